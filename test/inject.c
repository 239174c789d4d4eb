/*
 * Calls that fail on demand: linked into the program in front of the C library by ld's --wrap (see
 * test/test.mk), and told by the environment what to do.
 *
 *     INJECT=CALL:N[:ERRNO[:COUNT]]   the N-th CALL and the COUNT-1 after it fail with this
 *                                     errno (ENOMEM; 1); CALL is alloc, or a name below
 *     INJECT=short                    read and write take one byte at a time
 *     INJECT=eintr                    half of the system calls that can wait are interrupted
 *     INJECT_CHILD=1                  all of this for forked children instead of the process
 *     INJECT_COUNT=FILE               gets the number of calls of INJECT's CALL at exit
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/types.h>

static struct {
    bool here, short_io, interrupt; /* here: calls of this process are meant */
    char call[16];
    unsigned long first, last, seen;
    int error;
    unsigned turns;
} inject;

static void inject_report(void) {
    const char *path = getenv("INJECT_COUNT");
    FILE *file = path ? fopen(path, "w") : NULL;
    if (file) {
        fprintf(file, "%lu\n", inject.seen);
        fclose(file);
    }
}

int __real_atexit(void (*function)(void));

__attribute__((constructor))
static void inject_init(void) {
    const char *what = getenv("INJECT");
    unsigned long count = 1;
    inject.error = ENOMEM;
    if (!what)
        return;
    inject.short_io = strcmp(what, "short") == 0;
    inject.interrupt = strcmp(what, "eintr") == 0;
    if (sscanf(what, "%15[a-z0-9_]:%lu:%d:%lu", inject.call, &inject.first, &inject.error, &count) >= 2)
        inject.last = inject.first + count - 1;
    __real_atexit(inject_report);
    inject.here = !getenv("INJECT_CHILD");
}

/* Whether this call is to fail; errno then says how. */
static bool fails(const char *call) {
    if (!inject.here || strcmp(call, inject.call) != 0)
        return false;
    inject.seen++;
    if (inject.first == 0 || inject.seen < inject.first || inject.seen > inject.last)
        return false;
    errno = inject.error;
    return true;
}

static bool interrupted(void) {
    inject.turns = inject.turns * 1103515245 + 12345; /* not in step with any loop */
    if (!inject.here || !inject.interrupt || (inject.turns >> 16) % 2 == 0)
        return false;
    errno = EINTR;
    return true;
}

static size_t size_of_io(size_t n) {
    return inject.here && inject.short_io && n > 1 ? 1 : n;
}

#define WRAP(type, name, parameters, arguments, failure, how) \
    type __real_##name parameters;                            \
    type __wrap_##name parameters;                            \
    type __wrap_##name parameters {                           \
        return how ? failure : __real_##name arguments;       \
    }
/* CALL fails as FAILS says; WAITING can be interrupted besides. */
#define CALL(name, parameters, arguments) WRAP(int, name, parameters, arguments, -1, fails(#name))
#define WAITING(type, name, parameters, arguments) WRAP(type, name, parameters, arguments, -1, (interrupted() || fails(#name)))

WRAP(void *, malloc, (size_t n), (n), NULL, fails("alloc"))
WRAP(void *, calloc, (size_t n, size_t size), (n, size), NULL, fails("alloc"))
WRAP(void *, realloc, (void *p, size_t n), (p, n), NULL, fails("alloc"))
WRAP(void *, mmap64, (void *p, size_t n, int prot, int flags, int fd, off_t at), (p, n, prot, flags, fd, at), MAP_FAILED,
     fails("mmap64"))
WRAP(ssize_t, readlink, (const char *path, char *p, size_t n), (path, p, n), -1, fails("readlink"))
CALL(atexit, (void (*function)(void)), (function))
CALL(bind, (int fd, const struct sockaddr *a, socklen_t n), (fd, a, n))
CALL(chmod, (const char *path, mode_t mode), (path, mode))
CALL(connect, (int fd, const struct sockaddr *a, socklen_t n), (fd, a, n))
CALL(dup2, (int from, int to), (from, to))
CALL(epoll_create1, (int flags), (flags))
CALL(epoll_ctl, (int fd, int op, int on, struct epoll_event *e), (fd, op, on, e))
CALL(fcntl64, (int fd, int command, long argument), (fd, command, argument))
CALL(fstat64, (int fd, struct stat *st), (fd, st))
CALL(getsockname, (int fd, struct sockaddr *a, socklen_t *n), (fd, a, n))
CALL(getsockopt, (int fd, int level, int name, void *v, socklen_t *n), (fd, level, name, v, n))
CALL(lchown, (const char *path, uid_t uid, gid_t gid), (path, uid, gid))
CALL(listen, (int fd, int backlog), (fd, backlog))
CALL(lstat64, (const char *path, struct stat *st), (path, st))
CALL(madvise, (void *p, size_t n, int advice), (p, n, advice))
CALL(mlock, (const void *p, size_t n), (p, n))
CALL(mprotect, (void *p, size_t n, int prot), (p, n, prot))
CALL(open64, (const char *path, int flags, mode_t mode), (path, flags, mode))
CALL(pipe2, (int *ends, int flags), (ends, flags))
CALL(prctl, (int option, long a, long b, long c, long d), (option, a, b, c, d))
CALL(prlimit64, (pid_t pid, int resource, const struct rlimit *new, struct rlimit *old), (pid, resource, new, old))
CALL(setitimer, (int which, const struct itimerval *new, struct itimerval *old), (which, new, old))
CALL(setsockopt, (int fd, int level, int name, const void *v, socklen_t n), (fd, level, name, v, n))
CALL(shutdown, (int fd, int how), (fd, how))
CALL(sigaction, (int signal, const struct sigaction *new, struct sigaction *old), (signal, new, old))
CALL(sigprocmask, (int how, const sigset_t *set, sigset_t *old), (how, set, old))
CALL(socket, (int family, int type, int protocol), (family, type, protocol))
CALL(socketpair, (int family, int type, int protocol, int *pair), (family, type, protocol, pair))
CALL(stat64, (const char *path, struct stat *st), (path, st))
CALL(unlink, (const char *path), (path))
CALL(unlinkat, (int fd, const char *path, int flags), (fd, path, flags))
WAITING(int, accept4, (int fd, struct sockaddr *a, socklen_t *n, int flags), (fd, a, n, flags))
WAITING(int, epoll_pwait, (int fd, struct epoll_event *e, int n, int ms, const sigset_t *set), (fd, e, n, ms, set))
WAITING(int, waitpid, (pid_t pid, int *status, int options), (pid, status, options))
/* Here 128 is the size of a signalfd_siginfo, which comes whole or not at all. */
WAITING(ssize_t, read, (int fd, void *p, size_t n), (fd, p, n == 128 ? n : size_of_io(n)))
/* Standard error is spared: whoever runs the program has to see what it says. */
WRAP(ssize_t, write, (int fd, const void *p, size_t n), (fd, p, fd == 2 ? n : size_of_io(n)), -1,
     (fd != 2 && (interrupted() || fails("write"))))
WRAP(int, ppoll, (struct pollfd *p, nfds_t n, const struct timespec *wait, const sigset_t *set), (p, n, wait, set), -1,
     ((p && p->fd != 2 && interrupted()) || (!(p && p->fd == 2) && fails("ppoll"))))

/* A child has the failures, or the process has them. */
pid_t __real_fork(void);
pid_t __wrap_fork(void);
pid_t __wrap_fork(void) {
    if (fails("fork"))
        return -1;
    pid_t pid = __real_fork();
    if (pid == 0)
        inject.here = !inject.here;
    return pid;
}

/* The calls that kmsplugin.c makes by their numbers. */
long __real_syscall(long number, long a, long b, long c, long d);
long __wrap_syscall(long number, long a, long b, long c, long d);
long __wrap_syscall(long number, long a, long b, long c, long d) {
    bool failed = number == SYS_getrandom  ? interrupted() || fails("getrandom")
                  : number == SYS_signalfd4 ? fails("signalfd")
                  : number == SYS_capset    ? fails("capset")
                                            : fails("syscall");
    return failed ? -1 : __real_syscall(number, a, b, c, d);
}
