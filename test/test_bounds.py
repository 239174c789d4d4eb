"""Peers that take what they can get: others are served, memory and descriptors stay bounded."""
import contextlib
import os
import re
import select
import signal
import socket
import time

from hyperframe.frame import DataFrame, PingFrame, SettingsFrame

from plugin import MEMORY_MAX, OWN_MEMORY, STRANGER, WAIT, Case, needs_root, until
from raw import EMPTY, ENCRYPT_V1, PREFACE, STATUS, Raw, field, message, request

PING_BYTES = 17
PATIENCE = 5.0      # seconds for one call, where 0.1 is promised: this is no stopwatch


class Bounds(Case):
    def connect(self, server, **options):
        raw = Raw(server.path, **options)
        self.addCleanup(raw.close)
        return raw

    def assert_served(self, server):
        begin = time.monotonic()
        with Raw(server.path) as raw:
            self.assertTrue(raw.works())
        self.assertLess(time.monotonic() - begin, PATIENCE)
        if OWN_MEMORY:
            self.assertLess(server.resident(), MEMORY_MAX)

    def closed(self, raws):
        """Those that the server has closed."""
        gone = []
        for raw in raws:
            raw.socket.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                raw.wait_closed()
                gone.append(raw)
            raw.socket.settimeout(20)
        return gone

    @needs_root     # its directory in /proc is root's
    def test_descriptors_do_not_leak(self):
        server = self.start()
        rpc = self.client(server)
        rpc.status()
        before = server.descriptors()
        for turn in range(500):
            with Raw(server.path, hello=turn % 5 > 0) as raw:
                if turn % 5 == 1:
                    raw.send(b'garbage' * 10)
                elif turn % 5 == 2:
                    self.assertTrue(raw.works())
                elif turn % 5 == 3:
                    raw.send(DataFrame(raw.open(request(STATUS)), EMPTY[:1]))
        until(lambda: server.descriptors() == before, 'closed descriptors')
        rpc.status()
        self.assert_served(server)

    def test_300_idle_connections(self):
        """More than the 256 allowed: the idle give way, and the one that works goes on."""
        server = self.start()
        worker = self.connect(server)
        idle = []
        for _ in range(300):
            idle.append(self.connect(server))
            self.assertIsNotNone(idle[-1].frame())
            self.assertTrue(worker.works())
        until(lambda: len(self.closed(idle)) >= 45, 'idle connections closed')
        self.assertLessEqual(len(self.closed(idle)), 60)
        self.assertTrue(worker.works())
        self.assert_served(server)

    def test_the_longest_idle_gives_way(self):
        server = self.start('--max-connections', '4')
        raws = [self.connect(server) for _ in range(4)]
        for raw in raws:
            self.assertTrue(raw.works())
            time.sleep(0.01)                    # the server counts milliseconds
        self.assertTrue(raws[0].works())        # so that raws[1] is idle the longest
        stream = raws[2].open(request(STATUS))  # and raws[2] is not idle
        raws[2].drained()
        for victim in (1, 3):
            newcomer = self.connect(server)
            self.assertTrue(newcomer.works())
            raws[victim].wait_closed()
        self.assertEqual(self.closed([raws[0], raws[2]]), [])
        raws[2].send(DataFrame(stream, EMPTY, flags=['END_STREAM']))
        self.assertEqual(raws[2].wait(stream).status, 0)

    @needs_root
    def test_the_longest_idle_of_the_user_who_has_most_gives_way(self):
        server = self.start('--max-connections', '3', '--mode', '0666', '--allow-uid',
                            f'0,{STRANGER},{STRANGER + 1}')

        def connect_as(uid):
            os.seteuid(uid)
            try:
                raw = self.connect(server)
            finally:
                os.seteuid(0)
            self.assertTrue(raw.works())
            time.sleep(0.01)                    # the server counts milliseconds
            return raw
        stranger, first, second = (connect_as(uid) for uid in (STRANGER, 0, 0))
        third = connect_as(0)
        first.wait_closed()
        self.assertEqual(self.closed([stranger, second, third]), [])
        fourth = connect_as(STRANGER + 1)       # has none of its own: the longest idle of the user who has most
        second.wait_closed()
        self.assertEqual(self.closed([stranger, third, fourth]), [])

    def test_none_idle(self):
        """The one that holds most is closed, the newcomer is served."""
        server = self.start('--max-connections', '4')
        raws = [self.connect(server) for _ in range(4)]
        for number, raw in enumerate(raws):
            for _ in range(40 if number == 2 else 1):
                stream = raw.open(request(ENCRYPT_V1))
                raw.send(DataFrame(stream, message(bytes(1000))[:500]))
            raw.drained()
        self.assertTrue(self.connect(server).works())
        raws[2].wait_closed()
        self.assertEqual(len(self.closed(raws)), 1)

    def test_4097_streams(self):
        server = self.start()
        raws = [self.connect(server) for _ in range(16)]
        for raw in raws:
            self.assertTrue(raw.works())
            for _ in range(256):
                raw.open(request(STATUS))
            raw.drained()
        self.assertEqual(self.closed(raws), [])
        newcomer = self.connect(server)
        self.assertTrue(newcomer.works())
        self.assertEqual(len(self.closed(raws)), 1)
        self.assert_served(server)

    def test_a_client_that_never_reads(self):
        server = self.start()
        rpc = self.client(server)
        rpc.status()
        body = message(field(1, b'v1beta1') + field(2, bytes(60000)))
        greedy = socket.socket(socket.AF_UNIX)
        self.addCleanup(greedy.close)
        greedy.settimeout(1)
        greedy.connect(server.path)
        raw = Raw(server.path)          # only for its header encoder
        self.addCleanup(raw.close)
        windows = SettingsFrame(settings={SettingsFrame.INITIAL_WINDOW_SIZE: 0x7fffffff})
        with contextlib.suppress(TimeoutError, ConnectionError):
            greedy.sendall(PREFACE + windows.serialize() +
                           b'\0\0\4\x08\0\0\0\0\0\x7f\xff\0\0')     # WINDOW_UPDATE
            for number in range(1, 500, 2):
                frames = raw.header_frames(number, request(ENCRYPT_V1), False)
                frames += [DataFrame(number, body[at:at + 16384]) for at in range(0, len(body), 16384)]
                frames[-1].flags.add('END_STREAM')
                greedy.sendall(b''.join(frame.serialize() for frame in frames))
        self.assert_served(server)
        self.assertEqual(rpc.status().healthz, 'ok')

    def test_bodies_that_stop(self):
        """Large requests, all but their last byte, on many connections: 4 MiB are kept at most."""
        server = self.start()
        body = message(field(1, b'v1beta1') + field(2, bytes(60000)))[:-1]
        raws = []
        for _ in range(30):
            raws.append(self.connect(server))
            with contextlib.suppress(ConnectionError):
                for _ in range(6):
                    stream = raws[-1].open(request(ENCRYPT_V1))
                    raws[-1].upload(stream, body, end=False)
        self.assert_served(server)
        self.assertTrue(self.closed(raws))

    def test_refused_streams_leave_nothing(self):
        """Thousands of calls on one connection cost no more than one."""
        server = self.start()
        raw = self.connect(server)
        for _ in range(3000):
            self.assertEqual(raw.call('/x').status, 12)
        self.assert_served(server)

    def test_what_a_peer_does_not_take_is_kept(self):
        """And nothing more is read from it, until it has taken that: each PING is answered in the end."""
        raw = self.connect(self.start())
        raw.ping()
        pings = b''.join(PingFrame(opaque_data=n.to_bytes(8, 'big')).serialize() for n in range(200000))
        raw.pongs.clear()
        raw.socket.setblocking(False)
        sent = 0
        while select.select([], [raw.socket], [], 0.5)[1]:
            sent += raw.socket.send(pings[sent:sent + 65536])
        raw.socket.settimeout(WAIT)
        self.assertGreater(sent, 65536)
        self.assertLess(sent, len(pings))
        whole = sent // PING_BYTES
        while len(raw.pongs) < whole:
            self.assertIsNotNone(raw.frame(), f'closed after {len(raw.pongs)} of {whole} answers')
        self.assertEqual(raw.pongs, [n.to_bytes(8, 'big') for n in range(whole)])

    def test_newcomers_do_not_go_first(self):
        """Of many who wait to be accepted a few are, and then those have a turn who have been."""
        server = self.start()
        raw = self.connect(server)
        accepted = re.compile(rb'^kmsplugin_connections_total (\d+)$', re.M)
        before = int(accepted.search(raw.get('/metrics').data)[1])
        server.signal(signal.SIGSTOP)
        self.addCleanup(server.signal, signal.SIGCONT)
        until(lambda: b'\nState:\tT' in server.proc('status'), 'stopped')
        for _ in range(100):        # all fit in the backlog
            self.connect(server, hello=False)
        stream = raw.open(request('/metrics', method='GET', content_type=None), end=True)
        server.signal(signal.SIGCONT)
        self.assertLess(int(accepted.search(raw.wait(stream).data)[1]) - before, 50)
