#!/usr/bin/python3
"""Talks to a running plugin as kube-apiserver does, and shows every octet of it.

    watch.py ENDPOINT [METHOD...]       unix:///path or unix:///@name; Status, Encrypt, Decrypt if none is named

The plaintext is 32 random bytes of its own. A call to Decrypt opens what the Encrypt before it brought.
"""
import os
import socket
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from hpack import Encoder

from octets import ACK, DATA, END_HEADERS, END_STREAM, HEADERS, PREFACE, SETTINGS, Side, number
from plugin import WAIT, kms
from raw import message, request

UID = 'tour'            # kube-apiserver sends a UUID; it names the call in logs


def frame(kind, flags, stream, payload=b''):
    return len(payload).to_bytes(3, 'big') + bytes([kind, flags]) + stream.to_bytes(4, 'big') + payload


class Watch:
    """A client that keeps what both sides say, a flight at a time: (side, lines)."""

    def __init__(self, address):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(WAIT)
        self.socket.connect(address)
        self.client, self.server = Side('client'), Side('server')
        self.encoder, self.stream = Encoder(), -1
        self.buffer = b''
        self.flights = []

    def close(self):
        self.socket.close()

    def say(self, octets):
        self.socket.sendall(octets)
        self.flights.append((self.client.name, self.client.show(octets)))

    def frame(self):
        """The octets of the next frame from the server."""
        while len(self.buffer) < 9 or len(self.buffer) < (end := 9 + number(self.buffer[:3])):
            more = self.socket.recv(65536)
            if not more:
                raise EOFError('the server closed the connection')
            self.buffer += more
        octets, self.buffer = self.buffer[:end], self.buffer[end:]
        return octets

    def hear(self, last):
        """Reads frames up to one of a type, with that flag; gives the DATA among them."""
        heard, data = b'', b''
        while True:
            octets = self.frame()
            heard += octets
            if octets[3] == DATA:
                data += octets[9:]
            if octets[3] == last[0] and octets[4] & last[1]:
                break
        self.flights.append((self.server.name, self.server.show(heard)))
        return data

    def greet(self):
        """As grpc-go does: the preface and SETTINGS without a setting."""
        self.say(PREFACE + frame(SETTINGS, 0, 0))
        self.hear((SETTINGS, ACK))
        self.acknowledged = frame(SETTINGS, ACK, 0)

    def call(self, method, body):
        """One call; gives the response. Field for field what kube-apiserver 1.32 and later sends."""
        self.stream += 2
        self.server.method = method
        fields = request(f'/v2.KeyManagementService/{method}', ('grpc-timeout', '2999943u'))
        fields.insert(5, ('user-agent', 'grpc-go/1.82.1'))
        self.say(self.acknowledged + frame(HEADERS, END_HEADERS, self.stream, self.encoder.encode(fields)) +
                 frame(DATA, END_STREAM, self.stream, message(body.SerializeToString())))
        self.acknowledged = b''
        data = self.hear((HEADERS, END_STREAM))
        return getattr(kms, method + 'Response').FromString(data[5:])


def requests(methods, plaintext):
    """What to call, each request made from the response before it."""
    made = None
    for method in methods:
        if method == 'Status':
            yield method, kms.StatusRequest()
        elif method == 'Encrypt':
            made = yield method, kms.EncryptRequest(plaintext=plaintext, uid=UID)
        elif method == 'Decrypt' and made is not None:
            yield method, kms.DecryptRequest(ciphertext=made.ciphertext, uid=UID, key_id=made.key_id)
        else:
            sys.exit(f'{method}: not Status, Encrypt or a Decrypt behind an Encrypt')


def address_of(endpoint):
    path = endpoint.removeprefix('unix://')
    if path == endpoint or not path.startswith('/'):
        sys.exit(f'{endpoint}: not unix:///path or unix:///@name')
    return '\0' + path[2:] if path.startswith('/@') else path


def show(flights):
    for side, lines in flights:
        print(f'{side} says')
        print('\n'.join(lines) + '\n')


def main(endpoint, *methods):
    watch = Watch(address_of(endpoint))
    watch.greet()
    made = None
    calls = requests(methods or ('Status', 'Encrypt', 'Decrypt'), os.urandom(32))
    try:
        step = next(calls)
        while True:
            answer = watch.call(*step)
            made = answer if step[0] == 'Encrypt' else made
            step = calls.send(made)
    except StopIteration:
        pass
    show(watch.flights)


if __name__ == '__main__':
    if len(sys.argv) < 2 or sys.argv[1].startswith('-'):
        sys.exit(__doc__)
    main(*sys.argv[1:])
