"""Every call that can fail does, once each: the program must not crash, leak, or answer wrongly.

    inject.py [NAME...]     tests whose name contains one of the words

KMSPLUGIN_INJECT names the program: with sanitizers, and test/inject.c in front of the C
library; beside it is one without sanitizers, for what they do not bear (a sandbox). A line
`ok` or `not ok` for each test, and the sum.
"""
import errno
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time

import sealed
from plugin import KEK, OTHER, ROOT, WAIT, Server, fresh_dir, key_id, text
from raw import (DECRYPT, DECRYPT_V1, ENCRYPT, ENCRYPT_V1, STATUS, VERSION_V1, Raw, field, message)

PROGRAM = os.path.abspath(os.environ.get('KMSPLUGIN_INJECT', os.path.join(ROOT, 'build', 'kmsplugin-inject')))
PLAIN_PROGRAM = PROGRAM + '-plain'
PLAIN, KEY = b'sixteen bytes, or', b'/registry/secrets/default/s'
LOST = 'lost'           # instead of an answer: the connection ended
NO_MEMORY = (8, 13)     # RESOURCE_EXHAUSTED, INTERNAL: the one call that met the failure
SANITIZERS = {'ASAN_OPTIONS': 'detect_leaks=1', 'UBSAN_OPTIONS': 'print_stacktrace=1'}
TEST_SECONDS = 900


def environment(inject, **more):
    return {'INJECT': inject, **SANITIZERS, **more}


def bytes_of(data, number):
    """A field of bytes in a small message."""
    at = 0
    while at < len(data):
        tag, size, at = data[at], data[at + 1], at + 2
        if size > 127:
            size, at = size & 127 | data[at] << 7, at + 1
        if tag == number << 3 | 2:
            return data[at:at + size]
        at += size
    return b''


class Dialogue:
    """All that there is to ask, on as many connections as it takes."""

    def __init__(self, path):
        self.path, self.raw, self.trouble = path, None, []

    def call(self, name, body, right):
        """The response's message; None where the failure has struck."""
        for _ in range(3):
            try:
                self.raw = self.raw or Raw(self.path)
                answer = self.raw.call(name, message(body)) if name != '/metrics' else self.raw.get(name)
            except OSError:
                answer = None
            if answer is None or answer.closed or (answer.reset is not None and answer.status is None):
                self.trouble.append(LOST)
                self.raw.close() if self.raw else None
                self.raw = None
                continue
            if name == '/metrics' and answer.http == '503':
                self.trouble.append(503)
                continue
            if name == '/metrics':
                assert answer.http == '200' and b'kmsplugin_connections ' in answer.data, answer
                return answer.data
            if answer.status == right:
                return answer.data[5:]
            assert answer.status in NO_MEMORY, (name, answer)
            self.trouble.append(answer.status)
        raise AssertionError(f'{name} failed three times: {self.trouble}')

    def run(self):
        identity = key_id(KEK).encode()
        status = self.call(STATUS, b'', 0)
        assert bytes_of(status, 1) == b'v2' and bytes_of(status, 2) == b'ok' and bytes_of(status, 3) == identity, status
        ciphertext = bytes_of(self.call(ENCRYPT, field(1, PLAIN) + field(2, b'uid'), 0), 1)
        assert sealed.unseal(KEK, ciphertext, sealed.V2) == PLAIN
        opened = self.call(DECRYPT, field(1, ciphertext) + field(2, b'uid') + field(3, identity), 0)
        assert bytes_of(opened, 1) == PLAIN, opened
        self.call(DECRYPT, field(1, ciphertext) + field(3, b'x'), 3)
        self.call(VERSION_V1, field(1, b'v1beta1'), 0)
        cipher = bytes_of(self.call(ENCRYPT_V1, field(1, b'v1beta1') + field(2, PLAIN * 100), 0), 1)
        assert sealed.unseal(KEK, cipher, sealed.V1) == PLAIN * 100
        assert bytes_of(self.call(DECRYPT_V1, field(1, b'v1beta1') + field(2, cipher), 0), 1) == PLAIN * 100
        self.call('/metrics', b'', 0)
        self.call('/none', b'', 12)
        self.raw.close()
        self.raw = None


def serve(inject, *args, binary=PROGRAM, twice=True, **options):
    """A server with that failure, a dialogue, the end. Its trouble, and how many such calls there were.
    None if it refused to start, as it may: in one line, and without a socket file left behind."""
    env = environment(inject, INJECT_COUNT=os.path.join(fresh_dir(), 'count'), **options.pop('env', {}))
    server = Server.__new__(Server)
    try:
        server.__init__(*args, kek=f'{text(KEK)},{text(OTHER)}', binary=binary, env=env, **options)
    except AssertionError:
        server.process.wait(WAIT)
        server.reader.join(WAIT)
        lines = [line for line in server.lines if not re.match('(<.>)?time=', line)]
        assert server.process.returncode == 1 and len(lines) == 1 and lines[0].startswith('kmsplugin: '), \
            (inject, server.process.returncode, server.log())
        assert not os.path.lexists(server.path) or 'path' in options, (inject, 'a socket file stays behind')
        return None, 0, server
    try:
        dialogue = Dialogue(server.path)
        dialogue.run()
        trouble, dialogue.trouble = dialogue.trouble, []
        if twice:
            dialogue.run()      # once more, when it is over
        status = server.proc('status').decode() if os.geteuid() == 0 else ''
        server.filtered = re.search(r'Seccomp:\t2', status) is not None
        server.signal(signal.SIGTERM)
        assert server.wait() == 0, server.log()
    finally:
        server.kill()
    if server.filtered:     # a confined server opens no file
        return trouble, None, server
    with open(env['INJECT_COUNT'], encoding='ascii') as file:
        return trouble, int(file.read()), server


def everywhere(call, at_most=1, extra='', **options):
    """The n-th call fails, for every n that there is."""
    _, total, _ = serve(f'{call}:0', **options)
    assert total > 0, f'no {call} at all'
    refused = troubled = 0
    for n in range(1, total + 1):
        trouble, _, _ = serve(f'{call}:{n}{extra}', **options)
        refused += trouble is None
        troubled += bool(trouble)
        assert trouble is None or len(trouble) <= at_most, (call, n, trouble)
    return f'{total} calls: {refused} refused to start, {troubled} cost a call or a connection'


def allocations():
    """A session that had no memory is never deleted: that leak is meant."""
    return everywhere('alloc', env={'ASAN_OPTIONS': 'detect_leaks=0'})


def random_bytes():
    told = everywhere('getrandom', at_most=1, extra=':5')
    trouble, _, _ = serve('getrandom:3:5:2')    # two failures after those of the start: two calls that say so
    assert trouble == [13, 13], trouble
    return told


def reads():
    return everywhere('read', extra=f':{errno.ECONNRESET}')


def writes():
    return everywhere('write', extra=f':{errno.EPIPE}')


def credentials():
    """A peer whose uid cannot be told is no peer."""
    return everywhere('getsockopt', extra=f':{errno.ENOTCONN}')


# What a start calls, and what a wrong answer would be of the kernel.
STARTS = {'socket': errno.EMFILE, 'bind': errno.EACCES, 'listen': errno.EADDRINUSE, 'chmod': errno.EPERM,
          'lchown': errno.EPERM, 'lstat64': errno.EACCES, 'stat64': errno.EACCES, 'readlink': errno.EIO,
          'epoll_create1': errno.EMFILE, 'epoll_ctl': errno.ENOSPC, 'signalfd': errno.EMFILE, 'sigprocmask': errno.EINVAL,
          'mmap64': errno.ENOMEM, 'mlock': errno.EPERM, 'madvise': errno.EINVAL, 'mprotect': errno.ENOMEM,
          'getrlimit64': errno.EPERM, 'prlimit64': errno.EPERM, 'prctl': errno.EINVAL, 'fcntl64': errno.EIO,
          'setsockopt': errno.ENOPROTOOPT, 'sigaction': errno.EINVAL, 'atexit': errno.ENOMEM, 'setitimer': errno.EINVAL}


def stale(call):
    """Options of a start on a path where a crashed server has left its socket."""
    path = os.path.join(fresh_dir(), 'kms.sock')
    left = socket.socket(socket.AF_UNIX)
    left.bind(path)
    left.close()
    return {'path': path, 'env': {}} if call else {}


def inherited(listener):
    """Options of a start with a socket of systemd's, and a place to say READY=1."""
    return {'wrapper': ('sh', '-c', f'exec 3<&{listener.fileno()}; export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@"', 'sh'),
            'pass_fds': (listener.fileno(),), 'listen': False, 'path': listener.getsockname()}


def starts():
    """Every call of a start: it goes on without, or refuses in one line, and leaves no socket file."""
    told = []
    for call, error in STARTS.items():
        group = ('--group', str(os.getegid())) if call == 'lchown' else ()
        _, total, _ = serve(f'{call}:0', *group, twice=False)
        refused = 0
        for n in range(1, total + 1):
            trouble, _, _ = serve(f'{call}:{n}:{error}', *group, twice=False)
            assert not trouble or call in ('epoll_ctl', 'mmap64'), (call, n, trouble)
            refused += trouble is None
        assert total > 0 or call in ('setsockopt', 'prlimit64', 'mprotect'), f'no {call} at all'
        told.append(f'{call} {refused}/{total}')
    return 'refused: ' + ', '.join(told)


def other_starts():
    """A file that a crashed server has left; a key in a file; a socket of systemd, and whom to tell READY=1."""
    told = []
    key_file = os.path.join(fresh_dir(), 'kek')
    with open(os.open(key_file, os.O_CREAT | os.O_WRONLY, 0o600), 'w', encoding='ascii') as file:
        file.write(text(KEK))
    for call, error in (('connect', errno.EACCES), ('unlink', errno.EACCES), ('open64', errno.EIO), ('fstat64', errno.EIO),
                        ('getsockname', errno.ENOBUFS), ('fcntl64', errno.EIO)):
        refused = n = total = 0
        while n == 0 or n <= total:
            with socket.socket(socket.AF_UNIX) as listener:
                options = stale(call) if call in ('connect', 'unlink') else {}
                if call in ('getsockname', 'fcntl64'):
                    listener.bind(os.path.join(fresh_dir(), 'systemd.sock'))
                    listener.listen()
                    options = inherited(listener)
                if call in ('open64', 'fstat64'):
                    done = subprocess.run([PROGRAM, 'keyid'], capture_output=True, timeout=WAIT, check=False,
                                          env=environment(f'{call}:{n}:{error}', KMS_KEK_FILE=key_file,
                                                          INJECT_COUNT=key_file + '.count'))
                    assert done.returncode == 0 or (done.returncode == 1 and done.stderr.count(b'\n') == 1), done
                    with open(key_file + '.count', encoding='ascii') as file:
                        trouble, count = None if done.returncode else [], int(file.read())
                else:
                    trouble, count, _ = serve(f'{call}:{n}:{error}', twice=False, **options)
            assert not trouble, (call, n, trouble)
            total = count if n == 0 else total
            refused += trouble is None
            n += 1
        told.append(f'{call} {refused}/{total}')
    return 'refused: ' + ', '.join(told)


def rehearsals():
    """The program without sanitizers, in its sandbox. Where no rehearsal can be held, the filter is there all the same;
    where one fails, auto serves without the filter and require refuses."""
    if os.geteuid() != 0:
        return 'skipped, only root sees whether there is a filter'
    held = failed = 0
    for mode in ('auto', 'require'):
        for call, error in (('fork', errno.EAGAIN), ('socketpair', errno.EMFILE), ('pipe2', errno.EMFILE)):
            trouble, _, server = serve(f'{call}:1:{error}', '--sandbox', mode, binary=PLAIN_PROGRAM, twice=False)
            assert trouble == [] and server.filtered, (mode, call, trouble, server.log())
            held += 1
        for call, error in (('write', errno.EPIPE), ('accept4', errno.ENOSYS), ('ppoll', errno.ENOSYS), ('prctl', errno.EINVAL),
                            ('epoll_ctl', errno.ENOSYS), ('madvise', errno.ENOSYS), ('getrandom', errno.ENOSYS)):
            trouble, _, server = serve(f'{call}:1:{error}', '--sandbox', mode, binary=PLAIN_PROGRAM, twice=False,
                                       env={'INJECT_CHILD': '1'})
            assert trouble is None if mode == 'require' else trouble == [] and not server.filtered, (mode, call, server.log())
            failed += 1
    return f'{held} could not be held, {failed} failed'


# Calls that never fail, or whose failure changes nothing that could be told.
SAFE = set("""__assert_fail __cxa_finalize __errno_location __libc_start_main __stack_chk_fail _exit close clock_gettime
    dl_iterate_phdr dprintf environ exit free getenv geteuid getgrnam getpagesize getpid getpwnam gmtime_r time strnlen
    malloc_usable_size memchr memcmp memcpy memmove memset munmap sigaddset sigdelset sigemptyset sigfillset signal
    snprintf strchr strcmp strcspn strerror strlen strncasecmp strncmp strrchr strtok strtoul strtoull umask vdprintf vsnprintf
    _GLOBAL_OFFSET_TABLE_""".split())


def every_call_is_here():
    """Of what kmsplugin.c calls, each function is one that test/inject.c lets fail, or one of SAFE, or a library's."""
    def symbols(*args):
        return {line.split()[-1] for line in subprocess.run(['nm', *args], capture_output=True, text=True,
                                                            check=True).stdout.splitlines()}
    called = {name for name in symbols('-u', os.path.join(os.path.dirname(PROGRAM), 'inject', 'called.o'))
              if not re.match('nghttp2_|br_|protobuf_c_|v2__', name)}
    wrapped = {name.removeprefix('__wrap_') for name in symbols(PROGRAM) if name.startswith('__wrap_')}
    assert called - wrapped - SAFE == set(), f'not among the calls that fail: {called - wrapped - SAFE}'
    assert SAFE & wrapped == set(), SAFE & wrapped
    return f'{len(called & wrapped)} of {len(called)} functions'


def one_byte_at_a_time():
    trouble, _, _ = serve('short')
    assert trouble == [], trouble
    return 'reads, writes, random bytes'


def interrupted():
    trouble, _, _ = serve('eintr')
    assert trouble == [], trouble
    return 'half of the calls'


def accept_errors():
    """Whatever accept says, whoever waits is served a little later."""
    names = ('EMFILE', 'ENFILE', 'ENOBUFS', 'ENOMEM', 'ECONNABORTED', 'EINTR', 'EAGAIN', 'EPROTO', 'EPERM', 'EIO')
    for name in names:
        for count in (1, 3, 40):
            begin = time.monotonic()
            trouble, _, _ = serve(f'accept4:1:{getattr(errno, name)}:{count}')
            assert trouble == [], (name, count, trouble)
            assert time.monotonic() - begin < WAIT
    return ' '.join(names)


def verb(inject, args, stdin, right):
    """A verb with that failure: the right output, or one line and nothing on stdout."""
    count = os.path.join(fresh_dir(), 'count')
    done = subprocess.run([PROGRAM, *args], input=stdin, capture_output=True, timeout=WAIT, check=False,
                          env={'KMS_KEK': text(KEK), **environment(inject, INJECT_COUNT=count),
                               'ASAN_OPTIONS': 'detect_leaks=0'})       # what exit() leaves is no leak
    failed = done.returncode == 1 and done.stderr.count(b'\n') == 1 and done.stderr.startswith(b'kmsplugin: ')
    if args[0] == 'unseal' and failed:
        failed = done.stdout == b''
    assert failed or (done.returncode == 0 and done.stdout.endswith(right) and not done.stderr), (inject, args, done)
    with open(count, encoding='ascii') as file:
        return int(file.read())


def verbs():
    value = sealed.etcd_v2(KEK, KEY, PLAIN)
    response = sealed.range_response((KEY, value))
    total = 0
    for args, stdin, right in ((('keyid',), b'', b'\n'), (('genkey',), b'', b'=\n'), (('unseal',), response, PLAIN),
                               (('unseal', KEY.decode()), value, PLAIN),
                               (('audit', '--list'), response, b'other values=0\n')):
        for call in ('alloc', 'mmap64', 'read', 'getrandom'):
            extra = '' if call in ('alloc', 'mmap64') else f':{errno.EIO}'
            count = verb(f'{call}:0', args, stdin, right)
            total += count
            for n in range(1, count + 1):
                verb(f'{call}:{n}{extra}', args, stdin, right)
        for inject in ('short', 'eintr'):
            verb(inject, args, stdin, right)
    return f'{total} failures'


def probes():
    """The client: against a server that is well."""
    server = Server(kek=KEK, binary=PROGRAM, env=environment(''))
    try:
        version = subprocess.run([PROGRAM, '--version'], capture_output=True, check=True).stdout.split()[1]
        last = f'key_id {key_id(KEK)} version '.encode() + version + b'\n'
        args, total = ('probe', '--timeout', '10', 'unix://' + server.path), 0
        for call in ('alloc', 'read', 'write', 'getrandom'):
            count = verb(f'{call}:0', args, b'', last)
            total += count
            for n in range(1, count + 1):
                verb(f'{call}:{n}' + ('' if call == 'alloc' else f':{errno.EIO}'), args, b'', last)
        for inject in ('short', 'eintr'):
            verb(inject, args, b'', last)
    finally:
        server.kill()
    return f'{total} failures'


TESTS = (every_call_is_here, one_byte_at_a_time, interrupted, random_bytes, accept_errors, starts, other_starts, rehearsals,
         allocations, credentials, reads, writes, verbs, probes)


def late(*_):
    raise AssertionError(f'more than {TEST_SECONDS} s')


def main(words):
    signal.signal(signal.SIGALRM, late)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    passed = failed = 0
    for test in TESTS:
        if words and not any(word in test.__name__ for word in words):
            continue
        signal.alarm(TEST_SECONDS)
        try:
            print(f'ok inject_{test.__name__}: {test()}', flush=True)
            passed += 1
        except (AssertionError, OSError, subprocess.SubprocessError) as error:
            print(f'not ok inject_{test.__name__}: {type(error).__name__}: {error}', flush=True)
            failed += 1
        signal.alarm(0)
    print(f'{passed} passed, {failed} failed')
    return 0 if passed and not failed else 1


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
