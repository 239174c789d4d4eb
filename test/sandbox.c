/*
 * The confinement of kmsplugin.c, which is included whole: every system call that there
 * is, made by a child that has confined itself as the server does. Those of the list
 * below come back, all others are the child's death by SIGSYS.
 *
 *     build/sandbox       a line "ok NAME" or "not ok NAME: why" each; exits 1 if one failed
 */
int kmsplugin_main(int argc, char **argv);
#define main kmsplugin_main
#include "../kmsplugin.c"
#undef main

#include <sched.h>
#include <stdio.h>
#include <sys/ptrace.h>
#include <sys/wait.h>

/*
 * Numbers end long before CALLS_MAX; x32's have a bit of their own. New kernels on x86 let
 * uretprobe and uprobe pass every filter: they do nothing wherever no probe has been set.
 */
enum { CALLS_MAX = 1024, X32 = 0x40000000, URETPROBE = 335, UPROBE = 336, CHILD_SECONDS = 10 };

static const int allowed[] = {
#ifdef SYS_timerfd_settime64
    SYS_timerfd_settime64,
#endif
    SYS_epoll_pwait, SYS_TIMERFD_SETTIME, SYS_epoll_ctl, SYS_accept4, SYS_getsockopt, SYS_read, SYS_write, SYS_close,
    SYS_CLOCK_GETTIME, SYS_getrandom, SYS_PPOLL, SYS_pread64, SYS_brk, SYS_munmap, SYS_madvise, SYS_MMAP,
    SYS_mprotect, SYS_statx, SYS_unlinkat, SYS_exit_group,
};
enum { ALLOWED = sizeof allowed / sizeof *allowed };

static size_t failed;

static bool is_allowed(int call) {
    for (size_t i = 0; i < ALLOWED; i++)
        if (allowed[i] == call)
            return true;
    return false;
}

struct attempt {
    long call, a, b, c, d, e, f;
};

/* The wait status of a confined child that has made one call, and then exits with 0. */
static int confined(const struct attempt *t, void (*act)(void)) {
    int status;
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        alarm(CHILD_SECONDS);
        if (confine(SANDBOX_REQUIRE))
            syscall(SYS_exit_group, 99);
        if (act)
            act();
        else
            syscall(t->call, t->a, t->b, t->c, t->d, t->e, t->f);
        syscall(SYS_exit_group, 0);
    }
    if (pid < 0 || waitpid(pid, &status, 0) != pid)
        abort();
    return status;
}

static bool killed(int status) {
    return WIFSIGNALED(status) && WTERMSIG(status) == SIGSYS;
}

static bool lived(int status) {
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

static void tell(const char *name, bool right, const char *why) {
    printf(right ? "ok sandbox_%s\n" : "not ok sandbox_%s: %s\n", name, why);
    failed += !right;
}

/* Calls by name, with arguments that would do what they are for. */
static void each_class_dies(void) {
    static char path[] = "/etc/passwd";
    static char *none[] = {NULL};
    static struct sockaddr_un peer = {.sun_family = AF_UNIX, .sun_path = "/nowhere"};
    static uint8_t page[4096];
    const long p = (long)(intptr_t)path, n = (long)(intptr_t)none;
    const struct {
        const char *name;
        struct attempt attempt;
    } classes[] = {
        {"openat", {.call = SYS_openat, .a = AT_FDCWD, .b = p}},
        {"socket", {.call = SYS_socket, .a = AF_INET, .b = SOCK_STREAM}},
        {"connect", {.call = SYS_connect, .a = 0, .b = (long)(intptr_t)&peer, .c = sizeof peer}},
        {"bind", {.call = SYS_bind, .a = 0, .b = (long)(intptr_t)&peer, .c = sizeof peer}},
        {"sendmsg", {.call = SYS_sendmsg, .a = 1}},
        {"recvmsg", {.call = SYS_recvmsg, .a = 0}},
        {"execve", {.call = SYS_execve, .a = p, .b = n, .c = n}},
        {"execveat", {.call = SYS_execveat, .a = AT_FDCWD, .b = p, .c = n, .d = n}},
        {"clone", {.call = SYS_clone, .a = SIGCHLD}},
        {"kill", {.call = SYS_kill, .a = 1}},
        {"tgkill", {.call = SYS_tgkill, .a = 1, .b = 1}},
        {"ptrace", {.call = SYS_ptrace, .a = PTRACE_TRACEME}},
        {"process_vm_readv", {.call = SYS_process_vm_readv, .a = 1}},
        {"prctl", {.call = SYS_prctl, .a = PR_SET_DUMPABLE, .b = 1}},
        {"seccomp", {.call = SYS_seccomp, .a = SECCOMP_GET_ACTION_AVAIL}},
        {"setuid", {.call = SYS_setuid}},
        {"capset", {.call = SYS_capset}},
        {"unshare", {.call = SYS_unshare, .a = CLONE_NEWNS}},
        {"mount", {.call = SYS_mount, .a = p, .b = p}},
        {"memfd_create", {.call = SYS_memfd_create, .a = p}},
        {"dup", {.call = SYS_dup, .a = 0}},
        {"ioctl", {.call = SYS_ioctl, .a = 0}},
        {"fcntl", {.call = SYS_fcntl, .a = 0, .b = F_GETFL}},
        {"renameat2", {.call = SYS_renameat2, .a = AT_FDCWD, .b = p, .c = AT_FDCWD, .d = p}},
        {"bpf", {.call = SYS_bpf}},
        {"io_uring_setup", {.call = 425, .a = 1}},
        {"mremap", {.call = SYS_mremap, .a = (long)(intptr_t)page, .b = sizeof page, .c = sizeof page}},
        {"an executable mmap", {.call = SYS_MMAP, .b = 4096, .c = PROT_READ | PROT_EXEC,
                                .d = MAP_PRIVATE | MAP_ANONYMOUS, .e = -1}},
        {"a writable and executable mmap", {.call = SYS_MMAP, .b = 4096, .c = PROT_READ | PROT_WRITE | PROT_EXEC,
                                            .d = MAP_PRIVATE | MAP_ANONYMOUS, .e = -1}},
        {"an executable mprotect", {.call = SYS_mprotect, .a = (long)(intptr_t)page, .c = PROT_READ | PROT_EXEC}},
        {"mprotect to all", {.call = SYS_mprotect, .a = (long)(intptr_t)page, .c = 7}},
    };
    for (size_t i = 0; i < sizeof classes / sizeof *classes; i++)
        tell(classes[i].name, killed(confined(&classes[i].attempt, NULL)), "the process lives on");
}

static void every_other_call_dies(void) {
    char why[64] = "";
    for (int call = 0; call < CALLS_MAX && !why[0]; call++) {
        const struct attempt t = {.call = call}, x32 = {.call = call | X32};
        if (call == URETPROBE || call == UPROBE)
            continue;
        if (!is_allowed(call) && !killed(confined(&t, NULL)))
            snprintf(why, sizeof why, "call %d is let through", call);
        if (!killed(confined(&x32, NULL)))
            snprintf(why, sizeof why, "call %d with x32's bit is let through", call);
    }
    tell("every other call dies", !why[0], why);
}

/* Descriptor -1 and no bytes: whatever the kernel says to them, the filter has let them through. */
static void the_list_is_let_through(void) {
    char why[64] = "";
    for (size_t i = 0; i < ALLOWED && !why[0]; i++) {
        const struct attempt t = {.call = allowed[i], .a = allowed[i] == SYS_exit_group ? 0 : -1,
                                  .c = allowed[i] == SYS_PPOLL ? -1 : 0}; /* it would wait for good */
        if (!lived(confined(&t, NULL)))
            snprintf(why, sizeof why, "call %d is death", allowed[i]);
    }
    tell("twenty calls are let through", !why[0] && ALLOWED == 20 + (sizeof(void *) == 4), why);
}

/* What a turn of the server is made of, with malloc and the log, on the libc that this was built with. */
static void work(void) {
    void *blocks[64];
    for (size_t i = 0; i < 64; i++) {
        blocks[i] = malloc((size_t)1 << i % 22);
        if (!blocks[i])
            abort();
        memset(blocks[i], 1, (size_t)1 << i % 22);
    }
    for (size_t i = 0; i < 64; i++)
        free(blocks[i]);
    uint8_t nonce[NONCE_BYTES];
    if (random_fill(nonce, sizeof nonce) < 0)
        abort();
    log_level = LOG_ERROR;
    log_line(LOG_INFO, "msg=never");
    (void)monotonic_us();
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
    each_class_dies();
    every_other_call_dies();
    the_list_is_let_through();
    tell("memory, random bytes, clock, log", lived(confined(NULL, work)), "a child that only worked has died");
#ifdef __x86_64__
    tell("i386's calls die", killed(confined(NULL, other_gate)), "the process lives on");
#endif
    return failed > 0;
}
