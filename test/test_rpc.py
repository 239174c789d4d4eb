"""The six methods: what they answer, what they refuse, the sealed form, and the ring of keys."""
import os

from cryptography.exceptions import InvalidTag

os.environ.setdefault('GRPC_VERBOSITY', 'NONE')
import grpc

import sealed
from plugin import KEK, OTHER, Case, ServerCase, fresh_kek, key_id, kms, text
from raw import DECRYPT, INVALID, NOT_FOUND, WAIT, field
from sealed import OVERHEAD, V1, V2

V2_PLAINTEXT_MAX = 1024 - OVERHEAD
# Version and cipher of the largest v1 Decrypt request, 65,536 bytes: 2 + 7 and 1 + 3 + n.
V1_PLAINTEXT_MAX = 65536 - 9 - 4 - OVERHEAD


class Reference(Case):
    """The Python side itself, by the vectors of the C2SP document."""

    def test_vectors(self):
        nonce = b'ABCDEFGHIJKLMNOPQRSTUVWX'
        for key, aad, expected in (
                (1, b'', 'ce546ef63c9cc60765923609b33a9a1974e96e52daf2fcf7075e2271'),
                (3, b'c2sp.org/XAES-256-GCM',
                 '986ec1832593df5443a179437fd083bf3fdb41abd740a21f71eb769d')):
            made = sealed.xaes_seal(bytes([key]) * 32, nonce, b'XAES-256-GCM', aad)
            self.assertEqual(made.hex(), expected)


class Calls(ServerCase):
    def test_status(self):
        for _ in range(3):
            answer = self.rpc.status()
            self.assertEqual((answer.version, answer.healthz, answer.key_id),
                             ('v2', 'ok', key_id(KEK)))

    def test_v2(self):
        answer = self.rpc.encrypt(b'a data key')
        self.assertEqual(answer.key_id, self.rpc.status().key_id)
        self.assertEqual(dict(answer.annotations), {})
        self.assertEqual(self.rpc.decrypt(answer.ciphertext, answer.key_id), b'a data key')

    def test_v1(self):
        answer = self.rpc.version()
        self.assertEqual((answer.version, answer.runtime_name), ('v1beta1', 'kmsplugin'))
        self.assertRegex(answer.runtime_version, r'\A\d+\.\d+\.\d+([-+][0-9A-Za-z.+-]+)?\Z')
        self.assertEqual(self.rpc.decrypt_v1(self.rpc.encrypt_v1(b'ping')), b'ping')

    def test_v1_version_mismatch(self):
        cipher = self.rpc.encrypt_v1(b'ping')
        for version in ('', 'v1', 'v2', 'v1beta2', 'V1beta1', 'V1BETA1', 'v1beta', 'v1beta1 ', 'v1beta11'):
            with self.subTest(version=version):
                self.fails(INVALID, self.rpc.version, version)
                self.fails(INVALID, self.rpc.encrypt_v1, b'ping', version)
                self.fails(INVALID, self.rpc.decrypt_v1, cipher, version)

    def test_v2_sizes(self):
        for size in (*range(70), *range(240, 272), 500, *range(955, V2_PLAINTEXT_MAX + 1)):
            plaintext = os.urandom(size)
            answer = self.rpc.encrypt(plaintext)
            self.assertEqual(len(answer.ciphertext), size + OVERHEAD)
            self.assertEqual(self.rpc.decrypt(answer.ciphertext, answer.key_id), plaintext)

    def test_v2_limit(self):
        self.assertEqual(len(self.rpc.encrypt(bytes(967)).ciphertext), 1024)
        for size in (968, 1024, 4096, 65000):
            self.fails(INVALID, self.rpc.encrypt, bytes(size))

    def test_v1_sizes(self):
        for size in (0, 1, 4, 32, 967, 968, 4096, 16384, 40000, V1_PLAINTEXT_MAX - 1):
            plain = os.urandom(size)
            cipher = self.rpc.encrypt_v1(plain)
            self.assertEqual(len(cipher), size + OVERHEAD)
            self.assertEqual(self.rpc.decrypt_v1(cipher), plain)

    def test_v1_limit(self):
        plain = os.urandom(V1_PLAINTEXT_MAX)
        cipher = self.rpc.encrypt_v1(plain)
        largest = kms.V1beta1.DecryptRequest(version='v1beta1', cipher=cipher)
        self.assertEqual(largest.ByteSize(), 65536)
        self.assertEqual(self.rpc.decrypt_v1(cipher), plain)
        for more in (1, 2, OVERHEAD):   # the last one: a request of 65,536 bytes
            self.fails(INVALID, self.rpc.encrypt_v1, bytes(V1_PLAINTEXT_MAX + more))

    def test_apis_do_not_mix(self):
        v1, v2 = self.rpc.encrypt_v1(b'x' * 32), self.rpc.encrypt(b'x' * 32)
        self.fails(INVALID, self.rpc.decrypt_v1, v2.ciphertext)
        self.fails(INVALID, self.rpc.decrypt, v1, v2.key_id)

    def test_unknown_fields_are_borne(self):
        """A later Kubernetes may send more."""
        answer = self.rpc.encrypt(b'x')
        later = kms.DecryptRequest.FromString(field(1, answer.ciphertext) + field(3, answer.key_id.encode()) +
                                              b'\x7a\x03new' + b'\x80\x01\x05')
        self.assertEqual(self.rpc.call(DECRYPT, later, kms.DecryptResponse).plaintext, b'x')


class Grpc(ServerCase):
    """The same through grpcio, which is not written by us."""

    def setUp(self):
        self.channel = grpc.insecure_channel(self.server.target)
        self.addCleanup(self.channel.close)

    def method(self, service, name, messages):
        return self.channel.unary_unary(f'/{service}.KeyManagementService/{name}',
                                        request_serializer=lambda message: message.SerializeToString(),
                                        response_deserializer=getattr(messages, name + 'Response').FromString)

    def test_every_method(self):
        v1 = kms.V1beta1
        status, encrypt, decrypt = (self.method('v2', name, kms) for name in ('Status', 'Encrypt', 'Decrypt'))
        self.assertEqual(status(kms.StatusRequest(), timeout=WAIT).healthz, 'ok')
        made = encrypt(kms.EncryptRequest(plaintext=b'seed', uid='u'), timeout=WAIT)
        asked = kms.DecryptRequest(ciphertext=made.ciphertext, key_id=made.key_id)
        self.assertEqual(decrypt(asked, timeout=WAIT).plaintext, b'seed')
        version, encrypt, decrypt = (self.method('v1beta1', name, v1) for name in ('Version', 'Encrypt', 'Decrypt'))
        self.assertEqual(version(v1.VersionRequest(version='v1beta1'), timeout=WAIT).version, 'v1beta1')
        made = encrypt(v1.EncryptRequest(version='v1beta1', plain=b'dek'), timeout=WAIT)
        asked = v1.DecryptRequest(version='v1beta1', cipher=made.cipher)
        self.assertEqual(decrypt(asked, timeout=WAIT).plain, b'dek')
        with self.assertRaises(grpc.RpcError) as caught:
            decrypt(v1.DecryptRequest(version='v1beta1', cipher=made.cipher[:-1] + b'?'), timeout=WAIT)
        self.assertEqual(caught.exception.code(), grpc.StatusCode.INVALID_ARGUMENT)

    def test_500_concurrent_calls(self):
        encrypt, decrypt = self.method('v2', 'Encrypt', kms), self.method('v2', 'Decrypt', kms)
        plaintexts = [os.urandom(32) for _ in range(500)]
        sealing = [encrypt.future(kms.EncryptRequest(plaintext=p, uid='many'), timeout=WAIT) for p in plaintexts]
        answers = [call.result() for call in sealing]
        opening = [decrypt.future(kms.DecryptRequest(ciphertext=a.ciphertext, key_id=a.key_id), timeout=WAIT)
                   for a in answers]
        self.assertEqual([call.result().plaintext for call in opening], plaintexts)


class SealedForm(ServerCase):
    def test_layout(self):
        answer = self.rpc.encrypt(b'p' * 32)
        self.assertEqual(len(answer.ciphertext), 32 + OVERHEAD)
        for ciphertext in (answer.ciphertext, self.rpc.encrypt_v1(b'p' * 32)):
            self.assertEqual(ciphertext[0], 1)
            self.assertEqual(ciphertext[1:17].hex(), key_id(KEK))
        self.assertEqual(answer.key_id, key_id(KEK))

    def test_nonces_differ(self):
        ciphertexts = [self.rpc.encrypt(b'same').ciphertext for _ in range(1000)]
        self.assertEqual(len({c[17:41] for c in ciphertexts}), 1000)
        self.assertEqual(len({c[41:45] for c in ciphertexts}), 1000)
        for position in range(17, 41):      # no byte of the nonce is constant
            self.assertGreater(len({c[position] for c in ciphertexts}), 100)

    def test_python_opens_what_the_server_seals(self):
        for size in (0, 1, 15, 16, 17, 32, 255, 967):
            plaintext = os.urandom(size)
            ciphertext = self.rpc.encrypt(plaintext).ciphertext
            self.assertEqual(sealed.unseal(KEK, ciphertext, V2), plaintext)
            with self.assertRaises(InvalidTag):
                sealed.unseal(KEK, ciphertext, V1)
        plain = os.urandom(50000)
        self.assertEqual(sealed.unseal(KEK, self.rpc.encrypt_v1(plain), V1), plain)

    def test_the_server_opens_what_python_seals(self):
        for size in (0, 1, 15, 16, 17, 32, 255, 967):
            plaintext = os.urandom(size)
            made = sealed.seal(KEK, plaintext, V2)
            self.assertEqual(self.rpc.decrypt(made, key_id(KEK)), plaintext)
            self.assertEqual(self.rpc.decrypt_v1(sealed.seal(KEK, plaintext, V1)), plaintext)

    def test_every_kek(self):
        """The doubling in the key derivation takes its carry with every other key."""
        keks = [fresh_kek() for _ in range(16)]
        server = self.start(kek=','.join(map(text, keks)))
        rpc = self.client(server)
        for kek in keks:
            self.assertEqual(rpc.decrypt(sealed.seal(kek, b'seed', V2), key_id(kek)), b'seed')

    def test_every_byte_and_length_matters(self):
        v2, v1 = self.rpc.encrypt(b's' * 32).ciphertext, self.rpc.encrypt_v1(b's' * 32)
        for at in range(len(v2)):
            for bit in (1, 0x80):
                def flip(c):
                    return c[:at] + bytes([c[at] ^ bit]) + c[at + 1:]
                self.fails(INVALID, self.rpc.decrypt, flip(v2), key_id(KEK))
                self.fails(NOT_FOUND if 1 <= at <= 16 else INVALID, self.rpc.decrypt_v1, flip(v1))
            self.fails(INVALID, self.rpc.decrypt, v2[:at], key_id(KEK))
            self.fails(INVALID, self.rpc.decrypt_v1, v1[:at])
        self.fails(INVALID, self.rpc.decrypt, v2 + b'\0', key_id(KEK))
        self.fails(INVALID, self.rpc.decrypt_v1, v1 + b'\0')


class DecryptChecks(ServerCase):
    def test_order(self):
        """Each check alone, then with what a later one would refuse: the same sentence, and another one for each check."""
        good, foreign = self.rpc.encrypt(b'seed').ciphertext, sealed.seal(OTHER, b'seed', V2)
        ours, others, note = key_id(KEK), key_id(OTHER), {'kmsplugin.example.com': b'1'}

        def forged(ciphertext):
            return ciphertext[:-1] + bytes([ciphertext[-1] ^ 1])

        def form(kek, number):
            return sealed.seal(kek, b'seed', V2, form=number)
        wrong_ids = ('', others, ours[:-1], ours + '0', 'A' + ours[1:])
        steps = (
            (INVALID, [(b'', ours), (good[:56], ours), (good[:56], 'no id', note), (foreign[:56], '', note)]),
            (INVALID, [asked for number in (0, 2, 255) for asked in (
                (form(KEK, number), ours), (form(KEK, number), 'no id', note), (form(OTHER, number), others))]),
            (INVALID, [(good, 'no id'), (good, 'no id', note), (foreign, 'no id', note), (foreign, ours),
                       *((good, wrong) for wrong in wrong_ids)]),
            (INVALID, [(good, ours, note), (good, ours, {'': b''}), (foreign, others, note), (forged(good), ours, note)]),
            (NOT_FOUND, [(foreign, others), (forged(foreign), others)]),
            (INVALID, [(forged(good), ours)]))
        whys = []
        for code, questions in steps:
            told = {self.fails(code, self.rpc.decrypt, *asked) for asked in questions}
            self.assertEqual(len(told), 1, told)
            whys += told
        self.assertEqual(len(set(whys)), 5, whys)     # length and format are one check
        self.assertIn(others, whys[4])

    def test_v1(self):
        why = self.fails(NOT_FOUND, self.rpc.decrypt_v1, sealed.seal(OTHER, b'seed', V1))
        self.assertIn(key_id(OTHER), why)
        for form in (0, 2, 255):
            self.fails(INVALID, self.rpc.decrypt_v1, sealed.seal(KEK, b'seed', V1, form=form))


class Rotation(Case):
    """old, then old,new, then new,old, then new: what seals and what opens at each step."""

    def test_rotation(self):
        old, new = fresh_kek(), fresh_kek()
        v2, v1 = {}, {}
        steps = ((text(old), old, (old,)), (f'{text(old)},{text(new)}', old, (old, new)),
                 (f'{text(new)},{text(old)}', new, (old, new)), (text(new), new, (new,)))
        for kek in (old, new):
            v2[kek], v1[kek] = sealed.seal(kek, b'seed', V2), sealed.seal(kek, b'seed', V1)
        for ring, sealing, opening in steps:
            with self.subTest(step=ring.count(','), sealing=key_id(sealing)):
                server = self.start(kek=ring)
                rpc = self.client(server)
                self.assertEqual(rpc.status().key_id, key_id(sealing))
                answer = rpc.encrypt(b'seed')
                self.assertEqual(answer.key_id, key_id(sealing))
                self.assertEqual(rpc.decrypt(answer.ciphertext, answer.key_id), b'seed')
                for kek in (old, new):
                    if kek in opening:
                        self.assertEqual(rpc.decrypt(v2[kek], key_id(kek)), b'seed')
                        self.assertEqual(rpc.decrypt_v1(v1[kek]), b'seed')
                    else:
                        why = self.fails(NOT_FOUND, rpc.decrypt, v2[kek], key_id(kek))
                        self.assertIn(key_id(kek), why)
                        self.fails(NOT_FOUND, rpc.decrypt_v1, v1[kek])

    def test_keys_are_not_mixed_up(self):
        """A fingerprint of one key over a seal of the other opens with neither."""
        server = self.start(kek=f'{text(KEK)},{text(OTHER)}')
        rpc = self.client(server)
        made = sealed.seal(OTHER, b'seed', V2)
        lie = made[:1] + bytes.fromhex(key_id(KEK)) + made[17:]
        self.fails(INVALID, rpc.decrypt, lie, key_id(KEK))
        self.assertEqual(rpc.decrypt(made, key_id(OTHER)), b'seed')
