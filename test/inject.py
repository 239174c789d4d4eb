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
from plugin import KEK, OTHER, ROOT, WAIT, Client, RpcError, Server, fresh_dir, key_id, text
from raw import INVALID, UNAVAILABLE, Raw

PROGRAM = os.path.abspath(os.environ.get('KMSPLUGIN_INJECT', os.path.join(ROOT, 'build', 'kmsplugin-inject')))
PLAIN_PROGRAM = PROGRAM + '-plain'
PLAIN, KEY = b'sixteen bytes, or', b'/registry/secrets/default/s'
TROUBLE = (8, 13, UNAVAILABLE, None)    # RESOURCE_EXHAUSTED, INTERNAL, a lost connection, a reset: the call that met the failure
TEST_SECONDS = 900


def environment(inject, **more):
    return {'INJECT': inject, 'ASAN_OPTIONS': 'detect_leaks=1', 'UBSAN_OPTIONS': 'print_stacktrace=1', **more}


def counted(path):
    with open(path, encoding='ascii') as file:
        return int(file.read())


def persistent(trouble, call, *args, right=None):
    """What a call gives, three times if need be. It ends with the status `right`, or with none. Trouble is noted."""
    for _ in range(3):
        try:
            given = call(*args)
            assert right is None, (args, given)
            return given
        except RpcError as error:
            if right is not None and error.code == right:
                return None
            assert error.code in TROUBLE, error
            trouble.append(error.code)
    raise AssertionError(f'it failed three times: {trouble}')


def page(path):
    """GET /metrics as a call."""
    try:
        with Raw(path) as raw:
            answer = raw.get('/metrics')
    except OSError as error:
        raise RpcError(UNAVAILABLE, error) from None
    if answer.closed or answer.reset is not None:
        raise RpcError(UNAVAILABLE, answer)
    assert answer.http == '200' and b'kmsplugin_connections ' in answer.data, answer


def dialogue(path):
    """All that there is to ask. Returns the trouble that there was."""
    rpc, trouble = Client('unix:' + path), []
    status = persistent(trouble, rpc.status)
    assert (status.version, status.healthz, status.key_id) == ('v2', 'ok', key_id(KEK)), status
    ciphertext = persistent(trouble, rpc.encrypt, PLAIN).ciphertext
    assert sealed.unseal(KEK, ciphertext, sealed.V2) == PLAIN
    assert persistent(trouble, rpc.decrypt, ciphertext, key_id(KEK)) == PLAIN
    persistent(trouble, rpc.decrypt, ciphertext, 'x', right=INVALID)
    persistent(trouble, rpc.version)
    cipher = persistent(trouble, rpc.encrypt_v1, PLAIN * 100)
    assert sealed.unseal(KEK, cipher, sealed.V1) == PLAIN * 100
    assert persistent(trouble, rpc.decrypt_v1, cipher) == PLAIN * 100
    persistent(trouble, page, path)
    rpc.close()
    return trouble


def serve(inject, *args, binary=PROGRAM, twice=True, **options):
    """A server with that failure, a dialogue, the end. Its trouble, and how many such calls there were.
    None if it refused to start, as it may: in one line, and without a socket file left behind."""
    count = os.path.join(fresh_dir(), 'count')
    env = environment(inject, INJECT_COUNT=count, **options.pop('env', {}))
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
        trouble = dialogue(server.path)
        if twice:
            dialogue(server.path)   # once more, when it is over
        server.filtered = os.geteuid() == 0 and b'Seccomp:\t2' in server.proc('status')
        server.signal(signal.SIGTERM)
        assert server.wait() == 0, server.log()
    finally:
        server.kill()
    return trouble, None if server.filtered else counted(count), server     # a confined server writes no file


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
          'epoll_create1': errno.EMFILE, 'epoll_ctl': errno.ENOSPC, 'signalfd': errno.EMFILE, 'syscall': errno.EPERM, 'sigprocmask': errno.EINVAL,
          'mmap64': errno.ENOMEM, 'mlock': errno.EPERM, 'madvise': errno.EINVAL, 'mprotect': errno.ENOMEM,
          'prlimit64': errno.EPERM, 'prctl': errno.EINVAL, 'fcntl64': errno.EIO,
          'setsockopt': errno.ENOPROTOOPT, 'sigaction': errno.EINVAL, 'atexit': errno.ENOMEM, 'setitimer': errno.EINVAL}


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
        assert total > 0 or call in ('prlimit64', 'mprotect', 'setitimer'), f'no {call} at all'
        told.append(f'{call} {refused}/{total}')
    return 'refused: ' + ', '.join(told)


def replaced_sockets():
    """On a path where a crashed server has left its socket: that is removed, or the start is refused."""
    for call in ('connect', 'unlink'):
        path = os.path.join(fresh_dir(), 'kms.sock')
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(path)
        trouble, _, _ = serve(f'{call}:1:{errno.EACCES}', path=path)
        assert trouble is None and os.path.lexists(path), (call, trouble)
    return 'connect, unlink'


def inherited_sockets():
    """With a socket of systemd's."""
    refused = total = 0
    for call in ('getsockname', 'getsockopt', 'fcntl64'):
        for n in range(1, 4):
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(os.path.join(fresh_dir(), 'systemd.sock'))
                listener.listen()
                exported = f'exec 3<&{listener.fileno()}; export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@"'
                trouble, _, _ = serve(f'{call}:{n}:{errno.EIO}', wrapper=('sh', '-c', exported, 'sh'), listen=False, twice=False,
                                      pass_fds=(listener.fileno(),), path=listener.getsockname())
            assert trouble is None or len(trouble) <= 1, (call, n, trouble)
            refused += trouble is None
            total += 1
    assert refused >= 3, refused
    return f'{refused} of {total} refused'


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
    dl_iterate_phdr dprintf environ exit flock free getenv geteuid getgrnam getpagesize getpid getrlimit64 getpwnam gmtime_r time strnlen
    malloc_usable_size memchr memcmp memcpy memmove memset munmap poll sigaddset sigdelset sigemptyset sigfillset signal
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


def verb(inject, args, stdin, right, **env):
    """A verb with that failure: the right output, or one line and nothing on stdout. The number of such calls."""
    count = os.path.join(fresh_dir(), 'count')
    env = {'KMS_KEK': text(KEK), **environment(inject, INJECT_COUNT=count, **env), 'ASAN_OPTIONS': 'detect_leaks=0'}
    done = subprocess.run([PROGRAM, *args], input=stdin, capture_output=True, timeout=WAIT, check=False,
                          env={name: value for name, value in env.items() if value})     # what exit() leaves is no leak
    failed = done.returncode == 1 and done.stderr.count(b'\n') == 1 and done.stderr.startswith(b'kmsplugin: ')
    if args[0] == 'unseal' and failed:
        failed = done.stdout == b''
    assert failed or (done.returncode == 0 and done.stdout.endswith(right) and not done.stderr), (inject, args, done)
    return counted(count)


def verb_everywhere(calls, args, stdin, right, **env):
    total = 0
    for call in calls:
        count = verb(f'{call}:0', args, stdin, right, **env)
        total += count
        for n in range(1, count + 1):
            verb(f'{call}:{n}' + ('' if call in ('alloc', 'mmap64') else f':{errno.EIO}'), args, stdin, right, **env)
    for inject in ('short', 'eintr'):
        verb(inject, args, stdin, right, **env)
    return total


def verbs():
    value = sealed.etcd_v2(KEK, KEY, PLAIN)
    response = sealed.range_response((KEY, value))
    key_file = os.path.join(fresh_dir(), 'kek')
    with open(os.open(key_file, os.O_CREAT | os.O_WRONLY, 0o600), 'w', encoding='ascii') as file:
        file.write(text(KEK))
    total = verb_everywhere(('open64', 'fstat64', 'read'), ('keyid',), b'', b'\n', KMS_KEK='', KMS_KEK_FILE=key_file)
    for args, stdin, right in ((('keyid',), b'', b'\n'), (('genkey',), b'', b'=\n'), (('unseal',), response, PLAIN),
                               (('unseal', KEY.decode()), value, PLAIN),
                               (('audit', '--list'), response, b'other values=0\n')):
        total += verb_everywhere(('alloc', 'mmap64', 'read', 'getrandom'), args, stdin, right)
    return f'{total} failures'


def probes():
    """The client: against a server that is well."""
    server = Server(kek=KEK, binary=PROGRAM, env=environment(''))
    try:
        version = subprocess.run([PROGRAM, '--version'], capture_output=True, check=True).stdout.split()[1]
        args = ('probe', '--timeout', '10', 'unix://' + server.path)
        total = verb_everywhere(('alloc', 'read', 'write', 'getrandom', 'socket', 'connect', 'setsockopt'), args, b'',
                                f'key_id {key_id(KEK)} version '.encode() + version + b'\n')
    finally:
        server.kill()
    return f'{total} failures'


TESTS = (every_call_is_here, one_byte_at_a_time, interrupted, random_bytes, accept_errors, starts, replaced_sockets,
         inherited_sockets, rehearsals, allocations, credentials, reads, writes, verbs, probes)


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
