"""A machine that is not as one would have it: calls that the kernel lacks or a container runtime forbids, signals, closed
descriptors. The server serves, or says in one line why it cannot."""
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

from plugin import BINARY, EMULATED, KEK, SANITIZED, WAIT, Case, environment, fresh_dir, key_id, needs_root, run, text, until
from raw import Raw

# Becomes the program, with a filter of system calls: those of NUMBERS are answered with error ERROR. With the error 0 the call
# is getrandom as it is after boot: it waits, or fails with EAGAIN if it may not wait. (It waits for the listener of the
# filter, which nobody reads.)
DENY = r'''
import ctypes, errno, os, struct, sys
numbers, error = [int(n) for n in sys.argv[1].split(",")], int(sys.argv[2])
LOAD, EQUAL, BIT, RETURN, ERROR, ALLOW, NOTIFY = 0x20, 0x15, 0x45, 0x06, 0x50000, 0x7fff0000, 0x7fc00000
code = [(LOAD, 0, 0, 0), *((EQUAL, len(numbers) - i, 0, n) for i, n in enumerate(numbers)), (RETURN, 0, 0, ALLOW)]
code += [(RETURN, 0, 0, ERROR | error)] if error else [
    (LOAD, 0, 0, 32), (BIT, 0, 1, os.GRND_NONBLOCK), (RETURN, 0, 0, ERROR | errno.EAGAIN), (RETURN, 0, 0, NOTIFY)]
lines = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
class Program(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("code", ctypes.c_void_p)]
libc = ctypes.CDLL(None, use_errno=True)
NO_NEW_PRIVS, SECCOMP, FILTER, NEW_LISTENER = 38, 317, 1, 8
libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0)
fd = libc.syscall(SECCOMP, FILTER, 0 if error else NEW_LISTENER, ctypes.byref(Program(len(code), ctypes.addressof(lines))))
if fd < 0:
    sys.exit(os.strerror(ctypes.get_errno()))
if not error:
    os.set_inheritable(fd, True)
os.execv(sys.argv[3], sys.argv[3:])
'''

# x86-64's numbers.
CALLS = {
    'prctl': 157, 'prlimit64': 302, 'getrlimit': 97, 'fstat': 5, 'lstat': 6, 'newfstatat': 262, 'statx': 332, 'mlock': 149,
    'madvise': 28, 'getrandom': 318, 'clock_gettime': 228, 'ppoll': 271, 'rt_sigprocmask': 14, 'rt_sigaction': 13, 'socket': 41,
    'bind': 49, 'listen': 50, 'getsockname': 51, 'pipe2': 293, 'socketpair': 53, 'shutdown': 48, 'clone': 56, 'clone3': 435,
    'fork': 57, 'wait4': 61, 'kill': 62, 'epoll_create1': 291, 'epoll_ctl': 233, 'epoll_pwait': 281, 'signalfd4': 289,
    'fcntl': 72, 'capset': 126, 'chmod': 90, 'fchmodat': 268, 'umask': 95, 'accept4': 288, 'getsockopt': 55, 'setsockopt': 54,
    'connect': 42, 'unlink': 87, 'readlink': 89, 'readlinkat': 267, 'seccomp': 317, 'poll': 7, 'mprotect': 10,
    'timer_create': 222, 'setitimer': 38, 'rt_sigreturn': 15, 'gettid': 186, 'brk': 12, 'munmap': 11}
FILTERS = re.compile(r'Seccomp_filters:\t(\d+)')       # since Linux 5.9
x86_64_only = unittest.skipUnless(platform.machine() == 'x86_64' and not EMULATED, 'the numbers are those of x86-64')


def denied(names, error):
    return (sys.executable, '-c', DENY, ','.join(str(CALLS[name]) for name in names.split()), str(error))


class Kernel(Case):
    def outcome(self, wrapper, *args):
        """What it says, whether it serves, and its exit status, after SIGTERM if it had not ended; nothing is left behind."""
        path = fresh_dir() + '/kms.sock'
        process = subprocess.Popen([*wrapper, BINARY, 'serve', '--listen', 'unix://' + path, *args], env=environment(KEK, None),
                                   stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
        lines, serves = [], False
        try:
            for line in process.stderr:
                lines.append(line.rstrip('\n'))
                if ' msg=ready ' in line:
                    serves = run('probe', 'unix://' + path, '--timeout', '2').returncode == 0
                    process.terminate()
                    break
            lines += process.stderr.read().splitlines()
            process.wait(WAIT)
        finally:
            process.kill()
            process.wait()
            process.stderr.close()
        self.assertFalse(os.path.lexists(path), lines)
        return lines, serves, process.returncode

    @x86_64_only
    @unittest.skipIf(SANITIZED, 'sanitizers need many of these calls')
    def test_each_call_missing_or_forbidden(self):
        """It serves, or its words name what failed, and why."""
        served, ended = set(), set()
        for name in CALLS:
            for error in (errno.ENOSYS, errno.EPERM):
                wrapper = denied(name, error)
                if run('--version', wrapper=wrapper).returncode:
                    continue    # the dynamic loader cannot do without
                with self.subTest(call=name, error=errno.errorcode[error]):
                    lines, serves, status = self.outcome(wrapper)
                    if serves:
                        served.add(name)
                        self.assertEqual(status, 0, lines)
                    else:
                        ended.add(name)
                        said = [line for line in lines if line.startswith('kmsplugin: ') or re.search('level=(warn|error)', line)]
                        self.assertTrue(any(re.search(rf'\w.*{os.strerror(error)}', line) for line in said), lines)
                        self.assertIn(status, (0, 1))
        self.assertGreaterEqual(len(served), 20, served)
        self.assertLessEqual({'socket', 'bind', 'listen', 'signalfd4', 'epoll_create1', 'getrandom', 'epoll_pwait'}, ended)

    @x86_64_only
    @unittest.skipIf(SANITIZED, 'sanitizers need many of these calls')
    def test_what_the_sandbox_lacks(self):
        """A warning before READY, and with `require` an end in one line; a rehearsal that cannot be held is no reason."""
        for name, error, says in (('prctl', errno.EPERM, 'seccomp|no_new_privs'), ('capset', errno.EPERM, 'capabilities'),
                                  ('madvise', errno.EPERM, 'madvise'), ('mlock', errno.EPERM, 'locked'), ('clone fork', errno.EAGAIN, 'rehearsal')):
            with self.subTest(call=name):
                lines, serves, _ = self.outcome(denied(name, error))
                warnings = '\n'.join(line for line in lines[:1 + next(i for i, line in enumerate(lines) if 'msg=ready' in line)]
                                     if 'level=warn' in line)
                self.assertTrue(serves, lines)
                self.assertRegex(warnings, says)
                self.assertTrue(name == 'clone fork' or os.strerror(error) in warnings, warnings)
                lines, serves, status = self.outcome(denied(name, error), '--sandbox', 'require')
                if name in ('mlock', 'clone fork'):
                    self.assertTrue(serves, lines)
                else:
                    self.assertEqual((status, len(lines)), (1, 1), lines)
                    self.assertRegex(lines[0], rf'require.*({says}).*{os.strerror(error)}')
        server = self.start('--sandbox', 'require', wrapper=denied('clone fork', errno.EAGAIN))
        with open('/proc/self/status', encoding='utf-8') as file:
            ours = FILTERS.search(file.read())[1]
        self.assertEqual(int(FILTERS.search(server.proc('status').decode())[1]), int(ours) + 2)

    @x86_64_only
    def test_no_entropy_yet(self):
        """It says that it waits, is not ready, and hears SIGTERM."""
        for number in (signal.SIGTERM, signal.SIGINT):
            path = fresh_dir() + '/kms.sock'
            process = subprocess.Popen([*denied('getrandom', 0), BINARY, 'serve', '--listen', 'unix://' + path],
                                       env=environment(KEK, None), stderr=subprocess.PIPE)
            try:
                line = process.stderr.readline()
                if b'kmsplugin' not in line and b'level=' not in line:
                    self.skipTest('no such filter here: ' + line.decode())
                self.assertRegex(line, b'level=(warn|info) .*(random|entropy)')
                self.assertFalse(os.path.lexists(path))
                until(lambda: self.waits(process.pid), 'it waits')
                process.send_signal(number)
                rest = process.stderr.read()
                self.assertEqual(process.wait(WAIT), 0)
                self.assertNotIn(b'msg=ready', rest)
            finally:
                process.kill()
                process.wait()
                process.stderr.close()

    def waits(self, pid):
        with open(f'/proc/{pid}/stat', encoding='ascii') as file:
            return file.read().rpartition(')')[2].split()[0] == 'S'


class Signals(Case):
    def test_hangup_is_logged_and_changes_nothing(self):
        server = self.start()
        for count in (1, 2):
            server.signal(signal.SIGHUP)
            line = server.wait_log(r'signal=1\b', count)[-1].string
            self.assertRegex(line, 'level=info msg=".*KEKs.*restart')
        with Raw(server.path) as raw:
            self.assertTrue(raw.works())

    @unittest.skipIf(EMULATED, 'the emulator has signals of its own')
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

    @unittest.skipIf(EMULATED, 'the emulator has signals of its own')
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
