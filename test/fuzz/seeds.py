"""Makes the fuzzers' seeds anew: test/fuzz/NAME.seeds.

    seeds.py NAME...        fuzzers built by make fuzz: build/fuzz/NAME

They are the ones there were, what fuzzing found, and what real clients say to a running
plugin, less what adds no coverage. A listener between client and plugin keeps the bytes
of grpcio, curl, h2load and of the plugin's own probe. The plugin has the fuzzers' KEKs,
so that what it sealed opens in them.

A seed is a line, the shortest first. What is not printable ASCII in it, and each \\ and %,
is three octal digits behind a \\, so that printf(1) makes the seed of it.
"""
import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import threading

HERE = os.path.dirname(os.path.abspath(__file__))
BUILD = os.path.join(HERE, '../../build/fuzz')
INPUT_MAX = 700         # bytes of a seed
sys.path.insert(0, os.path.dirname(HERE))
import sealed
from plugin import BINARY, WAIT, Client, Server, fresh_dir, kms, text

KEKS = [bytes([0x80 + n] + [(7 * n + 13 * i) & 255 for i in range(1, 32)]) for n in range(3)]
FRAMED, GREETED, SPLIT = 1, 2, b'\x07\x80'
PREFACE = b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n'


class Tap:
    """A socket that passes on to the plugin, and keeps what clients sent."""

    def __init__(self, target):
        self.path, self.target, self.heard = os.path.join(fresh_dir(), 'tap.sock'), target, []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen()
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            client, _ = self.listener.accept()
            server = socket.socket(socket.AF_UNIX)
            server.connect(self.target)
            kept = bytearray()
            self.heard.append(kept)
            threading.Thread(target=self.pump, args=(client, server, kept), daemon=True).start()
            threading.Thread(target=self.pump, args=(server, client, None), daemon=True).start()

    @staticmethod
    def pump(source, sink, kept):
        with contextlib.suppress(OSError):
            while piece := source.recv(65536):
                if kept is not None:
                    kept += piece
                sink.sendall(piece)
            sink.shutdown(socket.SHUT_RDWR)


def frames_of(heard):
    """(type, flags, stream, payload) of each whole frame behind the preface."""
    at = len(PREFACE)
    while at + 9 <= len(heard):
        length = int.from_bytes(heard[at:at + 3], 'big')
        kind, flags, stream = heard[at + 3], heard[at + 4], int.from_bytes(heard[at + 5:at + 9], 'big')
        if at + 9 + length <= len(heard):
            yield kind, flags, stream, bytes(heard[at + 9:at + 9 + length])
        at += 9 + length


def steps_of(heard):
    """The same bytes as the steps of session.c, as far as they fit."""
    return b''.join(bytes([kind, flags, stream, len(payload)]) + payload
                    for kind, flags, stream, payload in frames_of(heard)
                    if kind < 16 and stream < 256 and len(payload) < 256)


def converse(path):
    """What several clients have to say: all RPCs, right and wrong."""
    target = 'unix:' + path
    rpc = Client(target)
    status = rpc.status()
    for size in (0, 1, 32, 967, 968):
        with contextlib.suppress(Exception):
            answer = rpc.encrypt(b'\x61' * size)
            rpc.decrypt(answer.ciphertext, answer.key_id)
            rpc.decrypt(answer.ciphertext, status.key_id[::-1])
    with contextlib.suppress(Exception):
        rpc.decrypt(sealed.seal(KEKS[1], b'other', sealed.V2), sealed.key_id(KEKS[1]), {'a.b': b'annotation'})
    rpc.version()
    rpc.decrypt_v1(rpc.encrypt_v1(b'ping'))
    rpc.decrypt_v1(rpc.encrypt_v1(bytes(3000)))
    with contextlib.suppress(Exception):
        rpc.encrypt_v1(b'', 'v1')
    rpc.close()
    quiet = {'stdout': subprocess.DEVNULL, 'stderr': subprocess.DEVNULL, 'timeout': WAIT, 'check': False}
    subprocess.run([BINARY, 'probe', 'unix://' + path], **quiet)
    for name in ('metrics', 'other'):
        subprocess.run(['curl', '-s', '--http2-prior-knowledge', '--unix-socket', path, 'http://localhost/' + name],
                       **quiet)
    if shutil.which('h2load'):
        body = os.path.join(os.path.dirname(path), 'body')
        with open(body, 'wb') as file:
            file.write(bytes(5))
        subprocess.run(['h2load', '-n', '6', '-c', '1', '-m', '3', '-d', body, '-H', 'te: trailers',
                        '-H', 'content-type: application/grpc', '-B', 'unix:' + path,
                        'http://localhost/v2.KeyManagementService/Status'], **quiet)


def messages_of(heard):
    """Bodies without their prefix: what the KMS service is given."""
    return [payload[5:] for kind, _, _, payload in frames_of(heard) if kind == 0 and len(payload) > 4]


def etcd_inputs():
    key, thing = b'/registry/secrets/default/s', b'k8s\0 the object'
    values = [sealed.etcd_v1(KEKS[0], key, thing), sealed.etcd_v1_cbc(KEKS[0], thing),
              sealed.etcd_v2(KEKS[0], key, thing), sealed.etcd_v2(KEKS[0], key, thing, seeded=False),
              sealed.etcd_v2(KEKS[1], key, thing), sealed.etcd_v2(b'\x99' * 31 + b'x', key, thing),
              thing, b'k8s:enc:aescbc:v1:k:' + thing]
    for value in values:
        yield 0, value
        yield 1, sealed.range_response((key, value))
    for mode in (2, 3):
        yield mode, sealed.range_response(*((key + bytes([65 + i]), value) for i, value in enumerate(values)))
        yield mode, kms.Etcd.RangeResponse(more=True, count=9).SerializeToString()
    for mode in (4, 5, 6):
        yield mode, bytes(3) + thing
        yield mode, b'\0\x20\x01' + thing


def texts():
    keys = ','.join(text(k) for k in KEKS)
    yield from ((0, e) for e in ('unix:///run/kms.sock', 'unix:///@name', 'unix://run', '/run/kms.sock', 'tcp://x:1'))
    yield from ((1, t) for t in (text(KEKS[0]), 'QQ==', 'QUI=', 'QR=='))
    yield from ((2, t) for t in (keys, ' ' + text(KEKS[0]) + '\n', 'QQ==,', text(b'a' * 32)))
    yield from ((3, t) for t in (
        'serve\n--listen=unix:///@n\n--mode\n0660\n--group\ng\n--allow-uid\n0,u,12\n--max-connections\n9'
        '\n--sandbox\nrequire\n--log-level\ndebug', 'probe\n--timeout\n2.5\nunix:///@n', 'audit\n--strict\n--list',
        'unseal\n--\n-k', '--version', '-h', 'genkey', 'keyid\nx'))
    yield from ((4, t) for t in (
        ':method\nPOST\n:scheme\nhttp\n:path\n/v2.KeyManagementService/Status\n:authority\nlocalhost\n'
        'content-type\napplication/grpc\nte\ntrailers\ngrpc-timeout\n2999943u\nuser-agent\ngrpc-go/1\n\n\nx\ny\n',
        ':method\nGET\n:scheme\nhttp\n:path\n/metrics\ncontent-length\n5\nconnection\nclose\n'))
    yield from ((5, t) for t in ('2999943u', '1H', '99999999n', '3S'))
    yield from ((7, t) for t in ('plain', 'a "b" =\x01\xff'))


def heard(keep):
    """What clients say, and texts and values that are right or nearly so."""
    server = Server(kek=','.join(text(k) for k in KEKS))
    tap = Tap(server.path)
    converse(tap.path)
    server.stop()
    for said in tap.heard:
        keep('session', bytes([0]) + SPLIT + bytes(said))
        keep('session', bytes([FRAMED | GREETED]) + SPLIT + steps_of(said))
        for body in messages_of(said):
            for rpc in range(6):
                keep('kms', bytes([rpc]) + body)
    for rpc in (0x80, 0x81):
        keep('kms', bytes([rpc]) + bytes(4) + b'plaintext')
        keep('kms', bytes([rpc, 1, 0, 20, 1]) + b'plaintext')
    for mode, data in etcd_inputs():
        keep('rescue', bytes([mode]) + data)
    for mode, words in texts():
        keep('parse', bytes([mode]) + words.encode('latin-1'))
    for rpc in range(7):    # steps that no client takes
        keep('session', bytes([FRAMED | GREETED]) + SPLIT + bytes([0x80 + rpc, 0, 1, 2]) + b'\x0a\0' +
             b'\xc0\x05\xc2\xff\xc4\0\xc1\1\xc4\0\xc5\0')


def line_of(seed):
    line = ''.join(chr(b) if 32 <= b < 127 and b not in b'\\%' else f'\\{b:03o}' for b in seed)
    return re.sub(' $', r'\\040', line)


def seed_of(line):
    return re.sub(rb'\\([0-7]{3})', lambda octal: bytes([int(octal[1], 8)]), line.encode())


def renew(fuzzer, new):
    """Merges all there is for a fuzzer."""
    file = os.path.join(HERE, fuzzer + '.seeds')
    with open(file, encoding='ascii') as old:
        lines = old.read().splitlines()
    found = os.path.join(BUILD, 'corpus', fuzzer)
    os.makedirs(found, exist_ok=True)
    given, merged = fresh_dir(), fresh_dir()
    for number, seed in enumerate(new + [seed_of(line) for line in lines]):
        with open(os.path.join(given, str(number)), 'wb') as one:
            one.write(seed)
    subprocess.run([os.path.join(BUILD, fuzzer), '-set_cover_merge=1', f'-max_len={INPUT_MAX}', merged, given, found],
                   stderr=subprocess.DEVNULL, check=True)
    seeds = []
    for name in os.listdir(merged):
        with open(os.path.join(merged, name), 'rb') as one:
            seeds.append(one.read())
    with open(file, 'w', encoding='ascii') as out:
        out.writelines(line_of(seed) + '\n' for seed in sorted(seeds, key=lambda seed: (len(seed), seed)))
    print(f'{fuzzer}: {len(lines)} seeds before, {len(seeds)} now')


def main(fuzzers):
    new = {fuzzer: [] for fuzzer in fuzzers}
    heard(lambda fuzzer, seed: new.get(fuzzer, []).append(seed))
    for fuzzer, seeds in new.items():
        renew(fuzzer, seeds)


if __name__ == '__main__':
    main(sys.argv[1:])
