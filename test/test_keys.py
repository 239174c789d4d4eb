"""Where KEKs come from, which are refused, and the verbs genkey and keyid."""
import base64
import os
import re

from plugin import (KEK, OTHER, STRANGER, Case, as_user, fresh_dir, fresh_kek, key_id, needs_root,
                    public_binary, run, text)
from sealed import key_id_hash

PASSWORD = b'correct horse battery staple 123'
assert len(PASSWORD) == 32


def key_lines(*keks):
    return ''.join(f'{key_id(kek)} {key_id_hash(kek)}\n' for kek in keks).encode()


class KeyCase(Case):
    def assert_refused(self, kek=None, env=None, secrets=()):
        """Refused by serve and keyid alike, in one line without any eight characters of the key."""
        secrets = [s if isinstance(s, str) else text(s) for s in (secrets or [kek] if kek else secrets)]
        lines = [self.dies('keyid', kek=kek, env=env),
                 self.dies('serve', '--listen', f'unix://{fresh_dir()}/kms.sock', kek=kek, env=env)]
        for line in lines:
            for secret in secrets:
                for at in range(len(secret) - 7):
                    self.assertNotIn(secret[at:at + 8], line)
        return lines[0]

    def assert_told(self, kind, line):
        words = {'hex': '(?i)hexadecimal', 'url': 'URL-safe', 'ascii': 'ASCII|UTF-16|byte order mark'}
        self.assertEqual([name for name, word in words.items() if re.search(word, line)], [kind] if kind else [], line)


class Variable(KeyCase):
    def test_good(self):
        for ring, keks in ((text(KEK), (KEK,)), (text(KEK) + '\n', (KEK,)),
                           (f' \t{text(KEK)}\r\n', (KEK,)),
                           (f'{text(KEK)},{text(OTHER)}', (KEK, OTHER)),
                           (f'{text(OTHER)} ,\n {text(KEK)}\n', (OTHER, KEK))):
            with self.subTest(ring=ring):
                done = run('keyid', kek=ring)
                self.assertEqual((done.returncode, done.stderr), (0, ''))
                self.assertEqual(done.stdout, key_lines(*keks))

    def test_none(self):
        self.assertIn('KMS_KEK', self.assert_refused())

    def test_empty(self):
        for ring in ('', ' ', '\n', ',', ' , ', f'{text(KEK)},', f',{text(KEK)}', f'{text(KEK)},,{text(OTHER)}', f'{text(KEK)}, ,{text(OTHER)}'):
            with self.subTest(ring=ring):
                self.assert_refused(ring)

    def test_wrong_length(self):
        for length in (1, 16, 24, 30, 31, 33, 34, 48, 64, 1000):
            with self.subTest(length=length):
                self.assert_refused(text(os.urandom(length)))

    def test_bad_base64(self):
        good = text(KEK)
        for bad in (good[:-1], good + '=', '=' + good[1:], good[:20] + '!' + good[21:], good[:20] + '=' + good[21:],
                    good[:20] + '\n' + good[20:], good[:20] + ' ' + good[21:], '"' + good + '"',
                    good + ';' + text(OTHER), good + ' ' + text(OTHER), 'base64:' + good):
            with self.subTest(bad=bad):
                self.assert_told(None, self.assert_refused(bad))
        self.assert_refused(f'{text(OTHER)},{good[:-1]}')

    def test_what_is_told_apart(self):
        """Hexadecimal, URL-safe base64, and what is no ASCII text: each by its name, and nothing else by it."""
        plain = next(k for k in iter(fresh_kek, None) if not set(text(k)) & set('+/'))
        odd = next(k for k in iter(fresh_kek, None) if '+' in text(k) and '/' in text(k))
        safe, good = base64.urlsafe_b64encode(odd).decode(), text(plain)
        for kind, ring in (('hex', odd.hex()), ('hex', odd.hex().upper()), ('hex', f'{text(OTHER)},{odd.hex()}'),
                           ('url', safe), ('url', safe.rstrip('=')),
                           ('ascii', good[:20] + '\u00e9' + good[21:]), ('ascii', '\ufeff' + good), ('ascii', good + '\u00a0'),
                           ('ascii', good[:-1] + '\uff1d'), (None, good[:42]), (None, good[:43]), (None, good[:-2]), (None, odd.hex()[:62])):
            with self.subTest(kind=kind, ring=ring):
                self.assert_told(kind, self.assert_refused(ring, secrets=[plain.hex(), odd.hex(), plain, odd, safe]))

    def test_repeated(self):
        self.assert_refused(f'{text(KEK)},{text(KEK)}')
        self.assert_refused(f'{text(KEK)},{text(OTHER)}, {text(KEK)}')

    def test_not_random(self):
        for kek in (bytes(32), b'\xff' * 32, b'A' * 32, PASSWORD, b'0123456789abcdef' * 2,
                    b' ' * 31 + b'~'):
            with self.subTest(kek=kek):
                self.assert_refused(text(kek), secrets=[kek, kek.decode('latin-1')])
                self.assert_refused(f'{text(OTHER)},{text(kek)}')

    def test_one_byte_away_from_a_password(self):
        """Random keys are not refused by mistake."""
        for kek in (PASSWORD[:-1] + b'\x7f', b'\n' + PASSWORD[1:], bytes(31) + b'\1'):
            self.assertEqual(run('keyid', kek=kek).stdout, key_lines(kek))

    def test_at_most_16(self):
        keks = [fresh_kek() for _ in range(17)]
        done = run('keyid', kek=','.join(map(text, keks[:16])))
        self.assertEqual(done.stdout, key_lines(*keks[:16]))
        self.assertIn('key 17 ', self.assert_refused(','.join(map(text, keks))))

    def test_at_most_4096_octets(self):
        """The same in the variable and in the file."""
        path = os.path.join(fresh_dir(), 'kek')
        for length in (4096, 4097, 100000):
            ring = text(KEK) + ' ' * (length - 44)
            with open(path, 'w', encoding='ascii', opener=private) as file:
                file.write(ring)
            for kek, env in ((ring, None), (None, {'KMS_KEK_FILE': path})):
                with self.subTest(length=length, env=env):
                    if length == 4096:
                        self.assertEqual(run('keyid', kek=kek, env=env).stdout, key_lines(KEK))
                    else:
                        self.assertRegex(self.assert_refused(kek, env, secrets=[KEK]), '4,?096')

    def test_both_sources(self):
        path = os.path.join(fresh_dir(), 'kek')
        with open(path, 'w', encoding='ascii', opener=private) as file:
            file.write(text(OTHER))
        self.assert_refused(text(KEK), env={'KMS_KEK_FILE': path}, secrets=[KEK, OTHER])
        self.assert_refused(text(OTHER), env={'KMS_KEK_FILE': path}, secrets=[OTHER])


def private(path, flags):
    return os.open(path, flags, 0o600)


class File(KeyCase):
    def setUp(self):
        self.path = os.path.join(fresh_dir(), 'kek')
        self.env = {'KMS_KEK_FILE': self.path}
        self.write(text(KEK) + '\n')

    def write(self, content):
        with open(self.path, 'wb', opener=private) as file:
            file.write(content if isinstance(content, bytes) else content.encode())

    def assert_read(self, *keks):
        done = run('keyid', env=self.env)
        self.assertEqual((done.returncode, done.stderr), (0, ''))
        self.assertEqual(done.stdout, key_lines(*keks))

    def test_good(self):
        self.assert_read(KEK)
        server = self.start(kek=None, env=self.env)
        self.assertEqual(self.client(server).status().key_id, key_id(KEK))
        self.write(f'{text(OTHER)},\n{text(KEK)}\n')
        self.assert_read(OTHER, KEK)

    def test_good_modes(self):
        for mode in (0o400, 0o600, 0o440, 0o640, 0o700):
            os.chmod(self.path, mode)
            with self.subTest(mode=oct(mode)):
                self.assert_read(KEK)

    def test_bad_modes(self):
        for mode in (0o604, 0o602, 0o601, 0o644, 0o606, 0o620, 0o660, 0o777):
            os.chmod(self.path, mode)
            with self.subTest(mode=oct(mode)):
                self.assertIn(self.path, self.assert_refused(env=self.env, secrets=[KEK]))

    def test_symlink(self):
        """As Kubernetes mounts a Secret."""
        link = os.path.join(fresh_dir(), 'link')
        os.symlink(self.path, link)
        self.env['KMS_KEK_FILE'] = link
        self.assert_read(KEK)
        os.chmod(self.path, 0o644)
        self.assert_refused(env=self.env)

    @needs_root
    def test_owner(self):
        """Root's or our own user's: who else owns it could change it under us."""
        for uid, reader, good in ((0, 0, True), (STRANGER, 0, False), (STRANGER, STRANGER, True), (0, STRANGER, True),
                                  (STRANGER + 1, STRANGER, False)):
            with self.subTest(uid=uid, reader=reader):
                os.chown(self.path, uid, STRANGER)
                os.chmod(self.path, 0o640)
                done = run('keyid', kek=None, env=self.env, wrapper=as_user(reader), binary=public_binary())
                self.assertEqual(done.returncode, 0 if good else 1, done.stderr)
                if not good:
                    self.assertIn(f'belongs to uid {uid}', done.stderr)
                    self.assertEqual(done.stdout, b'')

    def test_not_a_file(self):
        fifo = os.path.join(fresh_dir(), 'fifo')
        os.mkfifo(fifo, 0o600)
        directory = fresh_dir()
        os.chmod(directory, 0o700)
        for path in (fifo, directory, '/dev/null', self.path + '.missing', self.path + '/x', ''):
            with self.subTest(path=path):
                self.assert_refused(env={'KMS_KEK_FILE': path})

    def test_bad_content(self):
        for content in ('', '\n', text(KEK)[:-2], text(KEK) + '\n' + text(OTHER), text(bytes(32)),
                        '# a key\n' + text(KEK), 'A' * 4096, text(KEK) + '\0' + text(OTHER)):
            with self.subTest(content=content[:60]):
                self.write(content)
                self.assert_refused(env=self.env, secrets=[KEK, OTHER])

    def test_no_ascii_text(self):
        """As an editor or PowerShell saves it, and the key's own bytes."""
        for content in (text(KEK).encode('utf-16'), text(KEK).encode('utf-16-be'), b'\xef\xbb\xbf' + text(KEK).encode(),
                        text(KEK).encode()[:-1] + b'\x80', b'\x80' + KEK):
            with self.subTest(content=content[:8]):
                self.write(content)
                self.assert_told('ascii', self.assert_refused(env=self.env, secrets=[KEK]))

    @needs_root
    def test_unreadable(self):
        line = self.dies('keyid', env=self.env, binary=public_binary(), wrapper=as_user(STRANGER))
        self.assertIn(self.path, line)


class Genkey(Case):
    def test_genkey(self):
        made = [run('genkey') for _ in range(5)]
        for done in made:
            self.assertEqual((done.returncode, done.stderr), (0, ''))
            self.assertRegex(done.stdout, rb'\A[A-Za-z0-9+/]{43}=\n\Z')
        self.assertEqual(len({done.stdout for done in made}), 5)
        kek = base64.b64decode(made[0].stdout)
        self.assertEqual(run('keyid', kek=made[0].stdout.decode()).stdout, key_lines(kek))

    def test_needs_no_key(self):
        self.assertEqual(run('genkey', kek='nonsense').returncode, 0)

    def test_a_full_disk_is_an_error(self):
        """A key that nobody got must not look like one."""
        done = run('genkey', wrapper=('sh', '-c', '"$0" "$@" >/dev/full'))
        self.assertEqual(done.returncode, 1)
        self.assertEqual(len(done.stderr.splitlines()), 1, done.stderr)


class KeyId(Case):
    def test_known_answer(self):
        """By openssl: key_id must never change, and this not together with its twin in Python."""
        done = run('keyid', kek=bytes(range(128, 160)))
        self.assertEqual(done.stdout[:32], b'9fcbff2fc670c72fdff707decdd1d203')
