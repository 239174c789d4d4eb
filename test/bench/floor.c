/*
 * floor - what the machine takes for as little as there can be.
 *
 *     floor pingpong [ROUNDS]        two processes and a UNIX socket, 150 bytes each way: p50
 *     floor serve SOCKET             an HTTP/2 server on nghttp2 with one answer for all requests
 *     floor spawn DIR COMMAND...     COMMAND once for each file of DIR, as its standard input: p50 and sum
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <nghttp2/nghttp2.h>
#include <signal.h>
#include <spawn.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MESSAGE_BYTES = 150, ANSWER_BYTES = 130, BUFFER_BYTES = 64 * 1024, SAMPLES_MAX = 1000000 };

static void die(const char *what) {
    perror(what);
    exit(1);
}

static double now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void report(double *samples, size_t count) {
    double sum = 0;
    for (size_t i = 0; i < count; i++)
        sum += samples[i];
    qsort(samples, count, sizeof *samples, by_value);
    printf("count=%zu seconds=%.6f p50_us=%.3f\n", count, sum / 1e6, count ? samples[count / 2] : 0);
}

static void pingpong(double *samples, size_t rounds) {
    int pair[2];
    char message[MESSAGE_BYTES] = {0};
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair) < 0)
        die("socketpair");
    pid_t child = fork();
    close(pair[child != 0]);
    if (child == 0) {
        while (read(pair[1], message, sizeof message) > 0)
            if (write(pair[1], message, sizeof message) < 0)
                break;
        exit(0);
    }
    for (size_t i = 0; i < rounds; i++) {
        double begin = now_us();
        if (write(pair[0], message, sizeof message) < 0 || read(pair[0], message, sizeof message) <= 0)
            die("pingpong");
        samples[i] = now_us() - begin;
    }
    report(samples, rounds);
}

static void spawn(double *samples, const char *dir, char **command) {
    size_t count = 0;
    DIR *files = opendir(dir);
    if (!files || chdir(dir) < 0)
        die(dir);
    for (struct dirent *entry; count < SAMPLES_MAX && (entry = readdir(files));) {
        posix_spawn_file_actions_t actions;
        pid_t child;
        int status = 0;
        if (entry->d_name[0] == '.')
            continue;
        posix_spawn_file_actions_init(&actions);
        posix_spawn_file_actions_addopen(&actions, 0, entry->d_name, O_RDONLY, 0);
        posix_spawn_file_actions_addopen(&actions, 1, "/dev/null", O_WRONLY, 0);
        double begin = now_us();
        if (posix_spawn(&child, command[0], &actions, NULL, command, environ) != 0 || waitpid(child, &status, 0) < 0)
            die(command[0]);
        samples[count++] = now_us() - begin;
        posix_spawn_file_actions_destroy(&actions);
        if (status != 0)
            die("a command failed");
    }
    report(samples, count);
}

/* The canned-answer server. */

#define FIELD(n, v)                                                          \
    {(uint8_t *)(n), (uint8_t *)(v), sizeof(n) - 1, sizeof(v) - 1,            \
     NGHTTP2_NV_FLAG_NO_COPY_NAME | NGHTTP2_NV_FLAG_NO_COPY_VALUE}

struct conn {
    int fd;
    nghttp2_session *session;
};

static uint8_t out[BUFFER_BYTES];
static size_t out_len;

static ssize_t on_read(nghttp2_session *session, int32_t id, uint8_t *buf, size_t len, uint32_t *flags,
                       nghttp2_data_source *source, void *user) {
    static nghttp2_nv trailers[] = {FIELD("grpc-status", "0")};
    (void)len, (void)source, (void)user;
    memset(buf, 0, ANSWER_BYTES);
    buf[4] = ANSWER_BYTES - 5;
    *flags |= NGHTTP2_DATA_FLAG_EOF | NGHTTP2_DATA_FLAG_NO_END_STREAM;
    nghttp2_submit_trailer(session, id, trailers, 1);
    return ANSWER_BYTES;
}

static int on_frame(nghttp2_session *session, const nghttp2_frame *frame, void *user) {
    static nghttp2_nv fields[] = {FIELD(":status", "200"), FIELD("content-type", "application/grpc")};
    nghttp2_data_provider body = {.read_callback = on_read};
    (void)user;
    if (frame->hd.type <= NGHTTP2_HEADERS && frame->hd.flags & NGHTTP2_FLAG_END_STREAM)
        nghttp2_submit_response(session, frame->hd.stream_id, fields, 2, &body);
    return 0;
}

static ssize_t on_send(nghttp2_session *session, const uint8_t *data, size_t len, int flags, void *user) {
    (void)session, (void)flags, (void)user;
    if (len > sizeof out - out_len)
        return NGHTTP2_ERR_WOULDBLOCK;
    memcpy(out + out_len, data, len);
    out_len += len;
    return (ssize_t)len;
}

/* Sends what there is, waiting for room if need be. */
static bool flush(struct conn *c) {
    do {
        out_len = 0;
        if (nghttp2_session_send(c->session) != 0 || write(c->fd, out, out_len) != (ssize_t)out_len)
            return false;
    } while (out_len > 0);
    return true;
}

static void serve(const char *path) {
    static uint8_t in[BUFFER_BYTES];
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strncpy(address.sun_path, path, sizeof address.sun_path - 1);
    int listener = socket(AF_UNIX, SOCK_STREAM, 0), epoll = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN};
    if (bind(listener, (struct sockaddr *)&address, sizeof address) < 0 || listen(listener, 128) < 0 ||
        epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &event) < 0)
        die(path);
    signal(SIGPIPE, SIG_IGN);
    nghttp2_session_callbacks *callbacks;
    nghttp2_option *options = NULL;
    if (nghttp2_session_callbacks_new(&callbacks) != 0 || nghttp2_option_new(&options) != 0)
        die("nghttp2");
    nghttp2_session_callbacks_set_on_frame_recv_callback(callbacks, on_frame);
    nghttp2_session_callbacks_set_send_callback(callbacks, on_send);
    nghttp2_option_set_no_http_messaging(options, 1);
    nghttp2_option_set_no_closed_streams(options, 1);
    for (struct epoll_event events[64];;) {
        int ready = epoll_wait(epoll, events, 64, -1);
        for (int i = 0; i < ready; i++) {
            struct conn *c = events[i].data.ptr;
            if (!c) {
                c = calloc(1, sizeof *c);
                event.data.ptr = c;
                if (!c || (c->fd = accept(listener, NULL, NULL)) < 0 ||
                    epoll_ctl(epoll, EPOLL_CTL_ADD, c->fd, &event) < 0 ||
                    nghttp2_session_server_new2(&c->session, callbacks, c, options) != 0)
                    die("accept");
                nghttp2_submit_settings(c->session, 0, NULL, 0);
                flush(c);
                continue;
            }
            ssize_t n = read(c->fd, in, sizeof in);
            if (n <= 0 || nghttp2_session_mem_recv(c->session, in, (size_t)n) < 0 || !flush(c)) {
                close(c->fd);
                nghttp2_session_del(c->session);
                free(c);
            }
        }
    }
}

int main(int argc, char **argv) {
    const char *mode = argc > 1 ? argv[1] : "";
    double *samples = calloc(SAMPLES_MAX, sizeof *samples);
    if (!samples)
        die("memory");
    if (strcmp(mode, "pingpong") == 0)
        pingpong(samples, argc > 2 ? strtoul(argv[2], NULL, 10) % SAMPLES_MAX : 20000);
    else if (strcmp(mode, "serve") == 0 && argc == 3)
        serve(argv[2]);
    else if (strcmp(mode, "spawn") == 0 && argc > 3)
        spawn(samples, argv[2], argv + 3);
    else
        die("usage: floor pingpong|serve|spawn ...");
    return 0;
}
