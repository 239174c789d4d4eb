"""Peers that mean harm, one kind after the other, against one running plugin.

    hostile.py [NAME...]    all, or those whose name contains one of the words

While each goes on another client's calls are timed, and when it is over the plugin must be
the same process with the descriptors and the memory that it had before. A line `ok` or
`not ok` for each, a table, and the sum. Needs root, for /proc.

Memory: musl gives back what is free, so a round ends within SLACK of the beginning; but where a
block of another client lies between, the pages around it stay: so a round may also end within
KEPT_MAX of it and no longer grow.
glibc keeps what it once had: a round must not grow. What leaks does so in every round.

Then the same plugin with two users: under each hoard of one (NEIGHBOURS) every call of the other
has to succeed, at the first attempt, and its idle connections have to stay.

Timing is a bound on starvation and nothing else: the slowest call has to come in under
LATENCY_MS in one of ATTEMPTS, since the machine may have other things to do.
"""
import contextlib
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import time

import plugin
from plugin import MEMORY_MAX, STRANGER, WAIT, Server, until
from raw import (DECRYPT, EMPTY, ENCRYPT, ENCRYPT_V1, FRAME_MAX, PREFACE, PROTOCOL_ERROR, STATUS, WINDOW, Raw,
                 field, message, request)
from hpack import Encoder

LATENCY_MS = 100        # of another client's slowest call
ATTEMPTS = 6            # rounds, until one is within all bounds
RETRIES = 20            # of one call of the other client
SLACK = 64 << 10        # bytes that may stay after an attack
KEPT_MAX = 256 << 10    # bytes that may stay around what others hold
SETTLE = 12.0           # seconds: longest time-out of the plugin, and some
CASE_SECONDS = 240
LIMIT = 10.0            # seconds: the plugin's own time-outs
METER = '--meter'       # runs the other client
VICTIM = '--victim'     # runs the other user's
IDLE = 8                # connections of the other user that rest
BURST = 200             # its requests that are open at a time
HOARD_SECONDS = 4.0
FAILED = 'FAILED'
CONNECTIONS = 256       # the plugin's own limit
STREAMS = 256           # of a connection
ALL_STREAMS = 4096

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, _, PING, _, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS = 1, 1, 4
WIDE = struct.pack('>HI', 4, 0x7fffffff)        # SETTINGS_INITIAL_WINDOW_SIZE
SHUT = struct.pack('>HI', 4, 0)


def frame(kind, flags, stream, payload=b''):
    return struct.pack('>I', len(payload))[1:] + struct.pack('>BBI', kind, flags, stream) + payload


def literal(name, value):
    """A header field that leaves no trace in the HPACK table."""
    def string(s):
        return (bytes([len(s)]) if len(s) < 127 else integer(len(s), 7)) + s
    return b'\0' + string(name) + string(value)


def integer(value, bits, top=0):
    """HPACK's integer, RFC 7541 5.1, when it does not fit in its first byte."""
    out, value = [top | (1 << bits) - 1], value - ((1 << bits) - 1)
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out + [value])


def head(path, *extra):
    """The header block of a call, as it is the same on every stream."""
    return b''.join(literal(name.encode(), value.encode()) for name, value in request(path, *extra))


def call(stream, path, body, *extra):
    """The bytes of a whole call."""
    parts = [body[at:at + FRAME_MAX] for at in range(0, len(body), FRAME_MAX)]
    return frame(HEADERS, END_HEADERS, stream, head(path, *extra)) + b''.join(
        frame(DATA, END_STREAM if i == len(parts) - 1 else 0, stream, part) for i, part in enumerate(parts))


def v1_encrypt(size):
    return message(field(1, b'v1beta1') + field(2, bytes(size)))


class Peer:
    """A hostile connection: sends without a look at what comes back, and never waits."""

    def __init__(self, path, settings=b'', hello=True):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)       # waits for room in the backlog
        self.socket.setblocking(False)
        self.closed = False
        self.unsent = b''
        if hello:
            self.send(PREFACE + frame(SETTINGS, 0, 0, settings))

    def send(self, data=b''):
        """As much as the plugin takes now; False when something is left, or the plugin has closed."""
        self.unsent += data
        while self.unsent and not self.closed:
            try:
                self.unsent = self.unsent[self.socket.send(self.unsent):]
            except BlockingIOError:
                return False
            except OSError:
                self.closed = True
        return not self.closed

    def insist(self, data, seconds=5.0):
        """Sends all of it, in that time or not at all."""
        end = time.monotonic() + seconds
        while not self.send(data) and not self.closed and time.monotonic() < end:
            data = b''
            select.select([], [self.socket], [], 0.1)
        return not self.unsent and not self.closed

    def hear(self):
        """What has come so far; notes the end."""
        heard = b''
        with contextlib.suppress(BlockingIOError, OSError):
            while piece := self.socket.recv(1 << 16):
                heard += piece
            self.closed = True
        return heard

    def close(self):
        self.socket.close()


@contextlib.contextmanager
def peers(path, count, settings=b'', hello=True):
    """That many peers; those for which there is no room are simply closed."""
    crowd = []
    try:
        for _ in range(count):
            crowd.append(Peer(path, settings, hello))
        yield crowd
    finally:
        for peer in crowd:
            peer.close()


def still_open(crowd):
    for peer in crowd:
        peer.hear()
    return sum(not peer.closed for peer in crowd)


def closed_in_time(crowd, begin, limit=LIMIT):
    """Waits until the plugin has closed them all, not before its time-out and not long after."""
    until(lambda: time.monotonic() > begin + limit - 1, 'time passes')
    if still_open(crowd) == 0:
        return
    end = begin + limit + 8
    while still_open(crowd) and time.monotonic() < end:
        time.sleep(0.05)
    assert still_open(crowd) == 0, f'{still_open(crowd)} open after {time.monotonic() - begin:.0f} s'


# ------------------------------------------------------------ The other client

class Meter:
    """A process of its own that calls Encrypt and times it, on one connection and on fresh ones."""

    def __init__(self, path):
        self.process = subprocess.Popen([sys.executable, os.path.abspath(__file__), METER, path],
                                        stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == 'ready\n', 'the other client died'

    @staticmethod
    def measure(path):
        stop = []
        signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
        signal.alarm(CASE_SECONDS)
        print('ready', flush=True)
        body = message(field(1, b'0123456789abcdef') + field(2, b'meter'))
        worst, calls, again, wrong, raw = 0.0, 0, 0, '', None
        while (calls == 0 or not stop) and not wrong:
            if raw is not None and calls % 8 == 7:
                raw.close()
                raw = None
            begin = time.monotonic()
            for turn in range(RETRIES): # an idle connection may give way; gRPC clients then come back, too
                try:
                    raw = raw or Raw(path)
                    answer = raw.call(ENCRYPT, body)
                except OSError as error:
                    answer, why = None, error
                if answer is not None and not answer.closed:
                    break
                if raw:
                    raw.close()
                raw, again = None, again + 1
                time.sleep(min(0.05, 0.002 * 2 ** turn))
            worst = max(worst, time.monotonic() - begin)
            if answer is None or answer.status != 0:
                wrong = repr(answer or why)
            calls += 1
            time.sleep(0.003)
        print(1000 * worst, calls, again, wrong)

    def stop(self):
        """Milliseconds of the slowest call, and how often it had to connect again."""
        self.process.terminate()
        told, _ = self.process.communicate()
        assert told, 'the other client died'
        worst, calls, again, wrong = told.split(' ', 3)
        assert not wrong.strip(), f'the other client got {wrong[:300]} after {calls} calls'
        assert int(calls) > 0
        return float(worst), int(again)


class Victim:
    """A process of root's: it works on two connections of its own, on fresh ones, and has idle ones. Nothing of it may fail."""

    def __init__(self, path):
        self.process = subprocess.Popen([sys.executable, os.path.abspath(__file__), VICTIM, path],
                                        stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == 'ready\n', 'the other user died'

    @staticmethod
    def burst(raw):
        """So many requests that all wait for their last byte, and then get it: what a client that works holds."""
        body = v1_encrypt(200)
        streams = [raw.open(request(ENCRYPT_V1)) for _ in range(BURST)]
        raw.send(*[frame(DATA, 0, stream, body[:-1]) for stream in streams])
        raw.send(*[frame(DATA, END_STREAM, stream, body[-1:]) for stream in streams])
        for stream in streams:
            answer = raw.wait(stream)
            assert answer.status == 0, f'of a burst: {answer}'
            del raw.answers[stream]

    @staticmethod
    def work(path, stop):
        """The slowest call in seconds, and how many there were."""
        worst, calls, body = 0.0, 0, message(field(1, b'0123456789abcdef') + field(2, b'victim'))
        with contextlib.ExitStack() as stack:
            idle = [stack.enter_context(Raw(path)) for _ in range(IDLE)]
            steady, worker = (stack.enter_context(Raw(path)) for _ in range(2))
            for raw in idle:
                assert raw.works()
            print('ready', flush=True)
            while calls == 0 or not stop:
                begin = time.monotonic()
                assert steady.call(ENCRYPT, body).status == 0, f'of the steady connection: {steady.answers}'
                worst = max(worst, time.monotonic() - begin)
                if calls % 4 == 3:
                    with Raw(path) as fresh:
                        assert fresh.call(ENCRYPT, body).status == 0, f'of a fresh connection: {fresh.answers}'
                if calls % 16 == 15:
                    Victim.burst(worker)
                steady.answers.clear()
                calls += 1
                time.sleep(0.003)
            for number, raw in enumerate(idle):
                assert raw.works(), f'idle connection {number}'
        return worst, calls

    @staticmethod
    def run(path):
        stop = []
        signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
        signal.alarm(CASE_SECONDS)
        try:
            worst, calls = Victim.work(path, stop)
            print(f'{1000 * worst} {calls} ', flush=True)
        except (AssertionError, OSError) as error:
            print(f'0 0 {error!r}'[:300].replace('\n', ' '), flush=True)

    def stop(self):
        """Milliseconds of the slowest call, and how many calls there were."""
        self.process.terminate()
        told, _ = self.process.communicate()
        assert told, 'the other user died'
        worst, calls, wrong = told.split(' ', 2)
        assert not wrong.strip(), f'the other user lost something: {wrong.strip()}'
        return float(worst), int(calls)


# ------------------------------------------------------------------- Attacks
#
# Each takes the path of the socket and the server, and returns a word on what it did.

def never_reads(path, _):
    """Large answers asked for, none read."""
    request_bytes = v1_encrypt(60000)
    sent = 0
    with peers(path, 20, WIDE) as crowd:
        for peer in crowd:
            peer.send(frame(WINDOW_UPDATE, 0, 0, struct.pack('>I', 0x7fff0000)))
        for number in range(1, 64, 2):
            for peer in crowd:
                sent += peer.send(call(number, ENCRYPT_V1, request_bytes))
        time.sleep(1)
    return f'{sent} calls of 60 kB on 20 connections'


def zero_window(path, _):
    """Answers made that may not be sent."""
    with peers(path, 20, SHUT) as crowd:
        for number in range(1, 2 * STREAMS, 2):
            for peer in crowd:
                peer.send(call(number, ENCRYPT_V1, v1_encrypt(200)) if number % 4 == 1 else
                          call(number, STATUS, EMPTY))
        time.sleep(1)
        left = still_open(crowd)
    return f'256 answers each on 20 connections, {left} left open'


def zero_window_times_out(path, _):
    """An answer that nobody takes has its time."""
    with peers(path, 4, SHUT) as crowd:
        begin = time.monotonic()
        for peer in crowd:
            peer.send(call(1, STATUS, EMPTY))
        closed_in_time(crowd, begin)
    return 'an answer each on 4 connections, unread for 10 s'


def shut_window(path, _):
    """Large answers made that may not be sent: the plugin stops taking requests until they are read."""
    body, sent, silent = v1_encrypt(60000), 0, False
    with Raw(path, window=0, grant=0) as raw:
        raw.ping()
        for _ in range(40):
            stream, left = raw.open(request(ENCRYPT_V1)), body
            while left and not silent:
                size = min(len(left), raw.theirs[0], FRAME_MAX)
                if size > 0:
                    raw.send(frame(DATA, END_STREAM if size == len(left) else 0, stream, left[:size]))
                    left, sent = left[size:], sent + size
                    raw.theirs[0] -= size
                elif raw.buffer or select.select([raw.socket], [], [], 0.5)[0]:
                    raw.frame()
                else:
                    silent = True
    assert silent and 256 << 10 < sent < 512 << 10, sent
    return f'{sent >> 10} KiB of requests taken on 1 connection'


def window_overflow(path, _):
    """Windows past 2^31-1, and DATA past the plugin's own window."""
    big = struct.pack('>I', 0x7fffffff)
    wide = frame(WINDOW_UPDATE, 0, 0, big)
    attempts = [(wide, True), (frame(SETTINGS, 0, 0, struct.pack('>HI', 4, 0x80000000)), True),
                (frame(HEADERS, END_HEADERS, 1, head(STATUS)) + frame(WINDOW_UPDATE, 0, 1, big) +
                 frame(WINDOW_UPDATE, 0, 1, big), False),
                (frame(WINDOW_UPDATE, 0, 0, bytes(4)), True)]
    for attack, fatal in attempts * 50:
        with Raw(path) as raw:
            raw.send(attack)
            while not raw.goaways and not any(a.reset is not None for a in raw.answers.values()):
                assert raw.frame() is not None or raw.goaways, 'closed without a word'
            assert bool(raw.goaways) == fatal, attack
    with peers(path, 20) as crowd:
        for peer in crowd:
            for number in range(1, 40, 2):
                peer.send(frame(HEADERS, END_HEADERS, number, head(ENCRYPT_V1)))
                for part in range(20):
                    data = message(bytes(60000)) if part == 0 else bytes(16000)
                    peer.send(frame(DATA, 0, number, data[:16000]))
        time.sleep(0.3)
    return '200 updates, and DATA past the window on 20 connections'


def rapid_reset(path, _):
    """CVE-2023-44487."""
    total = 20000
    block, cancel = head(ENCRYPT_V1), struct.pack('>I', 8)
    with peers(path, 4) as crowd:
        for begin in range(0, total // 4, 500):
            piece = b''.join(frame(HEADERS, END_HEADERS, 2 * n + 1, block) + frame(RST_STREAM, 0, 2 * n + 1, cancel)
                             for n in range(begin, begin + 500))
            for peer in crowd:
                peer.insist(piece)
                peer.hear()
        left = still_open(crowd)
    return f'{total} streams opened and reset, {left} of 4 connections left'


def rapid_reset_of_calls(path, _):
    """The same after a whole request: the work is done for nothing."""
    total, cancel, body = 20000, struct.pack('>I', 8), v1_encrypt(32)
    with peers(path, 4) as crowd:
        for begin in range(0, total // 4, 250):
            piece = b''.join(call(2 * n + 1, ENCRYPT_V1, body) + frame(RST_STREAM, 0, 2 * n + 1, cancel)
                             for n in range(begin, begin + 250))
            for peer in crowd:
                peer.insist(piece)
                peer.hear()
    return f'{total} calls made and reset'


def flood(path, piece, seconds=2.0, count=8, first=b'', deaf=False):
    """The same bytes over and over on `count` connections. Returns how many bytes were taken."""
    taken, end = 0, time.monotonic() + seconds
    with peers(path, count) as crowd:
        for peer in crowd:
            peer.send(first)
        while time.monotonic() < end:
            for i, peer in enumerate(crowd):
                if peer.closed:
                    peer.close()
                    crowd[i] = peer = Peer(path)
                    peer.send(first)
                before = len(peer.unsent)
                if before < len(piece):
                    peer.send(piece)
                    before += len(piece)
                else:
                    peer.send()
                taken += before - len(peer.unsent)
                if not deaf:
                    peer.hear()
            select.select([], crowd_sockets(crowd), [], 0.05)
    return taken


def crowd_sockets(crowd):
    return [peer.socket for peer in crowd if not peer.closed]


def ping_flood(path, _):
    return f"{flood(path, frame(PING, 0, 0, bytes(8)) * 4000) // 17} PINGs"


def ping_flood_unread(path, _):
    """The answers to PINGs are not read."""
    return f"{flood(path, frame(PING, 0, 0, bytes(8)) * 4000, deaf=True) // 17} PINGs, their answers unread"


def settings_flood(path, _):
    many = struct.pack('>HI', 4, 70000) * 200
    taken = flood(path, frame(SETTINGS, 0, 0) * 2000 + frame(SETTINGS, 0, 0, many) * 20)
    return f'{taken >> 10} KiB of SETTINGS'


def settings_flood_unread(path, _):
    taken = flood(path, frame(SETTINGS, 0, 0) * 4000, deaf=True)
    return f'{taken // 9} SETTINGS, their answers unread'


def priority_flood(path, _):
    """Streams that depend on streams that are not there."""
    piece = b''.join(frame(PRIORITY, 0, 2 * n + 1, struct.pack('>IB', 2 * n + 3, 255)) for n in range(4000))
    return f'{flood(path, piece) // 14} PRIORITYs'


def empty_data_flood(path, _):
    taken = flood(path, frame(DATA, 0, 1) * 8000, first=frame(HEADERS, END_HEADERS, 1, head(ENCRYPT_V1)))
    return f'{taken // 9} empty DATA frames'


def continuation_flood(path, _):
    """CVE-2024-28182 and its like: a header block without an end."""
    first = frame(HEADERS, 0, 1, head(STATUS))
    empty = flood(path, frame(CONTINUATION, 0, 1) * 4000, 1.0, first=first)
    full = flood(path, frame(CONTINUATION, 0, 1, literal(b'x', b'y' * 100) * 100) * 20, 1.0, first=first)
    return f'{empty // 9} empty CONTINUATIONs, and {full >> 10} KiB of fields'


def unknown_frames_flood(path, _):
    """Frames of no known type, and window updates, cost a look each."""
    taken = flood(path, frame(0xbe, 0, 0, bytes(100)) * 500 + frame(WINDOW_UPDATE, 0, 0, b'\0\0\0\1') * 500)
    return f'{taken >> 10} KiB of frames of other types'


def hpack_bomb(path, _):
    """One field of 4,000 bytes in the table, called up by one byte as often as fits."""
    bomb = b'\x40\x01x' + integer(4000, 7) + b'y' * 4000
    blocks = head(STATUS) + bomb + b'\xbe' * 12000
    told = 0
    for _ in range(20):
        with Raw(path) as raw:
            for _ in range(4):
                stream = raw.expect()
                raw.send(frame(HEADERS, END_HEADERS | END_STREAM, stream, blocks))
                answer = raw.wait(stream)
                assert answer.closed or answer.reset is not None or answer.status == 8, answer
                told += 1
                if answer.closed:
                    break
    return f'{told} blocks of 16 KB that stand for 48 MB each'


def hpack_table(path, _):
    """Tables as large as may be, filled and resized over and over."""
    piece = b''
    for n in range(40):
        block = (b'\x20\x3f\xe1\x1f' if n % 2 else b'') + head('/x') + b''.join(
            b'\x40\x04k%03d\x01v' % i for i in range(100))
        piece += frame(HEADERS, END_HEADERS | END_STREAM, 2 * n + 1, block)
    done = 0
    for _ in range(20):
        with peers(path, 10) as crowd:
            done += sum(peer.insist(piece) for peer in crowd)
    return f'{done} of 200 connections with 4,000 table entries each'


def endless_value(path, _):
    """A value of 256 MB is announced, and comes."""
    announced = head(STATUS) + b'\0\x01x' + integer(1 << 28, 7)
    taken = flood(path, frame(CONTINUATION, 0, 1, b'v' * 16000) * 4, first=frame(HEADERS, 0, 1, announced))
    return f'{taken >> 10} KiB of one value'


def list_of(size):
    """Header fields that count as `size` bytes in RFC 9113 6.5.2."""
    fields = request(STATUS)
    left = size - sum(len(n) + len(v) + 32 for n, v in fields)
    while left > 0:
        value = min(left - 33, 3000) if left - 33 - 3000 > 33 or left - 33 <= 3000 else left // 2
        fields.append(('x', 'v' * value))
        left -= value + 33
    assert left == 0 and sum(len(n) + len(v) + 32 for n, v in fields) == size
    return fields


def header_lists(path, _):
    """At the limit of 16 KiB and over it."""
    for _ in range(20):
        with Raw(path) as raw:
            raw.encoder = Encoder()
            raw.encoder.header_table_size = 0
            for size, status in ((16383, 0), (16384, 0), (16385, 8), (20000, 8)):
                answer = raw.call_with(list_of(size), EMPTY)
                assert answer.status == status, (size, answer)
            assert raw.works()
            huge = raw.call_with(request(STATUS) + [('x', 'v' * 3000)] * 40, EMPTY)
            assert huge.status == 8 or huge.reset is not None or huge.closed, huge
    return '100 header lists from 16,383 to 120,000 bytes'


def half_sent(path, _):
    """All streams of all connections wait for the rest of a message."""
    part = v1_encrypt(1000)[:-1]
    opened = 0
    with peers(path, CONNECTIONS - 6) as crowd:
        for number in range(1, 2 * STREAMS, 16):
            piece = b''.join(frame(HEADERS, END_HEADERS, n, head(ENCRYPT_V1)) + frame(DATA, 0, n, part)
                             for n in range(number, number + 16, 2))
            for peer in crowd:
                opened += 8 * peer.send(piece)
        time.sleep(0.5)
        left = still_open(crowd)
    return f'{opened} streams on {CONNECTIONS - 6} connections, {left} of them left open'


def all_at_once(path, _):
    """What each connection may hold, on nearly all of them: tables, streams, bodies, answers not read."""
    table = b''.join(b'\x40\x04k%03d\x01v' % i for i in range(110))
    part, whole = v1_encrypt(960)[:-1], v1_encrypt(30)
    with peers(path, CONNECTIONS - 6, SHUT) as crowd:
        for peer in crowd:
            peer.send(frame(HEADERS, END_HEADERS | END_STREAM, 1, head('/x') + table))
        for number in range(3, 35, 2):
            for peer in crowd:
                peer.send(frame(HEADERS, END_HEADERS, number, head(ENCRYPT_V1)) +
                          frame(DATA, *((END_STREAM, number, whole) if number % 8 == 3 else (0, number, part))))
        time.sleep(0.5)
        left = still_open(crowd)
    return f'tables, answers and bodies on {CONNECTIONS - 6} connections, {left} left open'


def bodies_of_1025(path, _):
    """The worst size for a heap of classes, on 20 connections, beside 180 idle ones."""
    body = v1_encrypt(1008)[:1025 + 5]
    with peers(path, 180) as idle, peers(path, 20) as crowd:
        for number in range(1, 2 * STREAMS, 2):
            for peer in crowd:
                peer.send(frame(HEADERS, END_HEADERS, number, head(ENCRYPT_V1)) + frame(DATA, 0, number, body[:1029]))
        time.sleep(0.5)
        left = still_open(crowd), still_open(idle)
    return f'5,120 bodies, {left[0]} of 20 left open, {left[1]} of 180 idle ones'


def sizes_in_turn(path, _):
    """Blocks of each size, as many as may be, and let go for those of the next: kept for reuse, they would add up."""
    done = 0
    for size in (60, 120, 250, 500, 1000, 2000, 14000):
        streams = STREAMS if size <= 2048 else 17
        body = v1_encrypt(size)[:size + 4]      # all but its last bytes
        with peers(path, 16) as crowd:
            for number in range(1, 2 * streams, 2):
                piece = frame(HEADERS, END_HEADERS, number, head(ENCRYPT_V1)) + frame(DATA, 0, number, body)
                for peer in crowd:
                    done += peer.insist(piece)
    return f'{done} bodies of 60 to 14,000 bytes'


def large_bodies(path, _):
    """64 KiB announced on every stream, and all but the last byte sent."""
    body = v1_encrypt(65400)[:-1]
    with peers(path, 40) as crowd:
        for number in range(1, 16, 2):
            for peer in crowd:
                peer.send(call(number, ENCRYPT_V1, body)[:-len(body) - 9 * 4])
                for at in range(0, len(body), FRAME_MAX):
                    peer.send(frame(DATA, 0, number, body[at:at + FRAME_MAX]))
        time.sleep(0.5)
        left = still_open(crowd)
    return f'8 bodies of 64 KiB on each of 40 connections, {left} left open'


def lied_lengths(path, _):
    """Lengths that no message may have, and content-length that is not the body's."""
    for _ in range(50):
        with Raw(path) as raw:
            for length in (65537, 1 << 24, 0xffffffff):
                answer = raw.call(ENCRYPT_V1, b'\0' + struct.pack('>I', length))
                assert answer.status == 8, answer
            for told in ('4', '6', '18446744073709551616', '-1', ''):
                answer = raw.call(STATUS, EMPTY, ('content-length', told))
                assert answer.reset == PROTOCOL_ERROR, (told, answer)
            assert raw.works()
    return '400 calls'


def metrics_hoard(path, _):
    """The longest answer there is, asked for on every stream and not taken."""
    block = b''.join(literal(n, v) for n, v in ((b':method', b'GET'), (b':scheme', b'http'), (b':path', b'/metrics')))
    with peers(path, 16, SHUT) as crowd:
        for number in range(1, 2 * STREAMS, 2):
            for peer in crowd:
                peer.send(frame(HEADERS, END_HEADERS | END_STREAM, number, block))
        time.sleep(0.5)
        left = still_open(crowd)
    return f'4,096 GET /metrics, {left} of 16 connections left open'


def slow_preface(path, _):
    """Nothing, half a preface, and a preface without SETTINGS."""
    with peers(path, 60, hello=False) as crowd:
        begin = time.monotonic()
        for i, peer in enumerate(crowd):
            peer.send((b'', PREFACE[:10], PREFACE)[i % 3])
        for i in range(8):                              # a byte now and then is no progress
            time.sleep(1)
            for peer in crowd[1::3]:
                peer.send(PREFACE[10 + i:11 + i])
        closed_in_time(crowd, begin)
    return '60 connections, closed after 10 s'


def slow_headers(path, _):
    """A byte of the header block a second."""
    block = head(STATUS)
    with peers(path, 60) as crowd:
        begin = time.monotonic()
        for peer in crowd:
            peer.send(frame(HEADERS, 0, 1, block[:20]))
        for i in range(5):
            time.sleep(1.5)
            for peer in crowd[::2]:
                peer.send(frame(CONTINUATION, 0, 1, block[20 + i:21 + i]))
        closed_in_time(crowd, begin)
    return '60 connections, closed after 10 s'


def slow_frame(path, _):
    """A frame's own bytes come one at a time."""
    whole = frame(HEADERS, END_HEADERS, 1, head(STATUS))
    with peers(path, 60) as crowd:
        begin = time.monotonic()
        for i in range(60):
            for peer in crowd:
                peer.send(whole[i:i + 1])
            time.sleep(0.02)
        for peer in crowd:
            peer.send(frame(HEADERS, END_HEADERS, 1, head(STATUS))[60:] + frame(DATA, 0, 1, EMPTY[:1]))
        until(lambda: time.monotonic() > begin + LIMIT + 4, 'time passes')
        heard = [peer.hear() for peer in crowd]
    assert all(b'grpc-status' in h or b'complete in time' in h or len(h) > 60 for h in heard)
    return '60 connections, answered after 10 s'


def slow_body(path, _):
    """A byte of the body a second, on 64 streams each: DEADLINE_EXCEEDED after 10 s, the connection lives."""
    body, raws = v1_encrypt(100), []
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            raw = stack.enter_context(Raw(path))
            for _ in range(64):
                stream = raw.open(request(ENCRYPT_V1))
                raw.send(frame(DATA, 0, stream, body[:1]))
            raws.append(raw)
        begin = time.monotonic()
        for i in range(1, 9):
            time.sleep(1)
            for raw in raws:
                raw.send(frame(DATA, 0, 1, body[i:i + 1]))
        for raw in raws:
            for stream in range(1, 128, 2):
                assert raw.wait(stream).status == 4, raw.answers[stream]
            assert raw.works()
        taken = time.monotonic() - begin
    assert LIMIT - 2 < taken < LIMIT + 8, taken
    return f'1,280 streams, DEADLINE_EXCEEDED after {taken:.0f} s'


def short_deadlines(path, _):
    """Requests that are to time out at once, without their bodies."""
    done, heads = 0, head(STATUS, ('grpc-timeout', '1m'))
    with peers(path, 16) as crowd:
        for begin in range(0, 1600, 200):
            piece = b''.join(frame(HEADERS, END_HEADERS, 2 * n + 1, heads) for n in range(begin, begin + 200))
            for peer in crowd:
                done += 200 * peer.send(piece)
                peer.hear()
            time.sleep(0.02)
    return f'{done} calls with a deadline of 1 ms'


def idle_connections(path, _):
    """A thousand, where 256 are allowed: the idle ones give way to each other."""
    with peers(path, 1000) as crowd:
        until(lambda: still_open(crowd) <= CONNECTIONS, 'the surplus closed')
        left = still_open(crowd)
        with Raw(path) as raw:
            assert raw.works()
    assert left >= CONNECTIONS - 20, left
    return f'1,000 connections, {left} left open'


def descriptors_run_out(_, server):
    """The limit comes down under a running plugin; newcomers are served by the idle ones' descriptors."""
    path = server.path
    before = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    used = server.descriptors()
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (used + 24, before[1]))
    try:
        with peers(path, 60) as crowd:
            until(lambda: server.descriptors() >= used + 24 or still_open(crowd) < 60, 'descriptors used up')
            with Raw(path) as raw:
                assert raw.works()
        with peers(path, 40, hello=False) as crowd:     # and by none, if all of them are busy
            for peer in crowd:
                peer.send(PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, END_HEADERS, 1, head(STATUS)))
            time.sleep(0.5)
    finally:
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, before)
    with Raw(path) as raw:
        assert raw.works()
    return '100 connections where 24 descriptors were left'


def dropped(path, _):
    """Connections that end in the middle of a request, at another byte each time."""
    whole = PREFACE + frame(SETTINGS, 0, 0) + call(1, ENCRYPT_V1, v1_encrypt(300))
    for i in range(10000):
        peer = Peer(path, hello=False)
        peer.send(whole[:i % len(whole)])
        peer.close()
    return '10,000 connections'


def passed_descriptors(path, server):
    """SCM_RIGHTS with every piece: none of them may arrive."""
    before, sent = server.descriptors(), 0
    with open('/dev/null', 'rb') as null, peers(path, 10) as crowd:
        until(lambda: server.descriptors() >= before + 10, 'connected')
        held = server.descriptors()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack('253i', *[null.fileno()] * 253))]
        for number in range(1, 40, 2):
            for peer in crowd:
                with contextlib.suppress(OSError):
                    peer.socket.sendmsg([call(number, STATUS, EMPTY)], rights)
                    sent += 253
        until(lambda: all(b'grpc-status' in peer.hear() or True for peer in crowd), 'answers')
        time.sleep(0.2)
        assert server.descriptors() <= held + 2, 'descriptors of a peer have come in'  # the meter's own
    return f'{sent} descriptors'


def split_everywhere(path, _):
    """A connection of four calls, cut in two at every byte, and sent byte by byte."""
    bodies = [(STATUS, EMPTY), (ENCRYPT, message(field(1, b'0123456789abcdef') + field(2, b'u'))),
              (ENCRYPT_V1, v1_encrypt(20)), (DECRYPT, message(field(1, bytes(80)) + field(3, b'k')))]
    whole = PREFACE + frame(SETTINGS, 0, 0)
    for i, (name, body) in enumerate(bodies):
        whole += call(2 * i + 1, name, body)
    for cut in range(len(whole) + 1):
        with Raw(path, hello=False) as raw:
            raw.window, raw.ours[0] = WINDOW, WINDOW
            for _ in bodies:
                raw.expect()
            for part in ([whole[:cut], whole[cut:]] if cut else [whole[i:i + 1] for i in range(len(whole))]):
                raw.send(part)
                if cut % 4 == 1:
                    raw.drained()
            assert [raw.wait(stream).status for stream in (1, 3, 5, 7)] == [0, 0, 0, 3], raw.answers
    return f'{len(whole) + 1} ways to send 4 calls'


def malformed_heads(path, _):
    """RFC 9113 section 8: each is a stream error of type PROTOCOL_ERROR and no more."""
    good = [(':method', 'POST'), (':scheme', 'http'), (':path', STATUS), (':authority', 'localhost'),
            ('content-type', 'application/grpc'), ('te', 'trailers')]
    bad = [good[:i] + good[i + 1:] for i in range(3)]                               # one is missing
    bad += [good + [field_] for field_ in good[:5]]                                 # twice, or behind others
    bad += [[field_] + good for field_ in good[:4]]
    bad += [good[1:3] + good[4:] + good[:1], [('x', 'y')] + good]                   # behind a regular field
    bad += [good + [(':status', '200')], [(':unknown', 'x')] + good, [(':', '')] + good, [('', 'x')] + good]
    bad += [good + [(name, 'x')] for name in ('connection', 'keep-alive', 'proxy-connection', 'transfer-encoding',
                                              'upgrade', 'X-Upper', 'with space', 'colon:', 'nul\0', '\x7f')]
    bad += [good + [('te', 'gzip')]] + [good + [('x', value)] for value in ('a\0b', 'a\rb', 'a\nb', ' a', 'a ', '\ta')]
    bad += [[(n, v2 if n == which else v) for n, v in good] for which, v2 in
            ((':path', ''), (':path', 'relative'), (':method', ''), (':scheme', ''))]
    bad += [[(':method', 'CONNECT')] + good[1:]]
    wrong = []
    with Raw(path) as raw:
        for fields in bad:
            stream = raw.expect()
            raw.send(frame(HEADERS, END_HEADERS, stream,
                           b''.join(literal(n.encode('latin-1'), v.encode('latin-1')) for n, v in fields)))
            raw.send(frame(DATA, END_STREAM, stream, EMPTY))
            answer = raw.wait(stream)
            if answer.reset != PROTOCOL_ERROR:
                wrong.append((fields, answer))
        assert not wrong, wrong
        assert raw.works()
    return f'{len(bad)} header lists on one connection'


def flooders(path, _):
    """Nearly every connection there may be asks as fast as it can."""
    piece, end, number, sent = b'', time.monotonic() + 4, 1, 0
    with peers(path, 240) as crowd:
        while time.monotonic() < end and number < 60000:
            piece = b''.join(call(n, ENCRYPT_V1, v1_encrypt(400)) for n in range(number, number + 20, 2))
            number += 20
            for peer in crowd:
                if len(peer.unsent) < 1 << 16:
                    sent += 10
                    peer.send(piece)
                else:
                    peer.send()
                peer.hear()
    return f'{sent} calls on 240 connections'


def short_calls(path, _):
    """Sockets full of short requests with short answers, on nearly all connections: a turn's fair share."""
    block = b''.join(literal(n, v) for n, v in ((b':method', b'GET'), (b':scheme', b'http'), (b':path', b'/x')))
    end, number, done = time.monotonic() + 4, 1, 0
    with peers(path, 240) as crowd:
        while time.monotonic() < end:
            piece = b''.join(frame(HEADERS, END_HEADERS | END_STREAM, n, block)
                             for n in range(number, number + 6000, 2))
            number += 6000
            for peer in crowd:
                peer.send(piece)
            while time.monotonic() < end and any(peer.unsent and not peer.closed for peer in crowd):
                for peer in crowd:
                    done += len(peer.hear())
                    peer.send()
    return f'{number // 2} GETs on each of 240 connections, {done >> 10} KiB of answers'


def garbage(path, _):
    """Other protocols, and random bytes behind a right beginning."""
    for i in range(300):
        peer = Peer(path, hello=False)
        peer.send((b'GET / HTTP/1.1\r\n\r\n', b'\x16\x03\x01\x02\x00' + os.urandom(500), os.urandom(3000),
                   PREFACE + os.urandom(3000), PREFACE + frame(SETTINGS, 0, 0) + os.urandom(3000),
                   PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, END_HEADERS, 1, os.urandom(300)))[i % 6])
        peer.close()
    return '300 connections of noise'


ATTACKS = (
    never_reads, zero_window, zero_window_times_out, shut_window, window_overflow, rapid_reset,
    rapid_reset_of_calls, ping_flood, ping_flood_unread, settings_flood, settings_flood_unread, priority_flood,
    empty_data_flood, continuation_flood, unknown_frames_flood, hpack_bomb, hpack_table, endless_value,
    header_lists, half_sent, all_at_once, bodies_of_1025, sizes_in_turn, large_bodies, lied_lengths, metrics_hoard,
    slow_preface, slow_headers, slow_frame, slow_body, short_deadlines, idle_connections, descriptors_run_out,
    dropped, passed_descriptors, split_everywhere, malformed_heads, flooders, short_calls, garbage,
)


# -------------------------------------------------------------------- Hoards
#
# Of a user beside another one. Each is spread over many connections, none of which holds much; what is closed comes again.

def hoard(path, count, fill=b'', settings=b'', seconds=HOARD_SECONDS):
    """That many connections of the stranger, which have sent the same; how many of them had to give way."""
    def stranger():
        os.seteuid(STRANGER)
        try:
            peer = Peer(path, settings)
        finally:
            os.seteuid(0)
        peer.send(fill)
        return peer

    crowd, lost, end = [], 0, time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            if len(crowd) < count:
                crowd.append(stranger())
                continue
            for i, peer in enumerate(crowd):
                peer.send()
                peer.hear()
                if peer.closed:
                    peer.close()
                    crowd[i] = stranger()
                    lost += 1
            time.sleep(0.01)
    finally:
        for peer in crowd:
            peer.close()
    return lost


def unfinished(streams, body):
    """Requests that lack their last byte."""
    return b''.join(frame(HEADERS, END_HEADERS, n, head(ENCRYPT_V1)) + frame(DATA, 0, n, body[:-1])
                    for n in range(1, 2 * streams, 2))


def thin_streams(path, _):
    return f'254 connections of 16 unfinished streams, {hoard(path, 254, unfinished(16, EMPTY + b"x"))} gave way'


def thin_memory(path, _):
    table = frame(HEADERS, END_HEADERS | END_STREAM, 1, head('/x') + b''.join(b'\x40\x04k%03d\x01v' % i for i in range(110)))
    fill = table + unfinished(16, v1_encrypt(30))[len(unfinished(1, v1_encrypt(30))):]
    return f'254 connections with a table and 15 requests of 30 bytes, {hoard(path, 254, fill)} gave way'


def thin_bodies(path, _):
    return f'254 connections with 17 KB of a body, {hoard(path, 254, unfinished(1, v1_encrypt(16000)))} gave way'


def thin_answers(path, _):
    block = b''.join(literal(n, v) for n, v in ((b':method', b'GET'), (b':scheme', b'http'), (b':path', b'/metrics')))
    fill = b''.join(frame(HEADERS, END_HEADERS | END_STREAM, n, block) for n in (1, 3, 5))
    return f'254 connections with 3 unread /metrics, {hoard(path, 254, fill, SHUT)} gave way'


def many_connections(path, _):
    return f'400 connections that rest, {hoard(path, 400)} gave way'


def many_descriptors(path, server):
    before = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    used = server.descriptors()
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (used + 20, before[1]))
    try:
        return f'60 connections where 20 descriptors were left, {hoard(path, 60)} gave way'
    finally:
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, before)


def all_ask_for_metrics(path, _):
    """In one turn, and over and over: rendered once a turn (test/unit.c), and copied for each."""
    block = b''.join(literal(n, v) for n, v in ((b':method', b'GET'), (b':scheme', b'http'), (b':path', b'/metrics')))
    asked, number, end = 0, 1, time.monotonic() + HOARD_SECONDS
    os.seteuid(STRANGER)
    try:
        with peers(path, 200, WIDE) as crowd:
            while time.monotonic() < end:
                for peer in crowd:
                    asked += peer.send(frame(WINDOW_UPDATE, 0, 0, struct.pack('>I', 1 << 20)) +
                                       frame(HEADERS, END_HEADERS | END_STREAM, number, block))
                for peer in crowd:
                    peer.hear()
                number += 2
    finally:
        os.seteuid(0)
    return f'{asked} GET /metrics on 200 connections'


NEIGHBOURS = (thin_streams, thin_memory, thin_bodies, thin_answers, many_connections, many_descriptors, all_ask_for_metrics)


# -------------------------------------------------------------------- Verdict

class Subject:
    """The plugin under attack, and what /proc says of it."""

    def __init__(self, *options):
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit[1], limit[1]))
        self.server = Server(*options)
        with open(plugin.BINARY, 'rb') as file:     # musl's malloc gives back, glibc's keeps for reuse
            self.static = b'ld-linux' not in file.read()
        with Raw(self.server.path) as raw:
            assert raw.works()
        fresh = self.anonymous()
        for attack in (dropped_few, flooders_few):  # pages of its own that a first use takes
            attack(self.server.path)
        self.before = self.calm(None)
        assert not self.static or self.before[1] <= fresh + KEPT_MAX, f'{fresh} bytes at first, then {self.before[1]}'

    def status(self, name):
        for line in self.server.proc('status').decode().splitlines():
            if line.startswith(name + ':'):
                return int(line.split()[1]) << 10
        raise AssertionError(name)

    def anonymous(self):
        return self.status('RssAnon')

    def reset_peak(self):
        with open(f'/proc/{self.server.pid}/clear_refs', 'w', encoding='ascii') as file:
            file.write('5')

    def calm(self, before):
        """Descriptors and anonymous memory when all is quiet again: as before, or what they are in the end."""
        end = time.monotonic() + SETTLE
        while True:
            now = self.server.descriptors(), self.anonymous()
            quiet = before and now[0] == before[0] and now[1] <= before[1] + SLACK
            if quiet or time.monotonic() > end or (before is None and time.monotonic() > end - SETTLE + 3):
                return now
            time.sleep(0.1)


def dropped_few(path):
    for _ in range(50):
        Peer(path).close()


def flooders_few(path):
    with peers(path, 100) as crowd:
        for peer in crowd:
            peer.send(call(1, ENCRYPT_V1, v1_encrypt(30000)))
        time.sleep(0.3)


def attempt(subject, attack):
    """One round: what was done, peak memory, the other client's slowest call in milliseconds."""
    subject.reset_peak()
    meter = Meter(subject.server.path)
    done = None
    try:
        done = attack(subject.server.path, subject.server)
    finally:
        worst, _ = (0, 0) if done is None else meter.stop()
        if done is None:
            with contextlib.suppress(AssertionError):
                meter.stop()
    assert subject.server.process.poll() is None, 'the plugin is gone:\n' + subject.server.log()[-2000:]
    return done, subject.status('VmHWM'), worst


def judge(subject, attack):
    """A row of the table; an AssertionError says what is wrong."""
    rows, more, grown, before = [], [], True, subject.before
    for _ in range(ATTEMPTS):
        rows.append(attempt(subject, attack))
        done, peak, worst = rows[-1]
        assert peak <= MEMORY_MAX, f'{peak >> 10} KiB at the peak ({done})'
        after = subject.calm(before)
        assert after[0] == before[0], f'{after[0]} descriptors, {before[0]} before'
        more.append(after[1])
        steady = len(more) > 1 and more[-1] <= max(more[:-1]) + SLACK // 4 and (
            not subject.static or more[-1] <= before[1] + KEPT_MAX)
        if steady or (subject.static and more[-1] <= before[1] + SLACK):
            grown = False
        if not grown and worst < LATENCY_MS:
            break
    assert not grown, f'{before[1]} bytes of memory before, and after each round {more}'
    worst = min(row[2] for row in rows)
    assert worst < LATENCY_MS, f'another client waited {worst:.0f} ms'
    with Raw(subject.server.path) as raw:
        assert raw.works()
    return done, max(row[1] for row in rows), more[-1] - before[1], worst


def judge_neighbour(subject, attack):
    """The same of a hoard beside another user, who must not lose anything in any round."""
    rows = []
    for _ in range(ATTEMPTS):
        subject.reset_peak()
        victim, done = Victim(subject.server.path), None
        try:
            done = attack(subject.server.path, subject.server)
        finally:
            if done is None:
                with contextlib.suppress(AssertionError):
                    victim.stop()
        worst, calls = victim.stop()
        assert subject.server.process.poll() is None, 'the plugin is gone:\n' + subject.server.log()[-2000:]
        rows.append((f'{done}; {calls} calls of the other user', subject.status('VmHWM'), worst))
        assert rows[-1][1] <= MEMORY_MAX, f'{rows[-1][1] >> 10} KiB at the peak ({done})'
        after = subject.calm(subject.before)
        assert after[0] == subject.before[0], f'{after[0]} descriptors, {subject.before[0]} before'
        if worst < LATENCY_MS:
            break
    done, _, worst = min(rows, key=lambda row: row[2])
    assert worst < LATENCY_MS, f'another user waited {worst:.0f} ms'
    return done, max(row[1] for row in rows), after[1] - subject.before[1], worst


def judge_all(attacks, judge_one, *options):
    """Runs them against one plugin. The rows of the table; of one that failed, without figures."""
    subject, rows = Subject(*options) if attacks else None, []
    for attack in attacks:
        signal.alarm(CASE_SECONDS)
        try:
            row = judge_one(subject, attack)
            print(f'ok {attack.__name__}', flush=True)
        except Exception as error:
            print(f'not ok {attack.__name__}: {type(error).__name__}: {error}', flush=True)
            row = (FAILED, 0, 0, 0.0)
            subject.server.kill()
            subject = Subject(*options)
        signal.alarm(0)
        rows.append((attack.__name__, *row))
    if subject:
        subject.server.stop()
    return rows


def main(words):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    signal.signal(signal.SIGALRM, late)
    def chosen(attacks):
        return [a for a in attacks if not words or any(word in a.__name__ for word in words)]
    rows = judge_all(chosen(ATTACKS), judge)
    rows += judge_all(chosen(NEIGHBOURS), judge_neighbour, '--mode', '0666', '--allow-uid', f'0,{STRANGER}')
    failed = sum(row[1] == FAILED for row in rows)
    print(f'\n{"case":22} {"peak KiB":>8} {"kept KiB":>8} {"worst ms":>8}  what was done')
    for name, done, peak, kept, worst in rows:
        print(f'{name:22} {peak >> 10:8} {kept >> 10:8} {worst:8.1f}  {done}')
    print(f'{len(rows) - failed} passed, {failed} failed', flush=True)
    return 0 if rows and not failed else 1


def late(*_):
    raise AssertionError(f'more than {CASE_SECONDS} s')


if __name__ == '__main__':
    assert os.geteuid() == 0, 'needs root, for /proc'
    if sys.argv[1:2] == [METER]:
        Meter.measure(sys.argv[2])
    elif sys.argv[1:2] == [VICTIM]:
        Victim.run(sys.argv[2])
    else:
        sys.exit(main(sys.argv[1:]))
