/*
 * init - the first and only process of a kernel that test/kernel.sh boots: it tries the release program there.
 *
 *     /init CALLS        of each RPC to each server, and a tenth of it in the imitations
 *
 * Beside the kernel as it is there are three imitations of what is found elsewhere. A seccomp filter answers calls from
 * some number on as an older kernel does, which lacks them (numbers are given in the order of time), or as an old
 * container runtime does, which does not know them. The program's own filter comes on top of that.
 *
 * Prints a line for each test on the console (ok, not ok, skip), and `end` at the end.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <net/if.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/klog.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define PROGRAM "/kmsplugin"
#define SOCKET "/run/kms.sock"
#define ENDPOINT "unix://" SOCKET
#define LOG "/run/log"
#define PROBE_LOG "/run/probe"

enum {
    STRANGER = 1000,        /* a uid that may not connect */
    PATIENCE_SECONDS = 120, /* until something that does not happen counts as failed: an emulator is slow */
    FIRST_OF_5_1 = 403,     /* clock_gettime64; from here on numbers are the same on every architecture */
    ARM_PRIVATE = 0xf0000,  /* Arm's own calls (set_tls), which are old */
};

static const struct world {
    const char *name;
    unsigned lacks_from; /* calls from this number on... */
    int error;           /* ...are answered with this */
} worlds[] = {
    {"this kernel", 0, 0},
    {"before 5.1", FIRST_OF_5_1, ENOSYS},
    {"before 4.11", SYS_statx, ENOSYS},
    {"old runtime", SYS_statx, EPERM},
};

#ifdef __s390x__
static const bool has_filter = false;
#else
static const bool has_filter = true; /* the program has a list of calls for this architecture */
#endif

static const struct world *world;
static const char *mode; /* "require" is that of --sandbox */
static pid_t server;
static int server_status;
static char text[256 * 1024];

/* ---------------------------------------------------------------- Results */

static const char *file_text(const char *path) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t len = fd < 0 ? 0 : read(fd, text, sizeof text - 1);
    close(fd);
    text[len < 0 ? 0 : len] = '\0';
    return text;
}

/* The end of what a program logged. */
static void show(const char *what) {
    size_t len = strlen(what);
    printf("    %s%s", len > 2000 ? what + len - 2000 : what, len > 0 && what[len - 1] == '\n' ? "" : "\n");
}

/* What the kernel said of calls that it killed for. */
static void show_kills(void) {
    int len = klogctl(3, text, sizeof text - 1); /* read all */
    text[len < 0 ? 0 : len] = '\0';
    for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n"))
        if (strstr(line, "type=1326"))
            printf("    %s\n", line);
    klogctl(5, NULL, 0); /* clear */
}

/* A test: returns whether it passed. */
static bool check(bool good, const char *format, ...) {
    va_list args;
    va_start(args, format);
    printf(good ? "ok %s, %s: " : "not ok %s, %s: ", world->name, mode);
    vprintf(format, args);
    va_end(args);
    putchar('\n');
    if (!good) {
        show(file_text(LOG));
        show_kills();
    }
    return good;
}

static void nap(void) {
    nanosleep(&(struct timespec){.tv_nsec = 5 * 1000 * 1000}, NULL);
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* ---------------------------------------------------------- The program */

/* What lies before this kernel, or around this container, from now on and for all that is executed. */
static void enter_world(void) {
    if (world->error == 0)
        return;
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, ARM_PRIVATE, 1, 0),
        BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, world->lacks_from, 1, 0),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (unsigned)world->error),
    };
    struct sock_fprog program = {sizeof filter / sizeof *filter, filter};
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0)
        _exit(99);
}

/* Runs the program; `prepare` is called in its process before. */
static pid_t start(const char *log, char *const argv[], void (*prepare)(void)) {
    static char *const environment[] = {"KMS_KEK=AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=", NULL};
    pid_t pid = fork();
    if (pid != 0)
        return pid;
    int fd = open(log, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND, 0600);
    if (dup2(fd, STDOUT_FILENO) < 0 || dup2(fd, STDERR_FILENO) < 0)
        _exit(98);
    prepare();
    execve(PROGRAM, argv, environment);
    _exit(97);
}

/* Whether a process has ended; how, in *status. */
static bool ended(pid_t pid, int *status) {
    double until = seconds() + PATIENCE_SECONDS;
    while (seconds() < until) {
        if (waitpid(pid, status, WNOHANG) == pid)
            return true;
        nap();
    }
    return false;
}

static const char *end_text(int status) {
    static char end[64];
    if (WIFSIGNALED(status))
        snprintf(end, sizeof end, "killed by signal %d (%s)", WTERMSIG(status), strsignal(WTERMSIG(status)));
    else
        snprintf(end, sizeof end, "exit status %d", WEXITSTATUS(status));
    return end;
}

/* Whether the server lives; it never ends by itself. */
static bool lives(void) {
    if (server != 0 && waitpid(server, &server_status, WNOHANG) == server)
        server = 0;
    return server != 0;
}

/* Waits until the server has logged this, or is no more. */
static bool logged(const char *what) {
    double until = seconds() + PATIENCE_SECONDS;
    for (bool alive = true; alive && seconds() < until; nap()) {
        alive = lives();
        if (strstr(file_text(LOG), what))
            return true;
    }
    return false;
}

/* What /proc says of the server: "Seccomp:", "Seccomp_filters:". -1 where it says nothing. */
static int status_field(const char *field) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/status", (int)server);
    const char *found = strstr(file_text(path), field);
    return found ? atoi(found + strlen(field)) : -1;
}

/* ----------------------------------------------------------------- Peers */

static int dial(void) {
    const struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = SOCKET};
    const struct timeval patience = {.tv_sec = PATIENCE_SECONDS};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    if (connect(fd, (const struct sockaddr *)&address, sizeof address) == 0)
        return fd;
    close(fd);
    return -1;
}

/* One call of each RPC. */
static bool probe(void) {
    char *const argv[] = {"kmsplugin", "probe", "--timeout", "60", ENDPOINT, NULL};
    int status = -1;
    if (ended(start(PROBE_LOG, argv, enter_world), &status) && status == 0)
        return true;
    printf("    probe: %s\n", end_text(status));
    show(file_text(PROBE_LOG));
    return false;
}

/* A peer of another uid is closed before it is heard. */
static bool stranger_is_refused(void) {
    int status = -1;
    pid_t pid = fork();
    if (pid == 0) {
        char byte;
        if (setgid(STRANGER) != 0 || setuid(STRANGER) != 0)
            _exit(1);
        int fd = dial();
        _exit(fd < 0 ? 2 : read(fd, &byte, 1) <= 0 && errno != EAGAIN ? 0 : 3);
    }
    return waitpid(pid, &status, 0) == pid && status == 0;
}

/*
 * Passes the server a TCP socket with unsent bytes, whose last close(2) waits for longer than any test does: the server's,
 * as that is stopped meanwhile. Returns whether all was so, or whether the kernel knows how to refuse it (Linux 6.16).
 */
static bool pass_lingering(void) {
    struct ifreq loopback = {.ifr_name = "lo", .ifr_flags = IFF_UP};
    struct sockaddr_in address;
    socklen_t len = sizeof address;
    const struct linger linger = {1, 10 * PATIENCE_SECONDS};
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(sizeof(int))];
    } rights = {.header = {.cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS}};
    struct iovec data = {"PRI", 3};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = &rights, .msg_controllen = sizeof rights};
    int peer = dial(), deaf = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), fd = socket(AF_INET, SOCK_STREAM, 0), status;
    if (ioctl(deaf, SIOCSIFFLAGS, &loopback) != 0 || listen(deaf, 1) != 0 ||
        getsockname(deaf, (struct sockaddr *)&address, &len) != 0 || connect(fd, (struct sockaddr *)&address, len) != 0)
        return false;
    while (send(fd, text, sizeof text, MSG_DONTWAIT) > 0)
        continue;
    bool unsent = errno == EAGAIN;
    memcpy(CMSG_DATA(&rights.header), &fd, sizeof fd);
    kill(server, SIGSTOP);
    bool stopped = waitpid(server, &status, WUNTRACED) == server && WIFSTOPPED(status);
    bool passed = sendmsg(peer, &message, MSG_NOSIGNAL) == 3, refused = !passed && errno == EPERM;
    printf("    a descriptor is %s\n", passed ? "passed" : strerror(errno));
    bool lingers = passed && setsockopt(fd, SOL_SOCKET, SO_LINGER, &linger, sizeof linger) == 0;
    close(fd);
    kill(server, SIGCONT);
    return unsent && stopped && (lingers || refused);
}

/* --------------------------------------------------------- Random bytes */

/* Early at boot getrandom waits. Here it does until something comes through this pipe. */
static int release[2];

static bool has_random(void) {
    char byte;
    return getrandom(&byte, 1, GRND_NONBLOCK) == 1;
}

/* Has a process of its own hold each getrandom that the server makes. */
static void hold_getrandom(void) {
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getrandom, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof filter / sizeof *filter, filter};
    int calls = (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &program);
    pid_t pid = fork();
    if (calls < 0 || pid < 0)
        _exit(96);
    if (pid > 0)
        return; /* to be the server; `calls` closes at execve */
    close(release[1]);
    for (bool holding = true;;) {
        struct seccomp_notif call = {0};
        if (ioctl(calls, SECCOMP_IOCTL_NOTIF_RECV, &call) < 0)
            continue; /* its process ended meanwhile */
        struct seccomp_notif_resp answer = {.id = call.id, .flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE};
        char byte;
        if (holding && call.data.args[2] & GRND_NONBLOCK) {
            answer.flags = 0;
            answer.error = -EAGAIN;
        } else if (holding) {
            read(release[0], &byte, 1);
            holding = false;
        }
        ioctl(calls, SECCOMP_IOCTL_NOTIF_SEND, &answer);
    }
}

/* ----------------------------------------------------------------- Tests */

static void serve(const char *level, void (*prepare)(void)) {
    char *argv[] = {"kmsplugin", "serve", "--listen", ENDPOINT, "--mode", "0666", "--log-level", (char *)level, NULL,
        NULL, NULL};
    if (strcmp(mode, "require") == 0) {
        argv[8] = "--sandbox";
        argv[9] = "require";
    }
    unlink(LOG); /* what an earlier one said */
    server = start(LOG, argv, prepare);
}

static bool stops(void) {
    if (!lives())
        return false;
    kill(server, SIGTERM);
    bool good = ended(server, &server_status);
    if (!good) {
        kill(server, SIGKILL);
        waitpid(server, NULL, 0);
    }
    server = 0;
    return good && server_status == 0 && access(SOCKET, F_OK) != 0;
}

/* A server that did not start: allowed only where it must refuse or may, in one sentence that says why. */
static void test_refusal(bool allowed) {
    const char *log = file_text(LOG), *said = strstr(log, "kmsplugin: "), *end = said ? strchr(said, '\n') : NULL;
    bool named = strstr(log, has_filter ? strerror(EPERM) : "seccomp does not work here: ");
    show(log);
    if (check(allowed && server_status == 1 << 8 && end && end[1] == '\0' && named,
              "refuses to start with one sentence (%s)", end_text(server_status)))
        check(access(SOCKET, F_OK) != 0, "leaves no socket");
}

/* The first process after boot, on a machine without a source of random bytes: a second or so passes until there are. */
static void test_boot(void) {
    mode = "boot";
    if (has_random()) {
        printf("skip %s, %s: the kernel has random bytes from the start\n", world->name, mode);
        return;
    }
    serve("info", enter_world);
    bool ready = logged("msg=ready"), random = has_random();
    check(ready && random, "says ready once there are random bytes");
    check(probe(), "and answers");
    check(stops(), "and ends at SIGTERM");
}

/* The same, as long as it takes. */
static void test_no_random(void) {
    mode = "no random bytes";
    for (int wait = 1; wait >= 0; wait--) {
        pipe2(release, O_CLOEXEC);
        serve("info", hold_getrandom);
        check(logged("waiting for the kernel to have random numbers"), "says that it waits");
        for (int i = 0; i < 40; i++) /* a negative: it would have been ready long since */
            nap();
        check(lives() && !strstr(file_text(LOG), "msg=ready"), "is not ready without random bytes");
        if (wait) {
            kill(server, SIGTERM);
            check(ended(server, &server_status) && server_status == 0, "and ends at SIGTERM");
            server = 0;
        } else {
            write(release[1], "", 1);
            check(logged("msg=ready") && probe(), "is ready when there are, and answers");
            check(stops(), "and ends at SIGTERM");
        }
        close(release[0]);
        close(release[1]);
    }
}

static void test_mode(int calls) {
    bool require = strcmp(mode, "require") == 0;
    double begin = seconds();
    serve("info", enter_world);
    bool ready = logged("msg=ready");
    if (!ready && !lives()) {
        test_refusal(world->error == EPERM || (!has_filter && require));
        return;
    }
    if (!check(ready, "says ready"))
        goto out;
    char *warning = strstr(file_text(LOG), "level=warn");
    bool warned = warning && warning < strstr(text, "msg=ready");
    if (warned)
        printf("    %.*s\n", (int)strcspn(warning, "\n"), warning);
    if (world->error != EPERM)
        check(warned == !has_filter, has_filter ? "warns of nothing" : "warns that there is no filter");
    check(!(warned && require), "has all or nothing when it is required");
    int filters = (world->error != 0) + !warned, seen = status_field("Seccomp_filters:");
    check(seen == filters && status_field("\nSeccomp:") == (filters ? 2 : 0), "has %d seccomp filters, of %d", seen,
          filters);

    int done = 0;
    while (done < calls && lives() && probe())
        done++;
    check(done == calls && lives(), "answers %d of %d calls of each RPC", done, calls);
    check(stranger_is_refused() && logged("msg=refused"), "refuses another uid, and says so");
    check(lives() && pass_lingering() && probe() && lives(), "waits for no descriptor that a peer passes");
    size_t before = strlen(file_text(LOG));
    if (lives())
        kill(server, SIGHUP);
    double until = seconds() + PATIENCE_SECONDS;
    while (lives() && strlen(file_text(LOG)) == before && seconds() < until)
        nap();
    check(strlen(file_text(LOG)) > before && probe() && lives(), "logs SIGHUP and goes on");
    bool stopped = stops();
    check(stopped, "ends at SIGTERM, without its socket file: %s", end_text(server_status));

    serve("debug", enter_world);
    check(logged("msg=ready") && probe() && logged("level=debug"), "logs at level debug");
    check(lives(), "and goes on");
    stopped = stops();
    check(stopped, "and ends at SIGTERM: %s", end_text(server_status));
out:
    if (lives()) {
        kill(server, SIGKILL);
        waitpid(server, NULL, 0);
        server = 0;
    }
    unlink(SOCKET);
    printf("    %.1f seconds\n", seconds() - begin);
}

int main(int argc, char **argv) {
    int calls = argc > 1 ? atoi(argv[argc - 1]) : 1;
    struct utsname kernel;
    mkdir("/dev", 0755);
    mkdir("/proc", 0755);
    mkdir("/run", 0755);
    mount("none", "/dev", "devtmpfs", 0, NULL);
    mount("none", "/proc", "proc", 0, NULL);
    mount("none", "/run", "tmpfs", 0, "mode=0755");
    int console = open("/dev/console", O_RDWR);
    for (int fd = 0; fd < 3; fd++)
        dup2(console, fd);
    setvbuf(stdout, NULL, _IOLBF, 0);
    uname(&kernel);
    printf("\nkernel %s %s\n", kernel.release, kernel.machine);
    world = &worlds[0];
    test_boot();
    test_no_random();
    for (size_t i = 0; i < sizeof worlds / sizeof *worlds; i++) {
        world = &worlds[i];
#ifdef __riscv
        if (strcmp(world->name, "before 4.11") == 0) {
            printf("skip %s: riscv64 came with Linux 4.15\n", world->name);
            continue;
        }
#endif
        mode = "default";
        test_mode(i == 0 ? calls : calls / 10);
        mode = "require";
        test_mode(i == 0 ? calls : calls / 10);
    }
    puts("end");
    tcdrain(STDOUT_FILENO);
    reboot(RB_POWER_OFF);
    reboot(RB_AUTOBOOT);
}
