/*
 * Calls that fail on demand: linked into the program in front of the C library by
 * ld's --wrap (see test/test.mk), and told by the environment what to do.
 *
 *     INJECT=CALL:N[:ERRNO[:COUNT]]   the N-th CALL and the COUNT-1 after it fail with this
 *                                     errno (ENOMEM; 1); CALL is alloc or a name below
 *     INJECT=short                    read and write take one byte at a time
 *     INJECT=eintr                    half of the system calls that can wait are interrupted
 *     INJECT_COUNT=FILE               gets the number of calls of INJECT's CALL at exit
 */
#define _GNU_SOURCE
#define _GNU_SOURCE /* ppoll */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/types.h>

static struct {
    bool ready, short_io, interrupt;
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
    atexit(inject_report);
    inject.ready = true;
}

/* Whether this call is to fail; errno then says how. */
static bool fails(const char *call) {
    if (!inject.ready || strcmp(call, inject.call) != 0)
        return false;
    inject.seen++;
    if (inject.first == 0 || inject.seen < inject.first || inject.seen > inject.last)
        return false;
    errno = inject.error;
    return true;
}

static bool interrupted(void) {
    inject.turns = inject.turns * 1103515245 + 12345; /* not in step with any loop */
    if (!inject.interrupt || (inject.turns >> 16) % 2 == 0)
        return false;
    errno = EINTR;
    return true;
}

#define WRAP(type, name, parameters, arguments, failure, how) \
    type __real_##name parameters;                            \
    type __wrap_##name parameters;                            \
    type __wrap_##name parameters {                           \
        return how ? failure : __real_##name arguments;       \
    }
#define SYSTEM_CALL(type, name, parameters, arguments) \
    WRAP(type, name, parameters, arguments, -1, (interrupted() || fails(#name)))

WRAP(void *, malloc, (size_t n), (n), NULL, fails("alloc"))
WRAP(void *, calloc, (size_t n, size_t size), (n, size), NULL, fails("alloc"))
WRAP(void *, realloc, (void *p, size_t n), (p, n), NULL, fails("alloc"))
WRAP(void *, mmap64, (void *p, size_t n, int prot, int flags, int fd, off_t at), (p, n, prot, flags, fd, at), MAP_FAILED,
     fails("mmap"))
WRAP(int, epoll_ctl, (int fd, int op, int on, struct epoll_event *e), (fd, op, on, e), -1, fails("epoll_ctl"))
WRAP(int, getsockopt, (int fd, int level, int name, void *v, socklen_t *n), (fd, level, name, v, n), -1,
     fails("getsockopt"))
WRAP(ssize_t, pread64, (int fd, void *p, size_t n, off_t at), (fd, p, n, at), -1, fails("pread"))
SYSTEM_CALL(ssize_t, read, (int fd, void *p, size_t n), (fd, p, inject.short_io && n > 1 && n != 128 ? 1 : n))
/* Standard error is spared: whoever runs the program has to see what it says. */
WRAP(ssize_t, write, (int fd, const void *p, size_t n), (fd, p, inject.short_io && n > 1 && fd != 2 ? 1 : n), -1,
     (fd != 2 && (interrupted() || fails("write"))))
/* A child of a rehearsal has no failures: they are for the server and the verbs. */
pid_t __real_fork(void);
pid_t __wrap_fork(void);
pid_t __wrap_fork(void) {
    pid_t pid = __real_fork();
    if (pid == 0) {
        inject.first = 0;
        inject.short_io = inject.interrupt = false;
    }
    return pid;
}

/* getrandom, which kmsplugin.c calls by its number; its only other such call is let through. */
long __real_syscall(long number, long a, long b, long c);
long __wrap_syscall(long number, long a, long b, long c);
long __wrap_syscall(long number, long a, long b, long c) {
    if (number != SYS_getrandom)
        return __real_syscall(number, a, b, c);
    return interrupted() || fails("getrandom") ? -1 : __real_syscall(number, a, inject.short_io ? 1 : b, c);
}
SYSTEM_CALL(int, accept4, (int fd, struct sockaddr *a, socklen_t *n, int flags), (fd, a, n, flags))
SYSTEM_CALL(int, epoll_pwait, (int fd, struct epoll_event *e, int n, int ms, const sigset_t *set), (fd, e, n, ms, set))
WRAP(int, ppoll, (struct pollfd *p, nfds_t n, const struct timespec *wait, const sigset_t *set), (p, n, wait, set), -1,
     (p && p->fd != 2 && interrupted())) /* as above */
