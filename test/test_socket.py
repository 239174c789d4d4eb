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

from plugin import (EMULATED, KEK, STRANGER, WAIT, Case, RpcError, as_user, fresh_dir, fresh_name,
                    needs_root, public_binary, until)
from raw import EMPTY, GOAWAY, STATUS, Raw, data, request

# Connects COUNT times to PATH and prints how many bytes came back each time.
PEER = r'''
import contextlib, socket, sys
for _ in range(int(sys.argv[2])):
    got = b""
    with socket.socket(socket.AF_UNIX) as peer, contextlib.suppress(OSError):
        peer.settimeout(20)
        peer.connect(sys.argv[1].replace("@", "\0"))
        with contextlib.suppress(BrokenPipeError):
            peer.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
        got = peer.recv(9)
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
    done = subprocess.run([*as_user(uid), sys.executable, '-c', PEER, path, str(count)], capture_output=True, timeout=WAIT, check=True)
    return [int(line) for line in done.stdout.split()]


def killed(server):
    """Leaves its socket behind; gives the path."""
    os.kill(server.pid, signal.SIGKILL)
    server.wait()
    server.kill()
    return server.path


def listening(path=None, kind=socket.SOCK_STREAM, listen=True):
    path = path or fresh_dir() + '/activated.sock'
    listener = socket.socket(socket.AF_UNIX, kind)
    listener.bind(path.replace('@', '\0'))
    if listen:
        listener.listen()
    return listener, path


class SocketCase(Case):
    def refused(self, path, says='', **options):
        line = self.dies('serve', '--listen', 'unix://' + path, kek=KEK, **options)
        self.assertRegex(line, says or re.escape(path))
        return line

    def serves(self, *targets):
        for target in targets:
            self.assertEqual(self.client(target).status().healthz, 'ok', target)


class Files(SocketCase):
    def test_mode(self):
        for mode, umask in ((None, 0), (0o600, 0), (0o660, 0o77), (0o666, 0o777), (0o622, 0)):
            server = self.start(*(('--mode', f'{mode:o}') if mode else ()), umask=umask)
            self.assertEqual(stat.S_IMODE(os.stat(server.path).st_mode), mode or 0o600)

    @needs_root
    def test_group(self):
        for group, gid in ((str(STRANGER), STRANGER), ('daemon', 1)):
            server = self.start('--group', group, '--mode', '0660')
            status = os.stat(server.path)
            self.assertEqual((status.st_uid, status.st_gid), (os.geteuid(), gid))
            self.assertEqual(stat.S_IMODE(status.st_mode), 0o660)

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
        path = killed(self.start())
        self.assertTrue(stat.S_ISSOCK(os.stat(path).st_mode))
        again = self.start(path=path)
        self.serves(again)
        again.stop()
        self.assertFalse(os.path.lexists(path))

    @needs_root
    def test_a_stale_socket_that_cannot_be_tried(self):
        """Root's, and the plugin no longer is: it does not claim that anybody listens."""
        path = killed(self.start())
        os.chown(os.path.dirname(path), STRANGER, STRANGER)
        line = self.refused(path, 'uid 0.*Permission denied', wrapper=as_user(STRANGER), binary=public_binary())
        self.assertNotIn('another process is listening', line)
        self.assertTrue(os.path.exists(path))

    def test_live_socket_is_refused(self):
        """Though its queue may be full."""
        server = self.start()
        inode = os.stat(server.path).st_ino
        self.refused(server.path)
        self.assertEqual(os.stat(server.path).st_ino, inode)
        self.serves(server)
        listener, path = listening(listen=False)
        with listener, socket.socket(socket.AF_UNIX) as first:
            listener.listen(0)
            first.connect(path)
            self.refused(path)
            self.assertTrue(os.path.exists(path))

    def test_no_socket_is_touched(self):
        directory = fresh_dir()
        path = directory + '/kms.sock'
        dead, _ = listening(directory + '/dead')
        dead.close()

        def refused():
            before = os.lstat(path)
            self.refused(path)
            after = os.lstat(path)
            self.assertEqual((before.st_ino, before.st_mode, before.st_mtime_ns, before.st_size),
                             (after.st_ino, after.st_mode, after.st_mtime_ns, after.st_size))
        for make, unmake in ((os.mkdir, os.rmdir), (os.mkfifo, os.unlink), (lambda name: open(name, 'wb').close(), os.unlink),
                             *((lambda name, to=to: os.symlink(to, name), os.unlink) for to in ('dead', 'nowhere', directory + '/dead', '/dev/null'))):
            make(path)
            refused()
            unmake(path)
        self.assertEqual(os.listdir(directory), ['dead'])

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
                    self.refused(path, directory)
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
        path, hop = top + '/a/kms.sock', top + '/b/hop'
        for name in ('b', 'c', 'd'):
            os.mkdir(f'{top}/{name}', 0o755)
        os.symlink('b/../b/hop', top + '/a')
        os.symlink(top + '/c', hop)
        self.start(path=path).stop()
        os.chmod(top + '/b', 0o777)
        self.refused(path, top + '/b')
        if os.geteuid() == 0:
            os.chmod(top + '/b', 0o1777)
            self.start(path=path).stop()
            os.lchown(hop, STRANGER, STRANGER)
            self.refused(path, rf'hop: .*\b{STRANGER}\b|Permission denied')
        os.chmod(top + '/b', 0o755)
        for target, says in (('../a', '(?i)symbolic link'), ('nowhere', 'No such file'), ('../../' + os.path.basename(top) + '/file', 'Not a directory')):
            os.unlink(hop)
            os.symlink(target, hop)
            with open(top + '/file', 'wb'):
                self.refused(path, says)

    def test_as_many_links_as_the_kernel_follows(self):
        top, most = fresh_dir(), 40
        os.mkdir(top + '/0')
        for i in range(1, most + 2):
            os.symlink(str(i - 1), f'{top}/{i}')
        os.stat(f'{top}/{most}')
        with self.assertRaises(OSError):
            os.stat(f'{top}/{most + 1}')
        self.start(path=f'{top}/{most}/kms.sock').stop()
        self.refused(f'{top}/{most + 1}/kms.sock', '(?i)symbolic link')

    def test_long_links(self):
        """Looked at whole, or refused: never one directory looked at, and the socket in another."""
        top = fresh_dir()
        os.mkdir(top + '/open', 0o755)
        os.chmod(top + '/open', 0o777)
        for length in (1000, 2030, 4000):
            for target in (top, top + '/open'):
                os.symlink('/.' * (length // 2) + target, top + '/long')
                if target == top and length < 2000:
                    self.start(path=top + '/long/kms.sock').stop()
                elif target != top:
                    self.refused(top + '/long/kms.sock', '.')
                    self.assertEqual(os.listdir(top + '/open'), [])
                os.unlink(top + '/long')

    def test_several(self):
        paths, name = [fresh_dir() + '/kms.sock' for _ in range(2)], fresh_name()
        more = [word for path in paths for word in ('--listen', 'unix://' + path)]
        server = self.start(*more, '--listen', f'unix:///@{name}')
        self.serves(server, 'unix:' + paths[0], 'unix:' + paths[1], f'unix-abstract:{name}')
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

    @needs_root
    def test_each_step_names_itself(self):
        stranger = {'wrapper': as_user(STRANGER), 'binary': public_binary()}
        self.assert_nothing_left('0.sock: bind: Permission denied', **stranger)
        self.assert_nothing_left('0.sock: .*--group.*: Operation not permitted', '--group', '0', owner=(STRANGER, STRANGER), **stranger)


class Abstract(SocketCase):
    @unittest.skipIf(EMULATED, 'it warns that the emulator has no seccomp')
    def test_served_by_its_exact_name(self):
        """No NUL after the name: grpc-go sends none."""
        name = fresh_name()
        server = self.start('--listen', f'unix:///@{name}', listen=False)
        self.serves(f'unix-abstract:{name}')
        with socket.socket(socket.AF_UNIX) as other, self.assertRaises(ConnectionRefusedError):
            other.connect('\0' + name + '\0')
        self.assertEqual(len(server.wait_log('level=warn.*take an abstract name first.*fill its queue')), 1)

    @unittest.skipIf(EMULATED, 'it warns that the emulator has no seccomp')
    def test_file_sockets_warn_of_nothing(self):
        server = self.start()
        server.stop()
        self.assertNotIn('level=warn', server.log())


@needs_root
class Floods(Case):
    """A refused user connects as fast as it can. grpc-go connects non-blocking: EAGAIN if the queue is full."""

    @staticmethod
    def connects(path):
        """As Go does; False when it is to try again later."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.setblocking(False)
            try:
                connection.connect(path)
            except BlockingIOError:
                return False
        return True

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
            self.assertTrue(self.connects(server.path), 'the queue was full')
            time.sleep(0.002)
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
                until(lambda at=path: self.connects(at), 'room in the queue')
                with Raw(path) as raw:
                    self.assertTrue(raw.works())
            flood.kill()
        server.wait_log(f'msg=refused.*uid={STRANGER} ')
        server.stop()
        self.assertLess(len(server.lines), 60)


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


class Activation(SocketCase):
    def activation(self, *files, pid=''):
        """The options that start the program with these files as systemd would."""
        numbers = [file.fileno() for file in files]
        return {'wrapper': (sys.executable, '-c', ACTIVATE, ','.join(map(str, numbers)), pid),
                'pass_fds': numbers}

    def test_one_socket(self):
        listener, path = listening()
        with listener:
            for _ in range(2):
                server = self.start(listen=False, **self.activation(listener))
                self.serves('unix:' + path)
                self.assertNotIn('/run/kmsplugin', server.log())
                server.stop()
                self.assertTrue(os.path.exists(path))

    def test_several_and_listen(self):
        name = fresh_name()
        (one, path), (two, _) = listening(), listening('@' + name)
        with one, two:
            server = self.start(**self.activation(one, two))
            self.serves('unix:' + path, f'unix-abstract:{name}', server)
            server.stop()
            self.assertTrue(os.path.exists(path))
            self.assertFalse(os.path.lexists(server.path))

    def test_of_another_process(self):
        """A wrapper that did not exec: the socket is nothing to us, and a warning says so."""
        listener, path = listening()
        with listener, Raw(path, hello=False) as raw:
            server = self.start(**self.activation(listener, pid='1'))
            self.serves(server)
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
        """And a manager that cannot be reached keeps nobody from serving."""
        for path in (fresh_dir() + '/notify.sock', '@' + fresh_name()):
            receiver, _ = listening(path, kind=socket.SOCK_DGRAM, listen=False)
            with receiver:
                receiver.settimeout(WAIT)
                server = self.start(env={'NOTIFY_SOCKET': path})
                self.assertIn(b'READY=1', receiver.recv(4096).splitlines())
                self.serves(server)
                server.signal(signal.SIGTERM)
                self.assertIn(b'STOPPING=1', receiver.recv(4096).splitlines())
                self.assertEqual(server.wait(), 0)
        self.serves(self.start(env={'NOTIFY_SOCKET': '/no/such/socket'}))


class Stop(SocketCase):
    def test_calls_in_flight_are_finished(self):
        server = self.start()
        with Raw(server.path) as raw:
            self.assertTrue(raw.works())
            stream = raw.open(request(STATUS))
            raw.send(data(stream, EMPTY[:2]))
            raw.drained()
            server.signal(signal.SIGTERM)
            while (frame := raw.frame()).kind != GOAWAY:
                pass
            self.assertGreaterEqual(int.from_bytes(frame.payload[:4], 'big'), stream)
            until(lambda: not os.path.lexists(server.path), 'socket removed')
            with self.assertRaises(OSError):
                Raw(server.path)
            self.assertIsNone(server.process.poll())
            raw.send(data(stream, EMPTY[2:], end=True))
            answer = raw.wait(stream)
            self.assertEqual(answer.status, 0, answer)
            raw.wait_closed()
            self.assertEqual(set(raw.goaways), {0})
        self.assertEqual(server.wait(), 0)

    def test_goaway_to_the_idle(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            server = self.start()
            with Raw(server.path) as raw:
                self.assertTrue(raw.works())
                server.signal(number)
                raw.wait_closed()
                self.assertEqual(set(raw.goaways), {0})
            self.assertEqual(server.wait(), 0)
            self.assertFalse(os.path.lexists(server.path))

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

    def test_calls_during_the_end(self):
        """Each is answered, or was above the last stream that GOAWAY names: its client may repeat it elsewhere."""
        server = self.start()
        with Raw(server.path) as raw:
            self.assertTrue(raw.works())
            streams = [raw.expect() for _ in range(200)]
            raw.send(*(raw.headers(stream, request(STATUS)) + data(stream, EMPTY, end=True) for stream in streams))
            server.signal(signal.SIGTERM)
            last = 2**31 - 1
            while frame := raw.frame():
                if frame.kind == GOAWAY:
                    last = int.from_bytes(frame.payload[:4], 'big')
            answered = {stream for stream, answer in raw.answers.items() if answer.ended and answer.status == 0}
            self.assertLessEqual(set(range(1, min(last, raw.stream) + 1, 2)), answered)
            self.assertGreater(len(answered), 1)
        self.assertEqual(server.wait(), 0)

    def test_restart_is_found_by_a_client(self):
        server = self.start()
        rpc = self.client(server)
        rpc.status()
        server.stop()
        with self.assertRaises(RpcError):
            rpc.status()
        again = self.start(path=server.path)
        self.assertEqual(rpc.status().healthz, 'ok')
        again.stop()
