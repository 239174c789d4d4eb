/*
 * start - from spawn to the first answer.
 *
 *     start ROUNDS SOCKET REQUEST PROGRAM [ARGUMENT]...
 *
 * PROGRAM makes SOCKET. A client tries to connect until it can, and sends REQUEST (a file: preface, SETTINGS, one call);
 * the time ends with the last frame of stream 1. Prints the median and the least, in microseconds.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { ROUNDS_MAX = 10000, FRAME_HEAD = 9, HEADERS = 1, END_STREAM = 1, SECONDS_MAX = 300 };

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
static pid_t spawn(char **argv, int silence) {
    extern char **environ;
    pid_t pid = vfork();
    if (pid == 0) {
        dup2(silence, STDERR_FILENO);
        execve(argv[0], argv, environ);
        _exit(127);
    }
    if (pid < 0)
        die("vfork");
    return pid;
}

static int connect_soon(const struct sockaddr_un *address) {
    for (;;) {
        int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (connect(fd, (const struct sockaddr *)address, sizeof *address) == 0)
            return fd;
        if (errno != ENOENT && errno != ECONNREFUSED && errno != EACCES)
            die("connect");
        close(fd);
        sched_yield();
    }
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
        if (n <= 0)
            die("no answer");
        len += (size_t)n;
    }
}

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv) {
    static double us[ROUNDS_MAX];
    static uint8_t request[4096];
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    size_t rounds = argc < 5 ? 0 : strtoul(argv[1], NULL, 10);
    if (rounds == 0 || rounds > ROUNDS_MAX || strlen(argv[2]) >= sizeof address.sun_path)
        return 2;
    strcpy(address.sun_path, argv[2]);
    int file = open(argv[3], O_RDONLY | O_CLOEXEC), silence = open("/dev/null", O_WRONLY | O_CLOEXEC);
    ssize_t len = read(file, request, sizeof request);
    if (len <= 0 || silence < 0)
        die(argv[3]);
    alarm(SECONDS_MAX);
    for (size_t i = 0; i < rounds; i++) {
        double begin = now_us();
        pid_t pid = spawn(argv + 4, silence);
        int client = connect_soon(&address);
        if (write(client, request, (size_t)len) != len)
            die("write");
        await_trailers(client);
        us[i] = now_us() - begin;
        kill(pid, SIGKILL);
        waitpid(pid, NULL, 0);
        close(client);
        unlink(address.sun_path);
    }
    qsort(us, rounds, sizeof *us, compare);
    printf("p50_us=%.0f least_us=%.0f\n", us[rounds / 2], us[0]);
    return 0;
}
