"""What ends by the clock. All of it is begun together, since the longest takes ten seconds."""
import contextlib
import os
import select
import signal
import socket
import threading
import time

from hyperframe.frame import DataFrame, PingFrame

from plugin import WAIT, Client, Server, ServerCase
from raw import EMPTY, ENCRYPT, PREFACE, STATUS, Raw, field, message, request

DEADLINE_EXCEEDED = 4
SLACK = 5.0     # seconds that a loaded machine may add


class Deadlines(ServerCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.doomed = Server()
        cls.addClassCleanup(cls.doomed.kill)
        cls.seconds, cls.results = {}, {}
        cls.threads = {}
        cls.idle = Raw(cls.server.path)
        cls.addClassCleanup(cls.idle.close)
        cls.idle_rpc = Client(cls.server.target)
        cls.addClassCleanup(cls.idle_rpc.close)
        cls.idle_rpc.status()
        for timeout in ('300m', '1S', '20S', '1H', '1M', None):
            cls.begin(f'body with {timeout}', cls.body_that_never_comes, timeout)
        for name, start in (('nothing', b''), ('half a preface', PREFACE[:12]),
                            ('no SETTINGS', PREFACE), ('half of SETTINGS', PREFACE + b'\0\0\6\4')):
            cls.begin(name, cls.preface_that_stops, start)
        cls.begin('slow preface', cls.preface_that_drips)
        cls.begin('unread answer', cls.answer_that_is_not_read)
        cls.begin('full socket', cls.socket_that_is_not_read)
        cls.begin('end with a call open', cls.end_with_a_call_open)

    @classmethod
    def begin(cls, name, work, *args):
        start = time.monotonic()

        def timed():
            cls.results[name] = work(*args)
            cls.seconds[name] = time.monotonic() - start
        cls.threads[name] = threading.Thread(target=timed, daemon=True)
        cls.threads[name].start()

    @classmethod
    def body_that_never_comes(cls, timeout):
        with Raw(cls.server.path) as raw:
            stream = raw.open(request(ENCRYPT, *([('grpc-timeout', timeout)] if timeout else [])))
            raw.send(DataFrame(stream, EMPTY[:4]))
            return raw.wait(stream).status

    @classmethod
    def preface_that_stops(cls, start):
        with socket.socket(socket.AF_UNIX) as silent:
            silent.settimeout(WAIT)
            silent.connect(cls.server.path)
            silent.sendall(start)
            with contextlib.suppress(ConnectionResetError):
                while silent.recv(4096):
                    pass
        return 'closed'

    @classmethod
    def preface_that_drips(cls):
        """Each byte is progress, but the whole has one deadline."""
        with socket.socket(socket.AF_UNIX) as slow:
            slow.settimeout(0.6)
            slow.connect(cls.server.path)
            for byte in PREFACE + b'\0\0\x30\4\0\0\0\0\0' + bytes(48):
                try:
                    slow.send(bytes([byte]))
                    while slow.recv(4096):
                        pass
                    return 'closed'
                except TimeoutError:
                    continue
                except OSError:
                    return 'closed'
        return 'complete'

    @classmethod
    def answer_that_is_not_read(cls):
        with Raw(cls.server.path, window=0, grant=0) as raw:
            stream = raw.open(request(ENCRYPT))
            raw.upload(stream, message(field(1, b'x' * 32)))
            raw.wait_closed()
        return 'closed'

    @classmethod
    def socket_that_is_not_read(cls):
        """No stream is open: what the plugin holds has no deadline but its own."""
        ping = PingFrame(opaque_data=b'not read').serialize()
        with Raw(cls.server.path) as raw:
            end = select.poll()
            end.register(raw.socket, 0)
            raw.socket.settimeout(0.5)
            with contextlib.suppress(TimeoutError):
                while True:
                    raw.send(ping * 1000)
            return 'closed' if end.poll(WAIT * 1000) else 'open'

    @classmethod
    def end_with_a_call_open(cls):
        with Raw(cls.doomed.path) as raw:
            raw.open(request(STATUS))
            raw.drained()
            cls.doomed.signal(signal.SIGTERM)
            raw.wait_closed()
            return cls.doomed.wait()

    def outcome(self, name, low, high):
        """What came of it, once its time was within the bounds."""
        self.threads[name].join(high + SLACK + WAIT)
        self.assertIn(name, self.seconds, 'still waiting, or failed')
        self.assertGreaterEqual(self.seconds[name], low)
        self.assertLessEqual(self.seconds[name], high + SLACK)
        return self.results[name]

    def test_timeout_of_the_client(self):
        self.assertEqual(self.outcome('body with 300m', 0.25, 0.3), DEADLINE_EXCEEDED)
        self.assertEqual(self.outcome('body with 1S', 0.9, 1), DEADLINE_EXCEEDED)

    def test_at_most_ten_seconds(self):
        for timeout in ('20S', '1H', '1M', None):
            with self.subTest(timeout=timeout):
                self.assertEqual(self.outcome(f'body with {timeout}', 9, 10), DEADLINE_EXCEEDED)

    def test_preface(self):
        for name in ('nothing', 'half a preface', 'no SETTINGS', 'half of SETTINGS', 'slow preface'):
            with self.subTest(name=name):
                self.assertEqual(self.outcome(name, 8, 11), 'closed')

    def test_answer_that_is_not_read(self):
        self.assertEqual(self.outcome('unread answer', 8, 11), 'closed')

    def test_socket_that_is_not_read(self):
        self.assertEqual(self.outcome('full socket', 8, 12), 'closed')

    def test_end_with_a_call_open(self):
        self.assertEqual(self.outcome('end with a call open', 3, 6), 0)
        self.assertFalse(os.path.lexists(self.doomed.path))

    def test_idleness_closes_nothing(self):
        for thread in self.threads.values():
            thread.join(10 + SLACK + WAIT)
        self.assertTrue(self.idle.works())
        self.assertEqual(self.idle_rpc.status().healthz, 'ok')
