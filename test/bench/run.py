#!/usr/bin/env python3
"""Measures kmsplugin beside what people use today and beside what the machine can do at all.

    run.py [OUTPUT-FOLDER]      build/bench by default, where `make bench` built the programs that it runs

Three servers answer the same requests: the plugin ($KMSPLUGIN, or build/static/kmsplugin) with all its protections, a
Go plugin (go/peer) and a floor (floor.c). They take turns, ROUNDS times over, so that a slow minute of the machine
meets all of them; what counts is the median. A server has one core to itself, its client the other, except where they
share one on purpose. CPU time is what the kernel counted (/proc/PID/task/*/schedstat).

    ROUNDS=5        more is calmer
    REQUESTS=200000 of the plugin in one measurement of load; the Go plugin gets a tenth
"""
import base64
import collections
import hashlib
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import report

HERE = os.path.dirname(os.path.abspath(__file__))
BUILD = os.path.abspath(sys.argv[1] if len(sys.argv) > 1 else os.path.join(HERE, '../../build/bench'))
PLUGIN = os.path.abspath(os.environ.get('KMSPLUGIN', os.path.join(HERE, '../../build/static/kmsplugin')))
ROUNDS = int(os.environ.get('ROUNDS', 5))
REQUESTS = int(os.environ.get('REQUESTS', 200000))
VALUES = 10000          # of etcd, to open
IDLE = 200              # connections that do nothing
CONNS, STREAMS = 8, 32  # the usual load
SHAPES = [(c, STREAMS) for c in (1, 2, 4, 8, 16, 32, 64)] + [(CONNS, m) for m in (1, 4, 16, 64, 128, 250)]
CPUS = sorted(os.sched_getaffinity(0))
SERVER_CPU, CLIENT_CPU = CPUS[0], CPUS[-1]

TMP = tempfile.mkdtemp(prefix='kmsplugin-bench-')
KEK = base64.b64encode(hashlib.sha256(b'kmsplugin bench').digest()).decode()
ENV = {'PATH': os.environ['PATH'], 'KMS_KEK': KEK, 'GOMAXPROCS': '1'}
V2, V1 = '/v2.KeyManagementService/', '/v1beta1.KeyManagementService/'

samples = collections.defaultdict(list)     # (measurement, subject): one number a round


def program(name):
    return os.path.join(BUILD, name)


def command(subject, path):
    return {'plugin': [PLUGIN, 'serve', '--log-level', 'error', '--listen', 'unix://' + path],
            'peer': [program('peer'), path],
            'peer-v1': [program('peer'), '-v1', path],
            'floor': [program('floor'), 'serve', path]}[subject]


def run(*args, cpu=CLIENT_CPU, **options):
    """Runs a program on one core and gives its output."""
    done = subprocess.run(['taskset', '-c', str(cpu), *map(str, args)], env=ENV, stdout=subprocess.PIPE, text=True,
                          check=True, timeout=600, **options)
    return done.stdout


def fields(text):
    return {key: float(value) for key, value in re.findall(r'(\w+)=([\d.]+)', text)}


class Server:
    """A server that runs while the `with` lasts."""

    def __init__(self, subject):
        self.subject = subject
        self.path = os.path.join(TMP, subject + '.sock')

    def __enter__(self):
        self.process = subprocess.Popen(['taskset', '-c', str(SERVER_CPU), *command(self.subject, self.path)], env=ENV)
        while not os.path.exists(self.path):
            if self.process.poll() is not None:
                sys.exit(f'{self.subject} did not start')
            time.sleep(0.01)
        warm = ('Encrypt-v1', V1) if self.subject == 'peer-v1' else ('Encrypt', V2)
        self.load(warm[0], warm[1] + 'Encrypt', rounds=500)
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()
        if os.path.exists(self.path):
            os.unlink(self.path)

    def cpu_ns(self):
        """CPU time of all threads."""
        tasks = f'/proc/{self.process.pid}/task'
        total = 0
        for task in os.listdir(tasks):
            with open(f'{tasks}/{task}/schedstat', encoding='ascii') as file:
                total += int(file.read().split()[0])
        return total

    def resident(self):
        """KiB. Counted page by page if we may look; else as statm has it, some pages per core behind."""
        try:
            with open(f'/proc/{self.process.pid}/smaps_rollup', encoding='ascii') as file:
                return int(re.search(r'Rss: *(\d+)', file.read())[1])
        except PermissionError:
            with open(f'/proc/{self.process.pid}/statm', encoding='ascii') as file:
                return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE') // 1024

    def load(self, body, method, *options, rounds=1, cpu=CLIENT_CPU):
        return fields(run(program('load'), '-n', rounds, *options, self.path, method, os.path.join(TMP, body), cpu=cpu))

    def h2load(self, body, method, requests, conns=CONNS, streams=STREAMS, cpu=CLIENT_CPU):
        """Requests a second, and microseconds of the server's CPU for each."""
        before = self.cpu_ns()
        text = run('h2load', '-n', requests, '-c', conns, '-m', streams, '-t', 1, '--base-uri', 'unix:' + self.path,
                   '-B', 'unix:' + self.path, '-d', os.path.join(TMP, body), '-H', 'content-type: application/grpc',
                   '-H', 'te: trailers', '-H', 'grpc-timeout: 2999943u', 'http://localhost' + method, cpu=cpu)
        if f' {requests} succeeded' not in text:
            sys.exit(f'{self.subject} failed requests:\n{text}')
        return float(re.search(r'([\d.]+) req/s', text)[1]), (self.cpu_ns() - before) / requests / 1000


# ---------------------------------------------------------------- Bodies

def message(*parts):
    """A gRPC frame with these fields of bytes, each shorter than 128."""
    data = b''.join(bytes([number << 3 | 2, len(value)]) + value for number, value in parts)
    return b'\0' + len(data).to_bytes(4, 'big') + data


def parts(frame):
    """The fields of a frame as above."""
    found, at = {}, 5
    while at < len(frame):
        found[frame[at] >> 3] = frame[at + 2:at + 2 + frame[at + 1]]
        at += 2 + frame[at + 1]
    return found


def body(name, *fields_of):
    with open(os.path.join(TMP, name), 'wb') as file:
        file.write(message(*fields_of))


def answer(server, name, method):
    out = os.path.join(TMP, 'answer')
    server.load(name, method, '-o', out)
    with open(out, 'rb') as file:
        return parts(file.read())


PLAINTEXT, UID, V1BETA1 = bytes(range(32)), b'00000000-0000-4000-8000-000000000000', b'v1beta1'


def bodies():
    body('Status')
    body('Encrypt', (1, PLAINTEXT), (2, UID))
    body('Encrypt-v1', (1, V1BETA1), (2, PLAINTEXT))


def decrypt_bodies(server):
    """Decrypt can only be asked for what this very server sealed."""
    if server.subject != 'peer-v1':
        sealed = answer(server, 'Encrypt', V2 + 'Encrypt')
        body('Decrypt', (1, sealed[1]), (2, UID), (3, sealed[2]))
        assert answer(server, 'Decrypt', V2 + 'Decrypt')[1] == PLAINTEXT
    if server.subject != 'peer':
        sealed = answer(server, 'Encrypt-v1', V1 + 'Encrypt')
        body('Decrypt-v1', (1, V1BETA1), (2, sealed[1]))
        assert answer(server, 'Decrypt-v1', V1 + 'Decrypt')[1] == PLAINTEXT


# ---------------------------------------------------------------- Measurements

def amount(subject, share=1.0):
    """So many requests that a measurement takes about as long for all; a multiple of every shape."""
    return max(1, int(REQUESTS * share * (0.1 if subject.startswith('peer') else 1)) // 32000) * 32000


def take(name, subject, value):
    samples[name, subject].append(value)


def latency():
    """One request at a time, on the same core, the servers in quick turns: this varies most of all with the machine."""
    with Server('plugin') as plugin, Server('peer') as peer, Server('floor') as floor:
        for _ in range(5):
            take('latency', 'floor', fields(run(program('floor'), 'pingpong', 5000, cpu=SERVER_CPU))['p50_us'])
            for server in (plugin, peer, floor):
                p50 = server.load('Encrypt', V2 + 'Encrypt', rounds=5000, cpu=SERVER_CPU)['p50_us']
                take('latency-http2', server.subject, p50)
                if server is not floor:
                    take('latency', server.subject, p50)
                    rate, _ = server.h2load('Encrypt', V2 + 'Encrypt', 2000, 1, 1, cpu=SERVER_CPU)
                    take('latency-h2load', server.subject, 1e6 / rate)


def grpc_go(server):
    take('go-latency', server.subject, fields(run(program('client'), '-n', 5000, server.path))['p50_us'])
    got = fields(run(program('client'), '-c', CONNS, '-m', STREAMS, '-n', amount('peer'), server.path))
    take('go-rate', server.subject, got['requests'] / got['seconds'])


def throughput(server, name, method):
    rate, cpu = server.h2load(name, method, amount(server.subject))
    subject = server.subject.removesuffix('-v1')
    take(f'rate-{name}', subject, rate)
    take(f'cpu-{name}', subject, cpu)


def lean(server):
    rounds = amount(server.subject) // CONNS // STREAMS
    got = server.load('Encrypt', V2 + 'Encrypt', '-c', CONNS, '-m', STREAMS, rounds=rounds)
    take('rate-load', server.subject, got['requests'] / got['seconds'])


def growth(server):
    for conns, streams in SHAPES:
        _, cpu = server.h2load('Encrypt', V2 + 'Encrypt', amount(server.subject, 0.25), conns, streams)
        take(('cpu', conns, streams), server.subject, cpu)


def idle_memory(server):
    time.sleep(1.5)         # what a server gives back it has given back
    before = server.resident()
    take('resident', server.subject, before / 1024)
    client = subprocess.Popen([program('load'), '-w', '-c', str(IDLE), '-m', '8', '-n', '20', server.path,
                               V2 + 'Encrypt', os.path.join(TMP, 'Encrypt')],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    client.stdout.readline()
    time.sleep(1.5)
    take('idle', server.subject, (server.resident() - before) / IDLE)
    client.communicate()


def start(subject):
    """From the start of the process to its first answer."""
    path = os.path.join(TMP, 'start.sock')
    for _ in range(10):
        got = run(program('load'), path, V2 + 'Status', os.path.join(TMP, 'Status'), *command(subject, path))
        take('start', subject, fields(got)['start_us'] / 1000)
        if os.path.exists(path):
            os.unlink(path)


def one_round():
    latency()
    for subject in ('plugin', 'peer', 'floor'):
        with Server(subject) as server:
            throughput(server, 'Encrypt', V2 + 'Encrypt')
            lean(server)
            if subject == 'floor':
                continue
            growth(server)
            decrypt_bodies(server)
            grpc_go(server)
            throughput(server, 'Decrypt', V2 + 'Decrypt')
            throughput(server, 'Status', V2 + 'Status')
        if subject == 'floor':
            continue
        with Server(subject if subject == 'plugin' else 'peer-v1') as server:
            decrypt_bodies(server)
            throughput(server, 'Encrypt-v1', V1 + 'Encrypt')
            throughput(server, 'Decrypt-v1', V1 + 'Decrypt')
        with Server(subject) as server:
            idle_memory(server)
        start(subject)


def rescue():
    """`unseal` of one value a process, beside a program that does nothing; `audit` of all in one."""
    folder = os.path.join(TMP, 'values')
    with Server('plugin') as server:
        run(program('client'), '-values', VALUES, '-dir', folder, server.path)
    for subject, args in (('floor', [program('nothing')]), ('plugin', [PLUGIN, 'unseal'])):
        got = fields(run(program('floor'), 'spawn', folder + '/each', *args))
        take('unseal', subject, got['seconds'])
        take('exec', subject, got['p50_us'] / 1000)
    samples['start', 'floor'] = samples['exec', 'floor']
    begin = time.monotonic()
    with open(folder + '/all', 'rb') as file:
        run(PLUGIN, 'audit', stdin=file)
    take('audit', 'plugin', time.monotonic() - begin)


def instructions():
    for conns, streams in SHAPES:
        got = subprocess.run([os.path.join(HERE, 'instructions.sh'), PLUGIN, str(conns), str(streams)], check=True,
                             stdout=subprocess.PIPE, text=True, env={**os.environ, 'LOAD': program('load')})
        take(('instructions', conns, streams), 'plugin', float(got.stdout))
    samples['instructions', 'plugin'] = samples[('instructions', CONNS, STREAMS), 'plugin']


def machine():
    """What the figures depend on."""
    def first(*args):
        return subprocess.run(args, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[0]
    with open('/proc/cpuinfo', encoding='ascii') as file:
        model = re.search(r'model name\s*: (.*)', file.read())
    built = subprocess.run(['go', 'version', '-m', program('peer')], stdout=subprocess.PIPE, text=True, check=True).stdout
    module = {name: re.search(rf'dep\s+{re.escape(name)}\s+v(\S+)', built)[1]
              for name in ('k8s.io/kms', 'google.golang.org/grpc')}
    return [f'{model[1] if model else platform.machine()}, {len(CPUS)} cores; Linux {platform.release().split("-")[0]}',
            first(PLUGIN, '--version') + f', {os.path.getsize(PLUGIN) / 1024:.0f} KiB',
            f'Go plugin: {re.search(r"go[0-9.]+", built)[0]}, k8s.io/kms {module["k8s.io/kms"]}, '
            f'grpc-go {module["google.golang.org/grpc"]}, {os.path.getsize(program("peer")) / 2**20:.0f} MiB',
            first('h2load', '--version')]


def main():
    if len(CPUS) < 2:
        sys.exit('two cores are needed: one for the server, one for its client')
    os.environ.update(ENV)
    try:
        bodies()
        for number in range(ROUNDS):
            print(f'round {number + 1} of {ROUNDS}', file=sys.stderr, flush=True)
            one_round()
        print('unseal, instructions', file=sys.stderr, flush=True)
        rescue()
        instructions()
    finally:
        shutil.rmtree(TMP, ignore_errors=True)
    medians = {key: statistics.median(values) for key, values in samples.items() if values}
    print(report.write(BUILD, medians, machine(), ROUNDS, SHAPES, (CONNS, STREAMS)), end='')


if __name__ == '__main__':
    main()
