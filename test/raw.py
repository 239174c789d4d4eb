"""An HTTP/2 client of single frames: sends what it is told, right or wrong."""
import fcntl
import socket
import struct
import termios

from hpack import Decoder, Encoder
from hyperframe.frame import (ContinuationFrame, DataFrame, Frame, GoAwayFrame, HeadersFrame,
                              PingFrame, RstStreamFrame, SettingsFrame, WindowUpdateFrame)

from plugin import WAIT, until

PREFACE = b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n'
PROTOCOL_ERROR, REFUSED_STREAM, CANCEL = 1, 7, 8
STATUS = '/v2.KeyManagementService/Status'
ENCRYPT = '/v2.KeyManagementService/Encrypt'
DECRYPT = '/v2.KeyManagementService/Decrypt'
VERSION_V1 = '/v1beta1.KeyManagementService/Version'
ENCRYPT_V1 = '/v1beta1.KeyManagementService/Encrypt'
DECRYPT_V1 = '/v1beta1.KeyManagementService/Decrypt'
FRAME_MAX = 16384
WINDOW = 65535
EMPTY = bytes(5)        # an empty message, as StatusRequest is


def message(body, flag=0):
    """A gRPC message with its prefix."""
    return bytes([flag]) + struct.pack('>I', len(body)) + body


def field(number, value):
    """A protobuf field of bytes."""
    size, length = len(value), b''
    while size > 127:
        length += bytes([size & 127 | 128])
        size >>= 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + value


def request(path, *extra, method='POST', authority='localhost', content_type='application/grpc'):
    """The header fields of a call; None leaves a field out."""
    fields = [(':method', method), (':scheme', 'http'), (':path', path), (':authority', authority),
              ('content-type', content_type), ('te', 'trailers'), *extra]
    return [(name, value) for name, value in fields if value is not None]


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
        self.buffer = b''
        self.answers = {}
        self.settings = None            # the server's
        self.goaways = []
        self.pongs = []
        self.stream = -1                # the last one opened
        self.theirs = {0: WINDOW}       # what we may send
        self.ours = {0: WINDOW}         # what the server may send
        self.window, self.grant = window, grant
        if hello:
            self.send(PREFACE, SettingsFrame(settings={SettingsFrame.INITIAL_WINDOW_SIZE: window}))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.socket.close()

    def send(self, *parts):
        """Sends frames and plain bytes."""
        self.socket.sendall(b''.join(p if isinstance(p, bytes) else p.serialize() for p in parts))

    def drained(self):
        """Waits until the server has read all that was sent."""
        def empty():
            return fcntl.ioctl(self.socket, termios.TIOCOUTQ, bytes(4)) == bytes(4)
        until(empty, 'everything read by the server')

    def receive(self, length):
        while len(self.buffer) < length:
            try:
                more = self.socket.recv(65536)
            except (ConnectionResetError, BrokenPipeError):
                more = b''
            if not more:
                return None
            self.buffer += more
        part, self.buffer = self.buffer[:length], self.buffer[length:]
        return part

    def frame(self):
        """The next frame, acted upon; None at the end of the connection."""
        head = self.receive(9)
        if head is None:
            return None
        frame, length = Frame.parse_frame_header(memoryview(head))
        body = self.receive(length)
        if body is None:
            return None
        frame.parse_body(memoryview(body))
        try:
            self.act(frame)
        except (BrokenPipeError, ConnectionResetError):
            pass                        # the server has gone; what it sent remains to be read
        return frame

    def act(self, frame):
        answer = self.answers.setdefault(frame.stream_id, Answer())
        if isinstance(frame, SettingsFrame) and 'ACK' not in frame.flags:
            before = self.initial_window()
            self.settings = {**(self.settings or {}), **frame.settings}
            for stream in self.theirs:
                if stream:
                    self.theirs[stream] += self.initial_window() - before
            self.send(SettingsFrame(flags=['ACK']))
        elif isinstance(frame, PingFrame):
            if 'ACK' in frame.flags:
                self.pongs.append(frame.opaque_data)
            else:
                self.send(PingFrame(opaque_data=frame.opaque_data, flags=['ACK']))
        elif isinstance(frame, GoAwayFrame):
            self.goaways.append(frame)
        elif isinstance(frame, WindowUpdateFrame):
            self.theirs[frame.stream_id] = (self.theirs.get(frame.stream_id, self.initial_window())
                                            + frame.window_increment)
        elif isinstance(frame, RstStreamFrame):
            answer.reset = frame.error_code
            answer.shape.append('RST_STREAM')
        elif isinstance(frame, HeadersFrame):
            assert 'END_HEADERS' in frame.flags, 'answers need no CONTINUATION'
            fields = self.decoder.decode(frame.data)
            assert len(dict(fields)) == len(fields), f'a field twice: {fields}'
            answer.blocks.append(dict(fields))
            self.note(answer, 'HEADERS', frame)
        elif isinstance(frame, DataFrame):
            answer.data += frame.data
            self.note(answer, 'DATA', frame)
            self.received(frame.stream_id, frame.flow_controlled_length, answer.ended)

    def note(self, answer, kind, frame):
        answer.ended = 'END_STREAM' in frame.flags
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
        self.send(WindowUpdateFrame(stream, window_increment=increment))
        self.ours[stream] += increment

    def initial_window(self):
        return (self.settings or {}).get(SettingsFrame.INITIAL_WINDOW_SIZE, WINDOW)

    def open(self, fields, end=False):
        """Opens a stream with these header fields and gives its number."""
        stream = self.expect()
        self.send(*self.header_frames(stream, fields, end))
        return stream

    def expect(self):
        """The number of the next stream, made ready for its answer; the caller sends."""
        self.stream += 2
        self.ours[self.stream] = self.window
        self.theirs[self.stream] = self.initial_window()
        self.answers[self.stream] = Answer()
        return self.stream

    def header_frames(self, stream, fields, end, chunk=FRAME_MAX):
        block = self.encoder.encode(fields)
        chunks = [block[i:i + chunk] for i in range(0, len(block), chunk)] or [b'']
        frames = [HeadersFrame(stream, chunks[0], flags=['END_STREAM'] if end else [])]
        frames += [ContinuationFrame(stream, part) for part in chunks[1:]]
        frames[-1].flags.add('END_HEADERS')
        return frames

    def upload(self, stream, data, end=True):
        """Sends a body as fast as the server's windows allow; an early answer stops it."""
        answer = self.answers[stream]
        while data and not answer.ended and answer.reset is None:
            size = min(len(data), self.theirs[0], self.theirs[stream], FRAME_MAX)
            if size <= 0:
                if self.frame() is None:
                    return
                continue
            flags = ['END_STREAM'] if end and size == len(data) else []
            self.send(DataFrame(stream, data[:size], flags=flags))
            self.theirs[0] -= size
            self.theirs[stream] -= size
            data = data[size:]

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
        """A plain GET."""
        return self.call_with(request(path, method='GET', content_type=None), b'')

    def ping(self, data=b'in order'):
        """Waits until the server has handled all that was sent before."""
        self.pongs.clear()
        self.send(PingFrame(opaque_data=data))
        while data not in self.pongs:
            assert self.frame() is not None, 'closed'

    def works(self):
        """Whether a Status on this connection succeeds."""
        return self.call(STATUS).status == 0
