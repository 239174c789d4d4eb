"""What the tests share: starting the plugin, and calling it through gRPC."""
import atexit
import base64
import hashlib
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
import time
import unittest

os.environ.setdefault('GRPC_VERBOSITY', 'NONE')
import grpc

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BINARY = os.path.abspath(os.environ.get('KMSPLUGIN', os.path.join(ROOT, 'kmsplugin')))
SANITIZED = os.environ.get('KMSPLUGIN_SANITIZED') == '1'
EMULATED = os.environ.get('KMSPLUGIN_EMULATED') == '1'     # by qemu-user, whose process it then is
OWN_MEMORY = not SANITIZED and not EMULATED
WAIT = 20.0             # seconds: the bound of what takes milliseconds
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

OK = grpc.StatusCode.OK
INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND
INTERNAL = grpc.StatusCode.INTERNAL
UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
DEADLINE = grpc.StatusCode.DEADLINE_EXCEEDED

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


def until(condition, what):
    """Waits for a condition that no event announces."""
    end = time.monotonic() + WAIT
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f'not within {WAIT:.0f} s: {what}')
        time.sleep(0.005)


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


class Client:
    """The plugin's methods through gRPC, on a connection of its own."""

    def __init__(self, target):
        self.channel = grpc.insecure_channel(target, [('grpc.use_local_subchannel_pool', 1)])
        v1 = kms.V1beta1
        self.v2_status = self.method('v2', 'Status', kms.StatusResponse)
        self.v2_encrypt = self.method('v2', 'Encrypt', kms.EncryptResponse)
        self.v2_decrypt = self.method('v2', 'Decrypt', kms.DecryptResponse)
        self.v1_version = self.method('v1beta1', 'Version', v1.VersionResponse)
        self.v1_encrypt = self.method('v1beta1', 'Encrypt', v1.EncryptResponse)
        self.v1_decrypt = self.method('v1beta1', 'Decrypt', v1.DecryptResponse)

    def method(self, service, name, response):
        return self.channel.unary_unary(f'/{service}.KeyManagementService/{name}',
                                        request_serializer=lambda message: message.SerializeToString(),
                                        response_deserializer=response.FromString)

    def close(self):
        self.channel.close()

    def status(self):
        return self.v2_status(kms.StatusRequest(), timeout=WAIT)

    def encrypt(self, plaintext, uid='test'):
        return self.v2_encrypt(kms.EncryptRequest(plaintext=plaintext, uid=uid), timeout=WAIT)

    def decrypt(self, ciphertext, identity, annotations=None, uid='test'):
        return self.v2_decrypt(kms.DecryptRequest(ciphertext=ciphertext, key_id=identity, uid=uid,
                                                  annotations=annotations or {}),
                               timeout=WAIT).plaintext

    def version(self, version='v1beta1'):
        return self.v1_version(kms.V1beta1.VersionRequest(version=version), timeout=WAIT)

    def encrypt_v1(self, plain, version='v1beta1'):
        return self.v1_encrypt(kms.V1beta1.EncryptRequest(version=version, plain=plain),
                               timeout=WAIT).cipher

    def decrypt_v1(self, cipher, version='v1beta1'):
        return self.v1_decrypt(kms.V1beta1.DecryptRequest(version=version, cipher=cipher),
                               timeout=WAIT).plain


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
        with self.assertRaises(grpc.RpcError) as caught:
            call(*args, **options)
        error = caught.exception
        self.assertEqual(error.code(), code, error.details())
        self.assertRegex(error.details(), r'\A[ -~]{8,}\Z')
        return error.details()

    def dies(self, *args, code=1, **options):
        """Asserts a failure at the start, told in one line, and gives that line."""
        done = run(*args, **options)
        codes = code if isinstance(code, tuple) else (code,)
        self.assertIn(done.returncode, codes, (args, done.stderr))
        self.assertEqual(done.stdout, b'')
        lines = done.stderr.splitlines()
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
