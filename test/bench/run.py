#!/usr/bin/python3
"""Measures kmsplugin beside what people use today and beside what the machine can do at all.

    run.py PLUGIN FOLDER        programs and results (bench.md, bench.svg) are in FOLDER; `make bench` builds them

Four servers answer the same requests: the plugin with all its protections, a Go plugin (go/peer), a Rust plugin (rust,
if it was built) and a floor (floor.c). They take turns, several rounds over, so that a slow minute of the machine meets all of them; what counts is
the median. A server has one core to itself and its client the other, except where they share one on purpose. CPU time
is what the kernel counted (/proc/PID/task/*/schedstat). All answers of load.c and grpc-go are checked; those of h2load,
to which a gRPC error is a success, by the bytes of their bodies. QUICK=1 in the environment: one short round, to see
that it runs.
"""
import base64
import collections
import contextlib
import hashlib
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import memory
import report

HERE = os.path.dirname(os.path.abspath(__file__))
PLUGIN, BUILD = (os.path.abspath(path) for path in sys.argv[1:3])
QUICK = bool(os.environ.get('QUICK'))
ROUNDS = 1 if QUICK else 5
REQUESTS = 40000 if QUICK else 200000   # of the plugin in one measurement of load
SHARE = {'go': 0.2, 'rust': 0.4}        # of them for those that take longer
VALUES = 1000 if QUICK else 10000       # of etcd, to open
IDLE = 200                              # connections that do nothing
USUAL = 8, 32                           # connections and streams
CONNS = [(c, 32) for c in (1, 4, 8, 16, 64)]
STREAMS = [(8, m) for m in (1, 8, 32, 128, 250)]
SECONDS_MAX = 1200
CPUS = sorted(os.sched_getaffinity(0))
SERVER_CPU, CLIENT_CPU = CPUS[0], CPUS[-1]

TMP = tempfile.mkdtemp(prefix='kmsplugin-bench-')
ENV = {'PATH': os.environ['PATH'], 'GOMAXPROCS': '1',
       'KMS_KEK': base64.b64encode(hashlib.sha256(b'kmsplugin bench').digest()).decode()}
GO, RUST = BUILD + '/peer', BUILD + '/rust/release/peer'
PLUGINS = ['plugin', 'go'] + ['rust'] * os.path.exists(RUST)
V2, V1 = '/v2.KeyManagementService/', '/v1beta1.KeyManagementService/'

samples = collections.defaultdict(list)     # (measurement, subject): a number for each time it was taken


def take(name, subject, value):
    samples[name, subject].append(value)


def path_of(name):
    return os.path.join(TMP, name)


def command(subject, socket):
    return {'plugin': [PLUGIN, 'serve', '--log-level', 'error', '--listen', 'unix://' + socket],
            'go': [GO, socket],
            'go-v1': [GO, '-v1', socket],
            'rust': [RUST, socket],
            'floor': [BUILD + '/floor', 'serve', socket]}[subject]


def run(*args, cpu=CLIENT_CPU, **options):
    """Runs a program on one core and gives its output."""
    return subprocess.run(['taskset', '-c', str(cpu), *map(str, args)], env=ENV, stdout=subprocess.PIPE, text=True,
                          check=True, timeout=120, **options).stdout


def fields(text):
    return {key: float(value) for key, value in re.findall(r'(\w+)=([\d.]+)', text)}


class Server:
    """A server that runs while the `with` lasts, and not longer than this process."""

    def __init__(self, subject):
        self.name = subject
        self.subject = subject.removesuffix('-v1')
        self.socket = path_of(subject + '.sock')

    def __enter__(self):
        self.process = subprocess.Popen(['setpriv', '--pdeathsig', 'KILL', 'taskset', '-c', str(SERVER_CPU),
                                         *command(self.name, self.socket)], env=ENV)
        while not memory.listening(self.socket):
            if self.process.poll() is not None:
                sys.exit(f'{self.name} did not start')
            time.sleep(0.01)
        self.answer_bytes = {}
        self.load('Encrypt-v1' if self.name == 'go-v1' else 'Encrypt', rounds=500)    # warm
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()
        if os.path.exists(self.socket):
            os.unlink(self.socket)

    def cpu_us(self):
        """CPU time of all threads."""
        tasks = f'/proc/{self.process.pid}/task'
        total = 0
        for task in os.listdir(tasks):
            with open(f'{tasks}/{task}/schedstat', encoding='ascii') as file:
                total += int(file.read().split()[0])
        return total / 1000

    def resident(self):
        """KiB. Counted page by page if we may look; else as statm has it, some pages per core behind."""
        try:
            with open(f'/proc/{self.process.pid}/smaps_rollup', encoding='ascii') as file:
                return int(re.search(r'Rss: *(\d+)', file.read())[1])
        except PermissionError:
            with open(f'/proc/{self.process.pid}/statm', encoding='ascii') as file:
                return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE') // 1024

    def load(self, name, *options, rounds=1, cpu=CLIENT_CPU):
        return fields(run(BUILD + '/load', '-n', rounds, *options, self.socket, method(name), path_of(name), cpu=cpu))

    def answer(self, name):
        """One answer, a frame of gRPC."""
        self.load(name, '-o', path_of('answer'))
        with open(path_of('answer'), 'rb') as file:
            return file.read()

    def h2load(self, name, requests, conns=USUAL[0], streams=USUAL[1], *options, cpu=CLIENT_CPU):
        """Requests a second, and microseconds of the server's CPU for each."""
        if name not in self.answer_bytes:
            self.answer_bytes[name] = len(self.answer(name))
        before = self.cpu_us()
        text = run('h2load', *options, '-n', requests, '-c', conns, '-m', streams, '-t', 1,
                   '-B', 'unix:' + self.socket, '-d', path_of(name),
                   '-H', 'content-type: application/grpc', '-H', 'te: trailers',
                   '-H', 'grpc-timeout: 2999943u', 'http://localhost' + method(name), cpu=cpu)
        if f'({requests * self.answer_bytes[name]}) data' not in text:
            sys.exit(f'{self.name} failed requests:\n{text}')
        return float(re.search(r'([\d.]+) req/s', text)[1]), (self.cpu_us() - before) / requests


# ---------------------------------------------------------------- Bodies

PLAINTEXT, UID = bytes(range(32)), b'00000000-0000-4000-8000-000000000000'


def method(name):
    """Bodies have the name of their method, those of v1 with -v1 behind."""
    return V1 + name.removesuffix('-v1') if name.endswith('-v1') else V2 + name


def body(name, *parts):
    """A gRPC frame of a message with these fields of bytes, each shorter than 128."""
    data = b''.join(bytes([number << 3 | 2, len(value)]) + value for number, value in parts)
    with open(path_of(name), 'wb') as file:
        file.write(b'\0' + len(data).to_bytes(4, 'big') + data)


def parts_of(frame):
    """The fields of such a frame."""
    found, at = {}, 5
    while at < len(frame):
        found[frame[at] >> 3] = frame[at + 2:at + 2 + frame[at + 1]]
        at += 2 + frame[at + 1]
    return found


def bodies():
    body('Status')
    body('Encrypt', (1, PLAINTEXT), (2, UID))
    body('Encrypt-v1', (1, b'v1beta1'), (2, PLAINTEXT))


def decrypt_body(server, name):
    """Decrypt can only be asked for what this very server sealed."""
    if name == 'Decrypt':
        sealed = parts_of(server.answer('Encrypt'))
        body(name, (1, sealed[1]), (2, UID), (3, sealed[2]))
    else:
        body(name, (1, b'v1beta1'), (2, parts_of(server.answer('Encrypt-v1'))[1]))
    if parts_of(server.answer(name))[1] != PLAINTEXT:
        sys.exit(f'{server.name} does not open what it sealed')


# ---------------------------------------------------------------- Measurements

def amount(server, share=1.0):
    """So many requests that it takes about as long for all, and whole windows of any shape."""
    return max(1, int(REQUESTS * share * SHARE.get(server.subject, 1)) // 8000) * 8000


def latency():
    """One request at a time, on the same core, the servers in quick turns: this varies most of all with the machine."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(Server(subject)) for subject in [*PLUGINS, 'floor']]
        for _ in range(5):
            take('latency', 'floor', fields(run(BUILD + '/floor', 'pingpong', 5000, cpu=SERVER_CPU))['p50_us'])
            for server in servers:
                p50 = server.load('Encrypt', rounds=5000, cpu=SERVER_CPU)['p50_us']
                take('latency-http2', server.subject, p50)
                if server.subject != 'floor':
                    take('latency', server.subject, p50)
                log = path_of(f'h2load-{len(os.listdir(TMP))}')     # a new one: h2load appends
                server.h2load('Encrypt', 2000, 1, 1, '--log-file', log, cpu=SERVER_CPU)
                with open(log, encoding='ascii') as file:
                    took = statistics.median(int(line.split()[2]) for line in file)
                take('latency-h2load', server.subject, took)
                got = fields(run(BUILD + '/client', '-n', 2000, server.socket))
                take('go-p50', server.subject, got['p50_us'])
                take('go-p99', server.subject, got['p99_us'])


def h2load(server, name):
    rate, cpu = server.h2load(name, amount(server))
    take('rate-' + name, server.subject, rate)
    take('cpu-' + name, server.subject, cpu)


def load(server):
    """The same with load.c, for which h2load's own price is no limit."""
    rounds = amount(server) // USUAL[0] // USUAL[1]
    before = server.cpu_us()
    got = server.load('Encrypt', '-c', USUAL[0], '-m', USUAL[1], rounds=rounds)
    cpu = server.cpu_us() - before
    take('rate-load', server.subject, got['requests'] / got['seconds'])
    take('cpu-load', server.subject, cpu / got['requests'])
    take('busy', server.subject, cpu / got['seconds'] / 1e4)


def growth(server):
    for shape in dict.fromkeys(CONNS + STREAMS):
        take(('cpu', *shape), server.subject, server.h2load('Encrypt', amount(server, 0.25), *shape)[1])


def idle_memory(server):
    time.sleep(1.5)         # what a server gives back it has given back
    before = server.resident()
    client = subprocess.Popen([BUILD + '/load', '-w', '-c', str(IDLE), '-m', '8', '-n', '20', server.socket,
                               method('Encrypt'), path_of('Encrypt')], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    client.stdout.readline()
    time.sleep(1.5)
    take('idle', server.subject, (server.resident() - before) / IDLE)
    client.communicate()


def alone(subject):
    """Memory and start of a fresh process of its own."""
    program, serve = {'plugin': (PLUGIN, memory.serve), 'go': (GO, memory.Peer), 'rust': (RUST, memory.Peer)}[subject]
    ready, used = memory.idle(program, serve)
    take('ready', subject, ready / 1024)
    take('used', subject, used / 1024)
    take('peak', subject, memory.peak(program, serve) / 1024)
    own = path_of(subject + '-start.sock')
    times = memory.start(command(subject, own), TMP, own)
    take('start', subject, times['start'][0])
    take('start', 'floor', times['empty'][0])


def one_round():
    latency()
    for subject in [*PLUGINS, 'floor']:
        with Server(subject) as server:
            h2load(server, 'Encrypt')
            load(server)
            if subject != 'floor':
                growth(server)
                decrypt_body(server, 'Decrypt')
                h2load(server, 'Decrypt')
                h2load(server, 'Status')
    for subject in PLUGINS:
        with Server('go-v1' if subject == 'go' else subject) as server:
            h2load(server, 'Encrypt-v1')
            decrypt_body(server, 'Decrypt-v1')
            h2load(server, 'Decrypt-v1')
    for subject in PLUGINS:
        with Server(subject) as server:
            idle_memory(server)
        alone(subject)


def rescue():
    """`unseal` of one value a process, in a loop of the shell beside true(1); `audit` of all in one."""
    with Server('plugin') as server:
        run(BUILD + '/client', '-values', VALUES, '-dir', path_of('values'), server.socket)
    loop = 'for file in "$1"/*; do "$2" $3 <"$file" >/dev/null || exit 1; done'
    for subject, args in (('floor', ['/bin/true']), ('plugin', [PLUGIN, 'unseal'])):
        begin = time.monotonic()
        run('sh', '-c', loop, 'sh', path_of('values/each'), *args)
        take('unseal', subject, (time.monotonic() - begin) * 10000 / VALUES)
    begin = time.monotonic()
    with open(path_of('values/all'), 'rb') as file:
        run(PLUGIN, 'audit', stdin=file)
    take('audit', 'plugin', (time.monotonic() - begin) * 10000 / VALUES)


def instructions():
    counter = os.path.join(HERE, 'instructions.sh')
    for shape in dict.fromkeys([USUAL, CONNS[0], CONNS[-1], STREAMS[0], STREAMS[-1]]):
        got = subprocess.run([counter, PLUGIN, *map(str, shape)], check=True, stdout=subprocess.PIPE, text=True)
        take(('instructions', *shape), 'plugin', float(got.stdout))
    samples['instructions', 'plugin'] = samples[('instructions', *USUAL), 'plugin']


def machine():
    """What the figures depend on."""
    def output(*args):
        return subprocess.run(args, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    with open('/proc/cpuinfo', encoding='ascii') as file:
        model = re.search(r'model name\s*: (.*)', file.read())
    built = '\n'.join(output('go', 'version', '-m', GO))
    module = {name: re.search(rf'dep\s+{re.escape(name)}\s+v(\S+)', built)[1]
              for name in ('k8s.io/kms', 'google.golang.org/grpc')}
    rust = 'Rust plugin: not built (that takes cargo and protoc), so nothing is said of it'
    if 'rust' in PLUGINS:
        with open(os.path.join(HERE, 'rust/Cargo.lock'), encoding='ascii') as file:
            crate = dict(re.findall(r'name = "(.*)"\nversion = "(.*)"', file.read()))
        rust = 'Rust plugin: ' + ', '.join([' '.join(output('rustc', '--version')[0].split()[:2]),
                                            *(f'{name} {crate[name]}' for name in ('tonic', 'hyper', 'tokio', 'ring'))])
    return [f'{time.strftime("%Y-%m-%d", time.gmtime())}, {model[1] if model else platform.machine()}, '
            f'{len(CPUS)} cores, Linux {platform.release().split("-")[0]}, '
            f'load average at the start {os.getloadavg()[0]:.1f}',
            f'{", ".join(output(PLUGIN, "--version"))}; {output("cc", "--version")[0]}',
            f'Go plugin: {re.search(r"go[0-9.]+", built)[0]}, k8s.io/kms {module["k8s.io/kms"]}, '
            f'grpc-go {module["google.golang.org/grpc"]}',
            rust,
            f'{output("h2load", "--version")[0]}, {output("valgrind", "--version")[0]}']


def main():
    if len(CPUS) < 2:
        sys.exit('two cores are needed: one for the server, one for its client')
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, lambda *_: sys.exit('stopped'))
    signal.alarm(SECONDS_MAX)
    about = machine()
    try:
        bodies()
        for subject, program in zip(PLUGINS, (PLUGIN, GO, RUST)):
            take('bytes', subject, os.path.getsize(program) / 1024)
        for number in range(ROUNDS):
            print(f'round {number + 1} of {ROUNDS}', file=sys.stderr, flush=True)
            one_round()
        print('unseal, instructions', file=sys.stderr, flush=True)
        rescue()
        instructions()
    finally:
        shutil.rmtree(TMP, ignore_errors=True)
    print(report.write(BUILD, samples, about, ROUNDS, CONNS, STREAMS), end='')


if __name__ == '__main__':
    main()
