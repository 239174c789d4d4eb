"""What a running server has given up, as the kernel tells it. test/sandbox.c tries the calls themselves."""
import unittest

from plugin import EMULATED, SANITIZED, Case, needs_root


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

    def test_off(self):
        _, state = self.state('--sandbox', 'off')
        self.assertEqual((state['NoNewPrivs'], state['Seccomp']), ('0', '0'))
        self.assertNotEqual(int(state['CapEff'], 16), 0)
