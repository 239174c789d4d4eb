"""The HTTP/2 client of all tests in Python: sends what it is told, right or wrong, and keeps what came back."""
import collections
import fcntl
import socket
import struct
import termios
import time

from hpack import Decoder, Encoder, NeverIndexedHeaderTuple

WAIT = 20.0             # seconds: the bound of what takes milliseconds
PREFACE = b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n'
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED = 1, 1, 4, 8
MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE = 3, 4
PROTOCOL_ERROR, FLOW_CONTROL_ERROR, REFUSED_STREAM, CANCEL, COMPRESSION_ERROR = 1, 3, 7, 8, 9
FRAME_MAX = 16384
WINDOW = 65535
WINDOW_MAX = 0x7fffffff

STATUS, ENCRYPT, DECRYPT = (f'/v2.KeyManagementService/{name}' for name in ('Status', 'Encrypt', 'Decrypt'))
VERSION_V1, ENCRYPT_V1, DECRYPT_V1 = (f'/v1beta1.KeyManagementService/{name}'
                                      for name in ('Version', 'Encrypt', 'Decrypt'))
EMPTY = bytes(5)        # an empty message, as StatusRequest is

# gRPC's status codes
OK, INVALID, DEADLINE, NOT_FOUND, EXHAUSTED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE = 0, 3, 4, 5, 8, 12, 13, 14


def until(condition, what, seconds=WAIT):
    """Waits for a condition that no event announces."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f'not within {seconds:.0f} s: {what}')
        time.sleep(0.005)


# -------------------------------------------------- Bytes: messages, header fields, frames

def message(body, flag=0):
    """A gRPC message with its prefix."""
    return struct.pack('>BI', flag, len(body)) + body


def field(number, value):
    """A protobuf field of bytes."""
    size, length = len(value), b''
    while size > 127:
        length += bytes([size & 127 | 128])
        size >>= 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + value


def encrypt_v1(plain):
    """The body of a v1 Encrypt, prefix included."""
    return message(field(1, b'v1beta1') + field(2, plain))


def request(path, *extra, method='POST', authority='localhost', content_type='application/grpc'):
    """The header fields of a call; None leaves a field out."""
    fields = [(':method', method), (':scheme', 'http'), (':path', path), (':authority', authority),
              ('content-type', content_type), ('te', 'trailers'), *extra]
    return [(name, value) for name, value in fields if value is not None]


GET = {'method': 'GET', 'content_type': None}       # of request: a plain GET


def block(fields):
    """A header block that is the same on every stream, as it leaves no trace in the HPACK table."""
    return Encoder().encode([NeverIndexedHeaderTuple(*pair) for pair in fields], huffman=False)


def frame(kind, flags, stream, payload=b''):
    return struct.pack('>I', len(payload))[1:] + struct.pack('>BBI', kind, flags, stream) + payload


def data(stream, payload=b'', end=False, pad=None):
    if pad is None:
        return frame(DATA, END_STREAM * end, stream, payload)
    return frame(DATA, PADDED | END_STREAM * end, stream, bytes([pad]) + payload + bytes(pad))


def settings(values=()):
    """A SETTINGS frame of (setting, value) pairs."""
    return frame(SETTINGS, 0, 0, b''.join(struct.pack('>HI', *pair) for pair in values))


def reset(stream, code=CANCEL):
    return frame(RST_STREAM, 0, stream, struct.pack('>I', code))


def window_update(stream, increment):
    return frame(WINDOW_UPDATE, 0, stream, struct.pack('>I', increment))


def ping(octets):
    return frame(PING, 0, 0, octets)


def headers(stream, header_block, end=False, chunk=FRAME_MAX):
    """HEADERS, and CONTINUATIONs for what does not fit."""
    parts = [header_block[at:at + chunk] for at in range(0, len(header_block), chunk)] or [b'']
    return b''.join(frame(CONTINUATION if i else HEADERS, END_HEADERS * (i == len(parts) - 1) |
                          END_STREAM * (end and i == 0), stream, part) for i, part in enumerate(parts))


def body_frames(stream, body, end=True):
    """DATA frames without a look at any window."""
    return b''.join(data(stream, body[at:at + FRAME_MAX], end and at + FRAME_MAX >= len(body))
                    for at in range(0, len(body), FRAME_MAX))


def call(stream, path, body, *extra):
    """The bytes of a whole call."""
    return headers(stream, block(request(path, *extra))) + body_frames(stream, body)


# ------------------------------------------------------------------------ The client

Frame = collections.namedtuple('Frame', 'kind flags stream payload')


class Answer:
    """What came back on one stream."""

    def __init__(self):
        self.blocks = []        # header lists: the head and, for gRPC, the trailers
        self.data = b''
        self.shape = []         # the frames in short
        self.reset = None       # code of RST_STREAM
        self.ended = False      # END_STREAM was seen
        self.closed = False     # the connection ended first

    @property
    def http(self):
        return self.blocks[0].get(':status') if self.blocks else None

    @property
    def status(self):
        """The gRPC status as a number; None without one."""
        value = self.blocks[-1].get('grpc-status') if self.blocks else None
        return None if value is None else int(value)

    @property
    def message(self):
        return self.blocks[-1].get('grpc-message', '')

    def __repr__(self):
        return f'<{self.shape} {self.blocks} reset={self.reset} closed={self.closed}>'


class Raw:
    """One connection. Acknowledges SETTINGS and PING, keeps to the server's windows, and fails
    when the server does not keep to ours. A stream's window is `window` at first; whenever it
    is used up, `grant` is added (0: never)."""

    def __init__(self, path, hello=True, window=WINDOW, grant=WINDOW):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)       # ahead of the time-out, which makes a full backlog an error
        self.socket.settimeout(WAIT)
        self.encoder, self.decoder = Encoder(), Decoder()
        self.buffer, self.frames = b'', collections.deque()
        self.answers = {}
        self.settings = None            # the server's
        self.goaways = []               # their error codes
        self.pongs = []
        self.stream = -1                # the last one opened
        self.theirs = {0: WINDOW}       # what we may send
        self.ours = {0: WINDOW}         # what the server may send
        self.window, self.grant = window, grant
        if hello:
            self.send(PREFACE, settings([(INITIAL_WINDOW_SIZE, window)]))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.socket.close()

    def send(self, *parts):
        self.socket.sendall(b''.join(parts))

    def drained(self):
        """Waits until the server has read all that was sent."""
        until(lambda: fcntl.ioctl(self.socket, termios.TIOCOUTQ, bytes(4)) == bytes(4), 'everything read by the server')

    def receive(self):
        """Takes what the socket has; False at the end of the connection."""
        try:
            more = self.socket.recv(65536)
        except (ConnectionResetError, BrokenPipeError):
            more = b''
        octets, at = self.buffer + more, 0
        while len(octets) >= at + 9 and len(octets) >= (end := at + 9 + int.from_bytes(octets[at:at + 3], 'big')):
            self.frames.append(Frame(*struct.unpack_from('>BBI', octets, at + 3), octets[at + 9:end]))
            at = end
        self.buffer = octets[at:]
        return bool(more)

    def next_frame(self):
        """The next frame as it is; None at the end of the connection."""
        while not self.frames:
            if not self.receive():
                return None
        return self.frames.popleft()

    def frame(self):
        """The next frame, acted upon; None at the end of the connection."""
        if (got := self.next_frame()) is None:
            return None
        try:
            self.act(got)
        except (BrokenPipeError, ConnectionResetError):
            pass                        # the server has gone; what it sent remains to be read
        return got

    def act(self, got):
        kind, flags, stream, payload = got
        answer = self.answers.setdefault(stream, Answer())
        if kind == SETTINGS and not flags & ACK:
            before = self.initial_window()
            self.settings = {**(self.settings or {}), **dict(struct.iter_unpack('>HI', payload))}
            for opened in self.theirs:
                if opened:
                    self.theirs[opened] += self.initial_window() - before
            self.send(frame(SETTINGS, ACK, 0))
        elif kind == PING and flags & ACK:
            self.pongs.append(payload)
        elif kind == PING:
            self.send(frame(PING, ACK, 0, payload))
        elif kind == GOAWAY:
            self.goaways.append(int.from_bytes(payload[4:8], 'big'))
        elif kind == WINDOW_UPDATE:
            self.theirs[stream] = self.theirs.get(stream, self.initial_window()) + int.from_bytes(payload, 'big')
        elif kind == RST_STREAM:
            answer.reset = int.from_bytes(payload, 'big')
            answer.shape.append('RST_STREAM')
        elif kind == HEADERS:
            assert flags & END_HEADERS and not flags & PADDED, 'answers need no CONTINUATION and no padding'
            fields = self.decoder.decode(payload)
            assert len(dict(fields)) == len(fields), f'a field twice: {fields}'
            answer.blocks.append(dict(fields))
            self.note(answer, 'HEADERS', flags)
        elif kind == DATA:
            answer.data += payload
            self.note(answer, 'DATA', flags)
            self.received(stream, len(payload), answer.ended)

    def note(self, answer, kind, flags):
        answer.ended = bool(flags & END_STREAM)
        answer.shape.append(kind + '+END' if answer.ended else kind)

    def received(self, stream, length, ended):
        for which in (0, stream):
            self.ours[which] -= length
            assert self.ours[which] >= 0, 'the server sent more than the window'
        if self.ours[0] < WINDOW // 2:
            self.open_window(0, WINDOW // 2)
        if self.ours[stream] == 0 and self.grant and not ended:
            self.open_window(stream, self.grant)

    def open_window(self, stream, increment):
        self.send(window_update(stream, increment))
        self.ours[stream] += increment

    def initial_window(self):
        return (self.settings or {}).get(INITIAL_WINDOW_SIZE, WINDOW)

    def open(self, fields, end=False):
        """Opens a stream with these header fields and gives its number."""
        stream = self.expect()
        self.send(self.headers(stream, fields, end))
        return stream

    def expect(self):
        """The number of the next stream, made ready for its answer; the caller sends."""
        self.stream += 2
        self.ours[self.stream] = self.window
        self.theirs[self.stream] = self.initial_window()
        self.answers[self.stream] = Answer()
        return self.stream

    def headers(self, stream, fields, end=False, chunk=FRAME_MAX):
        return headers(stream, self.encoder.encode(fields), end, chunk)

    def upload(self, stream, body, end=True):
        """Sends a body as fast as the server's windows allow; an early answer stops it."""
        answer = self.answers[stream]
        while body and not answer.ended and answer.reset is None:
            size = min(len(body), self.theirs[0], self.theirs[stream], FRAME_MAX)
            if size <= 0:
                if self.frame() is None:
                    return
                continue
            self.send(data(stream, body[:size], end and size == len(body)))
            self.theirs[0] -= size
            self.theirs[stream] -= size
            body = body[size:]

    def wait(self, stream):
        """The complete answer on a stream."""
        answer = self.answers[stream]
        while not answer.ended and answer.reset is None and not answer.closed:
            answer.closed = self.frame() is None
        return answer

    def wait_closed(self):
        """Reads to the end of the connection."""
        while self.frame() is not None:
            pass

    def call(self, path, body=EMPTY, *extra, **fields):
        """A whole call; `body` includes the prefix of its message."""
        return self.call_with(request(path, *extra, **fields), body)

    def call_with(self, fields, body=EMPTY):
        stream = self.open(fields, end=not body)
        self.upload(stream, body)
        return self.wait(stream)

    def get(self, path):
        return self.call(path, b'', **GET)

    def ping(self, octets=b'in order'):
        """Waits until the server has handled all that was sent before."""
        self.pongs.clear()
        self.send(ping(octets))
        while octets not in self.pongs:
            assert self.frame() is not None, 'closed'

    def works(self):
        """Whether a Status on this connection succeeds."""
        return self.call(STATUS).status == OK
