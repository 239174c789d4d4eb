"""A machine that is not as one would have it: calls that the kernel lacks or a container runtime forbids, signals,
closed descriptors, sockets that others have left. The server serves, or says in one line why it cannot."""
import errno
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import time
import unittest

from plugin import (BINARY, EMULATED, KEK, ROOT, SANITIZED, STRANGER, WAIT, Case, as_user, environment, fresh_dir,
                    key_id, needs_root, public_binary, run, text, until)
from raw import Raw

# Becomes the program, with a filter of system calls: number NUMBER is answered with error ERROR.
DENY = r'''
import ctypes, os, struct, sys
number, error = int(sys.argv[1]), int(sys.argv[2])
LOAD, EQUAL, RETURN, ERROR, ALLOW = 0x20, 0x15, 0x06, 0x50000, 0x7fff0000
code = [(LOAD, 0, 0, 0), (EQUAL, 0, 1, number), (RETURN, 0, 0, ERROR | error), (RETURN, 0, 0, ALLOW)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
class Program(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("code", ctypes.c_void_p)]
libc = ctypes.CDLL(None, use_errno=True)
NO_NEW_PRIVS, SECCOMP, FILTER = 38, 22, 2
if libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(SECCOMP, FILTER, ctypes.byref(Program(4, ctypes.addressof(code)))):
    sys.exit(os.strerror(ctypes.get_errno()))
os.execv(sys.argv[3], sys.argv[3:])
'''

# x86-64's numbers. What happens without: None, it serves and warns of nothing; a warning's words; or with '!' the one
# line that it ends with.
CALLS = {
    'prctl': (157, 'feature=seccomp'), 'prlimit64': (302, None), 'getrlimit': (97, None), 'fstat': (5, None),
    'lstat': (6, None), 'statx': (332, None), 'mlock': (149, 'cannot be locked'), 'madvise': (28, 'MADV_DONTFORK'),
    'getrandom': (318, '!getrandom: '), 'clock_gettime': (228, None), 'ppoll': (271, '!ppoll: '),
    'rt_sigprocmask': (14, '!sigprocmask, sigaction: '), 'rt_sigaction': (13, '!sigprocmask, sigaction: '),
    'socket': (41, '!socket: '), 'bind': (49, '!bind: '), 'listen': (50, '!listen: '), 'getsockname': (51, 'getsockname: '),
    'pipe2': (293, 'pipe2: '), 'clone': (56, 'fork: '), 'clone3': (435, None), 'wait4': (61, 'waitpid: '),
    'kill': (62, 'kill: '), 'alarm': (37, None), 'epoll_create1': (291, '!epoll_create1: '),
    'epoll_ctl': (233, '!epoll_ctl: '), 'epoll_pwait': (281, '!epoll_pwait: '), 'signalfd4': (289, '!signalfd: '),
    'timerfd_create': (283, '!timerfd_create: '), 'timerfd_settime': (286, '!timerfd_settime: '), 'fcntl': (72, None),
    'capset': (126, 'feature=capabilities'), 'chmod': (90, '!chmod: '), 'umask': (95, None), 'accept4': (288, '!accept4: '),
    'getsockopt': (55, '!getsockopt: '), 'setsockopt': (54, None), 'connect': (42, '!connect: '), 'unlink': (87, None),
    'clock_nanosleep': (230, None), 'readlink': (89, None), 'seccomp': (317, None),
    'rt_sigreturn': (15, None), 'poll': (7, None), 'getcwd': (79, None), 'gettid': (186, None),
}
ENTROPY = (318, errno.EAGAIN)
with open(BINARY, 'rb') as program:
    GLIBC = b'libc.so.6' in program.read()

x86_64_only = unittest.skipUnless(platform.machine() == 'x86_64' and not EMULATED, 'the numbers are those of x86-64')


def denied(number, error):
    return (sys.executable, '-c', DENY, str(number), str(error))


class Kernel(Case):
    def serves(self, server):
        with Raw(server.path) as raw:
            self.assertTrue(raw.works())
        server.stop()
        self.assertFalse(os.path.lexists(server.path))

    def refuses(self, wrapper):
        """Exit status 1, nothing left behind; gives the last line that it says."""
        endpoint = 'unix://' + fresh_dir() + '/kms.sock'
        done = run('serve', '--listen', endpoint, kek=KEK, wrapper=wrapper)
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertFalse(os.path.lexists(endpoint[len('unix://'):]))
        line = done.stderr.splitlines()[-1]
        self.assertTrue(line.startswith('kmsplugin: '), done.stderr)
        return line

    def cases(self):
        for name, (number, expected) in CALLS.items():
            for error in (errno.ENOSYS, errno.EPERM):
                wrapper = denied(number, error)
                if run('--version', wrapper=wrapper).returncode == 127:
                    continue    # the dynamic loader cannot do without: fstat, on Debian 13
                yield name, wrapper, expected, error

    @x86_64_only
    @unittest.skipIf(SANITIZED, 'sanitizers need many of these calls')
    @unittest.skipUnless(GLIBC, 'musl makes other calls, and has others to fall back on')
    def test_each_call_missing_or_forbidden(self):
        for name, wrapper, expected, error in self.cases():
            with self.subTest(call=name, error=errno.errorcode[error]):
                if expected and expected.startswith('!'):
                    self.assertIn(expected[1:] + os.strerror(error), self.refuses(wrapper))
                    continue
                server = self.start(wrapper=wrapper)
                warnings = '\n'.join(line for line in server.lines if 'level=warn' in line)
                if expected:
                    self.assertIn(expected, warnings)
                    self.assertIn(os.strerror(error) if 'MADV' not in expected else '', warnings)
                else:
                    self.assertEqual(warnings, '')
                self.serves(server)

    @x86_64_only
    @unittest.skipIf(SANITIZED or GLIBC, 'another test asks more')
    def test_each_call_missing_or_forbidden_by_musl(self):
        """It serves, or ends in a line that names a call."""
        served = refused = 0
        for name, wrapper, _, error in self.cases():
            try:
                server = self.start(wrapper=wrapper)
            except AssertionError:
                self.assertRegex(self.refuses(wrapper), r'\w+: ' + os.strerror(error), name)
                refused += 1
            else:
                self.serves(server)
                served += 1
        self.assertGreater(min(served, refused), 20)

    @x86_64_only
    def test_no_entropy_yet(self):
        """It says that it waits, is not ready, and hears SIGTERM."""
        path = fresh_dir() + '/kms.sock'
        process = subprocess.Popen([*denied(*ENTROPY), BINARY, 'serve', '--listen', 'unix://' + path],
                                   env=environment(KEK, None), stderr=subprocess.PIPE)
        try:
            line = process.stderr.readline()
            self.assertIn(b'waiting for the kernel to have random numbers', line)
            self.assertFalse(os.path.lexists(path))
            process.send_signal(signal.SIGTERM)
            rest = process.stderr.read()
            self.assertEqual(process.wait(WAIT), 0)
            self.assertNotIn(b'msg=ready', rest)
        finally:
            process.kill()
            process.wait()
            process.stderr.close()


class Signals(Case):
    def test_hangup_is_logged_and_changes_nothing(self):
        server = self.start()
        for count in (1, 2):
            server.signal(signal.SIGHUP)
            line = server.wait_log(r'signal=1\b', count)[-1].string
            self.assertRegex(line, 'level=info msg=".*KEKs.*restart')
        with Raw(server.path) as raw:
            self.assertTrue(raw.works())

    def test_no_other_signal_ends_it(self):
        server = self.start()
        ends = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT}
        stops = {signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}
        for number in sorted(signal.valid_signals() - ends - stops):
            server.signal(number)
        with Raw(server.path) as raw:
            self.assertTrue(raw.works())
        for number in sorted(stops):
            server.signal(number)
            server.signal(signal.SIGCONT)
        with Raw(server.path) as raw:
            self.assertTrue(raw.works())

    def test_no_signal_of_the_threads_either(self):
        """32 to 34, which sigfillset leaves out."""
        server = self.start()
        for number in (32, 33, 34, 64):
            os.kill(server.pid, number)
        with Raw(server.path) as raw:
            self.assertTrue(raw.works())

    def test_ignored_children_are_waited_for(self):
        """Whoever ignores SIGCHLD leaves that to what it starts."""
        def ignore():
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
        server = self.start(preexec_fn=ignore)
        self.assertEqual([line for line in server.lines if 'level=warn' in line and not EMULATED], [])

    def test_no_child_outlives_a_start_that_is_ended(self):
        """Nor keeps the socket that was handed over."""
        path = fresh_dir() + '/kms.sock'
        for delay in range(2, 18, 2):
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(path)
            listener.listen()
            process = subprocess.Popen([BINARY, 'serve'], stderr=subprocess.DEVNULL, pass_fds=(listener.fileno(),),
                                       env=environment(KEK, {}))
            time.sleep(delay / 1000)
            process.send_signal(signal.SIGTERM)
            process.wait(WAIT)
            listener.close()

            def refused():
                with socket.socket(socket.AF_UNIX) as peer:
                    return peer.connect_ex(path) == errno.ECONNREFUSED
            until(refused, 'nobody holds the socket any more')
            os.unlink(path)

    def test_ignored_signals_are_heard(self):
        """A shell starts its background jobs with SIGINT ignored."""
        for number in (signal.SIGINT, signal.SIGTERM):
            server = self.start(preexec_fn=lambda number=number: signal.signal(number, signal.SIG_IGN))
            server.signal(number)
            self.assertEqual(server.wait(), 0)

    def test_terminated_while_it_starts(self):
        """However early: exit status 0, and no socket is left behind."""
        for delay in range(0, 40, 2):
            path = fresh_dir() + '/kms.sock'
            process = subprocess.Popen([BINARY, 'serve', '--listen', 'unix://' + path], env=environment(KEK, None),
                                       stderr=subprocess.DEVNULL)
            time.sleep(delay / 1000)
            process.send_signal(signal.SIGTERM)
            status = process.wait(WAIT)
            self.assertIn(status, (0, -signal.SIGTERM), delay)     # before main it is the kernel's to say
            self.assertFalse(os.path.lexists(path), delay)


class Descriptors(Case):
    CLOSE = ('/bin/sh', '-c', 'exec "$@" {}', 'sh')

    def closing(self, which):
        return (*self.CLOSE[:2], self.CLOSE[2].format(which), self.CLOSE[3])

    @needs_root     # its directory in /proc is root's
    @unittest.skipIf(EMULATED, 'the emulator has descriptors of its own')
    def test_closed_ones_are_dev_null(self):
        path = fresh_dir() + '/kms.sock'
        process = subprocess.Popen([*self.closing('<&- >&- 2>&-'), BINARY, 'serve', '--listen', 'unix://' + path],
                                   env=environment(KEK, None))
        try:
            until(lambda: run('probe', 'unix://' + path).returncode == 0, 'it serves')
            for fd in range(3):
                self.assertEqual(os.readlink(f'/proc/{process.pid}/fd/{fd}'), '/dev/null')
            process.send_signal(signal.SIGTERM)
            self.assertEqual(process.wait(WAIT), 0)
        finally:
            process.kill()
            process.wait()

    def test_a_reader_that_has_stopped_keeps_nobody_from_the_end(self):
        """Standard error is a pipe that is full: an error at the start ends it all the same."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        try:
            while True:
                os.write(writer, bytes(65536))
        except BlockingIOError:
            pass
        os.set_blocking(writer, True)
        process = subprocess.Popen([BINARY, 'serve', '--listen', 'unix:///nowhere/at/all/kms.sock'], stderr=writer,
                                   env=environment(KEK, None))
        try:
            self.assertEqual(process.wait(WAIT), 1)
        finally:
            process.kill()
            process.wait()
            os.close(reader)
            os.close(writer)

    def test_a_verb_without_standard_output_says_so(self):
        for verb in ('genkey', 'keyid', '--version', '--help'):
            done = subprocess.run([*self.closing('>&-'), BINARY, verb], env=environment(KEK, None), timeout=WAIT,
                                  stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, check=False)
            self.assertEqual(done.returncode, 1, verb)
            self.assertIn(b'standard output', done.stderr, verb)

    def test_a_key_file_is_no_standard_stream(self):
        """With standard error closed, the first file opened would become it, and be written to."""
        path = fresh_dir() + '/kek'
        with open(path, 'w', encoding='ascii') as file:
            file.write(text(KEK))
        os.chmod(path, 0o400)
        done = subprocess.run([*self.closing('<&- 2>&-'), BINARY, 'keyid'], stdout=subprocess.PIPE, timeout=WAIT,
                              env=environment(None, {'KMS_KEK_FILE': path}), check=True)
        self.assertIn(key_id(KEK).encode(), done.stdout)


class Sockets(Case):
    def test_descriptors_for_another_process(self):
        """LISTEN_PID of a wrapper that did not exec: a warning, and the endpoint of --listen is served."""
        server = self.start(env={'LISTEN_FDS': '1', 'LISTEN_PID': str(os.getpid())})
        line = server.wait_log('LISTEN_FDS is not taken')[0].string
        self.assertIn(f'level=warn msg="LISTEN_FDS is not taken', line)
        self.assertIn(f'listen_pid={os.getpid()} pid={server.pid}', line)
        with Raw(server.path) as raw:
            self.assertTrue(raw.works())

    def test_a_path_named_twice(self):
        path = fresh_dir() + '/kms.sock'
        line = self.dies('serve', '--listen', 'unix://' + path, '--listen', 'unix://' + path, kek=KEK)
        self.assertIn('bind: Address already in use; the path was named twice', line)

    @needs_root
    def test_refused_peers_are_told_at_the_end(self):
        server = self.start('--mode', '0666')
        subprocess.run([*as_user(STRANGER), sys.executable, '-c', 'import socket, sys\n'
                        'for _ in range(5):\n    s = socket.socket(socket.AF_UNIX)\n    s.connect(sys.argv[1])\n    s.recv(1)',
                        server.path], stderr=subprocess.DEVNULL, timeout=WAIT, check=False)
        with Raw(server.path) as raw:
            self.assertTrue(raw.works())
        server.stop()
        self.assertEqual(sum(int(m[1]) for m in server.wait_log(r'msg=refused .*count=(\d+)')), 5)

    @needs_root
    def test_a_stale_socket_that_cannot_be_tried(self):
        """Root's, and the plugin no longer is: it does not claim that anybody listens."""
        directory = fresh_dir()
        server = self.start(path=directory + '/kms.sock')
        os.kill(server.pid, signal.SIGKILL)
        server.wait()
        server.kill()
        os.chown(directory, STRANGER, STRANGER)
        line = self.dies('serve', '--listen', 'unix://' + server.path, kek=KEK, wrapper=as_user(STRANGER),
                         binary=public_binary())
        self.assertNotIn('another process is listening', line)
        self.assertIn('socket of uid 0', line)
        self.assertIn('Permission denied', line)
        self.assertIn('remove it', line)
        self.assertTrue(os.path.exists(server.path))

    @needs_root
    def test_each_step_has_a_sentence(self):
        directory = fresh_dir()
        endpoint = f'unix://{directory}/kms.sock'
        line = self.dies('serve', '--listen', endpoint, kek=KEK, wrapper=as_user(STRANGER), binary=public_binary())
        self.assertRegex(line, f'{re.escape(endpoint)}: bind: Permission denied; .*write')
        os.chown(directory, STRANGER, STRANGER)
        line = self.dies('serve', '--listen', endpoint, '--group', '0', kek=KEK, wrapper=as_user(STRANGER),
                         binary=public_binary())
        self.assertRegex(line, f'{re.escape(endpoint)}: chown: Operation not permitted; --group .*runAsGroup')
        self.assertEqual(os.listdir(directory), [])
