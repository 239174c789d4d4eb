/*
 * load - sends unary gRPC requests over UNIX sockets and measures the answers.
 *
 *     load CONNECTIONS STREAMS ROUNDS SOCKET PATH BODY
 *     load start ROUNDS SOCKET PATH BODY PROGRAM [ARGUMENT]...
 *     load pingpong ROUNDS
 *
 * A round is a batch on each connection: STREAMS requests in one write(2), and then all their answers. BODY is a file
 * with a gRPC frame. `start` measures from the spawn of a PROGRAM that makes SOCKET to its first answer, and pingpong
 * the least that a request can take: 150 bytes each way between two processes.
 *
 * It is here for what other clients cannot show, as they cost more than a fast server: how long one request takes when
 * client and server share a core, and how many a second keep a server's core busy. So requests are bytes made in
 * advance (RFC 9113, RFC 7541). Answers are all checked, with nghttp2's HPACK decoder, outside of what p50 measures.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <nghttp2/nghttp2.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
    DATA, HEADERS, RST_STREAM = 3, SETTINGS, PING = 6, GOAWAY, WINDOW_UPDATE,
    END_STREAM = 1, ACK = 1, END_HEADERS = 4, PADDED_OR_PRIORITY = 0x28,
    FRAME_HEAD = 9,
    SECONDS_MAX = 300,
    PING_BYTES = 150,           /* about as long as an Encrypt and its answer */
    IN_BYTES = 256 * 1024,
    OUT_BYTES = 128 * 1024,
    BATCH_MAX = 32 * 1024,      /* body bytes: half of the least window a server can have */
};

struct conn {
    int fd;
    uint32_t stream;            /* id of the next request */
    size_t open;                /* requests without their answer */
    bool acknowledged;          /* our SETTINGS */
    uint64_t sent_ns;
    nghttp2_hd_inflater *inflater;
    size_t in_len, out_len;
    uint8_t in[IN_BYTES], out[OUT_BYTES];
};

static uint8_t body[BATCH_MAX];
static size_t body_len;
static uint8_t first_block[1024], next_block[32];   /* a connection's first request, and all others */
static size_t first_len, next_len;

static void die(const char *what) {
    fprintf(stderr, "load: %s\n", what);
    exit(1);
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

/* ---------------------------------------------------------------- Requests */

static uint8_t *put_text(uint8_t *p, const char *text) {
    size_t len = strlen(text);
    if (len > 126)
        die("a field is too long");
    *p++ = (uint8_t)len;
    return mempcpy(p, text, len);
}

/* A field that enters the HPACK table; its name too, or the static one with this index. */
static void field(uint8_t index, const char *name, const char *value) {
    uint8_t *p = first_block + first_len;
    *p++ = 0x40 | index;
    if (index == 0)
        p = put_text(p, name);
    first_len = (size_t)(put_text(p, value) - first_block);
}

/*
 * What grpc-go sends for kube-apiserver. From the second request on, all of it is in the HPACK table but the value of
 * grpc-timeout, which is another one in each of grpc-go's.
 */
static void fields_init(const char *path) {
    static const char timeout[] = "2999943u";
    first_block[first_len++] = 0x83; /* :method POST */
    first_block[first_len++] = 0x86; /* :scheme http */
    memcpy(next_block, first_block, next_len = first_len);
    field(4, "", path);
    field(1, "", "localhost");
    field(31, "", "application/grpc");
    field(58, "", "grpc-go/1.82.1");
    field(0, "te", "trailers");
    field(0, "grpc-timeout", timeout);
    for (uint8_t index = 67; index > 62; index--)
        next_block[next_len++] = 0x80 | index;
    next_block[next_len++] = 0x0f; /* a literal, its name that of entry 62 = 15 + 47 */
    next_block[next_len++] = 47;
    next_len = (size_t)(put_text(next_block + next_len, timeout) - next_block);
}

static void put_frame(struct conn *c, int type, int flags, uint32_t stream, const void *payload, size_t len) {
    if (c->out_len + FRAME_HEAD + len > OUT_BYTES)
        die("a batch is too long");
    const uint8_t head[FRAME_HEAD] = {0, (uint8_t)(len >> 8), (uint8_t)len, (uint8_t)type, (uint8_t)flags,
        (uint8_t)(stream >> 24), (uint8_t)(stream >> 16), (uint8_t)(stream >> 8), (uint8_t)stream};
    memcpy(c->out + c->out_len, head, FRAME_HEAD);
    memcpy(c->out + c->out_len + FRAME_HEAD, payload, len);
    c->out_len += FRAME_HEAD + len;
}

static void flush(struct conn *c) {
    for (size_t sent = 0; sent < c->out_len;) {
        ssize_t n = write(c->fd, c->out + sent, c->out_len - sent);
        if (n <= 0)
            die("the server does not read");
        sent += (size_t)n;
    }
    c->out_len = 0;
}

static void send_batch(struct conn *c, size_t streams) {
    for (size_t i = 0; i < streams; i++, c->stream += 2) {
        bool first = c->stream == 1;
        put_frame(c, HEADERS, END_HEADERS, c->stream, first ? first_block : next_block, first ? first_len : next_len);
        put_frame(c, DATA, END_STREAM, c->stream, body, body_len);
    }
    c->open = streams;
    c->sent_ns = now_ns();
    flush(c);
}

/* ----------------------------------------------------------------- Answers */

static size_t frame_len(const uint8_t *frame) {
    return FRAME_HEAD + ((size_t)frame[0] << 16 | (size_t)frame[1] << 8 | frame[2]);
}

/* Reads once; looks at the new frames. Returns where the first incomplete one begins. */
static size_t receive(struct conn *c, size_t at) {
    ssize_t n = read(c->fd, c->in + c->in_len, IN_BYTES - c->in_len);
    if (n <= 0)
        die("the server closed the connection");
    c->in_len += (size_t)n;
    for (size_t len; c->in_len - at >= FRAME_HEAD && c->in_len - at >= (len = frame_len(c->in + at)); at += len) {
        const uint8_t *frame = c->in + at;
        int type = frame[3], flags = frame[4];
        if (type == RST_STREAM || type == GOAWAY)
            die("the server refused a request");
        if (type <= HEADERS && flags & END_STREAM)
            c->open--;
        if (type == SETTINGS && flags & ACK)
            c->acknowledged = true;
        else if (type == SETTINGS || (type == PING && !(flags & ACK)))
            put_frame(c, type, ACK, 0, frame + FRAME_HEAD, type == PING ? len - FRAME_HEAD : 0); /* sent with a batch */
    }
    return at;
}

/* A header block: the fields that tell success must have their value. Returns how many of them it has. */
static size_t check_fields(struct conn *c, const uint8_t *block, size_t len) {
    int flags = 0;
    size_t good = 0;
    while (!(flags & NGHTTP2_HD_INFLATE_FINAL)) {
        nghttp2_nv nv;
        ssize_t n = nghttp2_hd_inflate_hd2(c->inflater, &nv, &flags, block, len, 1);
        if (n < 0)
            die("HPACK error");
        block += n;
        len -= (size_t)n;
        if (!(flags & NGHTTP2_HD_INFLATE_EMIT))
            continue;
        bool status = strcmp((char *)nv.name, ":status") == 0, code = strcmp((char *)nv.name, "grpc-status") == 0;
        if ((status && strcmp((char *)nv.value, "200") != 0) || (code && strcmp((char *)nv.value, "0") != 0))
            die("a request failed");
        good += status || code;
    }
    nghttp2_hd_inflate_end_headers(c->inflater);
    return good;
}

/* Checks the frames up to `end`, and drops them. */
static void check(struct conn *c, size_t end, size_t answers) {
    size_t messages = 0, good = 0;
    for (size_t at = 0, len; at < end; at += len) {
        const uint8_t *frame = c->in + at, *payload = frame + FRAME_HEAD;
        len = frame_len(frame);
        if (frame[3] > HEADERS)
            continue;
        if (frame[4] & PADDED_OR_PRIORITY || (frame[3] == HEADERS && !(frame[4] & END_HEADERS)))
            die("a frame of an unexpected form");
        if (frame[3] == HEADERS) {
            good += check_fields(c, payload, len - FRAME_HEAD);
        } else {
            messages += len > FRAME_HEAD;
        }
    }
    if (messages != answers || good != 2 * answers)
        die("an answer without its message or status, or in pieces");
    memmove(c->in, c->in + end, c->in_len -= end);
}

/* Waits for a batch's answers. Returns nanoseconds from its write. */
static uint64_t take_batch(struct conn *c, size_t streams) {
    size_t end = 0;
    while (c->open > 0)
        end = receive(c, end);
    uint64_t ns = now_ns() - c->sent_ns;
    check(c, end, streams);
    return ns;
}

/* Connects, as soon as there is a server, and exchanges SETTINGS. */
static struct conn *conn_new(const char *path) {
    struct conn *c = calloc(1, sizeof *c);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (!c || strlen(path) >= sizeof address.sun_path || nghttp2_hd_inflate_new(&c->inflater) != 0)
        die("no memory, or the path is too long");
    strcpy(address.sun_path, path);
    c->stream = 1;
    c->fd = socket(AF_UNIX, SOCK_STREAM, 0);
    while (connect(c->fd, (struct sockaddr *)&address, sizeof address) < 0)
        sched_yield();
    c->out_len = (size_t)(stpcpy((char *)c->out, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n") - (char *)c->out);
    put_frame(c, SETTINGS, 0, 0, "\0\4\x7f\xff\xff\xff", 6);            /* INITIAL_WINDOW_SIZE */
    put_frame(c, WINDOW_UPDATE, 0, 0, "\x7f\xff\0\0", 4);
    flush(c);
    size_t end = 0;
    while (!c->acknowledged || c->out_len == 0)
        end = receive(c, end);
    check(c, end, 0);
    return c;
}

static void conn_free(struct conn *c) {
    nghttp2_hd_inflate_del(c->inflater);
    close(c->fd);
    free(c);
}

static int by_value(const void *a, const void *b) {
    const uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static void report(size_t requests, double seconds, uint32_t *samples, size_t count) {
    qsort(samples, count, sizeof *samples, by_value);
    printf("requests=%zu seconds=%.6f p50_us=%.3f least_us=%.3f\n", requests, seconds, samples[count / 2] / 1e3,
           samples[0] / 1e3);
}

static uint32_t *samples_new(size_t count) {
    uint32_t *samples = calloc(count, sizeof *samples);
    if (!samples || count == 0)
        die("no memory, or nothing to do");
    return samples;
}

static void pingpong(size_t rounds) {
    int pair[2];
    char bytes[PING_BYTES] = {0};
    uint32_t *samples = samples_new(rounds);
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair) < 0)
        die("socketpair");
    pid_t child = fork();
    if (child < 0)
        die("fork");
    close(pair[child != 0]);
    while (child == 0 && read(pair[1], bytes, sizeof bytes) > 0)
        if (write(pair[1], bytes, sizeof bytes) < 0)
            break;
    for (size_t i = 0; child > 0 && i < rounds; i++) {
        uint64_t begin = now_ns();
        if (write(pair[0], bytes, sizeof bytes) < 0 || read(pair[0], bytes, sizeof bytes) != sizeof bytes)
            die("pingpong");
        samples[i] = (uint32_t)(now_ns() - begin);
    }
    if (child > 0)
        report(rounds, 0, samples, rounds);
}

static void request_init(const char *path, const char *body_path, size_t streams) {
    FILE *file = fopen(body_path, "rb");
    if (!file || (body_len = fread(body, 1, sizeof body, file)) < 5 || body_len * streams > BATCH_MAX)
        die("no body, or one too long for so many streams");
    fclose(file);
    fields_init(path);
}

static void start(size_t rounds, const char *path, char **argv) {
    uint32_t *samples = samples_new(rounds);
    int silence = open("/dev/null", O_WRONLY | O_CLOEXEC);
    for (size_t i = 0; i < rounds; i++) {
        uint64_t begin = now_ns();
        pid_t pid = vfork(); /* as cheap as can be: the child borrows our memory until it is another program */
        if (pid == 0) {
            dup2(silence, STDERR_FILENO);
            execve(argv[0], argv, environ);
            _exit(127);
        }
        struct conn *c = conn_new(path);
        send_batch(c, 1);
        take_batch(c, 1);
        samples[i] = (uint32_t)(now_ns() - begin);
        conn_free(c);
        kill(pid, SIGKILL);
        waitpid(pid, NULL, 0);
        unlink(path);
    }
    report(rounds, 0, samples, rounds);
}

static void load(size_t conns, size_t streams, size_t rounds, const char *path) {
    size_t count = rounds * conns;
    uint32_t *samples = samples_new(count);
    struct conn **all = calloc(conns, sizeof *all);
    for (size_t i = 0; i < conns; i++)
        all[i] = conn_new(path);
    uint64_t begin = now_ns();
    for (size_t i = 0; i < count + conns; i++) { /* a connection's next batch as soon as it has its last */
        if (i >= conns)
            samples[i - conns] = (uint32_t)take_batch(all[i % conns], streams);
        if (i < count)
            send_batch(all[i % conns], streams);
    }
    report(count * streams, (double)(now_ns() - begin) / 1e9, samples, count);
}

int main(int argc, char **argv) {
    alarm(SECONDS_MAX);
    if (argc == 3 && strcmp(argv[1], "pingpong") == 0) {
        pingpong(strtoul(argv[2], NULL, 10));
    } else if (argc > 6 && strcmp(argv[1], "start") == 0) {
        request_init(argv[4], argv[5], 1);
        start(strtoul(argv[2], NULL, 10), argv[3], argv + 6);
    } else if (argc == 7) {
        size_t streams = strtoul(argv[2], NULL, 10);
        request_init(argv[5], argv[6], streams);
        load(strtoul(argv[1], NULL, 10), streams, strtoul(argv[3], NULL, 10), argv[4]);
    } else {
        die("usage: see the head of load.c");
    }
    return 0;
}
