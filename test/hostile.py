"""Peers that mean harm, one kind after the other, against one running plugin.

    hostile.py [NAME...]            all, or those whose name contains one of the words
    hostile.py --broken [NAME...]   are these tests any good? Attacks with a wrong preface or wrong
                                    header blocks: each has to fail for what it did not reach

Each attack says what it has reached, as the plugin's own counters and answers show it, and fails
below its minimum. While it goes on another client's calls are timed, and when it is over the
plugin must be the same process with the descriptors and the memory that it had before. A line
`ok` or `not ok` for each, a table, and the sum. Needs root, for /proc.

Memory: what leaks does so in every round. So a round has to end with what there was before, or
with no more than an earlier round.

Timing is a bound on starvation and nothing else: the slowest call has to come in under
LATENCY_MS in one of ATTEMPTS rounds, less the time for which the machine let the client itself
sleep too long. Where the plugin waits for a CPU for more than BUSY of a round, other programs have
the machine, and the figure (with a ~) is no verdict.
"""
import collections
import contextlib
import itertools
import os
import re
import resource
import select
import signal
import subprocess
import sys
import time

from plugin import MEMORY_MAX, Server
from raw import (CONTINUATION, DATA, ENCRYPT, ENCRYPT_V1, GET, GOAWAY, HEADERS, INITIAL_WINDOW_SIZE, OK, PING,
                 PREFACE, PRIORITY, SETTINGS, STATUS, WINDOW_MAX, Raw, block, body_frames, data, encrypt_v1, field, frame,
                 headers, message, ping, request, reset, settings, until, window_update)

LATENCY_MS = 100        # of another client's slowest call
ATTEMPTS = 6            # rounds, until one is within all bounds
BUSY = 0.2              # of the time
RETRIES = 20            # of one call of the other client
REACH_SECONDS = 60      # for an attack to reach what it has to
BROKEN_SECONDS = 1.5    # the same where it must not
SLACK = 64 << 10        # bytes that may stay after an attack
SETTLE = 12.0           # seconds: longest time-out of the plugin, and some
CASE_SECONDS = 400
LIMIT = 10.0            # seconds: the plugin's own time-outs
METER = '--meter'       # runs the other client
BROKEN = '--broken'
CONNECTIONS = 256       # the plugin's own limit
STREAMS = 256           # of a connection

WIDE = [(INITIAL_WINDOW_SIZE, WINDOW_MAX)]
SHUT = [(INITIAL_WINDOW_SIZE, 0)]
ASKED = request('/x', **GET)
METRICS = request('/metrics', **GET)
TABLE = b''.join(b'\x40\x04k%03d\x01v' % i for i in range(110))    # HPACK: fields that enter the table


def get(stream, fields):
    return headers(stream, block(fields), end=True)


def opened(stream, path, *extra):
    return headers(stream, block(request(path, *extra)))


def encrypts(streams, size, path=ENCRYPT_V1, more=lambda stream: b''):
    """Whole calls on these streams, and what is to come behind each."""
    return b''.join(opened(n, path) + (body_frames(n, encrypt_v1(bytes(size))) if size else b'') + more(n) for n in streams)


def odd(count):
    """The numbers of so many streams."""
    return range(1, 2 * count, 2)


class Peer(Raw):
    """A hostile connection: sends without a look at what comes back, never waits, and counts the frames that come."""
    preface = PREFACE           # but for an attack that is broken

    def __init__(self, path, values=(), hello=True):
        super().__init__(path, hello=False)
        self.socket.setblocking(False)
        self.closed = False
        self.unsent = b''
        self.pings = 0
        self.heard = collections.Counter()  # by type, and whether END_STREAM or ACK was set
        if hello:
            self.push(Peer.preface + settings(values))

    def push(self, octets=b''):
        """As much as the plugin takes now."""
        self.unsent += octets
        with contextlib.suppress(BlockingIOError):
            while self.unsent and not self.closed:
                try:
                    self.unsent = self.unsent[self.socket.send(self.unsent):]
                except (BrokenPipeError, ConnectionResetError):
                    self.hear()
                    self.closed = True

    def hear(self):
        """What has come so far; notes the end."""
        with contextlib.suppress(BlockingIOError):
            while self.receive():
                pass
            self.closed = True
        while self.frames:
            got = self.frames.popleft()
            self.heard[got.kind, bool(got.flags & 1)] += 1


class Round:
    """One attack on a server: its peers, what they heard, and what the server counted since it began."""

    def __init__(self, server, least, seconds=REACH_SECONDS):
        self.server, self.path, self.least, self.seconds = server, server.path, least, seconds
        self.everyone = []          # all peers there were
        self.start = collections.Counter()
        self.start = self.counters()

    def counters(self):
        """The server's series, less what they were in the beginning."""
        for _ in range(RETRIES):
            with contextlib.suppress(OSError), Raw(self.path) as asking:
                page = asking.get('/metrics')
                if page.ended:
                    found = re.findall(rb'^([a-z_]+(?:{.*})?) (\d+)$', page.data, re.M)
                    return collections.Counter({name.decode(): int(n) for name, n in found}) - self.start
        raise AssertionError('no /metrics')

    def answered(self, code='OK', method='Encrypt', service='v1beta1'):
        """A count of gRPC's answers."""
        return self.counters()[f'kmsplugin_grpc_requests_total{{service="{service}",method="{method}",code="{code}"}}']

    def unknown(self):
        return self.answered('UNIMPLEMENTED', 'unknown', 'unknown')

    def heard(self, kind, flag=False):
        return sum(peer.heard[kind, flag] for peer in self.everyone)

    def closed(self):
        """Peers that the plugin has closed."""
        return sum(peer.closed for peer in self.everyone)

    @contextlib.contextmanager
    def peers(self, count, values=(), hello=True):
        """That many peers."""
        crowd = []
        try:
            for _ in range(count):
                crowd.append(Peer(self.path, values, hello))
                self.everyone.append(crowd[-1])
            yield crowd
        finally:
            for peer in crowd:
                peer.close()

    def pump(self, crowd, done, deaf=False, seconds=None):
        """Sends what is left to send, until something is done or time is over."""
        end = time.monotonic() + (seconds or self.seconds)
        while not done() and time.monotonic() < end:
            for peer in crowd:
                peer.push()
                if not deaf:
                    peer.hear()
            time.sleep(0.02)

    def reach(self, count, crowd=(), deaf=False):
        """What is counted, once it is enough, or when time is over."""
        self.pump(crowd, lambda: count() >= self.least, deaf)
        return count()

    def sent(self, crowd):
        """Until the plugin has handled all that was sent to it, or has closed."""
        for peer in crowd:
            peer.pings += 1
            peer.push(ping(bytes(8)))
        self.pump(crowd, lambda: all(peer.closed or peer.heard[PING, True] == peer.pings for peer in crowd))

    def flood(self, piece, count, conns=8, first=b'', hello=True):
        """The same over and over, on connections that are made anew when they are closed. `piece` may give bytes for a peer."""
        end, look, crowd = time.monotonic() + self.seconds, 0, []
        try:
            while time.monotonic() < end:
                if time.monotonic() > look:
                    if count() >= self.least:
                        break
                    look = time.monotonic() + 0.2
                crowd = [peer for peer in crowd if not peer.closed]
                while len(crowd) < conns:
                    crowd.append(Peer(self.path, hello=hello))
                    self.everyone.append(crowd[-1])
                    crowd[-1].push(first)
                for peer in crowd:
                    peer.push(b'' if peer.unsent else piece(peer) if callable(piece) else piece)
                    peer.hear()
                    if peer.closed:
                        peer.close()
                select.select([], [peer.socket for peer in crowd if not peer.closed], [], 0.05)
        finally:
            for peer in crowd:
                peer.close()
        return count()

    def handled(self, octets, frames, first=b''):
        """Floods with so many frames to which there is no answer but that to a PING behind them."""
        return self.flood(octets + ping(bytes(8)), lambda: frames * self.heard(PING, True), first=first)

    def hold(self, conns, streams, body, values=()):
        """Requests that lack their last byte, as many as the plugin keeps; which are there is seen when it comes."""
        part, before = body_frames(1, body[:-1], end=False), self.answered()
        with self.peers(conns, values) as crowd:
            for n in odd(streams):
                mine = part.replace(frame(DATA, 0, 1)[4:9], frame(DATA, 0, n)[4:9])
                for peer in crowd:
                    peer.push(opened(n, ENCRYPT_V1) + mine)
            self.sent(crowd)
            for peer in crowd:
                peer.push(b''.join(data(n, body[-1:], end=True) for n in odd(streams)))
            self.sent(crowd)
            return self.answered() - before


ATTACKS = {}


def attack(least, what, wrong=('preface', 'block')):
    """An attack has to reach at least so much; it cannot without what is `wrong` with it when it is broken."""
    def keep(function):
        ATTACKS[function.__name__] = function, least, what, wrong
        return function
    return keep


# ------------------------------------------------------------------- Attacks: answers that are not taken

@attack(60, 'answers of 60 kB made for 20 connections that read none')
def never_reads(on):
    with on.peers(20, WIDE) as crowd:
        for peer in crowd:
            peer.push(window_update(0, 0x7fff0000) + encrypts(odd(32), 60000))
        return on.reach(on.answered, crowd, deaf=True)


@attack(5000, 'answers made on 20 connections whose windows are shut')
def zero_window(on):
    with on.peers(20, SHUT) as crowd:
        for n in odd(STREAMS):
            for peer in crowd:
                peer.push(encrypts([n], 200))
        return on.reach(on.answered, crowd)


@attack(1500, 'pages of /metrics made on 16 connections whose windows are shut')
def metrics_hoard(on):
    with on.peers(16, SHUT) as crowd:
        for n in odd(STREAMS):
            for peer in crowd:
                peer.push(get(n, METRICS))
        return on.reach(lambda: on.heard(HEADERS), crowd)


@attack(10000, 'pages of /metrics on 200 connections')
def all_ask_for_metrics(on):
    return on.flood(lambda peer: window_update(0, 1 << 20) + get(*next_streams(peer, 1), METRICS),
                    lambda: on.heard(DATA, True), conns=200)


@attack(40000, 'PINGs answered where nobody reads', wrong=['preface'])
def ping_flood_unread(on):
    with on.peers(8) as crowd:
        for peer in crowd:
            peer.push(ping(bytes(8)) * 50000)
        on.pump(crowd, lambda: False, deaf=True, seconds=2)
        return on.reach(lambda: on.heard(PING, True), crowd)


# ------------------------------------------------------------------- Attacks: more than anybody needs

def next_streams(peer, count):
    peer.stream += 2 * count
    return range(peer.stream - 2 * count + 2, peer.stream + 1, 2)


@attack(20000, 'streams opened and reset')
def rapid_reset(on):
    """CVE-2023-44487. nghttp2 closes after some thousand; who means it comes back."""
    return on.flood(lambda peer: encrypts(next_streams(peer, 100), 0, '/x', reset), on.unknown, conns=4)


@attack(20000, 'calls made and reset')
def rapid_reset_of_calls(on):
    return on.flood(lambda peer: encrypts(next_streams(peer, 100), 32, more=reset), on.answered, conns=4)


@attack(200000, 'PINGs answered', wrong=['preface'])
def ping_flood(on):
    return on.flood(ping(bytes(8)) * 900, lambda: on.heard(PING, True))


@attack(100000, 'SETTINGS acknowledged', wrong=['preface'])
def settings_flood(on):
    return on.flood((settings() + settings([(INITIAL_WINDOW_SIZE, 70000)] * 32)) * 50, lambda: on.heard(SETTINGS, True))


@attack(100000, 'empty DATA frames handled')
def empty_data_flood(on):
    return on.handled(data(1) * 500, 500, first=opened(1, ENCRYPT_V1))


@attack(100000, 'frames handled that mean nothing: of no known type, PRIORITYs, window updates', wrong=['preface'])
def idle_frames_flood(on):
    return on.handled((frame(0xbe, 0, 0, bytes(100)) + window_update(0, 1) + frame(PRIORITY, 0, 5, b'\0\0\0\7\xff')) * 200, 600)


@attack(50000, 'calls on 240 connections, as fast as they can')
def flooders(on):
    return on.flood(lambda peer: encrypts(next_streams(peer, 10), 400), on.answered, conns=240)


@attack(200000, 'GETs answered, sockets full of them on 240 connections')
def short_calls(on):
    pieces = {}

    def piece(peer):
        streams = next_streams(peer, 1000)
        if streams[0] not in pieces:
            pieces[streams[0]] = b''.join(get(n, ASKED) for n in streams)
        return pieces[streams[0]]
    return on.flood(piece, lambda: on.heard(HEADERS, True), conns=240)


@attack(3000, 'calls with a deadline of 1 ms that ended by it')
def short_deadlines(on):
    with on.peers(16) as crowd:
        for n in odd(STREAMS):
            for peer in crowd:
                peer.push(opened(n, STATUS, ('grpc-timeout', '1m')))
        return on.reach(lambda: on.answered('DEADLINE_EXCEEDED', 'Status', 'v2'), crowd)


# ------------------------------------------------------------------- Attacks: header blocks

@attack(100, 'header blocks without an end, closed for that')
def continuation_flood(on):
    """CVE-2024-28182. nghttp2 closes without a word; a block that HPACK does not know has a GOAWAY."""
    first = get(1, ASKED) + frame(HEADERS, 0, 3, block(request(STATUS)))
    fields = block([('x', 'y' * 100)] * 20)

    def ended():
        return sum(p.closed and p.heard[HEADERS, True] and not p.heard[GOAWAY, False] for p in on.everyone)
    on.least //= 2
    empty = on.flood(frame(CONTINUATION, 0, 3) * 1000, ended, first=first)
    on.least *= 2
    return empty and on.flood(frame(CONTINUATION, 0, 3, fields) * 20, ended, first=first)


@attack(400, 'header blocks of 16 KB that stand for 48 MB each, refused')
def hpack_bomb(on):
    """One field of 4,000 bytes in the table, called up by one byte as often as fits."""
    bomb = block(request(STATUS)) + b'\x40\x01x\x7f\xa1\x1e' + b'y' * 4000 + b'\xbe' * 12000
    return on.flood(lambda peer: headers(*next_streams(peer, 1), bomb), lambda: on.answered('RESOURCE_EXHAUSTED', 'Status', 'v2'))


@attack(8000, 'header blocks that fill the table and resize it')
def hpack_table(on):
    full = block(request('/x')) + TABLE
    return on.flood(lambda peer: headers(*next_streams(peer, 1), full) + headers(*next_streams(peer, 1), b'\x20\x3f\xe1\x1f' + full),
                    on.unknown, conns=10)


@attack(60, 'header values of 60,000 bytes announced on 250 connections, and held until they came')
def long_values(on):
    with on.peers(CONNECTIONS - 6) as crowd:
        for peer in crowd:
            peer.push(frame(HEADERS, 0, 1, block(request(STATUS)) + b'\0\x01x\x7f\xe1\xd3\x03'))
        on.pump(crowd, lambda: False, seconds=1)
        for peer in crowd:
            peer.push(b''.join(frame(CONTINUATION, 4 * (i == 3), 1, b'v' * 15000) for i in range(4)))
        return on.reach(lambda: on.answered('RESOURCE_EXHAUSTED', 'Status', 'v2'), crowd)


# ------------------------------------------------------------------- Attacks: requests that are kept

@attack(2500, 'bodies of 1,000 bytes kept at once, of 16,000 sent on 250 connections')
def half_sent(on):
    return on.hold(CONNECTIONS - 6, 64, encrypt_v1(bytes(960)))


@attack(60, 'bodies of 64 KiB kept at once, of 320 sent on 40 connections')
def large_bodies(on):
    return on.hold(40, 8, encrypt_v1(bytes(65400)))


@attack(60, 'bodies of 64 KiB kept, beside 62 connections that have reset all but 43 of 256 streams each')
def pinned_pages(on):
    """What those have left, lies on the pages of what they gave back."""
    with on.peers(62) as crowd:
        for kept in (True, False):
            for peer in crowd:
                peer.push(b''.join(opened(n, ENCRYPT_V1) if kept else reset(n) for n in odd(STREAMS) if kept or n % 12 > 1))
            on.sent(crowd)
        return on.hold(40, 8, encrypt_v1(bytes(65400)))


@attack(15000, 'bodies of 60 to 65,000 bytes kept, one size after the other')
def sizes_in_turn(on):
    """Blocks that are kept for reuse, of each size, would add up."""
    return sum(on.hold(16, STREAMS if size <= 1000 else 17, encrypt_v1(bytes(size)))
               for size in (60, 120, 250, 500, 1000, 14000, 65000))


@attack(400, 'answers made on 250 connections that hold all they may: tables, bodies, answers')
def all_at_once(on):
    with on.peers(CONNECTIONS - 6, SHUT) as crowd:
        for peer in crowd:
            peer.push(headers(1, block(request('/x')) + TABLE, end=True))
        for n in range(3, 35, 2):
            for peer in crowd:
                peer.push(encrypts([n], 30) if n % 8 == 3 else opened(n, ENCRYPT_V1) + data(n, encrypt_v1(bytes(960))[:-1]))
        return on.reach(on.answered, crowd)


# ------------------------------------------------------------------- Attacks: connections

@attack(240, 'connections that drip, ended after 10 s and not before')
def slow(on):
    """Prefaces, header blocks, frames, bodies: a byte now and then is no progress."""
    greeting, head = Peer.preface + settings(), block(request(STATUS))
    begun = greeting + frame(HEADERS, 0, 1, head[:20]) + frame(CONTINUATION, 0, 1, head[20:])[:9]
    body = greeting + headers(1, head) + data(1, encrypt_v1(bytes(100)))[:9]
    starts = ((b'', greeting), (begun, head[20:]), (greeting + headers(1, head)[:4], headers(1, head)[4:]),
              (body, encrypt_v1(bytes(100))))
    with on.peers(240, hello=False) as crowd:
        begin = time.monotonic()
        for i, peer in enumerate(crowd):
            peer.push(starts[i % 4][0])
        for step in range(8):
            until(lambda: time.monotonic() > begin + 1.1 * step, 'time passes')
            for i, peer in enumerate(crowd):
                peer.push(starts[i % 4][1][step:step + 1])
                peer.hear()
        early = sum(peer.closed or peer.heard[HEADERS, True] for peer in crowd)
        assert time.monotonic() > begin + LIMIT - 1 or not early, f'{early} ended early'
        return on.reach(lambda: sum(peer.closed or peer.heard[HEADERS, True] for peer in crowd) - early, crowd)


@attack(740, 'idle connections closed, of 1,000 where 256 are allowed', wrong=['preface'])
def idle_connections(on):
    with on.peers(1000) as crowd:
        on.reach(on.closed, crowd)
        on.sent(crowd[-200:])   # the youngest are open, and work
        return on.closed() if sum(bool(peer.heard[PING, True]) for peer in crowd[-200:]) >= 190 else 0


@attack(10000, 'connections that ended in the middle of a request', wrong=[])
def dropped(on):
    whole = Peer.preface + settings() + encrypts([1], 300)
    for i in range(on.least):
        with Raw(on.path, hello=False) as peer:
            peer.send(whole[:i % len(whole)])
    return on.reach(lambda: on.counters()['kmsplugin_connections_total'])


@attack(300, 'connections of noise closed', wrong=[])
def garbage(on):
    """Other protocols, and random bytes behind a right beginning."""
    hello, noise = Peer.preface + settings(), os.urandom(300)
    starts = (b'GET / HTTP/1.1\r\n\r\n', b'\x16\x03\x01\x02\x00' + noise, Peer.preface + bytes(300), hello + b'\xff' + noise,
              hello + frame(HEADERS, 5, 1, b'\xff' + noise), hello + frame(SETTINGS, 0, 0, noise[:7]))
    with on.peers(60, hello=False) as crowd:
        for _ in range(4):
            for peer, start in zip(crowd, itertools.cycle(starts)):
                peer.push(start)
            on.pump(crowd, lambda: all(peer.closed for peer in crowd))
            for i, peer in enumerate(crowd):
                peer.close()
                crowd[i] = Peer(on.path, hello=False)
                on.everyone.append(crowd[i])
        for peer, start in zip(crowd, itertools.cycle(starts)):
            peer.push(start)
        return on.reach(on.closed, crowd)


@attack(200, 'windows past 2^31-1 refused')
def window_overflow(on):
    wide, stream = window_update(0, WINDOW_MAX), opened(1, STATUS)
    attempts = ((wide, True), (settings([(INITIAL_WINDOW_SIZE, 0x80000000)]), True),
                (window_update(1, WINDOW_MAX) * 2, False), (window_update(0, 0), True))
    refused = 0
    for octets, fatal in attempts * 50:
        with Raw(on.path, hello=False) as peer:
            peer.expect()
            peer.send(Peer.preface, settings(), stream, ping(bytes(8)))
            while not peer.pongs:       # so far all is well
                if peer.frame() is None:
                    return refused
            peer.send(octets)
            while not peer.goaways and peer.answers[1].reset is None and peer.frame() is not None:
                pass
            refused += peer.goaways == [3] or peer.goaways == [1] if fatal else peer.answers[1].reset == 3
    return refused


# -------------------------------------------------------------------- The other client

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
        worst, late, calls, why, client = 0.0, 0.0, 0, '', None
        while (calls == 0 or not stop) and not why:
            if client is not None and calls % 8 == 7:
                client.close()
                client = None
            begin = time.monotonic()
            for turn in range(RETRIES): # an idle connection may give way; gRPC clients then come back, too
                try:
                    client = client or Raw(path)
                    answer = client.call(ENCRYPT, body)
                    why = '' if answer.status == OK else repr(answer)
                except OSError as error:
                    answer, why = None, repr(error)
                if answer is not None and not answer.closed:
                    break
                if client:
                    client.close()
                client = None
                time.sleep(min(0.05, 0.002 * 2 ** turn))
            now = time.monotonic()
            worst, calls = max(worst, now - begin), calls + 1
            time.sleep(0.003)
            late = max(late, time.monotonic() - now - 0.003)
        print(1000 * worst, 1000 * late, calls, why)

    def stop(self):
        """Milliseconds of the slowest call, and for how long the machine had no time for the client itself."""
        self.process.terminate()
        told, _ = self.process.communicate()
        assert told, 'the other client died'
        worst, late, calls, wrong = told.split(' ', 3)
        assert not wrong.strip(), f'the other client got {wrong[:300]} after {calls} calls'
        return float(worst), float(late)


# -------------------------------------------------------------------- Verdict

class Subject:
    """The plugin under attack, and what /proc says of it."""

    def __init__(self):
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit[1], limit[1]))
        self.server = Server()
        Round(self.server, 0, 5).hold(100, 4, encrypt_v1(bytes(30000)))     # pages that a first use takes
        self.before = self.calm((self.server.descriptors(), 0), 3)
        self.before = self.server.descriptors(), self.before[1]

    def starved(self):
        """Seconds for which the plugin has waited for a CPU since it began."""
        return int(self.server.proc('schedstat').split()[1]) / 1e9

    def memory(self, name):
        return 1024 * int(re.search(rf'^{name}:\s*(\d+) kB$', self.server.proc('status').decode(), re.M)[1])

    def calm(self, before, seconds=SETTLE):
        """Descriptors and anonymous memory when all is quiet again: as before, or what they are in the end."""
        end, last = time.monotonic() + seconds, None
        while True:
            now = self.server.descriptors(), self.memory('RssAnon')
            if now[0] == before[0] and (now[1] <= before[1] + SLACK or now == last) or time.monotonic() > end:
                return now
            last = now
            time.sleep(1)

    def attempt(self, name):
        """One round: what was reached, peak memory, the other client's slowest call (to blame on the plugin, and as it was)."""
        function, least, what, _ = ATTACKS[name]
        with open(f'/proc/{self.server.pid}/clear_refs', 'w', encoding='ascii') as file:
            file.write('5')     # a new peak
        meter, reached, begin, starved = Meter(self.server.path), None, time.monotonic(), self.starved()
        try:
            reached = function(Round(self.server, least))
        finally:
            with contextlib.suppress(AssertionError) if reached is None else contextlib.nullcontext():
                worst, late = meter.stop()
        assert self.server.process.poll() is None, 'the plugin is gone:\n' + self.server.log()[-2000:]
        assert reached >= least, f'{reached} of at least {least} {what}'
        calm = self.starved() - starved < BUSY * (time.monotonic() - begin)
        return reached, self.memory('VmHWM'), worst - late if calm else 0.0, f'{worst:.1f}{" " if calm else "~"}'

    def judge(self, name):
        """A row of the table; an AssertionError says what is wrong."""
        rows, kept = [], []
        for _ in range(ATTEMPTS):
            reached, peak, own, worst = self.attempt(name)
            rows.append((own, worst, reached, peak))
            assert peak <= MEMORY_MAX, f'{peak >> 10} KiB at the peak'
            after = self.calm(self.before)
            assert after[0] == self.before[0], f'{after[0]} descriptors, {self.before[0]} before'
            kept.append(after[1])
            steady = kept[-1] <= max([self.before[1] + SLACK, *(size + SLACK // 4 for size in kept[:-1])])
            if steady and own < LATENCY_MS:
                break
        assert steady, f'{self.before[1]} bytes of memory before, and after each round {kept}'
        own, worst, reached, _ = min(rows)
        assert own < LATENCY_MS, f'another client waited {worst}ms'
        with Raw(self.server.path) as client:
            assert client.works()
        return reached, max(row[3] for row in rows), kept[-1] - self.before[1], worst


def judge_all(names):
    """Runs them against one plugin, and prints the table. How many have failed."""
    subject, rows, failed = Subject(), [], 0
    for name in names:
        signal.alarm(CASE_SECONDS)
        try:
            reached, peak, kept, worst = subject.judge(name)
            _, least, what, _ = ATTACKS[name]
            rows.append(f'{name:21} {reached:8} {least:8} {peak >> 10:8} {kept >> 10:8} {worst:>9} {what}')
            print(f'ok {name}', flush=True)
        except Exception as error:
            print(f'not ok {name}: {type(error).__name__}: {error}', flush=True)
            failed += 1
            subject.server.kill()
            subject = Subject()
        signal.alarm(0)
    subject.server.stop()
    print(f'\n{"case":21} {"reached":>8} {"at least":>8} {"peak KiB":>8} {"kept KiB":>8} {"worst ms":>8} ', *rows, sep='\n')
    return failed


def reached_broken(name, part):
    """What an attack reaches whose preface or header blocks are wrong; nothing if it gives up."""
    global block
    function, least, *_ = ATTACKS[name]
    right, server = (Peer.preface, block), Server()
    try:
        on = Round(server, least, BROKEN_SECONDS)
        if part == 'preface':
            Peer.preface = b'?' + PREFACE[1:]
        else:
            block = lambda fields: b'\xff' * len(right[1](fields))     # of no table
        return function(on)
    except (AssertionError, OSError):
        return 0
    finally:
        Peer.preface, block = right
        server.stop()


def break_all(names):
    """How many attacks do not notice that they are broken."""
    failed = 0
    for name in names:
        for part in ATTACKS[name][3]:
            reached, least = reached_broken(name, part), ATTACKS[name][1]
            failed += reached >= least
            print(f'{"not ok" if reached >= least else "ok"} {name} with a wrong {part}: {reached} of at least {least}',
                  flush=True)
    return failed


def late_case(*_):
    raise AssertionError(f'more than {CASE_SECONDS} s')


def main(words):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    signal.signal(signal.SIGALRM, late_case)
    run = break_all if words[:1] == [BROKEN] else judge_all
    words = [word for word in words if word != BROKEN]
    names = [name for name in ATTACKS if not words or any(word in name for word in words)]
    failed = run(names) if names else 1
    print(f'{len(names) - failed} passed, {failed} failed', flush=True)
    return 1 if failed else 0


if __name__ == '__main__':
    assert os.geteuid() == 0, 'needs root, for /proc'
    if sys.argv[1:2] == [METER]:
        Meter.measure(sys.argv[2])
    else:
        sys.exit(main(sys.argv[1:]))
