/*
 * The confinement of kmsplugin.c, which is included whole: every system call that there
 * is, made by a child that has confined itself as the server does. Those of the first list
 * below come back, those of the second are the child's death by SIGSYS, and all others
 * are answered ENOSYS.
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
enum { CALLS_MAX = 1024, X32 = 0x40000000, URETPROBE = 335, UPROBE = 336, CHILD_SECONDS = 10, NOT_ENOSYS = 98 };

/* What a server is made of: let through. */
static const int allowed[] = {
    SYS_epoll_pwait, SYS_epoll_ctl, SYS_accept4, SYS_getsockopt, SYS_read, SYS_write, SYS_close, SYS_getrandom,
    SYS_pread64, SYS_brk, SYS_munmap, SYS_madvise, SYS_MMAP, SYS_mprotect, SYS_unlinkat,
    SYS_exit_group, SYS_exit, SYS_statx,
#ifdef SYS_timerfd_settime
    SYS_timerfd_settime,
#endif
#ifdef SYS_timerfd_settime32
    SYS_timerfd_settime32,
#endif
#ifdef SYS_timerfd_settime64
    SYS_timerfd_settime64,
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
#ifdef SYS_lstat
    SYS_lstat,
#endif
#ifdef SYS_lstat64
    SYS_lstat64,
#endif
#ifdef SYS_newfstatat
    SYS_newfstatat,
#endif
#ifdef SYS_fstatat64
    SYS_fstatat64,
#endif
};

/* What would serve an attacker, of any kind: death. */
static const int deadly[] = {
    SYS_execve, SYS_execveat, SYS_clone, 435 /* clone3 */, SYS_ptrace, SYS_process_vm_readv, SYS_process_vm_writev,
    440 /* process_madvise */, SYS_kill, SYS_tkill, SYS_tgkill, SYS_rt_sigqueueinfo, SYS_rt_tgsigqueueinfo, SYS_kcmp,
    424 /* pidfd_send_signal */, 434 /* pidfd_open */, 438 /* pidfd_getfd */, SYS_unshare, SYS_setns,
    SYS_socket, SYS_socketpair, SYS_connect, SYS_bind, SYS_listen, SYS_sendto, SYS_sendmsg, SYS_sendmmsg, SYS_recvmsg,
    SYS_recvmmsg, SYS_openat, 437 /* openat2 */, SYS_open_by_handle_at, SYS_memfd_create, SYS_linkat, SYS_symlinkat,
    SYS_mkdirat, SYS_mknodat, SYS_renameat2, SYS_fchmod, SYS_fchmodat, SYS_fchown, SYS_fchownat, SYS_truncate,
    SYS_ftruncate, SYS_chroot, SYS_pivot_root, SYS_mount, SYS_umount2, SYS_setxattr, SYS_fsetxattr, SYS_lsetxattr,
    428 /* open_tree */, 429 /* move_mount */, 430 /* fsopen */, 432 /* fsmount */,
    SYS_shmat, SYS_remap_file_pages, SYS_personality, SYS_pkey_mprotect, SYS_userfaultfd,
    SYS_setuid, SYS_setgid, SYS_setreuid, SYS_setregid, SYS_setresuid, SYS_setresgid, SYS_setgroups, SYS_setfsuid,
    SYS_setfsgid, SYS_capset, SYS_bpf, SYS_perf_event_open, SYS_add_key, SYS_request_key, SYS_keyctl, SYS_init_module,
    SYS_finit_module, SYS_delete_module, SYS_kexec_load, SYS_reboot, 425, 426, 427, /* io_uring */
#ifdef SYS_kexec_file_load
    SYS_kexec_file_load,
#endif
#ifdef SYS_renameat
    SYS_renameat,
#endif
#ifdef SYS_open
    SYS_open, SYS_creat, SYS_link, SYS_symlink, SYS_unlink, SYS_rename, SYS_mkdir, SYS_rmdir, SYS_mknod, SYS_chmod,
    SYS_chown, SYS_lchown, SYS_fork, SYS_vfork,
#endif
#ifdef SYS_setuid32
    SYS_setuid32, SYS_setgid32, SYS_setreuid32, SYS_setregid32, SYS_setresuid32, SYS_setresgid32, SYS_setgroups32,
    SYS_setfsuid32, SYS_setfsgid32,
#endif
#ifdef SYS_iopl
    SYS_iopl, SYS_ioperm, SYS_modify_ldt,
#endif
};

static bool is_in(const int *list, size_t count, int call) {
    for (size_t i = 0; i < count; i++)
        if (list[i] == call)
            return true;
    return false;
}
#define IS_IN(list, call) is_in(list, sizeof(list) / sizeof *(list), call)

static size_t failed;

struct attempt {
    long call, a, b, c, d, e, f;
};

/* The wait status of a confined child that has made one call and was answered ENOSYS; else it exits with NOT_ENOSYS. */
static int confined(const struct attempt *t, void (*act)(void)) {
    int status;
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        alarm(CHILD_SECONDS);
        long rv = 0;
        if (confine(SANDBOX_REQUIRE, true))
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

static void tell(const char *name, bool right, const char *why) {
    printf(right ? "ok sandbox_%s\n" : "not ok sandbox_%s: %s\n", name, why);
    failed += !right;
}

/* Calls that would serve an attacker, with arguments that would do what they are for. */
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
        {"setuid", {.call = SYS_setuid}},
        {"capset", {.call = SYS_capset}},
        {"unshare", {.call = SYS_unshare, .a = CLONE_NEWNS}},
        {"mount", {.call = SYS_mount, .a = p, .b = p}},
        {"memfd_create", {.call = SYS_memfd_create, .a = p}},
        {"renameat2", {.call = SYS_renameat2, .a = AT_FDCWD, .b = p, .c = AT_FDCWD, .d = p}},
        {"bpf", {.call = SYS_bpf}},
        {"io_uring_setup", {.call = 425, .a = 1}},
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

/* What is neither of use nor of harm: an error as on an older kernel, whatever its arguments. */
static void the_harmless_fail(void) {
    static uint8_t page[4096];
    const long p = (long)(intptr_t)page;
    const struct {
        const char *name;
        struct attempt attempt;
    } calls[] = {
        {"getpid", {.call = SYS_getpid}},
        {"gettid", {.call = SYS_gettid}},
        {"sched_yield", {.call = SYS_sched_yield}},
        {"futex", {.call = SYS_futex, .a = p}},
        {"dup", {.call = SYS_dup, .a = 0}},
        {"ioctl", {.call = SYS_ioctl, .a = 0}},
        {"fcntl", {.call = SYS_fcntl, .a = 0, .b = F_GETFL}},
        {"uname", {.call = SYS_uname, .a = p}},
        {"prctl", {.call = SYS_prctl, .a = PR_SET_DUMPABLE, .b = 1}},
        {"seccomp", {.call = SYS_seccomp, .a = SECCOMP_GET_ACTION_AVAIL}},
        {"mremap", {.call = SYS_mremap, .a = p, .b = sizeof page, .c = sizeof page}},
        {"sched_getaffinity", {.call = SYS_sched_getaffinity, .b = sizeof page, .c = p}},
    };
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++) {
        char name[64];
        snprintf(name, sizeof name, "%s is no death", calls[i].name);
        tell(name, ended(confined(&calls[i].attempt, NULL), 0), "it is not answered ENOSYS");
    }
}

/* Every number there is, in none of the two lists or in one. */
static void every_number(void) {
    char why[64] = "";
    for (int call = 0; call < CALLS_MAX && !why[0]; call++) {
        const struct attempt t = {.call = call};
        bool lives = IS_IN(allowed, call), dies = IS_IN(deadly, call);
        if (call == URETPROBE || call == UPROBE || lives)
            continue;
        int status = confined(&t, NULL);
        if (dies ? !killed(status) : !ended(status, 0))
            snprintf(why, sizeof why, "call %d is %s", call,
                     dies ? "no death" : killed(status) ? "death" : "not answered ENOSYS");
    }
    tell("every other call fails or kills", !why[0], why);
#ifdef __x86_64__
    for (int call = 0; call < CALLS_MAX && !why[0]; call++)
        if (!killed(confined(&(const struct attempt){.call = call | X32}, NULL)))
            snprintf(why, sizeof why, "call %d with x32's bit is let through", call);
    tell("x32's calls die", !why[0], why);
#endif
}

/* Descriptor -1 and no bytes: whatever the kernel says to them, the filter has let them through. */
static void the_list_is_let_through(void) {
    char why[64] = "";
    for (size_t i = 0; i < sizeof allowed / sizeof *allowed && !why[0]; i++) {
        struct attempt t = {.call = allowed[i], .a = -1};
#ifdef SYS_ppoll
        if (allowed[i] == SYS_ppoll)
            t.c = -1; /* it would wait for good */
#endif
#ifdef SYS_ppoll_time64
        if (allowed[i] == SYS_ppoll_time64)
            t.c = -1;
#endif
        if (allowed[i] == SYS_exit_group || allowed[i] == SYS_exit)
            t.a = NOT_ENOSYS;
        if (!ended(confined(&t, NULL), NOT_ENOSYS))
            snprintf(why, sizeof why, "call %d is not let through", allowed[i]);
    }
    tell("the list is let through", !why[0], why);
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
    the_harmless_fail();
    every_number();
    the_list_is_let_through();
    tell("memory, random bytes, clock, log", ended(confined(NULL, work), NOT_ENOSYS), "a child that only worked has died");
#ifdef __x86_64__
    tell("i386's calls die", killed(confined(NULL, other_gate)), "the process lives on");
#endif
    return failed > 0;
}
