/*
 * The confinement of kmsplugin.c, which is included whole. A child confines itself as the server
 * does, and makes a system call: each that there is. Those of the first list below are let through,
 * those of the second kill, and all others fail with ENOSYS.
 *
 *     build/sandbox       a line "ok NAME" or "not ok NAME: why" each; exits 1 if one failed
 */
int kmsplugin_main(int argc, char **argv);
#define main kmsplugin_main
#include "../kmsplugin.c"
#undef main

/*
 * Numbers end long before CALLS_MAX; x32's have a bit of their own. New kernels on x86 let
 * uretprobe and uprobe pass every filter: they do nothing where no probe has been set.
 */
enum { CALLS_MAX = 1024, X32 = 0x40000000, URETPROBE = 335, UPROBE = 336, CHILD_SECONDS = 10, NOT_ENOSYS = 98 };

/* What a turn, a log line and the exit are made of. */
static const int allowed[] = {
    SYS_epoll_pwait, SYS_epoll_ctl, SYS_accept4, SYS_getsockopt, SYS_read, SYS_write, SYS_close, SYS_getrandom,
    SYS_brk, SYS_munmap, SYS_madvise, SYS_mmap2, SYS_mprotect, SYS_unlinkat, SYS_setitimer, SYS_rt_sigreturn,
    SYS_exit_group, SYS_exit,
#ifdef SYS_sigreturn
    SYS_sigreturn,
#endif
#ifdef SYS_newfstatat
    SYS_newfstatat,
#endif
#ifdef SYS_fstatat64
    SYS_fstatat64,
#endif
#ifdef SYS_statx
    SYS_statx,
#endif
#ifdef SYS_lstat
    SYS_lstat,
#endif
#ifdef SYS_lstat64
    SYS_lstat64,
#endif
#ifdef SYS_clock_gettime
    SYS_clock_gettime,
#endif
#ifdef SYS_clock_gettime32
    SYS_clock_gettime32,
#endif
#ifdef SYS_clock_gettime64
    SYS_clock_gettime64,
#endif
#ifdef SYS_ppoll
    SYS_ppoll,
#endif
#ifdef SYS_ppoll_time64
    SYS_ppoll_time64,
#endif
};

/* What no libc does unasked, and an attacker does first. */
static const int deadly[] = {SYS_execve, SYS_execveat, SYS_ptrace, SYS_socket, SYS_connect};

static bool is_in(const int *list, size_t count, int call) {
    for (size_t i = 0; i < count; i++)
        if (list[i] == call)
            return true;
    return false;
}
#define IS_IN(list, call) is_in(list, sizeof(list) / sizeof *(list), call)

static size_t failed;

static void tell(const char *name, bool right, const char *why) {
    printf(right ? "ok sandbox_%s\n" : "not ok sandbox_%s: %s\n", name, why);
    failed += !right;
}

struct attempt {
    long call, a, b, c, d, e, f;
};

/* The wait status of a confined child that has made a call, or has done `act`. It exits with 0 if the call gave ENOSYS, else with NOT_ENOSYS. */
static int confined(const struct attempt *t, void (*act)(void)) {
    int status;
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        alarm(CHILD_SECONDS);
        long rv = 0;
        if (confine(true))
            syscall(SYS_exit_group, 99);
        if (act)
            act();
        else
            rv = syscall(t->call, t->a, t->b, t->c, t->d, t->e, t->f);
        syscall(SYS_exit_group, rv < 0 && errno == ENOSYS ? 0 : NOT_ENOSYS);
    }
    if (pid < 0 || waitpid(pid, &status, 0) != pid)
        abort();
    return status;
}

static bool killed(int status) {
    return WIFSIGNALED(status) && WTERMSIG(status) == SIGSYS;
}

static bool ended(int status, int code) {
    return WIFEXITED(status) && WEXITSTATUS(status) == code;
}

/* Calls with arguments that would work: what the filter looks at is not only the number. */
static void calls_that_would_work(void) {
    static char path[] = "/etc/passwd", *none[] = {NULL};
    static uint8_t page[8192];
    const long p = (long)(intptr_t)path, n = (long)(intptr_t)none;
    const long aligned = ((long)(intptr_t)page + 4095) & ~4095L, anonymous = MAP_PRIVATE | MAP_ANONYMOUS;
    const struct {
        const char *name;
        bool dies;
        struct attempt attempt;
    } rows[] = {
        {"execve", true, {.call = SYS_execve, .a = p, .b = n, .c = n}},
        {"execveat", true, {.call = SYS_execveat, .a = AT_FDCWD, .b = p, .c = n, .d = n}},
        {"ptrace", true, {.call = SYS_ptrace}},
        {"socket", true, {.call = SYS_socket, .a = AF_INET, .b = SOCK_STREAM}},
        {"connect", true, {.call = SYS_connect}},
        {"an executable mmap", true, {.call = SYS_mmap2, .b = 4096, .c = PROT_READ | PROT_EXEC, .d = anonymous, .e = -1}},
        {"a writable and executable mmap", true, {.call = SYS_mmap2, .b = 4096, .c = 7, .d = anonymous, .e = -1}},
        {"an executable mprotect", true, {.call = SYS_mprotect, .a = aligned, .b = 4096, .c = PROT_READ | PROT_EXEC}},
        {"openat", false, {.call = SYS_openat, .a = AT_FDCWD, .b = p}},
        {"clone", false, {.call = SYS_clone, .a = SIGCHLD}},
        {"kill", false, {.call = SYS_kill, .a = 1}},
        {"capset", false, {.call = SYS_capset}},
        {"prctl", false, {.call = SYS_prctl, .a = PR_SET_DUMPABLE, .b = 1}},
        {"fcntl", false, {.call = SYS_fcntl, .a = 0, .b = F_GETFL}},
        {"recvmsg", false, {.call = SYS_recvmsg, .a = 0}},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char name[64];
        int status = confined(&rows[i].attempt, NULL);
        snprintf(name, sizeof name, "%s %s", rows[i].name, rows[i].dies ? "kills" : "fails");
        tell(name, rows[i].dies ? killed(status) : ended(status, 0), killed(status) ? "it kills" : "the process lives on");
    }
}

/* Every number there is, in one of the two lists or in none. */
static void every_number(void) {
    char why[64] = "";
    for (int call = 0; call < CALLS_MAX && !why[0]; call++) {
        bool dies = IS_IN(deadly, call);
        if (call == URETPROBE || call == UPROBE || IS_IN(allowed, call))
            continue;
        int status = confined(&(const struct attempt){.call = call}, NULL);
        if (dies ? !killed(status) : !ended(status, 0))
            snprintf(why, sizeof why, "call %d %s", call, killed(status) ? "kills" : "is let through");
    }
    tell("every other call fails", !why[0], why);
#ifdef __x86_64__
    for (int call = 0; call < CALLS_MAX && !why[0]; call++)
        if (!killed(confined(&(const struct attempt){.call = call | X32}, NULL)))
            snprintf(why, sizeof why, "call %d with x32's bit is let through", call);
    tell("x32's calls kill", !why[0], why);
#endif
}

/* Descriptor -1 and no bytes: whatever the kernel makes of them, the filter has let them through. */
static void the_list_is_let_through(void) {
    char why[64] = "";
    for (size_t i = 0; i < sizeof allowed / sizeof *allowed && !why[0]; i++) {
        struct attempt t = {.call = allowed[i], .a = -1, .c = -1}; /* ppoll would wait for good */
        if (allowed[i] == SYS_exit_group || allowed[i] == SYS_exit)
            t.a = NOT_ENOSYS;
        if (allowed[i] == SYS_mmap2 || allowed[i] == SYS_mprotect)
            t.c = PROT_READ;
        int status = confined(&t, NULL);
        if (killed(status) || ended(status, 0)) /* sigreturn, without a signal, ends in another one */
            snprintf(why, sizeof why, "call %d is not let through", allowed[i]);
    }
    tell("the list is let through", !why[0], why);
}

/* What malloc, random bytes, the clock and a log line do, on the libc that this was built with. */
static void work(void) {
    void *blocks[64];
    uint8_t nonce[NONCE_BYTES];
    for (size_t i = 0; i < 64; i++) {
        blocks[i] = malloc((size_t)1 << i % 22);
        if (!blocks[i])
            abort();
        memset(blocks[i], 1, (size_t)1 << i % 22);
    }
    for (size_t i = 0; i < 64; i++)
        free(blocks[i]);
    if (random_fill(nonce, sizeof nonce, 0) < 0 || monotonic_us() <= 0)
        abort();
    log_line(LOG_INFO, "msg=\"work is done\"");
}

#ifdef __x86_64__
/* read by i386's gate: another architecture, where read has the number that close has here. */
static void other_gate(void) {
    long rv = 3; /* close, here */
    __asm__ volatile("int $0x80" : "+a"(rv) : "b"(-1L) : "memory", "r8", "r9", "r10", "r11");
}
#endif

int main(void) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (THIS_ARCH == 0) {
        printf("skip sandbox: no list of calls for this machine\n");
        return 0;
    }
    calls_that_would_work();
    every_number();
    the_list_is_let_through();
    tell("memory, random bytes, clock and log work", ended(confined(NULL, work), NOT_ENOSYS), "the child has died");
#ifdef __x86_64__
    tell("i386's calls kill", killed(confined(NULL, other_gate)), "the process lives on");
#endif
    return failed > 0;
}
