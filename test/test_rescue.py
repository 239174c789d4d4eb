"""Values as kube-apiserver stores them, made in Python: opened by `unseal`, counted by `audit`."""
import base64
import os
import re
import sqlite3

import sealed
from plugin import EMULATED, OTHER, ROOT, SANITIZED, Case, fresh_kek, key_id, kms, run, text

ETCD_KEY = b'/registry/secrets/default/name'
OBJECT = b'k8s\0\n\x0c\n\x02v1\x12\x06Secret' + os.urandom(100)
KEK = next(k for k in iter(fresh_kek, None) if not set(bytes.fromhex(key_id(k))) & {10, 13})     # no terminal changes its name
BOTH = f'{text(KEK)},{text(OTHER)}'


class Unseal(Case):
    def assert_opens(self, stdin, *args, kek=KEK, expected=OBJECT):
        done = run('unseal', *args, kek=kek, stdin=stdin)
        self.assertEqual((done.returncode, done.stderr), (0, ''))
        self.assertEqual(done.stdout, expected)

    def assert_fails(self, stdin, *args, kek=KEK):
        """Exit 1, one line, and nothing on stdout; gives the line."""
        return self.dies('unseal', *args, kek=kek, stdin=stdin)

    def values(self, plaintext=OBJECT, kek=KEK):
        return {'v1': sealed.etcd_v1(kek, ETCD_KEY, plaintext),
                'v2 seed': sealed.etcd_v2(kek, ETCD_KEY, plaintext),
                'v2 key': sealed.etcd_v2(kek, ETCD_KEY, plaintext, seeded=False)}

    def test_both_forms(self):
        """Raw, with etcdctl's newline and without, and a RangeResponse; under every key of a ring."""
        for name, value in self.values().items():
            with self.subTest(name=name):
                for ring in (BOTH, f'{text(OTHER)},{text(KEK)}'):
                    self.assert_opens(value, ETCD_KEY, kek=ring)
                    self.assert_opens(value + b'\n', ETCD_KEY, kek=ring)
                    self.assert_opens(sealed.range_response((ETCD_KEY, value)), kek=ring)
                for end in (b'\n\n', b'\r\n\r\n', b'\r', b' ', b'\0'):
                    self.assert_fails(value + end, ETCD_KEY)
                self.assert_fails(sealed.range_response((ETCD_KEY, value + b'\n')))

    def test_value_that_ends_in_a_newline(self):
        """Its own last byte is not taken for etcdctl's."""
        value = b''
        while not value.endswith(b'\n'):
            value = sealed.etcd_v1(KEK, ETCD_KEY, OBJECT)
        self.assert_opens(value, ETCD_KEY)
        self.assert_opens(value + b'\n', ETCD_KEY)

    def test_sizes(self):
        for size in (0, 1, 16, 70000, 1 << 20):
            plaintext = os.urandom(size)
            for name, value in self.values(plaintext).items():
                with self.subTest(name=name, size=size):
                    self.assert_opens(value, ETCD_KEY, expected=plaintext)
                    self.assert_opens(sealed.range_response((ETCD_KEY, value)), expected=plaintext)

    def test_names_of_providers(self):
        """KMS v1 allows colons in them: only the tag tells where the name ends."""
        for name in (b'a', b'kms-provider.example', b'n' * 300):
            for make in (sealed.etcd_v1, sealed.etcd_v2):
                self.assert_opens(make(KEK, ETCD_KEY, OBJECT, name=name), ETCD_KEY)
        for name in (b'a:b', b':', b'arn:aws:kms:eu-west-1:111122223333:key/1234', b'n:' * 100):
            value = sealed.etcd_v1(KEK, ETCD_KEY, OBJECT, name=name)
            self.assert_opens(value, ETCD_KEY)
            self.assertIn(key_id(KEK), self.assert_fails(value, ETCD_KEY, kek=OTHER))
            self.assert_fails(value[:-1] + bytes([value[-1] ^ 1]), ETCD_KEY)

    def test_missing_kek_is_named(self):
        for name, value in self.values().items():
            with self.subTest(name=name):
                self.assertIn(key_id(KEK), self.assert_fails(value, ETCD_KEY, kek=OTHER))
                entry = sealed.range_response((ETCD_KEY, value))
                self.assertIn(key_id(KEK), self.assert_fails(entry, kek=OTHER))

    def test_key_id_that_disagrees(self):
        for identity in (key_id(OTHER), 'x', key_id(KEK).upper() + 'A', key_id(KEK) + '\0'):
            value = sealed.etcd_v2(KEK, ETCD_KEY, OBJECT, identity=identity)
            for ring in (text(KEK), BOTH):
                with self.subTest(identity=identity):
                    self.assert_fails(value, ETCD_KEY, kek=ring)

    def test_wrong_etcd_key_or_api(self):
        for value in self.values().values():
            for other in (ETCD_KEY + b'2', ETCD_KEY[1:], b'x', b''):
                with self.subTest(other=other):
                    self.assert_fails(value, other)
            self.assert_fails(sealed.range_response((ETCD_KEY + b'2', value)))
        self.assert_fails(sealed.etcd_v2(KEK, ETCD_KEY, OBJECT, api=sealed.V1), ETCD_KEY)

    def test_every_third_byte_matters(self):
        """The provider's name apart, which nothing authenticates."""
        for name, value in self.values(b'object').items():
            for position in (*range(0, 14, 5), 14, 19, *range(20, len(value), 3), len(value) - 1):
                if not 15 <= position <= 18:
                    changed = bytearray(value)
                    changed[position] ^= 1
                    with self.subTest(name=name, position=position):
                        self.assert_fails(bytes(changed), ETCD_KEY)

    def test_cbc_is_told(self):
        value = sealed.etcd_v1_cbc(KEK, OBJECT)
        self.assertIn('CBC', self.assert_fails(value, ETCD_KEY))
        self.assertIn('CBC', self.assert_fails(sealed.range_response((ETCD_KEY, value))))

    def test_not_one_entry(self):
        value = sealed.etcd_v2(KEK, ETCD_KEY, OBJECT)
        entry = (ETCD_KEY, value)
        for stdin in (sealed.range_response(), sealed.range_response(entry, entry), b'', value,
                      sealed.range_response(entry)[:-40], os.urandom(500)):
            with self.subTest(stdin=stdin[:24]):
                self.assert_fails(stdin)

    def test_a_full_disk_is_an_error(self):
        for args, stdin in ((('unseal', K), V2), (('audit',), ONE)):
            done = run(*args, kek=KEK, stdin=stdin, wrapper=('sh', '-c', '"$0" "$@" >/dev/full'))
            self.assertEqual((done.returncode, len(done.stderr.splitlines())), (1, 1), done.stderr)


def terminal(octets):
    """What a terminal, or `kubectl exec -t`, makes of it."""
    return octets.replace(b'\n', b'\r\n')


def value_with(newline, make):
    """A value with an octet that a terminal changes, or without any."""
    while True:
        value = make(KEK, ETCD_KEY, OBJECT)
        if b'\r' not in value and (b'\n' in value[:-2]) == newline and not value.endswith(b'\n'):
            return value


def other_v2(identity, source):
    return b'k8s:enc:kms:v2:vault:' + kms.Etcd.EncryptedObject(
        encrypted_data=os.urandom(90), key_id=identity.encode(), encrypted_dek_source=source).SerializeToString()


V1, V2 = value_with(True, sealed.etcd_v1), value_with(True, sealed.etcd_v2)
ONE = sealed.range_response((ETCD_KEY, V2))
K = ETCD_KEY.decode()

# What is in etcd and not ours: plaintext in each encoding, others' values, others' keys.
PLAINTEXT = {
    'protobuf': OBJECT, 'JSON': b'{"kind":"Secret","apiVersion":"v1"}\n',
    'a custom resource in CBOR': b'\xd9\xd9\xf7\xa2\x44kind\x46Widget\x4aapiVersion\x42v1'}
FOREIGN = {
    'aescbc': b'k8s:enc:aescbc:v1:key1:' + os.urandom(64), 'secretbox': b'k8s:enc:secretbox:v1:k:' + os.urandom(80),
    'v1, a wrapped key that is text': sealed.stored_v1(b'vault:v1:' + base64.b64encode(os.urandom(60)), os.urandom(90)),
    'v1, one that begins with 0x01': sealed.stored_v1(b'\x01\x02\x02\x00x' + os.urandom(179), os.urandom(90)),
    'v1, its name with colons': sealed.stored_v1(b'\x01\x02\x02\x00x' + os.urandom(179), os.urandom(90), name=b'arn:aws:kms:a:1:key/2'),
    'v1, a short one': sealed.stored_v1(b'\0' + os.urandom(30), os.urandom(90)),
    'v2, a resource name': other_v2('projects/p/locations/l/keyRings/r/cryptoKeys/k', os.urandom(113)),
    'v2, ours in its shape': other_v2('arn:aws:kms:eu-west-1:111122223333:key/1234', b'\x01' + os.urandom(88)),
    'v2, a newline at its end': other_v2('arn:aws:kms:eu-west-1:111122223333:key/1234', os.urandom(88) + b'\n'),
    'v2, a hash': other_v2(os.urandom(32).hex(), b'vault:v1:' + base64.b64encode(os.urandom(60)))}
STRANGE = {'nothing': b'', 'text': b'10.0.0.7:2379', 'another tenant\'s': b'\x08\x96\x01\x12\x07tenant-b', 'octets': b'\0\xff' * 20}

# The kinds of wrong input, each by a word that its sentence has and no other kind's has.
KINDS = {'empty': 'empty|nothing|white space', 'plain': 'not encrypted|plaintext', 'other': 'another|did not seal',
         'terminal': 'terminal', 'text': r'\btext\b|hexadecimal|base64', 'unknown': 'none of the forms'}


class Inputs(Case):
    def assert_told(self, kind, word, stdin, *args):
        line = self.dies(*args, kek=KEK, stdin=stdin)
        self.assertRegex(line, f'(?i){KINDS[kind]}')
        self.assertRegex(line, f'(?i){word}')
        told = {name for name, pattern in KINDS.items() if re.search(pattern, line)}
        self.assertLessEqual(told, {kind} | ({'text'} if kind == 'text' else set()), line)

    def test_told_in_every_form(self):
        """Alone, with an etcd key and without."""
        for kind, word, stdin in (
                ('empty', '', b''), ('empty', '', b'\n'), ('plain', '', OBJECT), ('plain', '', PLAINTEXT['JSON']),
                ('plain', '', PLAINTEXT['a custom resource in CBOR']), ('other', '', FOREIGN['aescbc']),
                ('text', 'base64', base64.b64encode(V2) + b'\n'), ('text', 'base64', base64.encodebytes(ONE)),
                ('text', 'hexadecimal', V2.hex().encode()), ('text', 'hexadecimal', ONE.hex().upper().encode() + b'\n'),
                ('text', 'text', b'Error: context deadline exceeded\n'), ('text', 'text', b'hello, world'),
                ('unknown', '', b'\xa7\x02' + os.urandom(200).replace(b'\r\n', b'..'))):
            for args in (('unseal', K), ('unseal',)):
                with self.subTest(stdin=stdin[:20], args=args):
                    self.assert_told(kind, word, stdin, *args)
            with self.subTest(stdin=stdin[:20], args='audit'):
                self.dies('audit', kek=KEK, stdin=stdin)

    def test_told_of_a_value(self):
        """With its etcd key, and in a RangeResponse, where the value is what is told of."""
        for kind, values in (('plain', PLAINTEXT), ('other', FOREIGN)):
            for name, value in values.items():
                with self.subTest(name=name):
                    self.assert_told(kind, '', value, 'unseal', K)
                    self.assert_told(kind, '', value + b'\n', 'unseal', K)
                    self.assert_told(kind, '', sealed.range_response((ETCD_KEY, value)), 'unseal')

    def test_a_terminal_is_told(self):
        """Whatever it did to a value or a response: the remedy is to fetch it again, without -t."""
        kek = next(k for k in iter(fresh_kek, None) if b'\n' in bytes.fromhex(key_id(k)))
        for name, value in (('v1', V1), ('v2', V2), ('final newline', V2 + b'\n'),
                            ('none but the final one', value_with(False, sealed.etcd_v1) + b'\n')):
            with self.subTest(name=name):
                self.assert_told('terminal', r'\br\\n|-t\b', terminal(value), 'unseal', K)
        for make in (sealed.etcd_v1, sealed.etcd_v2):
            self.assertIn('terminal', self.dies('unseal', K, kek=kek, stdin=terminal(make(kek, ETCD_KEY, OBJECT))))
        for args in (('unseal',), ('audit',)):
            self.assert_told('terminal', '', terminal(ONE), *args)

    def test_no_terminal_is_told_where_there_was_none(self):
        for value in (V1, V2, value_with(False, sealed.etcd_v1)):
            damaged = value[:-1] + bytes([value[-1] == 0])      # never \r, which would make \r\n of a newline behind it
            self.assertNotIn('terminal', self.dies('unseal', K, kek=KEK, stdin=damaged))
            self.assertNotIn('terminal', self.dies('unseal', K, kek=KEK, stdin=damaged + b'\n'))
            self.assertNotIn('terminal', self.dies('unseal', K, kek=OTHER, stdin=value))

    def test_the_other_form(self):
        """A value without its etcd key, a response with one, JSON for protobuf: what to do is said."""
        for value in (V1, V2):
            self.assertRegex(self.dies('unseal', kek=KEK, stdin=value), '(?i)etcd.key')
        self.assertRegex(self.dies('unseal', K, kek=KEK, stdin=ONE), 'RangeResponse|etcd key')
        for key in ((), (K,)):
            self.assertIn('is JSON of etcdctl', self.dies('unseal', *key, kek=KEK, stdin=b'{"header":{"revision":7},"kvs":[]}'))

    def test_values_that_are_cut(self):
        for value in (b'k8s:enc:kms:v3:name:x', b'k8s:enc:kms:v2:', b'k8s:enc:kms:v2:name', b'k8s:enc:kms:v1:name:',
                      b'k8s:enc:kms:v1:name:\xff\xff', V1[:60], V2[:-1]):
            with self.subTest(value=value[:24]):
                for line in (self.dies('unseal', K, kek=KEK, stdin=value),
                             self.dies('unseal', kek=KEK, stdin=sealed.range_response((ETCD_KEY, value)))):
                    self.assertNotRegex(line, f'(?i){KINDS["plain"]}|{KINDS["terminal"]}|{KINDS["text"]}|{KINDS["unknown"]}')

    def test_more_than_a_value_can_have(self):
        self.assertRegex(self.dies('audit', kek=KEK, stdin=sealed.range_response((b'/x', bytes(4 << 20)))), '4 MiB|too l|larger|longer')
        self.assertRegex(self.dies('unseal', K, kek=KEK, stdin=V2 + bytes(4 << 20)), '4 MiB|too l|larger|longer')


class Kine(Case):
    """What the query files print of kine's table; test/deploy and test/kube have sqlite3 itself read them."""
    def setUp(self):
        self.database = sqlite3.connect(':memory:')
        self.addCleanup(self.database.close)
        self.database.execute(
            'CREATE TABLE kine (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT, created INTEGER, deleted INTEGER, '
            'create_revision INTEGER, prev_revision INTEGER, lease INTEGER, value BLOB, old_value BLOB)')
        self.row(b'compact_rev_key', b'')
        self.row(b'gap-3', None)

    def row(self, name, value, old=None, deleted=0):
        self.database.execute('INSERT INTO kine (name, created, deleted, value, old_value) VALUES (?, 1, ?, ?, ?)',
                              (name.decode(), deleted, value, old))

    def query(self, name, prefix=None):
        with open(f'{ROOT}/deploy/k3s/{name}.sql', encoding='ascii') as file:
            text_of = ''.join(line for line in file if not line.startswith('.'))
        self.database.isolation_level = None
        printed = []
        for statement in re.sub('(?m)--.*$', '', text_of).split(';'):
            bound = {'prefix': prefix} if ':prefix' in statement else {}
            printed += [line for line, in self.database.execute(statement, bound)]
        self.database.execute('DROP VIEW entry')
        self.database.execute('DROP TABLE wanted')
        return bytes.fromhex(''.join(printed))

    def entries(self, answer):
        """By Google's decoder, which also wants the message to be one."""
        answer = kms.Etcd.RangeResponse.FromString(answer)
        self.assertEqual(answer.count, len(answer.kvs))
        return [(kv.key, kv.value) for kv in answer.kvs]

    def test_newest_rows(self):
        name = b'/registry/secrets/a/'
        new, old = sealed.etcd_v2(KEK, name + b'1', OBJECT), sealed.etcd_v2(OTHER, name + b'1', OBJECT)
        self.row(name + b'1', old)
        self.row(name + b'2', OBJECT)
        self.row(name + b'1', new, old)
        self.row(name + b'2', OBJECT, OBJECT, deleted=1)
        self.row(b'/registry/secretsx', OBJECT)
        self.row(b'/registry/configmaps/a/1', OBJECT)
        answer = self.query('rangeresponse')
        self.assertEqual(self.entries(answer), [(name + b'1', new)])
        done = run('audit', '--strict', kek=KEK, stdin=answer)
        self.assertEqual((done.returncode, done.stderr), (0, ''))
        self.assertEqual(run('unseal', kek=KEK, stdin=answer).stderr, '')
        self.assertEqual(self.entries(self.query('rangeresponse', '/registry/configmaps/')),
                         [(b'/registry/configmaps/a/1', OBJECT)])
        self.assertEqual(sorted(self.entries(self.query('history'))),
                         sorted([(name + b'1', old), (name + b'1', old), (name + b'1', new), *[(name + b'2', OBJECT)] * 3]))
        self.assertIn(key_id(OTHER), run('audit', kek=KEK, stdin=self.query('history')).stdout.decode())

    def dies_audit(self, stdin):
        done = run('audit', kek=KEK, stdin=stdin)
        self.assertEqual(done.returncode, 1)
        return done.stderr

    def test_sizes(self):
        """Where a length takes another byte, and names that are not ASCII."""
        sizes = (0, 1, 127, 128, 16383, 16384, 1 << 20, 2097151, 2097152)
        rows = [('/registry/secrets/\u00e4%d' % size, os.urandom(size)) for size in sizes]
        for name, value in rows:
            self.row(name.encode(), value)
        self.row(b'/registry/secrets/null', None)
        self.assertEqual(sorted(self.entries(self.query('rangeresponse'))),
                         sorted([(name.encode(), value) for name, value in rows] + [(b'/registry/secrets/null', b'')]))
        self.assertEqual(len(self.entries(self.query('history'))), len(sizes) - 1)

    def test_empty(self):
        for name in ('rangeresponse', 'history'):
            self.assertEqual(self.entries(self.query(name)), [])
            self.assertIn('no entry', self.dies_audit(self.query(name)))
            self.assertIn('no entry', self.dies('unseal', kek=KEK, stdin=self.query(name)))


def varint(n):
    out = b''
    while n > 127:
        out += bytes([n & 127 | 128])
        n >>= 7
    return out + bytes([n])


class Audit(Case):
    def assert_audit(self, code, entries, *args, kek=KEK, stdin=None):
        """The exit status, a line on stderr with 1, and one sentence about what was looked at; gives all of it."""
        stdin = sealed.range_response(*entries) if stdin is None else stdin
        done = run('audit', *args, kek=kek, stdin=stdin)
        self.assertEqual(done.returncode, code, (done.stdout, done.stderr))
        self.assertEqual(len(done.stderr.splitlines()), code, done.stderr)
        self.assertNotRegex(done.stderr, r'\b0 (values )?do not open')
        return done.stdout.decode() + done.stderr

    def entries(self, count, kek=KEK, name=b'name'):
        for i in range(count):
            etcd_key = b'/registry/secrets/default/%d' % i
            yield etcd_key, (sealed.etcd_v1 if i % 4 == 0 else sealed.etcd_v2)(kek, etcd_key, OBJECT, name=name)

    def assert_row(self, shown, count, *words):
        """One line has these words and this number of values."""
        rows = [line for line in shown.splitlines() if all(re.search(rf'(?<![\w-]){re.escape(word)}(?![\w-])', line) for word in words)]
        self.assertEqual([row for row in rows if re.search(rf'\bvalues={count}\b', row)], rows[:1], (words, shown))
        self.assertTrue(rows, (words, shown))

    def test_all_well(self):
        """Counted by API, provider's name and key_id."""
        entries = [*self.entries(20), (b'/z', sealed.etcd_v2(KEK, b'/z', OBJECT, name=b'second'))]
        shown = self.assert_audit(0, entries, kek=BOTH)
        self.assert_row(shown, 15, 'v2', 'name', key_id(KEK))
        self.assert_row(shown, 1, 'v2', 'second', key_id(KEK))
        self.assert_row(shown, 5, 'v1', 'name', key_id(KEK))
        self.assertEqual(self.assert_audit(0, entries, '--strict', '--list', kek=BOTH), shown)

    def test_what_was_looked_at(self):
        """A dump of one key, or of another prefix, does not pass for the whole."""
        for count in (1, 7):
            entries = list(self.entries(count))
            for code, more, ring in ((0, [], KEK), (0, [(b'/registry/zzz\n', b'x')], KEK), (1, [], OTHER)):
                whole = entries + more
                shown = self.assert_audit(code, whole, kek=ring)
                first, last = (name.replace(b'\n', b'').decode() for name in (whole[0][0], whole[-1][0]))
                line = [line for line in shown.splitlines() if first in line and last in line]
                self.assertEqual(len(line), 1, shown)
                self.assertRegex(line[0], rf'\b{len(whole)}\b')

    def test_nothing_of_ours(self):
        for entries in ((), ((b'/a', b'plain'),), ((b'/a', FOREIGN['aescbc']),)):
            self.assert_audit(1, entries)

    def test_another_kek(self):
        """Readable or not, what the sealing KEK does not open needs another."""
        entries = [*self.entries(4), (b'/old', sealed.etcd_v2(OTHER, b'/old', OBJECT)),
                   (b'/old1', sealed.etcd_v1(OTHER, b'/old1', OBJECT))]
        for ring in (text(KEK), BOTH):
            shown = self.assert_audit(1, entries, '--list', kek=ring)
            self.assert_row(shown, 3, 'v2', 'name', key_id(KEK))
            self.assertEqual(sum(map(int, re.findall(rf'{key_id(OTHER)}.*\bvalues=(\d+)', shown))), 2, shown)
            self.assertRegex(shown, '(?m)^(?=.* /old$)')
            self.assertNotRegex(shown, r'(?m)/registry/secrets/default/[0-9]+$')
        self.assertNotIn('not open', self.assert_audit(1, entries, kek=BOTH).splitlines()[-1])
        self.assert_audit(1, self.entries(4), kek=f'{text(OTHER)},{text(KEK)}')

    def test_what_is_damaged(self):
        """A value that is known for ours and does not open keeps every KEK."""
        good = dict(self.entries(2))
        for name, value in good.items():
            for bad in ({name: value[:-3] + b'???'}, {name + b'2': value}, {name: value[:-40]}):
                shown = self.assert_audit(1, {**good, b'/a': list(good.values())[0], **bad}.items(), '--list')
                self.assertIn(list(bad)[0].decode(), shown)
        for what in (sealed.etcd_v2(KEK, b'/b', OBJECT, identity=key_id(OTHER)), sealed.etcd_v2(KEK, b'/b', OBJECT, identity='g' + key_id(KEK)[1:]),
                     sealed.etcd_v1_cbc(KEK, OBJECT)):
            self.assert_audit(1, [*self.entries(3), (b'/b', what)])

    def test_what_is_not_ours_keeps_no_kek(self):
        """On a cluster with anything else beside, a KEK can be retired."""
        for name, value in {**PLAINTEXT, **FOREIGN, **STRANGE}.items():
            for key in (b'/registry/beside', b'compact_rev_key'):
                with self.subTest(name=name, key=key):
                    entries = [*self.entries(3), (key, value)]
                    self.assert_audit(0, entries)
                    self.assertIn(key.decode(), self.assert_audit(0, entries, '--list', kek=BOTH))
                    self.assert_audit(1, entries, '--strict')
                    self.assert_audit(1, [(key, value)])

    def test_what_is_not_ours_is_counted_by_kind(self):
        entries = [(b'/%d' % i, value) for i, value in enumerate([*PLAINTEXT.values(), *FOREIGN.values()])]
        shown = self.assert_audit(0, [*self.entries(8), *entries])
        counts = [int(n) for n in re.findall(r'\bvalues=(\d+)', shown)]
        self.assertEqual(sum(counts), 8 + len(entries), shown)
        self.assert_row(shown, len(PLAINTEXT), 'plaintext')

    def test_etcd_keys_are_escaped(self):
        shown = self.assert_audit(0, [*self.entries(1), (b'/a\nforged\x1b[31m\xff', b'{}')], '--list')
        self.assertNotRegex(shown, '[\x00-\x09\x0b-\x1f]|(?m:^forged)')

    def test_cut_off(self):
        """A pipe that broke, between two entries too, must not look like an etcd without the rest."""
        whole = sealed.range_response(*self.entries(10))
        self.assert_audit(0, (), stdin=whole)
        answer = kms.Etcd.RangeResponse.FromString(whole)
        answer.count = 0
        while answer.kvs:       # without the count, which comes last, and ever fewer entries
            self.assert_audit(1, (), stdin=answer.SerializeToString())
            del answer.kvs[-1]
        for end in (len(whole) - 1, len(whole) // 2, 20, 1):
            self.assert_audit(1, (), stdin=whole[:end])
        answer = kms.Etcd.RangeResponse(count=9, more=True)
        for name, value in self.entries(3):
            answer.kvs.add(key=name, value=value)
        self.assert_audit(1, (), stdin=answer.SerializeToString())

    def test_not_a_response(self):
        for stdin in (b'no protobuf', b'\xff' * 100, bytes(100), os.urandom(1000), b'\x12\xff\xff\xff\xff\x0f'):
            self.assert_audit(1, (), stdin=stdin)

    def test_many_entries(self):
        """More than any buffer holds, and in pieces of any size."""
        name, big = b'/big', os.urandom(1 << 20)
        shown = self.assert_audit(0, [*self.entries(2000), *[(name, sealed.etcd_v2(KEK, name, big))] * 8])
        self.assert_row(shown, 500, 'v1', key_id(KEK))
        self.assert_row(shown, 1508, 'v2', key_id(KEK))
        answer = sealed.range_response(*self.entries(20))
        for size in (1, 3, 61):
            done = run('audit', kek=KEK, wrapper=('sh', '-c', f'dd bs={size} status=none | "$0" "$@"'), stdin=answer)
            self.assertEqual(done.stdout.decode(), self.assert_audit(0, (), stdin=answer))

    def test_many_keks(self):
        keks = [fresh_kek() for _ in range(16)]
        shown = self.assert_audit(1, [entry for kek in keks for entry in self.entries(4, kek)], kek=','.join(map(text, keks)))
        for kek in keks:
            self.assert_row(shown, 3, 'v2', key_id(kek))

    def test_more_names_than_rows(self):
        """Anybody who writes to etcd can make up any number of KEKs and of providers: none is lost from the sum."""
        made = [(b'/lost', sealed.etcd_v2(fresh_kek(), b'/lost', OBJECT)) for _ in range(300)]
        made += [(b'/n', sealed.etcd_v2(KEK, b'/n', OBJECT, name=b'n%d' % i)) for i in range(300)]
        shown = self.assert_audit(1, [*made, *self.entries(8)])
        counts = [int(n) for n in re.findall(r'\bvalues=(\d+)', shown)]
        self.assertEqual(sum(counts), 608, shown)
        self.assertLess(len(counts), 250)

    def test_memory(self):
        """Small unknown fields took 40 times their size once: such a value is opened, or refused."""
        value = sealed.etcd_v2(KEK, b'/a', bytes(1 << 20)) + b'\x30\x01' * (1 << 20)
        entry = b'\x0a\2/a' + b'\x2a' + varint(len(value)) + value
        entry += b'\x30\1' * ((4 << 20) // 2 - len(entry) // 2)
        answer = b'\x12' + varint(len(entry)) + entry + b'\x20\1'
        for verb in ('audit', 'unseal'):
            done = run(verb, kek=KEK, stdin=answer, wrapper=() if SANITIZED or EMULATED else ('prlimit', f'--as={20 << 20}'))
            self.assertIn(done.returncode, (0, 1))
            self.assertNotRegex(done.stderr, '(?i)memory')
