"""Mixed load from several clients, hostile peers and restarts among them: no wrong answer, and flat memory.

    soak.py [SECONDS]       1800 unless told otherwise; on this machine only, and it ends by itself

Each client is a thread. A call that a restart or a full server cuts off is repeated, as
kube-apiserver would do; one that is answered has to be right. Needs root, for /proc.
"""
import os
import random
import signal
import sys
import threading
import time

import sealed
from hostile import ATTACKS, Round
from plugin import KEK, MEMORY_MAX, OTHER, Client, RpcError, Server, fresh_dir, key_id, text
from raw import EXHAUSTED, INVALID, UNAVAILABLE

CLIENTS = 4
RESTART_SECONDS = 60
ATTACK_SECONDS = 5
NAMES = [name for name in ATTACKS if name not in ('slow', 'dropped', 'garbage')]    # those take their time
GROWTH_MAX = 1 << 20    # bytes between the first and the last calm moment of one process


class Load:
    def __init__(self, path):
        self.target, self.stop, self.calls, self.again, self.wrong = 'unix:' + path, threading.Event(), 0, 0, []
        self.threads = [threading.Thread(target=self.client, args=(n,), daemon=True) for n in range(CLIENTS)]
        for thread in self.threads:
            thread.start()

    @staticmethod
    def one(rpc, number, chance):
        """Some calls and their check."""
        plaintext = chance.randbytes(chance.choice((0, 1, 16, 32, 32, 32, 300, 967)))
        if number % 3 == 0:
            answer = rpc.encrypt(plaintext)
            assert answer.key_id == key_id(KEK) and sealed.unseal(KEK, answer.ciphertext, sealed.V2) == plaintext
            assert rpc.decrypt(answer.ciphertext, answer.key_id) == plaintext
        elif number % 3 == 1:
            assert rpc.decrypt_v1(sealed.seal(OTHER, plaintext, sealed.V1)) == plaintext
        else:
            assert rpc.status().key_id == key_id(KEK)
        forged = bytearray(sealed.seal(KEK, plaintext, sealed.V2))
        forged[chance.randrange(17, len(forged))] ^= 1 << chance.randrange(8)
        try:
            rpc.decrypt(bytes(forged), key_id(KEK))
        except RpcError as error:
            if error.code != INVALID:
                raise
        else:
            raise AssertionError('a forgery was opened')

    def client(self, number):
        chance, rpc = random.Random(number), Client(self.target)
        while not self.stop.is_set():
            try:
                self.one(rpc, self.calls + number, chance)
                self.calls += 1
            except RpcError as error:
                if error.code not in (UNAVAILABLE, EXHAUSTED):
                    self.wrong.append(repr(error))
                self.again += 1
                time.sleep(0.01)
            except AssertionError as error:
                self.wrong.append(repr(error))
            time.sleep(0.002)
        rpc.close()

    def end(self):
        self.stop.set()
        for thread in self.threads:
            thread.join(60)


def soak(seconds):
    path, keys = os.path.join(fresh_dir(), 'kms.sock'), f'{text(KEK)},{text(OTHER)}'
    server = Server(kek=keys, path=path)
    load, end, turn, reached, restarts, peak, growth = Load(path), time.monotonic() + seconds, 0, 0, 0, 0, 0
    restart, first = time.monotonic() + RESTART_SECONDS, None
    try:
        while time.monotonic() < end and not load.wrong:
            function, least, *_ = ATTACKS[NAMES[turn % len(NAMES)]]
            turn += 1
            try:
                reached += function(Round(server, least, ATTACK_SECONDS)) > 0
            except (OSError, AssertionError) as error:      # a peer of this kind may be cut off at any time
                print(f'# {function.__name__}: {error!r:.100}')
            assert server.process.poll() is None, 'the plugin is gone:\n' + server.log()[-1000:]
            time.sleep(0.5)
            peak = max(peak, server.resident())
            if turn % len(NAMES) == 0:                      # the same moment of each round, and no other of a process
                first = first or server.resident()
                growth = max(growth, server.resident() - first)
                if time.monotonic() > restart:
                    server.stop()
                    server = Server(kek=keys, path=path)
                    restart, first, restarts = time.monotonic() + RESTART_SECONDS, None, restarts + 1
    finally:
        load.end()
        server.stop()
    told = (f'{load.calls} rounds of calls by {CLIENTS} clients, {load.again} repeated, {len(load.wrong)} wrong, '
            f'{turn} attacks of which {reached} reached something, {restarts} restarts, '
            f'at most {peak >> 10} KiB resident, {growth >> 10} KiB growth')
    well = peak <= MEMORY_MAX and growth <= GROWTH_MAX and reached >= turn * 3 // 4
    assert well and not load.wrong and load.calls > seconds, (told, load.wrong[:5])
    return told


def main(words):
    seconds = int(words[0]) if words else 1800
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        print(f'ok soak of {seconds} s: {soak(seconds)}\n1 passed, 0 failed')
    except AssertionError as error:
        print(f'not ok soak of {seconds} s: {error}\n0 passed, 1 failed')
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
