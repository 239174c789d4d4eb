"""Where keys and plaintexts must not be found: memory, environment, core dumps."""
import os
import re
import socket
import subprocess
import unittest

import sealed
from plugin import (BINARY, EMULATED, INVALID, KEK, OTHER, OWN_MEMORY, STRANGER, WAIT, Case,
                    as_user, environment, fresh_dir, key_id, needs_root, public_binary, text, until)
from raw import DATA, DECRYPT, DECRYPT_V1, ENCRYPT, ENCRYPT_V1, END_STREAM, HEADERS, Raw, data, field, message, request, reset
from sealed import V1, V2


def memory(pid):
    """The readable memory of a process."""
    parts = []
    with open(f'/proc/{pid}/maps', encoding='utf-8') as maps, \
            open(f'/proc/{pid}/mem', 'rb', buffering=0) as mem:
        for line in maps:
            low, high, mode, name = re.match(r'(\w+)-(\w+) (\S+) \S+ \S+ \S+ *(.*)', line).groups()
            if mode[0] != 'r' or name.startswith(('[vvar', '[vsyscall')):
                continue
            mem.seek(int(low, 16))
            parts.append(mem.read(int(high, 16) - int(low, 16)))
    return b'\0'.join(parts)


@needs_root
@unittest.skipUnless(OWN_MEMORY, 'sanitizers keep freed memory, emulators a copy')
class Memory(Case):
    def setUp(self):
        self.server = self.start('--log-level', 'debug', kek=f'{text(KEK)},{text(OTHER)}')
        self.rpc = self.client(self.server)
        self.rpc.status()
        self.barrier = Raw(self.server.path)
        self.addCleanup(self.barrier.close)
        self.barrier.ping()
        self.descriptors = self.server.descriptors()

    def assert_clean(self, secrets):
        until(lambda: self.server.descriptors() == self.descriptors, 'all connections closed')
        self.barrier.ping()     # the answers before this one have left; it needs no key itself
        found = memory(self.server.pid)
        self.assertGreater(len(found), 100000)
        self.assertIn(b'KeyManagementService', found)
        traces = [name for name, secret in secrets if secret in found]
        self.assertEqual(traces, [])
        for kek in (KEK, OTHER):
            self.assertLessEqual(found.count(kek), 1)
            self.assertNotIn(text(kek).encode(), found)
            self.assertNotIn(text(kek).encode()[10:32], found)
            self.assertNotIn(kek.hex().encode(), found)

    def test_at_the_start(self):
        self.assert_clean([])

    def test_after_calls(self):
        secrets = []
        for i in range(300):
            plaintext = os.urandom(32)
            secrets.append((f'plaintext {i}', plaintext))
            answer = self.rpc.encrypt(plaintext)
            for ciphertext in (answer.ciphertext, sealed.seal(KEK, plaintext, V2)):
                self.assertEqual(self.rpc.decrypt(ciphertext, answer.key_id), plaintext)
                secrets.append((f'message key {i}', sealed.derive(KEK, ciphertext[17:41])))
            cipher = self.rpc.encrypt_v1(plaintext)
            self.assertEqual(self.rpc.decrypt_v1(cipher), plaintext)
            secrets.append((f'message key {i}', sealed.derive(KEK, cipher[17:41])))
        self.assert_clean(secrets)

    def test_after_large_calls(self):
        secrets = []
        for i in range(20):
            plain = os.urandom(60000)
            secrets += [(f'{i} at {at}', plain[at:at + 24]) for at in range(0, 60000 - 24, 600)]
            self.assertEqual(self.rpc.decrypt_v1(self.rpc.encrypt_v1(plain)), plain)
        self.assert_clean(secrets)

    def test_after_refusals(self):
        """Forgeries open to their plaintext before their tag is found wrong."""
        secrets = []
        for i in range(50):
            plaintext = os.urandom(32)
            secrets.append((f'plaintext {i}', plaintext))
            forged = bytearray(sealed.seal(KEK, plaintext, V2))
            forged[-1] ^= 1
            forged = bytes(forged)
            secrets.append((f'message key {i}', sealed.derive(KEK, forged[17:41])))
            self.fails(INVALID, self.rpc.decrypt, forged, key_id(KEK))
            self.fails(INVALID, self.rpc.decrypt_v1, sealed.seal(KEK, plaintext, V2))
            self.fails(INVALID, self.rpc.encrypt, plaintext * 40)
            self.fails(INVALID, self.rpc.encrypt_v1, plaintext, 'v1')
        self.assert_clean(secrets)

    def test_after_broken_calls(self):
        """Cancelled, cut off, undecodable, and never read."""
        secrets = []
        for i in range(30):
            plaintext = os.urandom(32)
            secrets.append((f'plaintext {i}', plaintext))
            body = message(field(1, plaintext) + field(2, b'uid'))
            with Raw(self.server.path) as raw:
                stream = raw.open(request(ENCRYPT))
                raw.send(data(stream, body[:-2]), reset(stream))
                self.assertEqual(raw.call(ENCRYPT, body[:-2]).status, 13)
                self.assertEqual(raw.call(ENCRYPT, body * 2).status, 13)
                self.assertEqual(raw.call(ENCRYPT, message(field(1, plaintext) + b'\x0a')).status, 13)
                self.assertEqual(raw.call(ENCRYPT, message(body, flag=1)).status, 12)
                stream = raw.open(request(ENCRYPT))
                raw.send(data(stream, body[:-2]))
                raw.drained()
            with Raw(self.server.path, window=3, grant=0) as raw:
                v1 = sealed.seal(KEK, plaintext, V1)
                for path, sent in ((DECRYPT_V1, field(1, b'v1beta1') + field(2, v1)), (DECRYPT, field(
                        1, sealed.seal(KEK, plaintext, V2)) + field(3, key_id(KEK).encode()))):
                    stream = raw.open(request(path))
                    raw.upload(stream, message(sent))
                    while len(raw.answers[stream].data) < 3:
                        self.assertIsNotNone(raw.frame())
            with Raw(self.server.path) as raw:
                raw.call(ENCRYPT_V1, message(field(1, b'v1beta1') + field(2, plaintext * 100)))
        self.assert_clean(secrets)


@needs_root     # its memory is root's to read and write
@unittest.skipUnless(OWN_MEMORY, 'the memory is the sanitizer\'s or the emulator\'s')
class Snapshot(Case):
    """A machine or a container that is brought back from a snapshot goes on where it was: no nonce may come twice."""

    def waits(self, server):
        """It is in epoll_pwait, where alone it sleeps; what it does on a loaded machine after an answer is done."""
        until(lambda: server.proc('stat').rpartition(b')')[2].split()[0] == b'S', 'a server that waits')

    def state(self, server):
        """All writable memory, by address."""
        self.waits(server)
        maps = [line.split() for line in server.proc('maps').decode().splitlines()]
        ranges = [tuple(int(n, 16) for n in m[0].split('-')) for m in maps if m[1].startswith('rw') and m[-1] != '[vvar]']
        with open(f'/proc/{server.pid}/mem', 'rb') as mem:
            saved = []
            for low, high in ranges:
                mem.seek(low)
                saved.append((low, mem.read(high - low)))
        return saved

    def put_back(self, server, saved):
        self.waits(server)
        with open(f'/proc/{server.pid}/mem', 'r+b', buffering=0) as mem:
            for low, data in saved:
                mem.seek(low)
                self.assertEqual(mem.write(data), len(data))

    def test_nonces_differ(self):
        server = self.start(kek=KEK)
        for path, body in ((ENCRYPT, field(1, b'k' * 32)), (ENCRYPT_V1, field(1, b'v1beta1') + field(2, b'k' * 32))):
            with Raw(server.path) as raw:
                self.assertTrue(raw.works())
                raw.ping()
                stream = raw.expect()
                said = raw.headers(stream, request(path)) + data(stream, message(body), end=True)
                saved, nonces = self.state(server), []
                for _ in range(3):
                    self.put_back(server, saved)        # it waits in epoll_pwait, and knows of nothing since
                    raw.socket.sendall(said)
                    answer = self.answer(raw)
                    at = answer.index(bytes([1]) + bytes.fromhex(key_id(KEK)))
                    nonces.append(answer[at + 17:at + 41])
                self.assertEqual(len(set(nonces)), 3, nonces)
                self.put_back(server, saved)

    def answer(self, raw):
        """DATA of the next answer, its head not looked at: the server's HPACK has gone back in time, ours has not."""
        octets = b''
        while frame := raw.next_frame():
            octets += frame.payload if frame.kind == DATA else b''
            if frame.kind in (DATA, HEADERS) and frame.flags & END_STREAM:
                return octets
        raise AssertionError('closed')


@unittest.skipIf(EMULATED, 'the environment that /proc shows is the emulator\'s')
class Environment(Case):
    @needs_root
    def test_serve_overwrites_its_environment(self):
        server = self.start(kek=f'{text(KEK)},{text(OTHER)}', env={'BESIDE': 'stays'})
        found = server.proc('environ')
        self.assertIn(b'BESIDE=stays', found)
        for kek in (KEK, OTHER):
            self.assertNotIn(text(kek)[:8].encode(), found)
            self.assertNotIn(text(kek)[-9:].encode(), found)

    @needs_root
    def test_every_verb_overwrites_it_and_leaves_no_core(self):
        """Those that wait for something can be looked at: probe, which needs no key, for a server; the others for their input."""
        path = os.path.join(fresh_dir(), 'silent.sock')
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            for args in (('probe', '--timeout', '10', 'unix://' + path), ('unseal', '/registry/secrets/a/b'), ('audit',)):
                process = subprocess.Popen([BINARY, *args], env=environment(KEK, {'BESIDE': 'stays'}), stdin=subprocess.PIPE,
                                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                try:
                    def environ(pid=process.pid):
                        with open(f'/proc/{pid}/environ', 'rb') as file:
                            return file.read()
                    until(lambda get=environ: b'BESIDE=stays' in get() and text(KEK)[:8].encode() not in get(), f'{args[0]} wipes it')
                    with open(f'/proc/{process.pid}/limits', encoding='ascii') as file:
                        self.assertRegex(file.read(), r'Max core file size +0 +0 ')
                    self.assertEqual(os.stat(f'/proc/{process.pid}/mem').st_uid, 0)
                    self.assertIsNone(process.poll())
                finally:
                    process.kill()
                    process.communicate()

    @needs_root
    @unittest.skipUnless(OWN_MEMORY, 'sanitizers make nothing of mlock')
    def test_the_page_of_the_keks(self):
        """Locked, and in no core file, whoever makes that."""
        server = self.start()
        flags = [line.split()[1:] for line in server.proc('smaps').decode().splitlines() if line.startswith('VmFlags:')]
        self.assertTrue(any({'lo', 'dd'} <= set(found) for found in flags) or 'cannot be locked' in server.log(), flags)

    def test_no_core_dump(self):
        server = self.start()
        limits = server.proc('limits').decode()
        self.assertRegex(limits, r'Max core file size +0 +0 ')

    @needs_root
    def test_not_dumpable(self):
        """The kernel then gives the files in /proc to root, so that its own user cannot read them."""
        directory = fresh_dir()
        os.chown(directory, STRANGER, STRANGER)
        server = self.start(binary=public_binary(), wrapper=as_user(STRANGER),
                            path=directory + '/kms.sock')
        self.assertIn(f'Uid:\t{STRANGER}'.encode(), server.proc('status'))
        self.assertEqual(os.stat(f'/proc/{server.pid}/mem').st_uid, 0)

    def test_not_in_the_arguments(self):
        server = self.start()
        self.assertNotIn(text(KEK)[:8].encode(), server.proc('cmdline'))
