"""What the tests share: starting the plugin, and calling its methods."""
import atexit
import base64
import hmac
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import unittest

from raw import INVALID, NOT_FOUND, OK, UNAVAILABLE, WAIT, Raw, message, until

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BINARY = os.path.abspath(os.environ.get('KMSPLUGIN', os.path.join(ROOT, 'kmsplugin')))
SANITIZED = os.environ.get('KMSPLUGIN_SANITIZED') == '1'
EMULATED = os.environ.get('KMSPLUGIN_EMULATED') == '1'     # by qemu-user, whose process it then is
OWN_MEMORY = not SANITIZED and not EMULATED
STRANGER = 12345        # a uid and gid that are neither root's nor ours
MEMORY_MAX = 16 << 20   # bytes: what the plugin may have resident

# Where other users must reach the sockets: no private directory.
TMP = tempfile.mkdtemp(prefix='kmsplugin-test-')
os.chmod(TMP, 0o755)
atexit.register(shutil.rmtree, TMP, ignore_errors=True)

sys.dont_write_bytecode = True
subprocess.run(['protoc', '-I' + ROOT, '--python_out=' + TMP, os.path.join(ROOT, 'kms.proto')], check=True)
sys.path.append(TMP)
kms = importlib.import_module('kms_pb2')

needs_root = unittest.skipUnless(os.geteuid() == 0, 'needs root')


def text(kek):
    """A KEK as KMS_KEK takes it."""
    return base64.b64encode(kek).decode()


def key_id(kek):
    return hmac.digest(kek, b'kmsplugin key_id v1', 'sha256')[:16].hex()


def fresh_kek():
    return os.urandom(32)


KEK = fresh_kek()
OTHER = fresh_kek()


def fresh_dir():
    path = tempfile.mkdtemp(dir=TMP)
    os.chmod(path, 0o755)
    return path


def fresh_name():
    """A name for an abstract socket that nothing else uses."""
    return 'kmsplugin-test-' + os.urandom(6).hex()


def as_user(uid):
    """The start of a command line that runs the rest as another user."""
    return ('setpriv', f'--reuid={uid}', f'--regid={uid}', '--clear-groups')


def public_binary():
    """The program where every user may run it."""
    path = os.path.join(TMP, 'kmsplugin')
    if not os.path.exists(path):
        shutil.copy(BINARY, path)
        os.chmod(path, 0o755)
    return path


def environment(kek, extra):
    kept = ('PATH', 'TMPDIR', 'ASAN_OPTIONS', 'UBSAN_OPTIONS')
    env = {name: os.environ[name] for name in kept if name in os.environ}
    if kek is not None:
        env['KMS_KEK'] = kek if isinstance(kek, str) else text(kek)
    env.update(extra or {})
    return env


def check_sanitizer(log):
    if re.search('Sanitizer|runtime error:', log):
        raise AssertionError('sanitizer report:\n' + log)


def run(*args, kek=None, env=None, stdin=b'', wrapper=(), binary=BINARY, **popen):
    """Runs the program to its end; stderr comes as text, stdout as bytes. What it still holds
    when it exits is no leak."""
    env = {'ASAN_OPTIONS': os.environ.get('ASAN_OPTIONS', '') + ':detect_leaks=0', **(env or {})}
    done = subprocess.run([*wrapper, binary, *args], input=stdin, timeout=WAIT,
                          capture_output=True, env=environment(kek, env), check=False, **popen)
    done.stderr = done.stderr.decode('utf-8', 'backslashreplace')
    check_sanitizer(done.stderr)
    return done


LOG_LINE = re.compile(
    r'time=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z level=(error|warn|info|debug)'
    r'( [a-z0-9_]+=("([^"\\\x00-\x1f\x7f]|\\.)*"|[^\s"=\x00-\x1f\x7f]*))+')


class Server:
    """A running `kmsplugin serve`, ready when the constructor returns."""

    def __init__(self, *args, kek=KEK, env=None, wrapper=(), binary=BINARY, listen=True,
                 path=None, **popen):
        self.path = path or os.path.join(fresh_dir(), 'kms.sock')
        self.target = 'unix:' + self.path
        endpoint = ('--listen', 'unix://' + self.path) if listen else ()
        sandbox = ('--sandbox', 'off') if SANITIZED else ()     # reports need system calls
        self.lines = []
        self.ended = False
        self.changed = threading.Condition()
        self.process = subprocess.Popen(
            [*wrapper, binary, 'serve', *endpoint, *sandbox, *args], env=environment(kek, env),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **popen)
        self.pid = self.process.pid
        atexit.register(self.kill)
        self.reader = threading.Thread(target=self.read_log, daemon=True)
        self.reader.start()
        try:
            self.wait_log(r'\bmsg=ready\b')
        except AssertionError:
            self.kill()
            raise

    def read_log(self):
        for line in self.process.stderr:
            with self.changed:
                self.lines.append(line.rstrip(b'\n').decode('utf-8', 'backslashreplace'))
                self.changed.notify_all()
        with self.changed:
            self.ended = True
            self.changed.notify_all()

    def log(self):
        return '\n'.join(self.lines)

    def wait_log(self, pattern, count=1):
        """The first matches of a pattern in the log, once there are that many."""
        def matches():
            return [m for m in (re.search(pattern, line) for line in self.lines) if m]
        with self.changed:
            self.changed.wait_for(lambda: self.ended or len(matches()) >= count, WAIT)
            if len(matches()) < count:
                raise AssertionError(f'log lines with {pattern!r}: {len(matches())} of {count} '
                                     f'in:\n{self.log()}')
            return matches()

    def proc(self, name):
        with open(f'/proc/{self.pid}/{name}', 'rb') as file:
            return file.read()

    def resident(self):
        """Bytes of resident memory."""
        return int(self.proc('statm').split()[1]) * os.sysconf('SC_PAGE_SIZE')

    def descriptors(self):
        return len(os.listdir(f'/proc/{self.pid}/fd'))

    def signal(self, number):
        self.process.send_signal(number)

    def wait(self):
        """Waits for the end and gives the exit status."""
        try:
            self.process.wait(WAIT)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError('did not end:\n' + self.log()) from None
        self.reader.join(WAIT)
        check_sanitizer(self.log())
        return self.process.returncode

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.reader.join(WAIT)
        self.process.stderr.close()
        atexit.unregister(self.kill)

    def stop(self):
        """Ends it if it runs still; an end or a log other than promised is an error."""
        if self.process.stderr.closed:
            return
        died = self.process.poll()
        if died is None:
            self.signal(signal.SIGTERM)
        status = self.wait()
        self.kill()
        if died is None and status != 0:
            raise AssertionError(f'exit status {status} after SIGTERM:\n{self.log()}')
        if died is not None and died != 0:
            raise AssertionError(f'ended by itself with {died}:\n{self.log()}')
        for line in self.lines:
            if not LOG_LINE.fullmatch(line) or ' msg=' not in line:
                raise AssertionError(f'not a log line: {line!r}')


class RpcError(Exception):
    """A call that failed, with gRPC's status code; without one, what became of it instead."""

    def __init__(self, code, why):
        super().__init__(f'{code}: {why}')
        self.code, self.why = code, why


class Client:
    """The plugin's methods, on a connection that is made when it is needed."""

    def __init__(self, target):
        name = target.removeprefix('unix:')
        self.path = name if name.startswith('/') else '\0' + name.removeprefix('unix-abstract:')
        self.raw = None

    def close(self):
        if self.raw:
            self.raw.close()
        self.raw = None

    def call(self, path, request, response):
        try:
            self.raw = self.raw or Raw(self.path)
            answer = self.raw.call(path, message(request.SerializeToString()))
        except OSError as error:
            self.close()
            raise RpcError(UNAVAILABLE, error) from None
        if answer.closed:
            self.close()
            raise RpcError(UNAVAILABLE, 'closed')
        del self.raw.answers[self.raw.stream]
        if answer.status != OK:
            raise RpcError(answer.status, answer.message if answer.blocks else f'reset: {answer.reset}')
        assert answer.data[:5] == message(answer.data[5:])[:5], answer
        return response.FromString(answer.data[5:])

    def v2(self, method, request):
        return self.call(f'/v2.KeyManagementService/{method}', request, getattr(kms, method + 'Response'))

    def v1(self, method, **fields):
        request = getattr(kms.V1beta1, method + 'Request')(**fields)
        return self.call(f'/v1beta1.KeyManagementService/{method}', request, getattr(kms.V1beta1, method + 'Response'))

    def status(self):
        return self.v2('Status', kms.StatusRequest())

    def encrypt(self, plaintext, uid='test'):
        return self.v2('Encrypt', kms.EncryptRequest(plaintext=plaintext, uid=uid))

    def decrypt(self, ciphertext, identity, annotations=None, uid='test'):
        return self.v2('Decrypt', kms.DecryptRequest(ciphertext=ciphertext, key_id=identity, uid=uid,
                                                     annotations=annotations or {})).plaintext

    def version(self, version='v1beta1'):
        return self.v1('Version', version=version)

    def encrypt_v1(self, plain, version='v1beta1'):
        return self.v1('Encrypt', version=version, plain=plain).cipher

    def decrypt_v1(self, cipher, version='v1beta1'):
        return self.v1('Decrypt', version=version, cipher=cipher).plain


class Case(unittest.TestCase):
    """A test case that stops what it started."""

    def start(self, *args, **options):
        server = Server(*args, **options)
        self.addCleanup(server.stop)
        return server

    def client(self, target):
        client = Client(getattr(target, 'target', target))
        self.addCleanup(client.close)
        return client

    def fails(self, code, call, *args, **options):
        """Asserts a call's gRPC error and gives its message."""
        with self.assertRaises(RpcError) as caught:
            call(*args, **options)
        error = caught.exception
        self.assertEqual(error.code, code, error.why)
        self.assertRegex(error.why, r'\A[ -~]{8,}\Z')
        return error.why

    def dies(self, *args, code=1, **options):
        """Asserts a failure at the start, told in one line, and gives that line."""
        done = run(*args, **options)
        codes = code if isinstance(code, tuple) else (code,)
        self.assertIn(done.returncode, codes, (args, done.stderr))
        self.assertEqual(done.stdout, b'')
        lines = [line for line in done.stderr.splitlines() if not (EMULATED and 'feature=seccomp' in line)]
        if done.returncode == 2:
            self.assertIn(len(lines), (1, 2), done.stderr)
            self.assertIn('help', lines[-1])
        else:
            self.assertEqual(len(lines), 1, done.stderr)
        self.assertRegex(lines[0], r'\S{3}')
        return lines[0]


class ServerCase(Case):
    """A test case whose tests share one server."""
    options = ()
    kek = KEK

    @classmethod
    def setUpClass(cls):
        cls.server = Server(*cls.options, kek=cls.kek)
        cls.addClassCleanup(cls.server.stop)
        cls.rpc = Client(cls.server.target)
        cls.addClassCleanup(cls.rpc.close)
