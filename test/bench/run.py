#!/usr/bin/python3
"""Measures kmsplugin beside what people use today, and beside what the machine can do at all.

    run.py PLUGIN FOLDER        programs and results (bench.md, bench.svg) are in FOLDER; `make bench` builds them
    run.py memory PROGRAM...    bytes, memory and start of release builds, a row each; of other machines': the size alone

Three servers answer the same requests: the plugin with all its protections, a Go plugin (go/peer) and a Rust plugin
(rust, if it was built). They take turns, several rounds over, so that a slow minute of the machine meets all of them;
what counts is the median. A server has one core to itself and its client the other, except where they share one on
purpose. CPU time is what the kernel counted (/proc/PID/task/*/schedstat). All answers are checked. QUICK=1 in the
environment: one short round, to see that it runs.
"""
import base64
import collections
import contextlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import report

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
import sealed
from plugin import KEK
from raw import EMPTY, ENCRYPT, Raw, field, message, until

QUICK = bool(os.environ.get('QUICK'))
ROUNDS = 1 if QUICK else 5
BATCHES = 160 if QUICK else 800         # of the plugin's in one measurement of load, on each connection
SHARE = {'go': 0.2, 'rust': 0.4}        # of them for those that take longer
VALUES = 1000 if QUICK else 10000       # of etcd, to open
STARTS = 20 if QUICK else 100
IDLE = 200                              # connections that do nothing
USUAL = 8, 32                           # connections and streams
SHAPES = [USUAL, (1, 32), (64, 32), (8, 1), (8, 250)]
SECONDS_MAX = 1200
CPUS = sorted(os.sched_getaffinity(0))
SERVER_CPU, CLIENT_CPU = CPUS[0], CPUS[-1]
MACHINES = {'x86_64': 62, 'aarch64': 183, 'riscv64': 243, 's390x': 22, 'armv7l': 40}     # e_machine of ELF

BUILD = os.path.join(HERE, '../../build/bench')
TMP = tempfile.mkdtemp(prefix='kmsplugin-bench-')
ENV = {'PATH': os.environ['PATH'], 'GOMAXPROCS': '1', 'KMS_KEK': base64.b64encode(KEK).decode()}
PROGRAMS = {'go': BUILD + '/peer', 'rust': BUILD + '/rust/release/peer'}
BODIES = {'Status': EMPTY, 'Encrypt': message(field(1, bytes(range(32))) + field(2, b'00000000-0000-4000-8000-000000000000'))}

samples = collections.defaultdict(list)     # (measurement, subject): a number for each time it was taken


def take(name, subject, value):
    samples[name, subject].append(value)


def path_of(name, content=None):
    path = os.path.join(TMP, name)
    if content is not None:
        with open(path, 'wb') as file:
            file.write(content)
    return path


def run(*args, cpu=CLIENT_CPU, **options):
    """Runs a program on one core and gives its output."""
    return subprocess.run(['taskset', '-c', str(cpu), *map(str, args)], env=ENV, stdout=subprocess.PIPE, text=True,
                          check=True, timeout=120, **options).stdout


def figures(words):
    return {key: float(value) for key, value in re.findall(r'(\w+)=([\d.]+)', words)}


def listening(path):
    """Without a connection, which would be part of the figures."""
    with open('/proc/net/unix', encoding='utf-8', errors='replace') as file:
        return any(words[3] == '00010000' and words[-1] == path for words in map(str.split, file))


def asked(name):
    return f'/v2.KeyManagementService/{name}', path_of(name, BODIES[name])


class Server:
    """A server that runs while the `with` lasts, and not longer than this process."""

    def __init__(self, subject):
        self.subject, self.socket = subject, path_of(subject + '.sock')
        own = [PROGRAMS[subject], 'serve', '--log-level', 'error', '--listen', 'unix://' + self.socket]
        self.command = own if subject == 'plugin' else [PROGRAMS[subject], self.socket]

    def __enter__(self):
        self.process = subprocess.Popen(['setpriv', '--pdeathsig', 'KILL', 'taskset', '-c', str(SERVER_CPU), *self.command],
                                        env=ENV)
        until(lambda: listening(self.socket), self.subject + ' listens')
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.socket)

    def cpu_us(self):
        """CPU time of all threads."""
        tasks, total = f'/proc/{self.process.pid}/task', 0
        for task in os.listdir(tasks):
            with open(f'{tasks}/{task}/schedstat', encoding='ascii') as file:
                total += int(file.read().split()[0])
        return total / 1000

    def memory(self, name='VmRSS'):
        """KiB."""
        with open(f'/proc/{self.process.pid}/status', encoding='ascii') as file:
            return int(re.search(rf'^{name}:\s*(\d+)', file.read(), re.M)[1])

    def load(self, name, conns=1, streams=1, rounds=1, cpu=CLIENT_CPU):
        return figures(run(BUILD + '/load', conns, streams, rounds, self.socket, *asked(name), cpu=cpu))


# ---------------------------------------------------------------- Measurements

def latency(subjects):
    """One request at a time, the servers in quick turns: this varies most of all with the machine."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(Server(subject)) for subject in subjects]
        for server in servers:
            server.load('Encrypt', rounds=500)      # warm
        for _ in range(5):
            take('latency', 'floor', figures(run(BUILD + '/load', 'pingpong', 5000, cpu=SERVER_CPU))['p50_us'])
            for server in servers:
                take('latency', server.subject, server.load('Encrypt', rounds=5000, cpu=SERVER_CPU)['p50_us'])
                got = figures(run(BUILD + '/client', '-n', 2000, server.socket))
                take('go-p50', server.subject, got['p50_us'])
                take('go-p99', server.subject, got['p99_us'])


def load(server, name):
    rounds = int(BATCHES * SHARE.get(server.subject, 1))
    server.load(name, *USUAL, rounds=rounds // 10)      # warm
    before = server.cpu_us()
    got = server.load(name, *USUAL, rounds=rounds)
    cpu = server.cpu_us() - before
    take('cpu-' + name, server.subject, cpu / got['requests'])
    take('rate-' + name, server.subject, got['requests'] / got['seconds'])
    take('busy-' + name, server.subject, cpu / got['seconds'] / 1e4)


def decrypt_body(server):
    """Decrypt can only be asked for what this very server sealed."""
    with Raw(server.socket) as raw:
        answer = raw.call(ENCRYPT, BODIES['Encrypt']).data[5:]
        size = answer[1]                                # each field is shorter than 128 bytes
        BODIES['Decrypt'] = message(answer[:2 + size] + field(3, answer[4 + size:4 + size + answer[3 + size]]))


def memory(subject):
    """Of a fresh process: when it is ready, after calls, an idle connection, and the peak."""
    with Server(subject) as server:
        take('ready', subject, server.memory())
        for _ in range(2):
            server.load('Encrypt')
        time.sleep(1.5)         # what a server gives back it has given back
        take('used', subject, server.memory())
        with contextlib.ExitStack() as stack:
            for _ in range(IDLE):
                assert stack.enter_context(Raw(server.socket)).works()
            time.sleep(1.5)
            take('idle', subject, (server.memory() - samples['used', subject][-1]) / IDLE)
    with Server(subject) as server:
        server.load('Encrypt', 8, 100, 3)
        take('peak', subject, server.memory('VmHWM'))


def start(subject):
    """Spawn to the answer of a Status, on a socket that the program makes."""
    server = Server(subject)
    got = figures(run(BUILD + '/load', 'start', STARTS, server.socket, *asked('Status'), *server.command,
                      cpu=f'{SERVER_CPU},{CLIENT_CPU}'))
    take('start', subject, got['p50_us'])
    take('start-least', subject, got['least_us'])


def one_round(subjects):
    latency(subjects)
    for subject in subjects:
        with Server(subject) as server:
            decrypt_body(server)
            for name in ('Encrypt', 'Decrypt', 'Status'):
                load(server, name)
        memory(subject)
        start(subject)


def rescue():
    """`unseal` of one value a process, in a loop of the shell beside true(1); `audit` of all in one."""
    os.mkdir(path_of('values'))
    entries = [(b'/registry/secrets/default/%d' % n, sealed.etcd_v1(KEK, b'/registry/secrets/default/%d' % n, bytes(1024)))
               for n in range(VALUES)]
    for n, entry in enumerate(entries):
        path_of(f'values/{n}', sealed.range_response(entry))
    loop = 'for file in "$1"/*; do "$2" $3 <"$file" >/dev/null || exit 1; done'
    for subject, args in (('floor', ['/bin/true']), ('plugin', [PROGRAMS['plugin'], 'unseal'])):
        begin = time.monotonic()
        run('sh', '-c', loop, 'sh', path_of('values'), *args)
        take('unseal', subject, (time.monotonic() - begin) * 10000 / VALUES)
    begin = time.monotonic()
    with open(path_of('all', sealed.range_response(*entries)), 'rb') as file:
        run(PROGRAMS['plugin'], 'audit', stdin=file)
    take('audit', 'plugin', (time.monotonic() - begin) * 10000 / VALUES)


def machine():
    """What the figures depend on."""
    def output(*args):
        return subprocess.run(args, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    with open('/proc/cpuinfo', encoding='ascii') as file:
        model = re.search(r'model name\s*: (.*)', file.read())
    built = '\n'.join(output('go', 'version', '-m', PROGRAMS['go']))
    module = {name: re.search(rf'dep\s+{re.escape(name)}\s+v(\S+)', built)[1]
              for name in ('k8s.io/kms', 'google.golang.org/grpc')}
    rust = 'Rust plugin: not built (that takes cargo and protoc), so nothing is said of it'
    if os.path.exists(PROGRAMS['rust']):
        with open(os.path.join(HERE, 'rust/Cargo.lock'), encoding='ascii') as file:
            crate = dict(re.findall(r'name = "(.*)"\nversion = "(.*)"', file.read()))
        rust = 'Rust plugin: ' + ', '.join([' '.join(output('rustc', '--version')[0].split()[:2]),
                                            *(f'{name} {crate[name]}' for name in ('tonic', 'hyper', 'tokio', 'ring'))])
    return [f'{time.strftime("%Y-%m-%d", time.gmtime())}, {model[1] if model else platform.machine()}, '
            f'{len(CPUS)} cores, Linux {platform.release().split("-")[0]}, '
            f'load average at the start {os.getloadavg()[0]:.1f}',
            f'{", ".join(output(PROGRAMS["plugin"], "--version"))}; {output("cc", "--version")[0]}',
            f'Go plugin: {re.search(r"go[0-9.]+", built)[0]}, k8s.io/kms {module["k8s.io/kms"]}, '
            f'grpc-go {module["google.golang.org/grpc"]}', rust, output('valgrind', '--version')[0]]


def bench(plugin, folder):
    PROGRAMS['plugin'] = os.path.abspath(plugin)
    subjects = [subject for subject in ('plugin', 'go', 'rust') if os.path.exists(PROGRAMS[subject])]
    about = machine()
    for subject in subjects:
        take('bytes', subject, os.path.getsize(PROGRAMS[subject]) / 1024)
    for number in range(ROUNDS):
        print(f'round {number + 1} of {ROUNDS}', file=sys.stderr, flush=True)
        one_round(subjects)
    print('unseal, instructions', file=sys.stderr, flush=True)
    rescue()
    for shape in SHAPES:
        take(('instructions', *shape), 'plugin', float(run(HERE + '/instructions.sh', PROGRAMS['plugin'], *shape)))
    samples['instructions', 'plugin'] = samples[('instructions', *USUAL), 'plugin']
    print(report.write(folder, samples, about, ROUNDS, SHAPES), end='')


def sizes(programs):
    names = ('ready', 'used', 'peak', 'idle', 'start', 'start-least')
    print(f'{"program":34} {"bytes":>7}', *(f'{name:>11}' for name in names), '(KiB; us)')
    for program in programs:
        row = f'{os.path.relpath(program):34} {os.path.getsize(program):7}'
        with open(program, 'rb') as file:
            head = file.read(20)
        if int.from_bytes(head[18:], 'little' if head[5] == 1 else 'big') != MACHINES.get(platform.machine()):
            print(row + '  not of this machine: memory and time under qemu would be qemu\'s')
            continue
        samples.clear()
        PROGRAMS['plugin'] = os.path.abspath(program)
        memory('plugin')
        start('plugin')
        print(row, *(f'{samples[name, "plugin"][0]:11.1f}' for name in names), flush=True)


def main(first, *more):
    if len(CPUS) < 2:
        sys.exit('two cores are needed: one for the server, one for its client')
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, lambda *_: sys.exit('stopped'))
    signal.alarm(SECONDS_MAX)
    try:
        sizes(more) if first == 'memory' else bench(first, *more)
    finally:
        shutil.rmtree(TMP, ignore_errors=True)


if __name__ == '__main__':
    main(*sys.argv[1:])
