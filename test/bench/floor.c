/*
 * floor - what the machine takes for as little as there can be.
 *
 *     floor pingpong ROUNDS      two processes and a UNIX socket, 150 bytes each way: the median, in microseconds
 *     floor serve SOCKET         an HTTP/2 server that answers each request with one and the same EncryptResponse
 *
 * The server reads frames and looks at nothing in them but type, END_STREAM and stream: no HPACK, no protobuf, no
 * encryption, no limits. What a plugin takes beyond it is the price of all these.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum {
    PING_BYTES = 150,
    PREFACE_BYTES = 24,
    FRAME_HEAD = 9,
    DATA = 0, SETTINGS = 4, PING = 6,
    END_STREAM = 1, ACK = 1,
    ANSWER_BYTES = 3 * FRAME_HEAD + 20 + 130 + 15,
    BUFFER_BYTES = 64 * 1024,
};

static void die(const char *what) {
    perror(what);
    exit(1);
}

/* --------------------------------------------------------------- Ping-pong */

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static void pingpong(size_t rounds) {
    int pair[2];
    char message[PING_BYTES] = {0};
    double *samples = calloc(rounds, sizeof *samples);
    if (!samples || rounds == 0 || socketpair(AF_UNIX, SOCK_STREAM, 0, pair) < 0)
        die("pingpong");
    pid_t child = fork();
    if (child < 0)
        die("fork");
    close(pair[child != 0]);
    if (child == 0) {
        while (read(pair[1], message, sizeof message) > 0)
            if (write(pair[1], message, sizeof message) < 0)
                break;
        exit(0);
    }
    for (size_t i = 0; i < rounds; i++) {
        double begin = now_us();
        if (write(pair[0], message, sizeof message) < 0 || read(pair[0], message, sizeof message) != sizeof message)
            die("pingpong");
        samples[i] = now_us() - begin;
    }
    qsort(samples, rounds, sizeof *samples, by_value);
    printf("p50_us=%.3f\n", samples[rounds / 2]);
}

/* ------------------------------------------------------------------ Server */

struct conn {
    int fd;
    bool begun;                 /* the preface is read */
    size_t in_len, out_len;
    uint8_t in[BUFFER_BYTES], out[BUFFER_BYTES];
};

/* HEADERS, DATA and trailers; fields that are literals and so ask for no HPACK table. */
static uint8_t answer[ANSWER_BYTES];

static uint8_t *put_head(uint8_t *p, size_t len, int type, int flags, uint32_t stream) {
    const uint8_t head[FRAME_HEAD] = {(uint8_t)(len >> 16), (uint8_t)(len >> 8), (uint8_t)len, (uint8_t)type,
        (uint8_t)flags, (uint8_t)(stream >> 24), (uint8_t)(stream >> 16), (uint8_t)(stream >> 8), (uint8_t)stream};
    return mempcpy(p, head, FRAME_HEAD);
}

static void answer_init(void) {
    uint8_t *p = put_head(answer, 20, 1, 4, 0);
    p = mempcpy(p, "\x88\x0f\x10\x10" "application/grpc", 20);      /* :status 200, content-type */
    p = put_head(p, 130, DATA, 0, 0);
    p = mempcpy(p, "\0\0\0\0\175" "\12\131", 7);                    /* ciphertext: 89 bytes */
    p = (uint8_t *)memset(p, 'c', 89) + 89;
    p = mempcpy(p, "\22\40" "0123456789abcdef0123456789abcdef", 34); /* key_id */
    p = put_head(p, 15, 1, 5, 0);
    mempcpy(p, "\0\13grpc-status\1" "0", 15);
}

/* Places in `answer` where a stream's id goes. */
static const size_t id_at[] = {5, FRAME_HEAD + 20 + 5, 2 * FRAME_HEAD + 20 + 130 + 5};

static bool flush(struct conn *c) {
    bool whole = write(c->fd, c->out, c->out_len) == (ssize_t)c->out_len;
    c->out_len = 0;
    return whole;
}

static bool take_frame(struct conn *c, const uint8_t *frame, size_t len, uint32_t *consumed) {
    int type = frame[3], flags = frame[4];
    uint8_t *out = c->out + c->out_len;
    if (type == DATA)
        *consumed += (uint32_t)(len - FRAME_HEAD);
    if (type == DATA && flags & END_STREAM) {
        memcpy(out, answer, ANSWER_BYTES);
        for (size_t i = 0; i < sizeof id_at / sizeof *id_at; i++)
            memcpy(out + id_at[i], frame + 5, 4);
        c->out_len += ANSWER_BYTES;
    } else if ((type == SETTINGS || type == PING) && !(flags & ACK)) {
        size_t payload = type == PING ? len - FRAME_HEAD : 0;
        memcpy(put_head(out, payload, type, ACK, 0), frame + FRAME_HEAD, payload);
        c->out_len += FRAME_HEAD + payload;
    }
    return c->out_len < BUFFER_BYTES / 2 || flush(c);
}

static bool serve_conn(struct conn *c) {
    ssize_t n = read(c->fd, c->in + c->in_len, sizeof c->in - c->in_len);
    if (n <= 0)
        return false;
    c->in_len += (size_t)n;
    size_t at = c->begun ? 0 : PREFACE_BYTES;
    if (at > c->in_len)
        return true;
    c->begun = true;
    uint32_t consumed = 0;
    for (size_t len; c->in_len - at >= FRAME_HEAD; at += len) {
        const uint8_t *frame = c->in + at;
        len = FRAME_HEAD + ((size_t)frame[0] << 16 | (size_t)frame[1] << 8 | frame[2]);
        if (c->in_len - at < len)
            break;
        if (!take_frame(c, frame, len, &consumed))
            return false;
    }
    memmove(c->in, c->in + at, c->in_len -= at);
    if (consumed > 0) { /* give the window back: of the connection, for streams do not live long enough */
        uint8_t *p = put_head(c->out + c->out_len, 4, 8, 0, 0);
        p[0] = (uint8_t)(consumed >> 24), p[1] = (uint8_t)(consumed >> 16);
        p[2] = (uint8_t)(consumed >> 8), p[3] = (uint8_t)consumed;
        c->out_len += FRAME_HEAD + 4;
    }
    return c->out_len == 0 || flush(c);
}

static void serve(const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct epoll_event event = {.events = EPOLLIN}, events[64];
    int listener = socket(AF_UNIX, SOCK_STREAM, 0), epoll = epoll_create1(0);
    strncpy(address.sun_path, path, sizeof address.sun_path - 1);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) < 0 || listen(listener, 128) < 0 ||
        epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &event) < 0)
        die(path);
    signal(SIGPIPE, SIG_IGN);
    answer_init();
    for (;;) {
        int ready = epoll_wait(epoll, events, 64, -1);
        for (int i = 0; i < ready; i++) {
            struct conn *c = events[i].data.ptr;
            if (c) {
                if (!serve_conn(c)) {
                    close(c->fd);
                    free(c);
                }
                continue;
            }
            if (!(c = calloc(1, sizeof *c)) || (c->fd = accept(listener, NULL, NULL)) < 0)
                die("accept");
            event.data.ptr = c;
            put_head(c->out, 0, SETTINGS, 0, 0);
            c->out_len = FRAME_HEAD;
            if (epoll_ctl(epoll, EPOLL_CTL_ADD, c->fd, &event) < 0 || !flush(c))
                die("accept");
        }
    }
}

int main(int argc, char **argv) {
    if (argc == 3 && strcmp(argv[1], "pingpong") == 0)
        pingpong(strtoul(argv[2], NULL, 10));
    else if (argc == 3 && strcmp(argv[1], "serve") == 0)
        serve(argv[2]);
    else
        return fputs("usage: floor pingpong ROUNDS | serve SOCKET\n", stderr), 2;
    return 0;
}
