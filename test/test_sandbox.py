"""What a running server has given up, as the kernel tells it. test/sandbox.c tries the calls themselves."""
import re
import subprocess
import unittest

from plugin import BINARY, EMULATED, SANITIZED, Case, needs_root


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
