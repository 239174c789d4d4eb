"""The sealed form, and what kube-apiserver stores around it, a second time: without the C code."""
import hashlib
import hmac
import os

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from plugin import key_id, kms

V1, V2 = 1, 2           # the last byte of the associated data
OVERHEAD = 57


def aes(key, block):
    encryptor = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    return encryptor.update(block) + encryptor.finalize()


def derive(kek, nonce):
    """The AES key that XAES-256-GCM uses for one nonce of 24 bytes."""
    first = int.from_bytes(aes(kek, bytes(16)), 'big')
    doubled = (first << 1) & ((1 << 128) - 1)
    mask = doubled ^ (0x87 if first >> 127 else 0)
    halves = (int.from_bytes(bytes([0, i, 0x58, 0]) + nonce[:12], 'big') for i in (1, 2))
    return b''.join(aes(kek, (half ^ mask).to_bytes(16, 'big')) for half in halves)


def xaes_seal(kek, nonce, plaintext, aad):
    return AESGCM(derive(kek, nonce)).encrypt(nonce[12:], plaintext, aad)


def seal(kek, plaintext, api, nonce=None, form=1):
    nonce = nonce or os.urandom(24)
    head = bytes([form]) + bytes.fromhex(key_id(kek))
    return head + nonce + xaes_seal(kek, nonce, plaintext, head + bytes([api]))


def unseal(kek, sealed, api):
    head, nonce, rest = sealed[:17], sealed[17:41], sealed[41:]
    return AESGCM(derive(kek, nonce)).decrypt(nonce[12:], rest, head + bytes([api]))


def stored_v1(cipher, data, name=b'name'):
    """What a KMS v1 provider stores, of any plugin: `cipher` is the wrapped key."""
    return b'k8s:enc:kms:v1:' + name + b':' + len(cipher).to_bytes(2, 'big') + cipher + data


def etcd_v1(kek, etcd_key, plaintext, nonce=None, name=b'name'):
    """An object as a KMS v1 provider of that name stores it."""
    dek = os.urandom(32)
    nonce = nonce or os.urandom(12)
    return stored_v1(seal(kek, dek, V1), nonce + AESGCM(dek).encrypt(nonce, plaintext, etcd_key), name)


def etcd_v1_cbc(kek, plaintext):
    """The same, as clusters before 1.25 wrote it."""
    dek, iv = os.urandom(32), os.urandom(16)
    pad = 16 - len(plaintext) % 16
    encryptor = Cipher(algorithms.AES(dek), modes.CBC(iv)).encryptor()
    return stored_v1(seal(kek, dek, V1), iv + encryptor.update(plaintext + bytes([pad]) * pad) + encryptor.finalize())


def etcd_v2(kek, etcd_key, plaintext, seeded=True, identity=None, api=V2, name=b'name'):
    """An object as a KMS v2 provider of that name stores it."""
    source, info, nonce = os.urandom(32), b'', os.urandom(12)
    dek = source
    if seeded:      # HKDF, the expand step alone
        info = os.urandom(32)
        dek = hmac.digest(source, info + b'\x01', 'sha256')
    stored = kms.Etcd.EncryptedObject(
        encrypted_data=info + nonce + AESGCM(dek).encrypt(nonce, plaintext, etcd_key),
        key_id=(identity or key_id(kek)).encode(), encrypted_dek_source=seal(kek, source, api),
        encrypted_dek_source_type=1 if seeded else 0)
    return b'k8s:enc:kms:v2:' + name + b':' + stored.SerializeToString()


def range_response(*entries):
    """What `etcdctl get -w protobuf` prints for these keys and values, header included."""
    answer = kms.Etcd.RangeResponse(count=len(entries))
    for etcd_key, value in entries:
        answer.kvs.add(key=etcd_key, value=value, create_revision=7, mod_revision=1 << 40, version=3)
    return b'\x0a\x06\x08\x01\x10\x02\x18\x03' + answer.SerializeToString()


def key_id_hash(kek):
    """A key_id as kube-apiserver's metrics show it."""
    return 'sha256:' + hashlib.sha256(key_id(kek).encode()).hexdigest()
