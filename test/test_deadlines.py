"""What ends by the clock. All of it is begun together, since the longest takes ten seconds."""
import contextlib
import os
import select
import signal
import threading
import time

from plugin import WAIT, Client, Server, ServerCase
from raw import (CONTINUATION, DEADLINE, EMPTY, ENCRYPT, HEADERS, INTERNAL, INVALID, OK, PREFACE, SETTINGS, STATUS, Raw,
                 block, data, field, frame, message, ping, request, settings)

EARLY, LATE = 0.1, 5.0      # seconds: clocks that differ, and what a loaded machine may add
HEAD = frame(HEADERS, 0, 1, block(request(STATUS))[:20])    # without END_HEADERS


def body_that_never_comes(path, timeout, body):
    with Raw(path) as raw:
        stream = raw.open(request(ENCRYPT, *([('grpc-timeout', timeout)] if timeout else [])))
        raw.send(data(stream, body))
        return raw.wait(stream).status


def bytes_that_stop(path, start):
    with Raw(path, hello=False) as raw:
        raw.send(start)
        while raw.receive():    # without a word: no SETTINGS is acknowledged
            pass
    return 'closed'


def bytes_that_drip(path, start, drops):
    """Each byte is progress, but the whole has one deadline."""
    with Raw(path, hello=False) as raw:
        raw.send(start)
        for drop in drops:
            raw.socket.settimeout(0.6)
            with contextlib.suppress(TimeoutError):
                with contextlib.suppress(BrokenPipeError):
                    raw.send(drop)
                    while raw.receive():
                        pass
                return 'closed'
    return 'all sent'


def answer_that_is_not_read(path):
    with Raw(path, window=0, grant=0) as raw:
        raw.upload(raw.open(request(ENCRYPT)), message(field(1, b'x' * 32)))
        raw.wait_closed()
    return 'closed'


def socket_that_is_not_read(path):
    """No stream is open: what the plugin holds has no deadline but its own."""
    with Raw(path) as raw:
        end = select.poll()
        end.register(raw.socket, 0)
        raw.socket.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            while True:
                raw.send(ping(b'not read') * 1000)
        return 'closed' if end.poll(WAIT * 1000) else 'open'


def end_with_a_call_open(server):
    with Raw(server.path) as raw:
        raw.open(request(STATUS))
        raw.drained()
        server.signal(signal.SIGTERM)
        raw.wait_closed()
    return server.wait(), os.path.lexists(server.path)


class Deadlines(ServerCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        path, doomed = cls.server.path, Server()
        cls.addClassCleanup(doomed.kill)
        cls.idle, cls.idle_rpc = Raw(path), Client(cls.server.target)
        for client in (cls.idle, cls.idle_rpc):
            cls.addClassCleanup(client.close)
        cls.idle_rpc.status()
        cls.results, cls.threads = {}, {}
        for timeout in ('300m', '300000u', '99999999n', '0S', '1n', '1S', '20S', '1H', '1M', None):
            cls.begin(f'body, {timeout}', body_that_never_comes, path, timeout, b'')
        cls.begin('half a message, 300m', body_that_never_comes, path, '300m', EMPTY[:4])
        for start in (b'', PREFACE[:12], PREFACE, PREFACE + b'\0\0\6\4', PREFACE + settings() + HEAD):
            cls.begin(f'{len(start)} bytes', bytes_that_stop, path, start)
        cls.begin('slow preface', bytes_that_drip, path, b'', [bytes([b]) for b in PREFACE + frame(SETTINGS, 0, 0, bytes(48))])
        rest = frame(CONTINUATION, 0, 1, bytes(40))     # its own head in one piece: nghttp2 allows few pieces of heads
        cls.begin('slow head', bytes_that_drip, path, PREFACE + settings() + HEAD + rest[:9], [bytes([b]) for b in rest[9:]])
        cls.begin('unread answer', answer_that_is_not_read, path)
        cls.begin('full socket', socket_that_is_not_read, path)
        cls.begin('end', end_with_a_call_open, doomed)

    @classmethod
    def begin(cls, name, work, *args):
        start = time.monotonic()

        def timed():
            result = work(*args)
            cls.results[name] = result, time.monotonic() - start
        cls.threads[name] = threading.Thread(target=timed, daemon=True)
        cls.threads[name].start()

    def check(self, name, expected, seconds, to):
        """What came of it, after so many seconds at the least, and soon after so many."""
        self.threads[name].join(to + LATE + WAIT)
        self.assertIn(name, self.results, 'still waiting, or failed')
        result, took = self.results[name]
        self.assertEqual(result, expected)
        self.assertGreaterEqual(took, seconds - EARLY)
        self.assertLessEqual(took, to + LATE)

    def test_timeout_of_the_client(self):
        for timeout, seconds in (('300m', 0.3), ('300000u', 0.3), ('99999999n', 0.1), ('0S', 0), ('1n', 0), ('1S', 1)):
            with self.subTest(timeout=timeout):
                self.check(f'body, {timeout}', DEADLINE, seconds, seconds + 0.5)
        self.check('half a message, 300m', DEADLINE, 0.3, 0.8)

    def test_at_most_ten_seconds(self):
        for timeout in ('20S', '1H', '1M', None):
            with self.subTest(timeout=timeout):
                self.check(f'body, {timeout}', DEADLINE, 10, 10.5)

    def test_what_never_ends_is_closed(self):
        names = [name for name in self.threads if name.endswith(' bytes')]
        self.assertEqual(len(names), 5)
        for name in (*names, 'slow preface', 'slow head', 'unread answer', 'full socket'):
            with self.subTest(name=name):
                self.check(name, 'closed', 10, 11)

    def test_end_with_a_call_open(self):
        self.check('end', (0, False), 5, 5.5)

    def test_idleness_closes_nothing(self):
        for thread in self.threads.values():
            thread.join(10 + LATE + WAIT)
        self.assertTrue(self.idle.works())
        self.assertEqual(self.idle_rpc.status().healthz, 'ok')

    def test_timeouts_that_leave_time(self):
        with Raw(self.server.path) as raw:
            for value in ('1H', '1M', '10S', '9000m', '2999943u', '99999999u', '99999999n', '99999999H', '00000001H'):
                with self.subTest(value=value):
                    self.assertEqual(raw.call(STATUS, EMPTY, ('grpc-timeout', value)).status, OK)

    def test_malformed_timeouts(self):
        """Whatever is made of them, it is the same for all, and it is an answer."""
        with Raw(self.server.path) as raw:
            codes = {raw.call(STATUS, EMPTY, ('grpc-timeout', value)).status for value in (
                '', '5', 'S', '-1S', '+1S', '123456789S', '1x', '1 S', '1.5S', '1s', 'S1', '1SS', '0x1S')}
        self.assertEqual(len(codes), 1, codes)
        self.assertLessEqual(codes, {OK, INVALID, INTERNAL})
