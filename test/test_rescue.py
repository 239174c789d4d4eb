"""Values as kube-apiserver stores them, made in Python: opened by `unseal`, counted by `audit`.

    test_rescue.py      prints the table of inputs and what is said of each
"""
import base64
import gzip
import json
import os
import re
import resource
import sqlite3
import stat
import sys

import sealed
from plugin import KEK, OTHER, ROOT, SANITIZED, Case, fresh_dir, fresh_kek, key_id, kms, run, text

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
            for end in (b'\n\n', b'\r\n\r\n', b'\r', b' ', b'\0'):
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


def terminal(octets):
    """What a terminal, or `kubectl exec -t`, makes of it."""
    return octets.replace(b'\n', b'\r\n')


def with_newline(make):
    """A value with at least one octet that a terminal changes."""
    while True:
        value = make(KEK, ETCD_KEY, OBJECT)
        if b'\n' in value[:-1] and b'\r\n' not in value:
            return value


V1, V2 = with_newline(sealed.etcd_v1), with_newline(sealed.etcd_v2)
OBJECT_V2 = V2[len('k8s:enc:kms:v2:name:'):]
ONE = sealed.range_response((ETCD_KEY, V2))
OTHERS = (b'/registry/secrets/default/name2', sealed.etcd_v2(KEK, b'/registry/secrets/default/name2', OBJECT))
TWO = sealed.range_response((ETCD_KEY, V2), OTHERS)
JSON = json.dumps({'header': {'revision': 7}, 'kvs': [
    {'key': base64.b64encode(ETCD_KEY).decode(), 'value': base64.b64encode(V2).decode()}]}).encode()
BARE = kms.Etcd.KeyValue(key=ETCD_KEY, value=V2, create_revision=3).SerializeToString()
COUNTED = b'\x0a\x02\x08\x01\x20\x05'
SNAPSHOT = bytes(8) + b'\x04\0\0\0\0\0\0\0' + bytes.fromhex('edda0ced02000000') + bytes(400)
DUMP = b'00000000: 6b38 733a 656e 633a 6b6d 733a 7632 3a6e  k8s:enc:kms:v2:n\n'
K = ETCD_KEY.decode()
RANDOM = b'\xa7\x01' + os.urandom(200).replace(b'k8s:', b'')

READS = ': audit reads what etcdctl get --prefix ... -w protobuf prints'
LOST = 'the value went through a program that took it for text: octets are lost, fetch it anew'
BASE64 = 'is base64: decode it first (base64 -d)'
HEX = 'is hexadecimal: decode it first (xxd -r -p)'
FAILED = 'is an error message: what should have written a value has failed'
YAML = 'is YAML of kubectl: an object that is readable, not what etcd holds'
PLAIN = 'is not encrypted: it is the object itself'
NOT_CBC = ('does not open: it is damaged, of another etcd key, or AES-CBC (Kubernetes up to 1.24), which carries no '
           'tag and is not opened')
NOT_KEY = 'does not open: it is damaged, or of another etcd key'
NOT_OURS = 'has a data key that kmsplugin did not seal, or is damaged or cut short'
CAME = 'came through a terminal: each \\r\\n is taken for the newline that it was'
TAKEN = 'standard input is a RangeResponse: its entry of this etcd key is taken'
LINE = "standard input has an etcd key on its first line: the value is taken for that key's"

# Inputs that are the same to unseal, with an etcd key and without, and to audit: name, octets, what standard input ...
ANYWHERE = (
    ('nothing', b'', 'is empty: has what should have written a value failed?'),
    ('a newline', b'\n', 'is white space alone: does the etcd key exist?'),
    ('white space', b' \r\n\t\n', 'is white space alone: does the etcd key exist?'),
    ('base64 of a value', base64.b64encode(V2) + b'\n', BASE64),
    ('the same in lines', base64.encodebytes(V2), BASE64),
    ('base64 of a RangeResponse', base64.b64encode(ONE), BASE64),
    ('base64 of an object', base64.b64encode(OBJECT), BASE64),
    ('URL-safe base64', base64.urlsafe_b64encode(V2), BASE64),
    ('a KEK', base64.b64encode(KEK) + b'\n', 'looks like a KEK, not like a value: a KEK goes into KMS_KEK_FILE'),
    ('a quoted string of JSON', b'"' + base64.b64encode(V2) + b'"\n',
     'is a string in quotes: write it raw (jq -r), then decode it (base64 -d)'),
    ('hexadecimal', V2.hex().encode(), HEX),
    ('hexadecimal of SQLite', V2.hex().upper().encode() + b'\n', HEX),
    ('hexadecimal in groups', V2.hex(' ').encode(), HEX),
    ('hexadecimal with 0x', b'0x' + V2.hex().encode(), 'is hexadecimal: decode it first, without its 0x (xxd -r -p)'),
    ('quote() of SQLite', b"X'" + V2.hex().encode() + b"'",
     'is hexadecimal of SQL: take what is between the quotes (xxd -r -p)'),
    ('bytea of PostgreSQL', b'\\x' + V2.hex().encode(),
     "is hexadecimal with \\x: decode it first (tr -d '\\\\x' | xxd -r -p)"),
    ('etcdctl --hex', ''.join(f'\\x{c:02x}' for c in ETCD_KEY).encode() + b'\n',
     "is hexadecimal with \\x: decode it first (tr -d '\\\\x' | xxd -r -p)"),
    ('xxd', DUMP, 'is a hex dump: undo it first (xxd -r)'),
    ('od', b'0000000 386b 3a73 6e65 3a63 6d6b 3a73 3276 6e3a\n', 'is a hex dump: undo it first (xxd -r)'),
    ('etcdctl -w json', JSON, 'is JSON of etcdctl: ask for -w protobuf in place of -w json'),
    ('the same through jq', json.dumps(json.loads(JSON), indent=2).encode(),
     'is JSON of etcdctl: ask for -w protobuf in place of -w json'),
    ('one of its kvs', json.dumps(json.loads(JSON)['kvs'][0]).encode(),
     'is JSON of etcdctl: ask for -w protobuf in place of -w json'),
    ('etcdctl -w fields', b'"ClusterID" : 14841639068965178418\n"Key" : "/registry"\n',
     'is text of etcdctl: ask for -w protobuf in place of -w fields'),
    ('null of jq', b'null\n', 'is the word null: jq has found nothing; does the etcd key exist?'),
    ('an error of etcdctl', b'{"level":"warn","ts":"2026-11-25T12:00:00Z","msg":"retrying"}\nError: x\n', FAILED),
    ('the line behind it', b'Error: context deadline exceeded\n', FAILED),
    ('an error of kubectl', b'Error from server (NotFound): pods "etcd-0" not found\n', FAILED),
    ('another of kubectl', b'error: unable to upgrade connection\n', FAILED),
    ('a third', b'Unable to connect to the server: EOF\n', FAILED),
    ('YAML of kubectl', b'apiVersion: v1\nkind: Secret\n', YAML),
    ('the same, sorted otherwise', b'kind: Secret\napiVersion: v1\n', YAML),
    ('gzip', gzip.compress(ONE), 'is compressed by gzip: decompress it first'),
    ('zstd', b'\x28\xb5\x2f\xfd\x24' + RANDOM, 'is compressed by zstd: decompress it first'),
    ('xz', b'\xfd7zXZ\0\0\x04' + RANDOM, 'is compressed by xz: decompress it first'),
    ('bzip2', b'BZh91AY&SY' + RANDOM, 'is compressed by bzip2: decompress it first'),
    ('zip', b'PK\3\4\x14\0' + RANDOM, 'is compressed by zip: decompress it first'),
    ('a snapshot of etcd', SNAPSHOT, 'is a snapshot or database of etcd: restore it first (etcdutl snapshot restore)'),
    ('a database of kine', b'SQLite format 3\0\x10\0' + RANDOM,
     'is a database of SQLite: have rangeresponse.sql read it (deploy/k3s)'),
    ('its write-ahead log', b'\x37\x7f\x06\x82' + RANDOM,
     'is the write-ahead log of SQLite: name the database beside it'),
    ('.dump of SQLite', b'PRAGMA foreign_keys=OFF;\n',
     'is SQL: give the database to sqlite3, with rangeresponse.sql (deploy/k3s)'),
    ('> of PowerShell', b'\xff\xfe' + V2.decode('latin-1').encode('utf-16-le'),
     "is UTF-16, as PowerShell's > writes it: its octets are lost, fetch it anew"),
    ('UTF-16, big endian', b'\xfe\xff\0k\0' + b'8', 'is UTF-16: its octets are lost, fetch it anew'),
    ('a byte order mark', b'\xef\xbb\xbf' + V2,
     'has a byte order mark: an editor has saved it, fetch it anew'),
    ('PEM', b'-----BEGIN CERTIFICATE-----\n', 'is PEM, a certificate or a key, and no value of etcd'),
    ('bytes of Python', repr(V2).replace('"', "'").encode(), 'is a literal of Python: write the octets themselves'),
    ('a KeyValue of bbolt', BARE,
     "is a KeyValue of etcd's database: take its value alone, and name its etcd key"),
    ('a value without its prefix', OBJECT_V2, 'is an EncryptedObject without its k8s:enc:kms:v2:NAME: in front'),
    ('a prompt before the value', b'$ ' + V2, 'has something in front of a value: cut that off, up to k8s:enc:'),
    ('etcdctl watch', b'PUT\n' + ETCD_KEY + b'\n' + V2,
     'has something in front of a value: cut that off, up to k8s:enc:'),
    ('keys alone', ETCD_KEY + b'\n' + ETCD_KEY + b'2\n', 'has an etcd key and no value: ask without --keys-only'),
    ('one key alone', ETCD_KEY + b'\n', 'has an etcd key and no value: ask without --keys-only'),
    ('a key before nonsense', ETCD_KEY + b'\nnonsense\n',
     'has an etcd key on its first line, and no value of Kubernetes behind it'),
    ('words', 'hello, w\u00f6rld\n'.encode(), 'is text, and no value of etcd'),
    ('random octets', RANDOM, 'is none of the forms that etcd has, or is damaged at its beginning'),
    ('a number alone', COUNTED, 'has the number of entries alone: ask without --count-only'),
)

# The verb's arguments, octets, exit status 0 or 1, and all that stands on stderr behind "kmsplugin: ".
ONLY = (
    ('unseal', 'plaintext', OBJECT, 1, f'unseal: standard input {PLAIN}'),
    (f'unseal {K}', 'plaintext', OBJECT, 1, f'unseal: standard input {PLAIN}'),
    (f'unseal {K}', 'JSON in plaintext', b'{"kind":"Secret"}', 1,
     'unseal: standard input is not encrypted: it is an object in JSON'),
    ('audit', 'plaintext', OBJECT, 1, f'audit: standard input {PLAIN}{READS}'),
    ('unseal', 'a key before plaintext', ETCD_KEY + b'\n' + OBJECT, 1, f'unseal: standard input {PLAIN}'),
    ('unseal', 'a raw value of v2', V2, 1, 'unseal: standard input is a value of KMS v2: name its etcd key, too'),
    ('unseal', 'a raw value of v1', V1, 1, 'unseal: standard input is a value of KMS v1: name its etcd key, too'),
    ('audit', 'a raw value', V2, 1, f'audit: standard input is a value of KMS v2{READS}'),
    ('audit', 'a key before a value', ETCD_KEY + b'\n' + V2 + b'\n', 1,
     f'audit: standard input has the etcd key on a line before the value{READS}'),
    (f'unseal {K}', 'a value of v2', V2, 0, ''),
    (f'unseal {K}', 'a value of v1', V1, 0, ''),
    (f'unseal {K}', 'with a newline', V2 + b'\n', 0, ''),
    (f'unseal {K}', 'v2 through a terminal', terminal(V2 + b'\n'), 0, f'unseal: the value {CAME}'),
    (f'unseal {K}', 'v1 through a terminal', terminal(V1 + b'\n'), 0, f'unseal: the value {CAME}'),
    (f'unseal {K}', 'the same and damaged', terminal(V2[:-1] + bytes([V2[-1] ^ 1])), 1,
     'unseal: the value is no EncryptedObject: it is damaged or cut short'),
    (f'unseal {K}', 'an octet turned', V2[:-1] + bytes([V2[-1] ^ 1]), 1,
     f'unseal: the value {NOT_KEY}'),
    (f'unseal {K}', 'an octet of v1 turned', V1[:-1] + bytes([V1[-1] ^ 1]), 1, f'unseal: the value {NOT_CBC}'),
    (f'unseal {K}', 'with U+FFFD', V2.decode('utf-8', 'replace').encode(), 1, f'unseal: {LOST}'),
    (f'unseal {K}', 'cut short', V2[:-1], 1, 'unseal: the value is no EncryptedObject: it is damaged or cut short'),
    (f'unseal {K}', 'cut in its head', V2[:60], 1,
     'unseal: the value is no EncryptedObject: it is damaged or cut short'),
    (f'unseal {K}', 'the prefix of v2 alone', b'k8s:enc:kms:v2:name', 1,
     'unseal: the value is no EncryptedObject: it is damaged or cut short'),
    (f'unseal {K}', 'the prefix of v1 alone', b'k8s:enc:kms:v1:name:', 1, f'unseal: the value {NOT_OURS}'),
    (f'unseal {K}', "another plugin's of v1", b'k8s:enc:kms:v1:name:\0\x04abcd' + bytes(40), 1,
     f'unseal: the value {NOT_OURS}'),
    (f'unseal {K}', "another plugin's of v2", sealed.etcd_v2(OTHER, ETCD_KEY, OBJECT, identity='projects/p'), 1,
     "unseal: the value was sealed by another KMS plugin: its keyID is none of kmsplugin's"),
    (f'unseal {K}', 'an unknown KEK', sealed.etcd_v2(OTHER, ETCD_KEY, OBJECT), 1,
     f'unseal: no KEK is configured with key_id {key_id(OTHER)}'),
    (f'unseal {K}', 'aescbc', b'k8s:enc:aescbc:v1:k:' + bytes(48), 1,
     'unseal: standard input is encrypted by another provider than KMS'),
    (f'unseal {K}', 'AES-CBC of v1', sealed.etcd_v1_cbc(KEK, OBJECT), 1, f'unseal: the value {NOT_CBC}'),
    (f'unseal {K}2', 'of another etcd key', V2, 1, f'unseal: the value {NOT_KEY}'),
    (f'unseal {K}', 'etcdctl get KEY', ETCD_KEY + b'\n' + V2 + b'\n', 0, f'unseal: {LINE}'),
    ('unseal', 'etcdctl get KEY', ETCD_KEY + b'\n' + V1 + b'\n', 0, f'unseal: {LINE}'),
    ('unseal', 'the same through a terminal', terminal(ETCD_KEY + b'\n' + V2 + b'\n'), 0,
     f'unseal: {LINE}\nkmsplugin: unseal: the value {CAME}'),
    (f'unseal {K}2', 'etcdctl get of another key', ETCD_KEY + b'\n' + V2 + b'\n', 1,
     'unseal: standard input has another etcd key on its first line than the one named'),
    (f'unseal {K}', 'a RangeResponse', ONE, 0, f'unseal: {TAKEN}'),
    (f'unseal {K}', 'a RangeResponse of two', TWO, 0, f'unseal: {TAKEN}'),
    (f'unseal {K}', 'a RangeResponse cut off', TWO[:-1], 1, 'unseal: standard input ends in the middle of a field'),
    (f'unseal {K}', 'a RangeResponse without its end', TWO[:-2], 1,
     'unseal: 2 of 0 entries: the response was cut off, or asked for with --limit'),
    (f'unseal {K}3', 'a RangeResponse of others', TWO, 1, 'unseal: standard input has no entry of this etcd key'),
    (f'unseal {K}', 'two of one key', sealed.range_response((ETCD_KEY, V2), (ETCD_KEY, V1)), 1,
     'unseal: standard input has several entries of this etcd key'),
    ('unseal', 'a RangeResponse', ONE, 0, ''),
    ('unseal', 'a RangeResponse of two', TWO, 1,
     'unseal: standard input has several entries: name one etcd key, or use --all, or audit'),
    ('unseal', 'a RangeResponse of none', sealed.range_response(), 1,
     'unseal: standard input has no entry: does the etcd key exist?'),
    ('unseal', 'a RangeResponse through a terminal', terminal(ONE), 0, f'unseal: standard input {CAME}'),
    ('unseal', 'an entry in base64', sealed.range_response((ETCD_KEY, base64.b64encode(V2))), 1,
     f'unseal: the value {BASE64}'),
    ('unseal', 'an entry in plaintext', sealed.range_response((ETCD_KEY, OBJECT)), 1, f'unseal: the value {PLAIN}'),
    ('audit', 'a RangeResponse', TWO, 0, ''),
    ('audit', 'a RangeResponse through a terminal', terminal(TWO), 0, f'audit: standard input {CAME}'),
    ('audit', 'a RangeResponse of none', sealed.range_response(), 1,
     'audit: standard input has no entry: does the prefix exist?'),
    ('audit', 'keys without values', sealed.range_response((ETCD_KEY, b''), (ETCD_KEY + b'2', b'')), 1,
     'audit: standard input has etcd keys without values: ask without --keys-only'),
    ('audit', 'two responses', TWO + ONE, 0, ''),
    ('audit', 'one that was cut off, and one', TWO[:-2] + ONE, 1,
     'audit: 2 of 0 entries: the response was cut off, or asked for with --limit'),
    ('audit', 'one in the middle of an entry', TWO[:-40], 1, 'audit: standard input ends in the middle of an entry'),
    ('audit', 'plaintext alone', sealed.range_response((ETCD_KEY, OBJECT)), 1,
     'audit: no value was sealed by kmsplugin'),
    ('audit', 'a value in base64', sealed.range_response((ETCD_KEY, base64.b64encode(V2)), OTHERS), 1,
     'audit: 0 values are not under the sealing KEK, 1 do not open: keep every KEK'),
    ('audit', 'a value of 4 MiB', sealed.range_response((b'/x', bytes(4 << 20))), 1,
     'audit: standard input has more than 4 MiB for one entry, which etcd does not'),
    (f'unseal {K}', 'a value of 4 MiB', V2 + bytes(4 << 20), 1,
     'unseal: standard input has more than 4 MiB for one value, which etcd does not'),
)


def inputs():
    for name, octets, what in ANYWHERE:
        for verb in (f'unseal {K}', 'unseal', 'audit'):
            yield verb, name, octets, 1, f'{verb.split()[0]}: standard input {what}'
    yield from ONLY


class Inputs(Case):
    def test_a_terminal_and_a_newline_in_the_fingerprint(self):
        """What came through a terminal then names a KEK that nobody has."""
        kek = next(k for k in iter(fresh_kek, None) if b'\n' in bytes.fromhex(key_id(k)))
        for make in (sealed.etcd_v1, sealed.etcd_v2):
            value = terminal(make(kek, ETCD_KEY, OBJECT) + b'\n')
            done = run('unseal', ETCD_KEY.decode(), kek=kek, stdin=value)
            self.assertEqual((done.returncode, done.stdout), (0, OBJECT), done.stderr)
            self.assertIn(CAME, done.stderr)

    def test_table(self):
        """What every input is called; nothing on stdout but an object whose tag was right."""
        self.assertGreater(len(ANYWHERE) + len(ONLY), 100)
        for verb, name, octets, code, said in inputs():
            with self.subTest(verb=verb, name=name):
                done = run(*verb.split(), kek=KEK, stdin=octets)
                self.assertEqual((done.stderr, done.returncode), (f'kmsplugin: {said}\n' if said else '', code))
                if verb.startswith('unseal'):
                    self.assertEqual(done.stdout, b'' if code else OBJECT)

    def test_names_with_colons(self):
        """KMS v1 allows them: only the tag tells where the name ends."""
        for name in (b'a:b', b':', b'arn:aws:kms:eu-west-1:111122223333:key/1234', b'n:' * 100):
            value = V1.replace(b':name:', b':' + name + b':', 1)
            self.assertEqual(run('unseal', K, kek=KEK, stdin=value).stdout, OBJECT)
            entry = sealed.range_response((ETCD_KEY, value))
            done = run('audit', '--strict', kek=KEK, stdin=entry)
            self.assertEqual((done.returncode, done.stderr), (0, ''))
            self.assertIn(key_id(KEK), self.dies('unseal', kek=OTHER, stdin=entry))

    def test_no_size_of_pieces_matters(self):
        """A terminal's \\r\\n may be cut between two reads."""
        answer = terminal(sealed.range_response((ETCD_KEY, V2), *[OTHERS] * 20))
        for size in (1, 2, 3, 61):
            done = run('audit', kek=KEK, wrapper=('sh', '-c', f'dd bs={size} status=none | "$0" "$@"'), stdin=answer[:6000])
            whole = run('audit', kek=KEK, stdin=answer[:6000])
            self.assertEqual((done.stdout, done.stderr), (whole.stdout, whole.stderr))


class All(Case):
    def setUp(self):
        self.top = fresh_dir()
        self.dir = os.path.join(self.top, 'objects')

    def unseal(self, *entries, code=0, stdin=None, kek=KEK):
        done = run('unseal', '--all', self.dir, kek=kek, stdin=stdin or sealed.range_response(*entries))
        self.assertEqual(done.returncode, code, done.stderr)
        return done

    def files(self):
        found = {}
        for path, folders, names in os.walk(self.top):
            for name in folders:
                self.assertEqual(stat.S_IMODE(os.lstat(os.path.join(path, name)).st_mode), 0o700)
            for name in names:
                full = os.path.join(path, name)
                self.assertEqual(stat.S_IMODE(os.lstat(full).st_mode), 0o600)
                with open(full, 'rb') as file:
                    found[os.path.relpath(full, self.dir)] = file.read()
        return found

    def entry(self, name, plaintext=OBJECT, kek=KEK):
        return name, sealed.etcd_v2(kek, name, plaintext)

    def test_all(self):
        names = [b'/registry/secrets/ns%d/name-%d' % (i % 7, i) for i in range(100)]
        done = self.unseal(*(self.entry(name, b'k8s\0' + name) for name in names))
        self.assertEqual((done.stdout, done.stderr), (b'written values=100\n', ''))
        self.assertEqual(self.files(), {name[1:].decode(): b'k8s\0' + name for name in names})

    def test_safe_names(self):
        """No etcd key leads out of the directory, and no two to one file."""
        names = {b'/../../etc/passwd': '%2e./%2e./etc/passwd', b'//x': '%/x', b'/a/': 'a/%', b'/a/./b': 'a/%2e/b',
                 b'/.ssh/x y': '%2essh/x%20y', b'/-rf': '%2drf', b'/a\0b\n\x1b': 'a%00b%0a%1b',
                 b'/clusterroles/system:a+b@c=d_e': 'clusterroles/system:a+b@c=d_e', b'/100%25': '100%2525',
                 '/\u00e4'.encode(): '%c3%a4', b'no-slash': 'no-slash', b'/x/' + b'n' * 255: 'x/' + 'n' * 255}
        self.unseal(*(self.entry(name, name) for name in names))
        self.assertEqual(self.files(), {path: name for name, path in names.items()})

    def test_what_gives_no_file_is_named(self):
        entries = [self.entry(b'/s/good'), self.entry(b'/s/lost', kek=OTHER), (b'/s/plain', OBJECT),
                   (b'/s/foreign', b'k8s:enc:aescbc:v1:k:' + bytes(40)), (b'/s/wrong', V2),
                   self.entry(b'/s/good/below'), self.entry(b'/s/good'), self.entry(b'/s/' + b'n' * 256),
                   (b'/s/forged\nline', OBJECT)]
        done = self.unseal(*entries, code=1)
        self.assertEqual(done.stdout, b'written values=1\n')
        self.assertEqual(self.files(), {'s/good': OBJECT})
        lines = done.stderr.splitlines()
        self.assertEqual(lines[:3], [f'kmsplugin: /s/lost needs the KEK with key_id {key_id(OTHER)}',
                                     f'kmsplugin: /s/plain {PLAIN}',
                                     'kmsplugin: /s/foreign is encrypted by another provider than KMS'])
        self.assertIn(r'/s/forged\x0aline', done.stderr)
        self.assertIn('/s/good cannot be written: File exists', done.stderr)
        self.assertIn('/s/good/below cannot be written: Not a directory', done.stderr)
        self.assertRegex(done.stderr, 'cannot be written: File ?name too long')
        self.assertEqual(lines[-1], 'kmsplugin: unseal: 8 of 9 values were not written')
        self.assertEqual(len(lines), 9)

    def test_nothing_is_overwritten(self):
        self.unseal(self.entry(b'/s/a', b'first'))
        done = self.unseal(self.entry(b'/s/a', b'second'), self.entry(b'/s/b', b'b'), code=1)
        self.assertEqual(done.stdout, b'written values=1\n')
        self.assertEqual(self.files(), {'s/a': b'first', 's/b': b'b'})

    def test_links_are_not_followed(self):
        """Somebody else's, in a directory that was not empty."""
        outside = fresh_dir()
        os.makedirs(self.dir + '/s')
        os.symlink(outside, self.dir + '/s/folder')
        os.symlink(outside + '/file', self.dir + '/s/file')
        self.unseal(self.entry(b'/s/folder/x'), self.entry(b'/s/file'), code=1)
        self.assertEqual(os.listdir(outside), [])

    def test_other_inputs(self):
        for stdin, said in ((b' ', 'white space'), (V2, 'a value of KMS v2: --all reads what'), (OBJECT, 'not encrypted'),
                            (sealed.range_response(), 'no entry'), (TWO[:-2], 'cut off')):
            with self.subTest(said=said):
                done = self.unseal(stdin=stdin, code=1)
                self.assertIn(said, done.stderr.splitlines()[-1])
        with open(self.top + '/file', 'w', encoding='ascii'):
            pass
        done = run('unseal', '--all', self.top + '/file', kek=KEK, stdin=TWO)
        self.assertEqual((done.returncode, done.stdout), (1, b''))

    def test_a_full_disk(self):
        """No half of an object stays."""
        os.mkdir(self.dir)
        size = 1 << 16

        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        done = run('unseal', '--all', self.dir, kek=KEK, preexec_fn=limit,
                   stdin=sealed.range_response(self.entry(b'/small', b's'), self.entry(b'/big', bytes(2 * size))),
                   wrapper=('env', '--ignore-signal=XFSZ'))
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertIn('/big cannot be written: File too large', done.stderr)
        self.assertEqual(os.listdir(self.dir), ['small'])


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
        self.assertIn('2 values are not under', self.dies_audit(self.query('history')))

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
            self.assertIn('no entry: does the prefix exist?', self.dies_audit(self.query(name)))
            self.assertIn('no entry: does the etcd key exist?', self.dies('unseal', K, kek=KEK, stdin=self.query(name)))


def varint(n):
    out = b''
    while n > 127:
        out += bytes([n & 127 | 128])
        n >>= 7
    return out + bytes([n])


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
        entries = [*self.entries(1), (b'/a\nforged\x1b[31m\xff', b'{}')]
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

    def test_more_key_ids_than_rows(self):
        """Anybody who writes to etcd can make up any number."""
        lost = [(b'/lost', sealed.etcd_v2(fresh_kek(), b'/lost', OBJECT)) for _ in range(300)]
        shown = self.assert_audit(1, [*lost, *self.entries(8)])
        counts = dict(re.findall(r'(?m)^(.*?) values=(\d+)', shown))
        self.assertEqual((counts[f'v2 key_id={key_id(KEK)}'], counts[f'v1 key_id={key_id(KEK)}']), ('6', '2'))
        self.assertEqual(sum(map(int, counts.values())), 308)
        self.assertLess(len(counts), 70)

    def test_memory(self):
        """Small unknown fields took 40 times their size once."""
        name = b'/a'
        value = sealed.etcd_v2(KEK, name, bytes(1 << 20)) + b'\x30\x01' * (1 << 20)
        entry = b'\x0a\2/a' + b'\x2a' + varint(len(value)) + value
        entry += b'\x30\1' * ((4 << 20) // 2 - len(entry) // 2)
        answer = b'\x12' + varint(len(entry)) + entry
        for args in (('audit',), ('unseal',)):
            before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
            done = run(*args, kek=KEK, stdin=answer, wrapper=() if SANITIZED else ('prlimit', f'--as={20 << 20}'))
            self.assertEqual(done.returncode, 0, (done.stderr, before))

    def test_a_full_disk_is_an_error(self):
        done = run('audit', kek=KEK, stdin=sealed.range_response(*self.entries(3)),
                   wrapper=('sh', '-c', '"$0" "$@" >/dev/full'))
        self.assertEqual((done.returncode, len(done.stderr.splitlines())), (1, 1), done.stderr)


if __name__ == '__main__':
    for made_verb, made_name, _, made_code, made_said in inputs():
        sys.stdout.write(f'| `{made_verb}` | {made_name} | {made_code} | {made_said} |\n')
