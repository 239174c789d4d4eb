"""Sockets and who may use them: files, abstract names, activation, and the peers' users."""
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
import unittest

import grpc
from hyperframe.frame import DataFrame

from plugin import (EMULATED, KEK, STRANGER, WAIT, Case, as_user, fresh_dir, fresh_name, kms,
                    needs_root, public_binary, run, until)
from raw import EMPTY, STATUS, Raw, request

# Connects COUNT times to PATH and prints how many bytes came back each time.
PEER = r'''
import socket, sys
path, count = sys.argv[1].replace("@", "\0"), int(sys.argv[2])
for _ in range(count):
    peer = socket.socket(socket.AF_UNIX)
    peer.settimeout(20)
    peer.connect(path)
    got = b""
    try:
        peer.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
    except OSError:
        pass
    try:
        got = peer.recv(9)
    except ConnectionResetError:
        pass
    print(len(got))
'''

# Connects to PATH as fast as it can, many at a time.
FLOOD = r'''
import socket, sys
path = sys.argv[1].replace("@", "\0")
print("ready", flush=True)
while True:
    held = []
    for _ in range(300):
        held.append(socket.socket(socket.AF_UNIX))
        held[-1].setblocking(False)
        try:
            held[-1].connect(path)
        except OSError:
            pass
    for connection in held:
        connection.close()
'''

# Puts descriptors at 3 and up, and becomes the program as systemd starts it.
ACTIVATE = r'''
import fcntl, os, sys
listed, pid, command = sys.argv[1].split(","), sys.argv[2], sys.argv[3:]
copies = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 100) for fd in listed]
for place, copy in enumerate(copies, 3):
    os.dup2(copy, place)
    os.close(copy)
os.environ.update(LISTEN_FDS=os.environ.get('LISTEN_FDS', str(len(copies))), LISTEN_PID=pid or str(os.getpid()))
os.execv(command[0], command)
'''


def peer(path, uid, count=1):
    """What a peer of that uid receives on each of its connections."""
    done = subprocess.run([*as_user(uid), sys.executable, '-c', PEER, path, str(count)],
                          capture_output=True, timeout=WAIT, check=True)
    return [int(line) for line in done.stdout.split()]


def listening(path=None, kind=socket.SOCK_STREAM, listen=True):
    path = path or fresh_dir() + '/activated.sock'
    listener = socket.socket(socket.AF_UNIX, kind)
    listener.bind(path.replace('@', '\0'))
    if listen:
        listener.listen()
    return listener, path


class Files(Case):
    def mode(self, path):
        return stat.S_IMODE(os.stat(path).st_mode)

    def test_mode(self):
        self.assertEqual(self.mode(self.start().path), 0o600)
        for mode in (0o600, 0o660, 0o666, 0o622):
            for umask in (0, 0o77):
                server = self.start('--mode', f'{mode:04o}', umask=umask)
                self.assertEqual(self.mode(server.path), mode)
        self.assertEqual(self.mode(self.start('--mode', '660').path), 0o660)

    @needs_root
    def test_group(self):
        for group, gid in ((str(STRANGER), STRANGER), ('daemon', 1)):
            server = self.start('--group', group, '--mode', '0660')
            status = os.stat(server.path)
            self.assertEqual((status.st_uid, status.st_gid), (os.geteuid(), gid))
            self.assertEqual(stat.S_IMODE(status.st_mode), 0o660)

    def test_removed_at_the_end(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            server = self.start()
            self.assertTrue(stat.S_ISSOCK(os.stat(server.path).st_mode))
            server.signal(number)
            self.assertEqual(server.wait(), 0)
            self.assertFalse(os.path.lexists(server.path))

    def test_a_socket_of_another_is_not_removed(self):
        """Who took the path meanwhile keeps it: ours removed, renamed, or out of the way behind another link."""
        top = fresh_dir()
        os.mkdir(top + '/other')
        for how in ('removed', 'renamed', 'linked'):
            with self.subTest(how=how):
                os.mkdir(f'{top}/{how}')
                os.symlink(how, top + '/way')
                server = self.start(path=top + '/way/kms.sock')
                if how == 'linked':
                    os.unlink(top + '/way')
                    os.symlink('other', top + '/way')
                elif how == 'renamed':
                    os.rename(server.path, server.path + '.old')
                else:
                    os.unlink(server.path)
                heir, _ = listening(server.path)
                with heir:
                    server.stop()
                    self.assertTrue(os.path.exists(server.path))
                os.unlink(top + '/way')

    def test_a_socket_that_is_gone(self):
        """Removed or renamed by an operator: the end is none the worse."""
        for change in (os.unlink, lambda path: os.rename(path, path + '.old')):
            server = self.start()
            with Raw(server.path) as raw:
                change(server.path)
                self.assertTrue(raw.works())
            server.stop()

    def test_stale_socket_is_replaced(self):
        server = self.start()
        os.kill(server.pid, signal.SIGKILL)
        self.assertEqual(server.wait(), -signal.SIGKILL)
        server.kill()
        self.assertTrue(os.path.exists(server.path))
        again = self.start(path=server.path)
        self.assertEqual(self.client(again).status().healthz, 'ok')

    def test_live_socket_is_refused(self):
        server = self.start()
        inode = os.stat(server.path).st_ino
        for _ in range(2):
            line = self.dies('serve', '--listen', 'unix://' + server.path, kek=KEK)
            self.assertIn(server.path, line)
        self.assertEqual(os.stat(server.path).st_ino, inode)
        self.assertEqual(self.client(server).status().healthz, 'ok')

    def test_live_socket_with_a_full_queue_is_refused(self):
        listener, path = listening(listen=False)
        with listener, socket.socket(socket.AF_UNIX) as first:
            listener.listen(0)
            first.connect(path)
            self.dies('serve', '--listen', 'unix://' + path, kek=KEK)
            self.assertTrue(os.path.exists(path))

    def test_no_socket_is_touched(self):
        directory = fresh_dir()
        path = directory + '/kms.sock'
        dead, _ = listening(directory + '/dead')
        dead.close()

        def refused():
            before = os.lstat(path)
            self.assertIn(path, self.dies('serve', '--listen', 'unix://' + path, kek=KEK))
            after = os.lstat(path)
            self.assertEqual((before.st_ino, before.st_mode, before.st_mtime_ns, before.st_size),
                             (after.st_ino, after.st_mode, after.st_mtime_ns, after.st_size))
        with open(path, 'wb') as file:
            file.write(b'precious')
        refused()
        os.unlink(path)
        for target in ('dead', 'nowhere', directory + '/dead', '/dev/null'):
            with self.subTest(symlink=target):
                os.symlink(target, path)
                refused()
                os.unlink(path)
        os.mkdir(path)
        refused()
        os.rmdir(path)
        os.mkfifo(path)
        refused()
        self.assertTrue(os.path.exists(directory + '/dead'))
        self.assertFalse(os.path.exists(directory + '/nowhere'))

    def test_parent_directory(self):
        """Whoever may rename files there could put a socket of his own in place of ours."""
        cases = [(0o777, 0, 0, False), (0o757, 0, 0, False), (0o1777, 0, 0, False),
                 (0o755, 0, 0, True), (0o700, 0, 0, True)]
        if os.geteuid() == 0:
            cases += [(0o775, 0, STRANGER, False), (0o1775, 0, STRANGER, False),
                      (0o755, STRANGER, 0, False), (0o1777, STRANGER, 0, False),
                      (0o755, 0, STRANGER, True), (0o700, STRANGER, STRANGER, False)]
        for mode, uid, gid, good in cases:
            with self.subTest(mode=oct(mode), uid=uid, gid=gid):
                directory = fresh_dir()
                if os.geteuid() == 0:
                    os.chown(directory, uid, gid)
                os.chmod(directory, mode)
                path = directory + '/kms.sock'
                if good:
                    self.start(path=path).stop()
                else:
                    line = self.dies('serve', '--listen', 'unix://' + path, kek=KEK)
                    self.assertIn(directory, line)
                    self.assertEqual(os.listdir(directory), [])

    def test_sticky_directories_on_the_way_are_taken(self):
        """/tmp, for one: there nobody but its owner can rename what comes next."""
        top = fresh_dir()
        os.chmod(top, 0o1777)
        os.mkdir(top + '/ours', 0o700)
        self.start(path=top + '/ours/kms.sock').stop()

    def test_every_hop_of_a_link_is_looked_at(self):
        """a -> b/hop -> c: who can rename the hop decides where the socket is."""
        top = fresh_dir()
        for name in ('b', 'c', 'd'):
            os.mkdir(f'{top}/{name}', 0o755)
        os.symlink('b/../b/hop', top + '/a')
        os.symlink(top + '/c', top + '/b/hop')
        endpoint = f'unix://{top}/a/kms.sock'
        self.start(path=top + '/a/kms.sock').stop()
        os.chmod(top + '/b', 0o777)
        self.assertIn(top + '/b', self.dies('serve', '--listen', endpoint, kek=KEK))
        if os.geteuid() == 0:
            os.chmod(top + '/b', 0o1777)
            self.start(path=top + '/a/kms.sock').stop()
            os.lchown(top + '/b/hop', STRANGER, STRANGER)
            self.assertRegex(self.dies('serve', '--listen', endpoint, kek=KEK), rf'hop: .*\b{STRANGER}\b|Permission denied')
        os.chmod(top + '/b', 0o755)
        os.unlink(top + '/b/hop')
        os.symlink('../a', top + '/b/hop')
        self.assertRegex(self.dies('serve', '--listen', endpoint, kek=KEK), '(Too many levels of s|S)ymbolic link')
        os.unlink(top + '/b/hop')
        os.symlink('nowhere', top + '/b/hop')
        self.assertIn('No such file', self.dies('serve', '--listen', endpoint, kek=KEK))
        os.unlink(top + '/b/hop')
        with open(top + '/b/hop', 'wb'):
            pass
        self.assertIn('Not a directory', self.dies('serve', '--listen', endpoint, kek=KEK))

    def test_as_many_links_as_the_kernel_follows(self):
        top, most = fresh_dir(), 40
        os.mkdir(top + '/0')
        for i in range(1, most + 2):
            os.symlink(str(i - 1), f'{top}/{i}')
        os.stat(f'{top}/{most}')
        with self.assertRaises(OSError):
            os.stat(f'{top}/{most + 1}')
        self.start(path=f'{top}/{most}/kms.sock').stop()
        self.assertRegex(self.dies('serve', '--listen', f'unix://{top}/{most + 1}/kms.sock', kek=KEK), '(?i)symbolic link')

    def test_long_links(self):
        """Looked at whole, or refused: never one directory looked at, and the socket in another."""
        top = fresh_dir()
        os.mkdir(top + '/open', 0o755)
        os.chmod(top + '/open', 0o777)
        for length in (1000, 2030, 4000):
            for target in (top, top + '/open'):
                os.symlink('/.' * (length // 2) + target, top + '/long')
                endpoint = f'unix://{top}/long/kms.sock'
                if target == top and length < 2000:
                    self.start(path=top + '/long/kms.sock').stop()
                elif target != top:
                    self.dies('serve', '--listen', endpoint, kek=KEK)
                    self.assertEqual(os.listdir(top + '/open'), [])
                os.unlink(top + '/long')

    def test_several(self):
        paths, name = [fresh_dir() + '/kms.sock' for _ in range(2)], fresh_name()
        more = [word for path in paths for word in ('--listen', 'unix://' + path)]
        server = self.start(*more, '--listen', f'unix:///@{name}')
        for target in (server.target, 'unix:' + paths[0], 'unix:' + paths[1], f'unix-abstract:{name}'):
            self.assertEqual(self.client(target).status().healthz, 'ok')
        server.stop()
        for path in (server.path, *paths):
            self.assertFalse(os.path.lexists(path))


class FailedStarts(Case):
    """One line that names what failed, and none of the socket files made before it is left."""

    def assert_nothing_left(self, says, *later, endpoints=2, **options):
        directory = fresh_dir()
        if 'wrapper' in options:
            os.chown(directory, *options.pop('owner', (0, 0)))
        good = [word for i in range(endpoints) for word in ('--listen', f'unix://{directory}/{i}.sock')]
        line = self.dies('serve', *good, *(word.replace('HERE', directory) for word in later), kek=KEK, **options)
        self.assertRegex(line, says)
        self.assertEqual(os.listdir(directory), [])

    def test_a_later_endpoint(self):
        taken, path = listening()
        named, name = listening('@' + fresh_name())
        with taken, named:
            for endpoint in ('unix:///no/such/dir/kms.sock', 'unix://HERE/0.sock', 'unix://' + path, 'unix:///' + name):
                with self.subTest(endpoint=endpoint):
                    self.assert_nothing_left('/no/such/dir|' + endpoint.split('/')[-1], '--listen', endpoint)
            self.assertTrue(os.path.exists(path))

    def test_no_more_descriptors(self):
        """Wherever they run out: after warnings, perhaps."""
        for most in range(6, 16):
            directory = fresh_dir()
            listen = [word for i in range(12) for word in ('--listen', f'unix://{directory}/{i}.sock')]
            done = run('serve', *listen, kek=KEK, wrapper=('prlimit', f'--nofile={most}'))
            self.assertEqual((done.returncode, os.listdir(directory)), (1, []), done.stderr)
            self.assertRegex(done.stderr.splitlines()[-1], 'kmsplugin: .*(Too many open files|No file descriptors available)')

    @needs_root
    def test_each_step_names_itself(self):
        stranger = {'wrapper': as_user(STRANGER), 'binary': public_binary()}
        self.assert_nothing_left('0.sock: bind: Permission denied', **stranger)
        self.assert_nothing_left('0.sock: .*--group.*: Operation not permitted', '--group', '0', owner=(STRANGER, STRANGER), **stranger)

    @needs_root
    def test_a_stale_socket_that_cannot_be_tried(self):
        """Root's, and the plugin no longer is: it does not claim that anybody listens."""
        server = self.start()
        os.kill(server.pid, signal.SIGKILL)
        server.wait()
        server.kill()
        os.chown(os.path.dirname(server.path), STRANGER, STRANGER)
        line = self.dies('serve', '--listen', 'unix://' + server.path, kek=KEK, wrapper=as_user(STRANGER), binary=public_binary())
        self.assertNotIn('another process is listening', line)
        self.assertRegex(line, 'uid 0.*Permission denied')
        self.assertTrue(os.path.exists(server.path))


class Abstract(Case):
    @unittest.skipIf(EMULATED, 'it warns that the emulator has no seccomp')
    def test_served_by_its_exact_name(self):
        """No NUL after the name: grpc-go sends none."""
        name = fresh_name()
        server = self.start('--listen', f'unix:///@{name}', listen=False)
        self.assertEqual(self.client(f'unix-abstract:{name}').status().healthz, 'ok')
        with Raw('\0' + name) as raw:
            self.assertTrue(raw.works())
        with socket.socket(socket.AF_UNIX) as other, self.assertRaises(ConnectionRefusedError):
            other.connect('\0' + name + '\0')
        self.assertEqual(len(server.wait_log('level=warn.*take an abstract name first.*fill its queue')), 1)

    @unittest.skipIf(EMULATED, 'it warns that the emulator has no seccomp')
    def test_file_sockets_warn_of_nothing(self):
        server = self.start()
        server.stop()
        self.assertNotIn('level=warn', server.log())

    def test_a_name_that_is_taken(self):
        name = fresh_name()
        taken, _ = listening('@' + name)
        with taken:
            self.assertIn(name, self.dies('serve', '--listen', f'unix:///@{name}', kek=KEK))


@needs_root
class Floods(Case):
    """A refused user connects as fast as it can. grpc-go connects non-blocking: EAGAIN if the queue is full."""

    @staticmethod
    def connect(path):
        """As Go does; None when it is to try again later."""
        connection = socket.socket(socket.AF_UNIX)
        connection.setblocking(False)
        try:
            connection.connect(path)
            return connection
        except BlockingIOError:
            connection.close()
            return None

    def flood(self, path):
        process = subprocess.Popen([*as_user(STRANGER), sys.executable, '-c', FLOOD, path.replace('\0', '@')],
                                   stdout=subprocess.PIPE, text=True)
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        self.assertEqual(process.stdout.readline(), 'ready\n')
        return process

    def test_a_file_that_strangers_may_not_open(self):
        """With mode 0600 they do not come as far as the queue."""
        server = self.start()
        flood = self.flood(server.path)
        for _ in range(200):
            connection = self.connect(server.path)
            self.assertIsNotNone(connection, 'the queue was full')
            connection.close()
            time.sleep(0.002)
        with Raw(server.path) as raw:
            self.assertTrue(raw.works())
        flood.kill()
        server.stop()
        self.assertNotIn('msg=refused', server.log())

    def test_a_socket_that_all_may_open(self):
        """Some connects find the queue full (doc/security.md, not defended); who tries again gets in, and is served."""
        name = fresh_name()
        server = self.start('--mode', '0666', '--listen', f'unix:///@{name}')
        for path in (server.path, '\0' + name):
            flood = self.flood(path)
            for _ in range(20):
                until(lambda at=path: self.served(at), 'served during the flood')
            flood.kill()
        until(lambda: self.served(server.path), 'served after it')
        server.wait_log(f'msg=refused.*uid={STRANGER} ')
        server.stop()
        self.assertLess(len(server.lines), 60)

    def served(self, path):
        connection = self.connect(path)
        if not connection:
            return False
        connection.close()
        with Raw(path) as raw:
            return raw.works()


@needs_root
class Peers(Case):
    def setUp(self):
        with open('/proc/self/uid_map', encoding='ascii') as file:
            if file.read().split() != ['0', '0', str(2**32 - 1)]:
                self.skipTest('65534 is everybody in this user namespace')

    def test_strangers_are_closed_before_a_byte(self):
        name = fresh_name()
        server = self.start('--mode', '0666', '--listen', f'unix:///@{name}')
        for path in (server.path, '@' + name):
            self.assertEqual(peer(path, STRANGER), [0])
            self.assertEqual(peer(path, 65534), [0])
            self.assertEqual(peer(path, 0), [9])
        self.assertEqual(self.client(server).status().healthz, 'ok')

    def test_own_user_and_root_by_default(self):
        directory = fresh_dir()
        os.chown(directory, STRANGER, STRANGER)
        server = self.start('--mode', '0666', binary=public_binary(), wrapper=as_user(STRANGER),
                            path=directory + '/kms.sock')
        self.assertEqual([peer(server.path, uid)[0] for uid in (0, STRANGER, STRANGER + 1)],
                         [9, 9, 0])

    def test_allow_uid(self):
        for allowed, expected in (((STRANGER,), [0, 9, 0, 0]), ((0, STRANGER), [9, 9, 0, 0]),
                                  ((STRANGER, 'daemon'), [0, 9, 9, 0]), ((0, 65534), [9, 0, 0, 9])):
            with self.subTest(allowed=allowed):
                server = self.start('--mode', '0666', '--allow-uid', ','.join(map(str, allowed)))
                self.assertEqual([peer(server.path, uid)[0] for uid in (0, STRANGER, 1, 65534)],
                                 expected)

    def test_refusals_are_logged_once_a_second(self):
        """With the peer's pid and uid, and a count: none is lost, at the end either."""
        server = self.start('--mode', '0666')
        begin = time.monotonic()
        self.assertEqual(peer(server.path, STRANGER, 200), [0] * 200)
        server.wait_log('msg=refused')
        server.stop()
        lines = [line for line in server.lines if ' msg=refused ' in line]
        for line in lines:
            self.assertRegex(line, rf' level=(warn|info) .*\bpid=[1-9]\d* .*uid={STRANGER}\b')
        self.assertEqual(sum(int(re.search(r'\bcount=(\d+)', line)[1]) for line in lines), 200)
        self.assertLessEqual(len(lines), time.monotonic() - begin + 2)

    def test_unmapped_users(self):
        """65534 stands for everybody who is not mapped: allowed only where everybody is, as test_allow_uid has it."""
        if subprocess.run(['unshare', '-Ur', 'true'], check=False, stderr=subprocess.DEVNULL).returncode:
            raise unittest.SkipTest('this system gives no user namespaces')
        line = self.dies('serve', '--listen', f'unix://{fresh_dir()}/kms.sock', '--allow-uid', '0,65534', wrapper=('unshare', '-Ur'),
                         code=(1, 2), kek=KEK)
        self.assertIn('65534', line)
        server = self.start('--mode', '0666', wrapper=('unshare', '-Ur'))
        self.assertEqual([peer(server.path, uid)[0] for uid in (0, STRANGER, 65534)], [9, 0, 0])

    def test_our_own_uid_is_65534(self):
        """The nobody of most systems: allowed as any own uid is, where the map is the identity."""
        directory = fresh_dir()
        os.chown(directory, 65534, 65534)
        server = self.start('--mode', '0666', path=directory + '/kms.sock', binary=public_binary(), wrapper=as_user(65534))
        self.assertEqual([peer(server.path, uid)[0] for uid in (0, STRANGER, 65534)], [9, 0, 9])

    def test_refusals_do_not_leak(self):
        server = self.start('--mode', '0666')
        before = server.descriptors()
        self.assertEqual(peer(server.path, STRANGER, 300), [0] * 300)
        until(lambda: server.descriptors() <= before, 'closed descriptors')


class Activation(Case):
    def activation(self, *files, pid=''):
        """The options that start the program with these files as systemd would."""
        numbers = [file.fileno() for file in files]
        return {'wrapper': (sys.executable, '-c', ACTIVATE, ','.join(map(str, numbers)), pid),
                'pass_fds': numbers}

    def test_one_socket(self):
        listener, path = listening()
        with listener:
            server = self.start(listen=False, **self.activation(listener))
            self.assertEqual(self.client('unix:' + path).status().healthz, 'ok')
            self.assertNotIn('/run/kmsplugin', server.log())
            server.stop()
            self.assertTrue(os.path.exists(path))
            server = self.start(listen=False, **self.activation(listener))
            self.assertEqual(self.client('unix:' + path).status().healthz, 'ok')

    def test_several_and_listen(self):
        name = fresh_name()
        (one, path), (two, _) = listening(), listening('@' + name)
        with one, two:
            server = self.start(**self.activation(one, two))
            for target in ('unix:' + path, f'unix-abstract:{name}', server.target):
                self.assertEqual(self.client(target).status().healthz, 'ok')
            server.stop()
            self.assertTrue(os.path.exists(path))
            self.assertFalse(os.path.lexists(server.path))

    def test_of_another_process(self):
        """A wrapper that did not exec: the socket is nothing to us, and a warning says so."""
        listener, path = listening()
        with listener, Raw(path, hello=False) as raw:
            server = self.start(**self.activation(listener, pid='1'))
            self.assertEqual(self.client(server).status().healthz, 'ok')
            raw.socket.setblocking(False)
            with self.assertRaises(BlockingIOError):
                raw.socket.recv(1)
            self.assertRegex(server.wait_log('LISTEN_FDS')[0].string, rf'level=warn .*\b{server.pid}\b')

    def test_a_number_of_sockets_that_is_none(self):
        listener, _ = listening()
        with listener:
            for number in ('', 'x', '-1', '1x', '17', '4294967297'):
                self.assertIn('LISTEN_FDS', self.dies('serve', kek=KEK, env={'LISTEN_FDS': number}, **self.activation(listener)))

    def test_what_is_no_listening_socket(self):
        def refused(descriptor):
            self.dies('serve', kek=KEK, **self.activation(descriptor))
        with open('/dev/null', 'rb') as null:
            refused(null)
        for kind, listen in ((socket.SOCK_DGRAM, False), (socket.SOCK_STREAM, False),
                             (socket.SOCK_SEQPACKET, True)):
            listener, _ = listening(kind=kind, listen=listen)
            with listener:
                refused(listener)
        with socket.socket(socket.AF_INET) as tcp:
            tcp.bind(('127.0.0.1', 0))
            tcp.listen()
            refused(tcp)

    @needs_root
    def test_peers_are_checked_there_too(self):
        listener, path = listening()
        with listener:
            os.chmod(path, 0o666)
            self.start(listen=False, **self.activation(listener))
            self.assertEqual(peer(path, STRANGER), [0])
            self.assertEqual(peer(path, 0), [9])

    def test_notify(self):
        for path in (fresh_dir() + '/notify.sock', '@' + fresh_name()):
            receiver, _ = listening(path, kind=socket.SOCK_DGRAM, listen=False)
            with receiver:
                receiver.settimeout(WAIT)
                server = self.start(env={'NOTIFY_SOCKET': path})
                told = receiver.recv(4096).decode().splitlines()
                self.assertIn('READY=1', told)
                self.assertEqual(self.client(server).status().healthz, 'ok')
                server.signal(signal.SIGTERM)
                told = receiver.recv(4096).decode().splitlines()
                self.assertIn('STOPPING=1', told)
                self.assertEqual(server.wait(), 0)

    def test_a_notify_socket_that_is_gone(self):
        server = self.start(env={'NOTIFY_SOCKET': '/no/such/socket'})
        self.assertEqual(self.client(server).status().healthz, 'ok')


class Stop(Case):
    def test_calls_in_flight_are_finished(self):
        server = self.start()
        with Raw(server.path) as raw:
            self.assertTrue(raw.works())
            stream = raw.open(request(STATUS))
            raw.send(DataFrame(stream, EMPTY[:2]))
            raw.drained()
            server.signal(signal.SIGTERM)
            while not raw.goaways:
                self.assertIsNotNone(raw.frame())
            until(lambda: not os.path.lexists(server.path), 'socket removed')
            with self.assertRaises(OSError):
                Raw(server.path)
            self.assertIsNone(server.process.poll())
            raw.send(DataFrame(stream, EMPTY[2:], flags=['END_STREAM']))
            answer = raw.wait(stream)
            self.assertEqual(answer.status, 0, answer)
            raw.wait_closed()
            for frame in raw.goaways:
                self.assertEqual(frame.error_code, 0)
                self.assertGreaterEqual(frame.last_stream_id, stream)
        self.assertEqual(server.wait(), 0)

    def test_goaway_to_the_idle(self):
        server = self.start()
        with Raw(server.path) as raw:
            self.assertTrue(raw.works())
            server.signal(signal.SIGTERM)
            raw.wait_closed()
            self.assertTrue(raw.goaways)
            self.assertEqual({f.error_code for f in raw.goaways}, {0})
        self.assertEqual(server.wait(), 0)

    def test_second_signal_ends_at_once(self):
        server = self.start()
        with Raw(server.path) as raw:
            raw.open(request(STATUS))
            raw.drained()
            server.signal(signal.SIGTERM)
            while not raw.goaways:
                self.assertIsNotNone(raw.frame())
            begin = time.monotonic()
            server.signal(signal.SIGTERM)
            server.wait()
            self.assertLess(time.monotonic() - begin, 4)    # it would have waited 5 s
        self.assertFalse(os.path.lexists(server.path))
        server.kill()

    def test_grpc_calls_during_the_end(self):
        """Every call that was begun is answered, or was never taken."""
        server = self.start()
        rpc = self.client(server)
        rpc.status()
        pending = [rpc.v2_encrypt.future(kms.EncryptRequest(plaintext=b'x' * 32), timeout=WAIT)
                   for _ in range(200)]
        pending[0].result()
        server.signal(signal.SIGTERM)
        codes = {call.code() for call in pending}
        self.assertLessEqual(codes, {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE})
        self.assertIn(grpc.StatusCode.OK, codes)
        self.assertEqual(server.wait(), 0)

    def test_restart_is_found_by_a_client(self):
        server = self.start()
        rpc = self.client(server)
        rpc.status()
        server.stop()
        again = self.start(path=server.path)

        def found():    # a call may still meet the end of the old connection
            try:
                return rpc.v2_status(kms.StatusRequest(), timeout=WAIT, wait_for_ready=True)
            except grpc.RpcError:
                return None
        until(found, 'a call succeeds')
        again.stop()
