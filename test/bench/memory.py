#!/usr/bin/python3
"""Bytes, memory and start time of a release build, as one row of a table.

    memory.py [PROGRAM]...    build/static/kmsplugin; of another architecture: its size alone

idle       resident when it is ready; and idle again, after calls and their connections' end
peak       the highest of it (VmHWM) with 8 connections of 100 Encrypt requests each, all of them open at a time
a connection    what 200 idle ones add, each after a call, by number
start      from spawn to the first Status answered: median of 100, beside the whole life of an empty static program.
           The client has connected and sent its request before (socket activation): nothing else is waited for.

Memory is what /proc/PID/status says of the process, pages of the program file included; under qemu-user it is qemu's.
"""
import os
import platform
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
import plugin
from raw import EMPTY, ENCRYPT, PREFACE, STATUS, Raw, field, message, request
from hpack import Encoder
from hyperframe.frame import DataFrame, HeadersFrame, SettingsFrame

ROUNDS = 100
CONNECTIONS, STREAMS, IDLE = 8, 100, 200
TIDY_SECONDS = 1.5      # by then the server has given back what it kept


class Peer:
    """Another plugin of the benchmark, with as much of plugin.Server as is needed here. Ready when it listens."""

    def __init__(self, program):
        self.path = os.path.join(plugin.fresh_dir(), 'kms.sock')
        self.process = subprocess.Popen([program, self.path], env={'GOMAXPROCS': '1'})
        plugin.until(lambda: listening(self.path), program + ' listens')

    def proc(self, name):
        with open(f'/proc/{self.process.pid}/{name}', 'rb') as file:
            return file.read()

    def stop(self):
        self.process.kill()
        self.process.wait()


def listening(path):
    """Without a connection, which would be part of the figures."""
    with open('/proc/net/unix', encoding='utf-8', errors='replace') as file:
        return any(words[3] == '00010000' and words[-1] == path for words in map(str.split, file))


def serve(program):
    return plugin.Server(binary=program)


def status(server, name):
    """A figure of /proc/PID/status in bytes."""
    line = next(x for x in server.proc('status').decode().splitlines() if x.startswith(name + ':'))
    return int(line.split()[1]) * 1024


def peak(program, serve=serve):
    """All 800 calls are open before the first has a body, and all bodies there before an answer is read."""
    server = serve(program)
    raws = [Raw(server.path) for _ in range(CONNECTIONS)]
    body = message(field(1, os.urandom(32)) + field(2, b'a-uid-as-long-as-those-of-apiservers'))
    asked = [(raw, [raw.open(request(ENCRYPT)) for _ in range(STREAMS)]) for raw in raws]
    for raw in raws:
        raw.drained()
    for raw, streams in asked:
        raw.send(b''.join(DataFrame(stream, body, flags=['END_STREAM']).serialize() for stream in streams))
    for raw, streams in asked:
        for stream in streams:
            assert raw.wait(stream).status == 0
    high = status(server, 'VmHWM')
    for raw in raws:
        raw.close()
    server.stop()
    return high


def idle(program, serve=serve):
    server = serve(program)
    ready = status(server, 'VmRSS')
    with Raw(server.path) as raw:
        assert raw.works()
    with Raw(server.path) as raw:   # served, so the one before is closed
        assert raw.works()
    time.sleep(TIDY_SECONDS)
    used = status(server, 'VmRSS')
    server.stop()
    return ready, used


def connection(program):
    server = plugin.Server(binary=program)
    raws = [Raw(server.path)]
    assert raws[0].works()
    before = status(server, 'VmRSS')
    for _ in range(IDLE):
        raws.append(Raw(server.path))
        assert raws[-1].works()
    after = status(server, 'VmRSS')
    for raw in raws:
        raw.close()
    server.stop()
    return (after - before) / IDLE


def start(command, tmp, own=None):
    """Medians and quartiles in microseconds: spawn to first answer, and an empty program. `own` is the socket that the
    command makes, if it is not to be given one."""
    compiler = 'build/static/x86_64/bin/cc' if os.path.exists('build/static/x86_64/bin/cc') else 'cc'
    empty = os.path.join(tmp, 'empty')
    subprocess.run([compiler, '-O2', '-fPIE', '-static-pie', '-s', '-xc', '-', '-o', empty],
                   input=b'int main(void) { return 0; }', check=True)
    subprocess.run(['cc', '-O2', '-o', tmp + '/start', HERE + '/start.c'], check=True)
    with open(tmp + '/request', 'wb') as file:
        file.write(PREFACE + b''.join(frame.serialize() for frame in (
            SettingsFrame(), HeadersFrame(1, Encoder().encode(request(STATUS)), flags=['END_HEADERS']),
            DataFrame(1, EMPTY, flags=['END_STREAM']))))
    done = subprocess.run([tmp + '/start', *(['-s', own] if own else []), str(ROUNDS), empty, tmp + '/request', *command],
                          check=True, text=True, env={'KMS_KEK': plugin.text(plugin.KEK)}, capture_output=True)
    return {line.split()[0]: [int(x) for x in line.split()[1:]] for line in done.stdout.splitlines()}


def native(program):
    with open(program, 'rb') as file:
        head = file.read(20)
    machine = int.from_bytes(head[18:20], 'little' if head[5] == 1 else 'big')
    return {'x86_64': 62, 'aarch64': 183, 'riscv64': 243, 's390x': 22, 'armv7l': 40}.get(platform.machine()) == machine


def main(programs):
    print(f'{"program":34} {"bytes":>7} {"idle KiB":>9} {"used KiB":>9} {"peak KiB":>9} {"KiB/conn":>9}'
          f' {"start us":>9} {"(quartiles)":>13} {"empty us":>9}', flush=True)
    for program in programs:
        row = f'{os.path.relpath(program):34} {os.path.getsize(program):7}'
        if not native(program):
            print(row + '  not of this machine: memory and time under qemu would be qemu\'s')
            continue
        program = os.path.abspath(program)
        ready, used = idle(program)
        with tempfile.TemporaryDirectory() as tmp:
            times = start([program, 'serve', '--log-level', 'error'], tmp)
        median, low, high = times['start']
        print(f'{row} {ready / 1024:9.0f} {used / 1024:9.0f} {peak(program) / 1024:9.0f}'
              f' {connection(program) / 1024:9.1f}'
              f' {median:9} {f"{low}-{high}":>13} {times["empty"][0]:9}', flush=True)


if __name__ == '__main__':
    main(sys.argv[1:] or ['build/static/kmsplugin'])
