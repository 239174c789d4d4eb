/*
 * start - from spawn to the first answer, and what an empty program takes for its whole life.
 *
 *     start [-s SOCKET] ROUNDS EMPTY REQUEST PROGRAM [ARGUMENT]...
 *
 * prints median and quartiles of both in microseconds, on two lines. PROGRAM is given a listening socket, as systemd
 * would do it, on which a client has connected and sent REQUEST (a file: preface, SETTINGS, one call) already: so
 * nothing is retried, and the time ends with the last frame of stream 1. With -s it makes SOCKET itself, which the
 * client tries until it can connect. The two are run in turn. KMS_KEK is in the environment.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { ROUNDS_MAX = 10000, LISTEN_FD = 3, HIGH_FD = 10, FRAME_HEAD = 9, HEADERS = 1, END_STREAM = 1 };

static void die(const char *what) {
    perror(what);
    exit(1);
}

static double now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

/* As cheap as it can be: the child borrows our memory until it is another program. */
static pid_t spawn(char **argv, char **env, char *listen_pid, int listener, int silence) {
    pid_t pid = vfork();
    if (pid == 0) {
        if (listen_pid)
            sprintf(listen_pid, "LISTEN_PID=%d", (int)getpid());
        if (listener >= 0)
            dup2(listener, LISTEN_FD);
        dup2(silence, STDERR_FILENO);
        execve(argv[0], argv, env);
        _exit(127);
    }
    if (pid < 0)
        die("vfork");
    return pid;
}

/* Reads frames until stream 1 has ended in headers: the trailers of an answer. */
static void await_trailers(int fd) {
    uint8_t bytes[65536];
    size_t len = 0, at = 0;
    for (;;) {
        while (len - at >= FRAME_HEAD) {
            const uint8_t *f = bytes + at;
            size_t size = (size_t)f[0] << 16 | (size_t)f[1] << 8 | f[2];
            if (len - at < FRAME_HEAD + size)
                break;
            if (f[3] == HEADERS && f[4] & END_STREAM && f[8] == 1)
                return;
            at += FRAME_HEAD + size;
        }
        ssize_t n = read(fd, bytes + len, sizeof bytes - len);
        if (n <= 0) {
            fputs("start: no answer\n", stderr);
            exit(1);
        }
        len += (size_t)n;
    }
}

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void report(const char *name, double *us, size_t n) {
    qsort(us, n, sizeof *us, compare);
    printf("%s %.0f %.0f %.0f\n", name, us[n / 2], us[n / 4], us[n * 3 / 4]);
}

/* A client of the program's own socket, as soon as there is one. */
static int connect_soon(const struct sockaddr_un *address, socklen_t len) {
    for (;;) {
        int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (connect(fd, (const struct sockaddr *)address, len) == 0)
            return fd;
        if (errno != ENOENT && errno != ECONNREFUSED)
            die("connect");
        close(fd);
        sched_yield();
    }
}

int main(int argc, char **argv) {
    static double start[ROUNDS_MAX], empty[ROUNDS_MAX];
    static uint8_t request[4096];
    const char *own = NULL;
    if (argc > 2 && strcmp(argv[1], "-s") == 0) {
        own = argv[2];
        argc -= 2;
        argv += 2;
    }
    if (argc < 5)
        return 2;
    size_t rounds = strtoul(argv[1], NULL, 10);
    int file = open(argv[3], O_RDONLY | O_CLOEXEC), silence = open("/dev/null", O_WRONLY | O_CLOEXEC);
    ssize_t request_len = read(file, request, sizeof request);
    const char *kek = getenv("KMS_KEK");
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (rounds == 0 || rounds > ROUNDS_MAX || request_len <= 0 || silence < 0 || !kek ||
        (own && strlen(own) >= sizeof address.sun_path))
        return 2;
    alarm(300);

    if (own)
        strcpy(address.sun_path, own);
    else
        snprintf(address.sun_path + 1, sizeof address.sun_path - 1, "kmsplugin-start-%d", (int)getpid());
    size_t name_len = own ? strlen(own) : 1 + strlen(address.sun_path + 1);
    socklen_t address_len = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + name_len);
    int listener = -1;
    if (!own) {
        int first = socket(AF_UNIX, SOCK_STREAM, 0);
        listener = fcntl(first, F_DUPFD_CLOEXEC, HIGH_FD);
        close(first); /* LISTEN_FD is free for the child's */
        if (bind(listener, (struct sockaddr *)&address, address_len) < 0 || listen(listener, 8) < 0)
            die("listen");
    }

    char kek_variable[256], listen_pid[32] = "LISTEN_PID=", listen_fds[] = "LISTEN_FDS=1", one_thread[] = "GOMAXPROCS=1";
    for (size_t i = 0; i < rounds; i++) {
        snprintf(kek_variable, sizeof kek_variable, "KMS_KEK=%s", kek);
        char *empty_argv[] = {argv[2], NULL};
        char *no_env[] = {NULL}, *env[] = {kek_variable, one_thread, own ? NULL : listen_fds, listen_pid, NULL};
        int status;

        double begin = now_us();
        pid_t pid = spawn(empty_argv, no_env, NULL, -1, silence);
        if (waitpid(pid, &status, 0) != pid || status != 0)
            die("empty");
        empty[i] = now_us() - begin;

        int client = own ? -1 : connect_soon(&address, address_len);
        if (!own && write(client, request, (size_t)request_len) != request_len)
            die("write");
        begin = now_us();
        pid = spawn(argv + 4, env, own ? NULL : listen_pid, listener, silence);
        if (own) {
            client = connect_soon(&address, address_len);
            if (write(client, request, (size_t)request_len) != request_len)
                die("write");
        }
        await_trailers(client);
        start[i] = now_us() - begin;
        kill(pid, SIGKILL);
        waitpid(pid, &status, 0);
        close(client);
        if (own)
            unlink(own);
    }
    report("start", start, rounds);
    report("empty", empty, rounds);
    return 0;
}
