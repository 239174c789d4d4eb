"""Values as kube-apiserver stores them, made in Python: opened by `unseal`, counted by `audit`."""
import os
import re

import sealed
from plugin import KEK, OTHER, Case, fresh_kek, key_id, kms, run, text

ETCD_KEY = b'/registry/secrets/default/name'
OBJECT = b'k8s\0\n\x0c\n\x02v1\x12\x06Secret' + os.urandom(100)


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

    def test_raw_value(self):
        for name, value in self.values().items():
            for end in (b'', b'\n'):
                with self.subTest(name=name, end=end):
                    self.assert_opens(value + end, ETCD_KEY)

    def test_range_response(self):
        for name, value in self.values().items():
            with self.subTest(name=name):
                self.assert_opens(sealed.range_response((ETCD_KEY, value)))

    def test_value_that_ends_in_a_newline(self):
        """Its own last byte is not taken for etcdctl's."""
        value = b''
        while not value.endswith(b'\n'):
            value = sealed.etcd_v1(KEK, ETCD_KEY, OBJECT)
        self.assert_opens(value, ETCD_KEY)
        self.assert_opens(value + b'\n', ETCD_KEY)

    def test_more_than_a_newline_is_refused(self):
        for name, value in self.values().items():
            for end in (b'\n\n', b'\r\n', b' ', b'\0'):
                with self.subTest(name=name, end=end):
                    self.assert_fails(value + end, ETCD_KEY)
        self.assert_fails(sealed.range_response((ETCD_KEY, value + b'\n')))

    def test_sizes(self):
        for size in (0, 1, 16, 70000, 1 << 20):
            plaintext = os.urandom(size)
            for name, value in self.values(plaintext).items():
                with self.subTest(name=name, size=size):
                    self.assert_opens(value, ETCD_KEY, expected=plaintext)
                    self.assert_opens(sealed.range_response((ETCD_KEY, value)), expected=plaintext)

    def test_every_key_of_the_ring(self):
        for ring in (f'{text(KEK)},{text(OTHER)}', f'{text(OTHER)},{text(KEK)}'):
            for value in self.values().values():
                self.assert_opens(value, ETCD_KEY, kek=ring)

    def test_names_of_providers(self):
        for name in (b'a', b'kms-provider.example', b'n' * 300):
            for value in self.values().values():
                self.assert_opens(value.replace(b':name:', b':' + name + b':', 1), ETCD_KEY)

    def test_missing_kek_is_named(self):
        for name, value in self.values().items():
            with self.subTest(name=name):
                self.assertIn(key_id(KEK), self.assert_fails(value, ETCD_KEY, kek=OTHER))
                entry = sealed.range_response((ETCD_KEY, value))
                self.assertIn(key_id(KEK), self.assert_fails(entry, kek=OTHER))

    def test_key_id_that_disagrees(self):
        for identity in (key_id(OTHER), 'x', key_id(KEK).upper() + 'A', key_id(KEK) + '\0'):
            value = sealed.etcd_v2(KEK, ETCD_KEY, OBJECT, identity=identity)
            for ring in (text(KEK), f'{text(KEK)},{text(OTHER)}'):
                with self.subTest(identity=identity):
                    self.assert_fails(value, ETCD_KEY, kek=ring)

    def test_wrong_etcd_key(self):
        for value in self.values().values():
            for other in (ETCD_KEY + b'2', ETCD_KEY[1:], b'x', b''):
                with self.subTest(other=other):
                    self.assert_fails(value, other)
            self.assert_fails(sealed.range_response((ETCD_KEY + b'2', value)))

    def test_wrong_api(self):
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

    def test_truncated(self):
        for name, value in self.values(b'object').items():
            for length in (0, 5, 14, 15, 20, 21, 22, 23, 50, 80, *range(100, len(value), 9),
                           len(value) - 1):
                with self.subTest(name=name, length=length):
                    self.assert_fails(value[:length], ETCD_KEY)

    def test_cbc_is_told(self):
        value = sealed.etcd_v1_cbc(KEK, OBJECT)
        self.assertIn('CBC', self.assert_fails(value, ETCD_KEY))
        self.assertIn('CBC', self.assert_fails(sealed.range_response((ETCD_KEY, value))))

    def test_values_of_others(self):
        for value in (OBJECT, b'{"kind":"Secret"}', b'k8s:enc:aescbc:v1:key1:' + os.urandom(64),
                      b'k8s:enc:kms:v3:name:x', b'k8s:enc:kms:v2:', b'k8s:enc:kms:v2:name',
                      b'k8s:enc:kms:v1:name:', b'k8s:enc:kms:v1:name:\xff\xff', b''):
            with self.subTest(value=value[:24]):
                self.assert_fails(value, ETCD_KEY)
                self.assert_fails(sealed.range_response((ETCD_KEY, value)))

    def test_not_one_entry(self):
        value = sealed.etcd_v2(KEK, ETCD_KEY, OBJECT)
        entry = (ETCD_KEY, value)
        for stdin in (sealed.range_response(), sealed.range_response(entry, entry), b'', value,
                      sealed.range_response(entry)[:-40], os.urandom(500)):
            with self.subTest(stdin=stdin[:24]):
                self.assert_fails(stdin)

    def test_no_key(self):
        self.assertIn('KMS_KEK', self.dies('unseal', ETCD_KEY))

    def test_a_full_disk_is_an_error(self):
        done = run('unseal', ETCD_KEY, kek=KEK, stdin=sealed.etcd_v2(KEK, ETCD_KEY, OBJECT),
                   wrapper=('sh', '-c', '"$0" "$@" >/dev/full'))
        self.assertEqual(done.returncode, 1)
        self.assertEqual(len(done.stderr.splitlines()), 1, done.stderr)


class Audit(Case):
    def assert_audit(self, code, entries, *args, kek=KEK, stdin=None):
        stdin = sealed.range_response(*entries) if stdin is None else stdin
        done = run('audit', *args, kek=kek, stdin=stdin)
        self.assertEqual(done.returncode, code, (done.stdout, done.stderr))
        self.assertEqual(len(done.stderr.splitlines()), code, done.stderr)
        return done.stdout.decode()

    def entries(self, count, kek=KEK):
        for i in range(count):
            name = b'/registry/secrets/default/%d' % i
            yield name, (sealed.etcd_v1 if i % 4 == 0 else sealed.etcd_v2)(kek, name, OBJECT)

    def test_all_well(self):
        shown = self.assert_audit(0, self.entries(20))
        self.assertRegex(shown, rf'(?m)^.*\bv2\b.*{key_id(KEK)}.*\b15\b')
        self.assertRegex(shown, rf'(?m)^.*\bv1\b.*{key_id(KEK)}.*\b5\b')
        self.assertEqual(self.assert_audit(0, self.entries(20), '--strict', '--list'), shown)

    def test_nothing_of_ours(self):
        for entries in ((), ((b'/a', b'plain'),), ((b'/a', b'k8s:enc:aescbc:v1:k:' + bytes(32)),)):
            self.assert_audit(1, entries)
        self.assert_audit(1, (), stdin=b'')

    def test_another_kek(self):
        """Readable or not, what the sealing KEK does not open needs another."""
        entries = [*self.entries(4), (b'/old', sealed.etcd_v2(OTHER, b'/old', OBJECT))]
        for ring in (text(KEK), f'{text(KEK)},{text(OTHER)}'):
            shown = self.assert_audit(1, entries, '--list', kek=ring)
            self.assertRegex(shown, rf'{key_id(OTHER)}.*\b1\b')
            self.assertIn('/old', shown)
            self.assertNotIn('/registry', shown)
        self.assert_audit(1, self.entries(4), kek=f'{text(OTHER)},{text(KEK)}')

    def test_what_does_not_open(self):
        good = dict(self.entries(2))
        for name, value in good.items():
            for bad in ({name: value[:-3] + b'???'}, {name: value[:30]}, {name + b'2': value}):
                shown = self.assert_audit(1, {**good, b'/a': list(good.values())[0], **bad}.items(),
                                          '--list')
                self.assertIn(list(bad)[0].decode(), shown)

    def test_plaintext_and_foreign(self):
        for value in (b'{}', OBJECT, b'k8s:enc:secretbox:v1:k:' + bytes(50)):
            entries = [*self.entries(3), (b'/beside', value)]
            self.assert_audit(0, entries)
            self.assertIn('/beside', self.assert_audit(0, entries, '--list'))
            self.assert_audit(1, entries, '--strict')

    def test_etcd_keys_are_escaped(self):
        entries = [*self.entries(1), (b'/a\nforged\x1b[31m\xff', b'plain')]
        shown = self.assert_audit(0, entries, '--list')
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

    def test_there_is_more(self):
        answer = kms.Etcd.RangeResponse(count=9, more=True)
        for name, value in self.entries(3):
            answer.kvs.add(key=name, value=value)
        self.assert_audit(1, (), stdin=answer.SerializeToString())

    def test_not_a_response(self):
        for stdin in (b'no protobuf', b'\xff' * 100, bytes(100), os.urandom(1000),
                      b'\x12\xff\xff\xff\xff\x0f'):
            self.assert_audit(1, (), stdin=stdin)

    def test_many_entries(self):
        """More than any buffer holds."""
        name, big = b'/big', os.urandom(1 << 20)
        entries = [*self.entries(2000), *[(name, sealed.etcd_v2(KEK, name, big))] * 8]
        found = re.findall(r'\d+', self.assert_audit(0, entries).replace(key_id(KEK), ''))
        self.assertLessEqual({'500', '1508'}, set(found))

    def test_many_keks(self):
        keks = [fresh_kek() for _ in range(16)]
        entries = [entry for kek in keks for entry in self.entries(4, kek)]
        shown = self.assert_audit(1, entries, kek=','.join(map(text, keks)))
        for kek in keks:
            self.assertIn(key_id(kek), shown)

    def test_a_full_disk_is_an_error(self):
        done = run('audit', kek=KEK, stdin=sealed.range_response(*self.entries(3)),
                   wrapper=('sh', '-c', '"$0" "$@" >/dev/full'))
        self.assertEqual((done.returncode, len(done.stderr.splitlines())), (1, 1), done.stderr)
