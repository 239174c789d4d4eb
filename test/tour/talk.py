"""The conversation of the tour. What the client says is grpc-go's, recorded once, in client.txt; the program answers anew each time.

    talk.py record CLIENT       runs CLIENT (client.go, built by Go) against the program, and writes client.txt
    talk.py watch ENDPOINT      says the same to a running plugin, unix:///path or unix:///@name, and prints each frame
"""
import fcntl
import os
import re
import select
import signal
import socket
import subprocess
import sys
import termios

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
from octets import ACK, DATA, END_STREAM, FUNCTIONS, HEADERS, PING, PREFACE, RST_STREAM, SETTINGS, Reader, number, read
from plugin import ROOT, WAIT, Server, fresh_dir, until

PROGRAM = os.path.join(ROOT, 'build/tour/program')
CLIENT = os.path.join(HERE, 'client.txt')
KEK = bytes(range(0x20))


def serve(calls=None):
    return Server(kek=KEK, binary=PROGRAM, env={'TOUR_CALLS': calls or os.path.join(fresh_dir(), 'calls')})


def frames(data):
    """The frames of whole octets, without the preface."""
    data = data.removeprefix(PREFACE)
    while data:
        end = 9 + number(data[:3])
        yield data[:end]
        data = data[end:]


def said():
    """What grpc-go says, a piece a line, in hexadecimal digits; ` 00*16338 ` for so many octets 00."""
    for piece in read(CLIENT).splitlines()[1:]:
        yield bytes.fromhex(re.sub(r'00\*(\d+)', lambda run: '00' * int(run[1]), piece))


class Talk:
    """One side of a connection, which keeps what both say: (side, octets)."""

    def __init__(self, connected):
        self.socket, self.buffer, self.flights = connected, b'', []
        self.socket.settimeout(WAIT)

    def frame(self):
        """The next frame from the server; nothing at the end of the connection."""
        while len(self.buffer) < 9 or len(self.buffer) < 9 + number(self.buffer[:3]):
            more = self.socket.recv(65536)
            if not more:
                assert not self.buffer, 'the connection ends within a frame'
                return b''
            self.buffer += more
        end = 9 + number(self.buffer[:3])
        found, self.buffer = self.buffer[:end], self.buffer[end:]
        return found

    def exchange(self, data):
        """Says something, and hears what it asks for: SETTINGS and PING their ACK, the end of a request the end of the response."""
        self.socket.sendall(data)
        self.flights.append(('client', data))
        wanted, heard = set(), b''
        for frame in frames(data):
            kind, flags, stream = frame[3], frame[4], number(frame[5:9])
            if kind in (SETTINGS, PING) and not flags & ACK:
                wanted.add((kind, 0))
            elif kind in (DATA, HEADERS) and flags & END_STREAM:
                wanted.add((DATA, stream))
        while wanted:
            frame = self.frame()
            assert frame, f'the server ends the connection in place of {wanted}'
            heard += frame
            kind, flags, stream = frame[3], frame[4], number(frame[5:9])
            if kind in (SETTINGS, PING) and flags & ACK:
                wanted.discard((kind, 0))
            elif kind == RST_STREAM or kind in (DATA, HEADERS) and flags & END_STREAM:
                wanted.discard((DATA, stream))
        self.flights += [('server', heard)] * bool(heard)


def connect(address):
    found = socket.socket(socket.AF_UNIX)
    found.connect(address)
    return found


def capture():
    """The conversation, and which functions ran: for each piece of the client, and for the start of the program."""
    calls = os.path.join(fresh_dir(), 'calls')
    server = serve(calls)
    with connect(server.path) as connected:
        talk = Talk(connected)
        for data in said():
            talk.exchange(data)
        until(lambda: fcntl.ioctl(connected, termios.TIOCOUTQ, bytes(4)) == bytes(4), 'everything read by the server')
        server.signal(signal.SIGTERM)
        talk.flights.append(('server', b''.join(iter(talk.frame, b''))))
    server.stop()
    return talk.flights, call_segments(calls, [len(data) for side, data in talk.flights if side == 'client'])


def call_lines(path):
    """The calls of a program of fixed.c: (depth, name), and (None, octets read)."""
    symbols = {}
    for line in subprocess.run(['nm', PROGRAM], check=True, capture_output=True, text=True).stdout.splitlines():
        address, kind, name = line.rsplit(' ', 2)
        if kind in 'tT':
            symbols[name] = int(address, 16)
    names = {(address - symbols['main']) % 2**64: name for name, address in symbols.items() if name in FUNCTIONS}
    for line in read(path).splitlines():
        depth, value = line.split()
        yield (None, int(value)) if depth == 'read' else (int(depth), names.get(int(value, 16), ''))


def call_segments(path, lengths):
    """The calls before the first octet came, and then those for each piece that a client said, of these lengths."""
    segments, ends = [[] for _ in range(len(lengths) + 1)], [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    at, now, stack = 0, segments[0], []
    for depth, value in call_lines(path):
        if depth is None:
            at += value
            before, now = now, segments[next(n for n, end in enumerate(ends) if at <= end)]     # the piece that the last octet is of
            if now is not before:
                now += stack        # the functions that read it
        else:
            stack[depth:] = [(depth, value)]
            now.append((depth, value))
    assert at == ends[-1], 'the program has not read all'
    return segments


def relayed(command, quiet=lambda server: None):
    """What a client says to the program, and hears. `command` makes a command of a path. `quiet` is called after a second of silence."""
    server, relay, path = serve(), socket.socket(socket.AF_UNIX), os.path.join(fresh_dir(), 'relay')
    relay.bind(path)
    relay.listen()
    relay.settimeout(WAIT)
    with subprocess.Popen(command(path), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        client, _ = relay.accept()
        select.select([client], [], [], WAIT)       # it speaks first
        other, flights, more = connect(server.path), [], True
        ways = {client: (other, 'client'), other: (client, 'server')}
        while more:
            ready = select.select(ways, [], [], 1)[0]
            if not ready:
                quiet(server)
            for source in ready:
                target, side = ways[source]
                more = source.recv(1 << 20)
                if not more:
                    break
                while select.select([source], [], [], 0.05)[0] and (rest := source.recv(1 << 20)):     # all that it says at once
                    more += rest
                if not flights or flights[-1][0] != side:
                    flights.append((side, b''))
                flights[-1] = side, flights[-1][1] + more
                target.sendall(more)
        for end in (client, other, relay, process.stdin):
            end.close()
    server.stop()
    assert process.returncode == 0, f'{command(path)} ends with {process.returncode}'
    return flights


def record(client):
    with open(CLIENT, 'w', encoding='utf-8') as file:
        file.write('# What grpc-go tells kmsplugin in the conversation of the tour, recorded: see talk.py.\n')
        for side, data in relayed(lambda path: [client, path], lambda server: server.signal(signal.SIGTERM)):
            if side == 'client':
                file.write(re.sub(r'(?:00){64,}', lambda run: f' 00*{len(run[0]) // 2} ', data.hex()) + '\n')


def watch(endpoint):
    path, readers = endpoint.removeprefix('unix://'), {side: Reader(side, '') for side in ('client', 'server')}
    with connect('\0' + path[2:] if path.startswith('/@') else path) as connected:
        talk = Talk(connected)
        for data in said():
            talk.exchange(data)
    for side, data in talk.flights:
        readers['server'].kind = readers['client'].kind
        print('\n'.join([f'{side} says', *readers[side].text(data), '']))


if __name__ == '__main__':
    if len(sys.argv) != 3 or sys.argv[1] not in ('record', 'watch'):
        sys.exit(__doc__)
    {'record': record, 'watch': watch}[sys.argv[1]](sys.argv[2])
