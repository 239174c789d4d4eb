"""What a running server has given up, as the kernel tells it. test/sandbox.c tries the calls themselves."""
import os
import re
import signal
import subprocess
import sys
import time
import unittest

from plugin import (BINARY, EMULATED, KEK, ROOT, SANITIZED, STRANGER, WAIT, Case, as_user, fresh_dir, fresh_name,
                    needs_root)
from raw import INVALID, Raw


@needs_root     # its directory in /proc is root's
class Sandbox(Case):
    def state(self, *args):
        server = self.start(*args)
        self.assertEqual(self.client(server).status().healthz, 'ok')
        lines = (line.split(':', 1) for line in server.proc('status').decode().splitlines())
        return server, {name: value.strip() for name, value in lines}

    @unittest.skipIf(SANITIZED, 'sanitizers need system calls')
    @unittest.skipIf(EMULATED, 'the emulator has no seccomp')
    def test_confined(self):
        for mode in ('auto', 'require'):
            with self.subTest(mode=mode):
                server, state = self.state('--sandbox', mode)
                self.assertEqual((state['NoNewPrivs'], state['Seccomp'], state['Seccomp_filters']), ('1', '2', '1'))
                for capabilities in ('CapInh', 'CapPrm', 'CapEff', 'CapAmb'):
                    self.assertEqual(int(state[capabilities], 16), 0, capabilities)
                self.assertEqual(state['Threads'], '1')
                self.assertNotIn('the sandbox lacks a feature', server.log())

    @unittest.skipIf(EMULATED, 'the maps are the emulator\'s')
    def test_relocated_pointers_are_read_only(self):
        """GNU_RELRO: no page of it can be written."""
        server, _ = self.state()
        headers = subprocess.run(['readelf', '-Wl', BINARY], capture_output=True, text=True, check=True).stdout
        relro = re.search(r'GNU_RELRO +0x\w+ (0x\w+) 0x\w+ 0x\w+ (0x\w+)', headers)
        start, size = (int(n, 16) for n in relro.groups())
        maps = [re.match(r'(\w+)-(\w+) (\S+) (\w+) \S+ (\d+)', line).groups()
                for line in server.proc('maps').decode().splitlines()]
        base = next(int(m[0], 16) for m in maps if int(m[3], 16) == 0 and m[4] != '0')   # the program comes first
        seen = 0
        for low, high, mode, *_ in maps:
            low, high = int(low, 16), int(high, 16)
            if low < base + start + size and high > base + start:
                self.assertEqual(mode[1], '-', f'{low:x}-{high:x} {mode}')
                seen += min(high, base + start + size) - max(low, base + start)
        self.assertEqual(seen, size)

    def test_off(self):
        _, state = self.state('--sandbox', 'off')
        self.assertEqual((state['NoNewPrivs'], state['Seccomp']), ('0', '0'))
        self.assertNotEqual(int(state['CapEff'], 16), 0)


class Watched(Case):
    """A local user who sees every socket's name and connects to all of them, in a network namespace of their own."""
    watcher = '''
import select, socket, sys
seen, open_, connected = set(), [], 0
while not select.select([sys.stdin], [], [], 0)[0]:
    with open('/proc/net/unix', encoding='utf-8', errors='replace') as file:
        names = {words[7] for words in map(str.split, file.readlines()[1:]) if len(words) == 8}
    for name in names:
        peer = socket.socket(socket.AF_UNIX)
        peer.setblocking(False)
        try:
            peer.connect(name.replace('@', chr(0), 1))
            connected += 1
            peer.send(b'PRI * HTTP/2.0')
        except OSError:
            pass
        open_.append(peer)
    while len(open_) > 100:
        open_.pop(0).close()
    seen |= names
print(connected, *seen)
'''

    @unittest.skipIf(SANITIZED, 'sanitizers need system calls')
    @unittest.skipIf(EMULATED, 'the emulator has no seccomp')
    @needs_root     # for the namespace
    def test_nobody_reaches_the_rehearsal(self):
        apart = subprocess.Popen(['unshare', '-n', 'cat'], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.addCleanup(apart.communicate)
        apart.stdin.write(b'there')
        apart.stdin.flush()
        self.assertEqual(apart.stdout.read(5), b'there')    # so the namespace is there
        inside = ('nsenter', f'--net=/proc/{apart.pid}/ns/net')
        watcher = subprocess.Popen([*inside, *as_user(STRANGER), sys.executable, '-c', self.watcher],
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.addCleanup(watcher.kill)
        names, slowest = set(), 0.0
        for mode in ('require', 'auto'):
            for _ in range(20):
                name = '@' + fresh_name()
                begin = time.monotonic()
                server = self.start('--sandbox', mode, '--mode', '0666', '--listen', 'unix:///' + name, wrapper=inside)
                slowest = max(slowest, time.monotonic() - begin)
                names |= {name, server.path}
                self.assertIn('Seccomp:\t2', server.proc('status').decode())
                self.assertNotIn('lacks a feature', server.log())
                self.assertEqual(self.client(server).status().healthz, 'ok')
                server.wait_log(f'msg=refused .*uid={STRANGER}')
                server.stop()
        connected, *seen = watcher.communicate('')[0].split()
        print(f'# 40 starts, the slowest {1000 * slowest:.0f} ms; {connected} connections of a watcher to {len(seen)} names')
        self.assertGreaterEqual(int(connected), 40)
        self.assertEqual(set(seen) - names, set())
        self.assertLess(slowest, WAIT / 4)


WITHOUT = os.environ.get('KMSPLUGIN_WITHOUT', os.path.join(ROOT, 'build', 'without'))


@unittest.skipIf(SANITIZED, 'sanitizers need system calls')
@unittest.skipIf(EMULATED, 'the emulator has no seccomp')
class Unforeseen(Case):
    """Each call that the filter allows is left out of it in turn (test/without.c), as if this libc's were one that
    nobody has foreseen: the server serves without the filter and says why, or does without the call."""

    def live(self, server):
        """All that a server may come to do; dies, if at all, here."""
        rpc = self.client(server)
        sealed = rpc.encrypt(b'k' * 32)
        self.assertEqual(rpc.decrypt(sealed.ciphertext, sealed.key_id), b'k' * 32)
        self.assertEqual(rpc.decrypt_v1(rpc.encrypt_v1(b'k' * 32)), b'k' * 32)
        self.assertEqual(rpc.status().healthz, 'ok')
        with Raw(server.path) as raw:
            self.assertIn(b'kmsplugin_connections 2', raw.get('/metrics').data)
        self.fails(INVALID, rpc.decrypt, b'x', sealed.key_id)
        if os.geteuid() == 0:
            subprocess.run([*as_user(STRANGER), sys.executable, '-c', 'import socket, sys\n'
                            's = socket.socket(socket.AF_UNIX)\ns.connect(sys.argv[1])\ns.recv(1)', server.path],
                           stderr=subprocess.DEVNULL, timeout=WAIT, check=False)
            server.wait_log('msg=refused')
        server.signal(signal.SIGHUP)
        server.wait_log('signal=1')
        server.stop()
        self.assertFalse(os.path.lexists(server.path))

    def test_each_call_left_out(self):
        numbers = subprocess.run([WITHOUT], capture_output=True, timeout=WAIT, check=True, text=True).stdout.split()
        self.assertGreaterEqual(len(numbers), 18)
        noticed, mode = 0, ('--mode', '0666', '--log-level', 'debug')
        for number in numbers:
            with self.subTest(call=number):
                env = {'WITHOUT': number}
                server = self.start(*mode, binary=WITHOUT, env=env)
                lacking = re.search('level=warn msg="the sandbox lacks a feature" feature=seccomp error="(.*)"', server.log())
                self.assertIn(f'Seccomp:\t{0 if lacking else 2}', server.proc('status').decode())
                self.live(server)
                if lacking:
                    noticed += 1
                    self.assertRegex(lacking[1], r'^\w+: \w+|signal \d+|status \d+')
                    line = self.dies('serve', '--listen', f'unix://{fresh_dir()}/kms.sock', '--sandbox', 'require',
                                     kek=KEK, binary=WITHOUT, env=env)
                    self.assertRegex(line, '--sandbox require: seccomp .*' + re.escape(lacking[1]))
                else:
                    self.live(self.start(*mode, '--sandbox', 'require', binary=WITHOUT, env=env))
        self.assertGreater(noticed, 12)
        print(f'# {len(numbers)} calls left out in turn: {noticed} noticed before READY, no death after it')
