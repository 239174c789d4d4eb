/*
 * Fuzzes connections: bytes into the session, in pieces, over up to four
 * connections of two users, whose sockets may take nothing, near the limit of
 * memory or far from it.
 *
 *     0   1   what holds: see enum
 *     1   1   seed of the sizes in which bytes arrive
 *     2   1   with TIGHT: room for what is held
 *     3   n   bytes as a client sends them; or, with FRAMED, steps:
 *
 *         00-0f  a frame of that type: flags, stream, length, payload
 *         80-87  a whole request of RPC number x: flags, stream, length, message
 *         90-97  that many of them, with the message `ping` for all: flags, first stream, count
 *         c0     time passes: tenths of a second
 *         c1     the other steps are of connection x from here
 *         c2     that connection's socket takes x bytes more
 *         c3     its peer closes
 *         c4     a new peer connects
 *         c5     GOAWAY to all
 *         c6     a frame of any type and length, told and not kept: type, flags, length
 */
#include "fuzz.h"

enum { FRAMED = 1, GREETED = 2, TIGHT = 4, DEAF = 32, LOUD = 64 };
enum { PEERS = 4, FD = 100, INBOX = 256 * 1024, STEPS_MAX = 400 };

static struct peer {
    uint8_t in[INBOX];
    size_t in_len, in_at;
    size_t room; /* what the socket takes */
    bool open, ended, greeted; /* ended: the peer has closed */
    uint8_t head[9]; /* of the frame that is being received */
    size_t head_len, frame_left;
} peers[PEERS];

static const uint8_t ping[] = "\12\4ping\22\4ping"; /* two fields of bytes */

static struct server server;
static uint32_t sizes;

/* What a real client would check of all frames: SETTINGS first, no frame over 16 KiB, no type that we never send. */
static void peer_hear(struct peer *p, const uint8_t *bytes, size_t len) {
    for (; len > 0; bytes++, len--) {
        if (p->frame_left > 0) {
            p->frame_left--;
            continue;
        }
        p->head[p->head_len++] = *bytes;
        if (p->head_len < sizeof p->head)
            continue;
        p->head_len = 0;
        p->frame_left = (size_t)p->head[0] << 16 | (size_t)p->head[1] << 8 | p->head[2];
        HOLDS(p->frame_left <= 16384);
        HOLDS(p->greeted || p->head[3] == NGHTTP2_SETTINGS);
        p->greeted = true;
        HOLDS(p->head[3] <= NGHTTP2_WINDOW_UPDATE && p->head[3] != NGHTTP2_PRIORITY &&
              p->head[3] != NGHTTP2_PUSH_PROMISE);
    }
}

static uint32_t next_size(void) {
    sizes = sizes * 1103515245 + 12345;
    uint32_t n = sizes >> 16;
    return n % 4 == 0 ? 1 + n / 4 % 16 : IN_BYTES;
}

ssize_t fuzz_read(int fd, void *buf, size_t len) {
    struct peer *p = &peers[fd - FD];
    size_t n = p->in_len - p->in_at, size = next_size();
    if (n == 0 && p->ended)
        return 0;
    errno = EAGAIN;
    if (n == 0)
        return -1;
    n = n > len ? len : n;
    n = n > size ? size : n;
    memcpy(buf, p->in + p->in_at, n);
    p->in_at += n;
    return (ssize_t)n;
}

ssize_t fuzz_write(int fd, const void *buf, size_t len) {
    if (fd == STDERR_FILENO)
        return (ssize_t)len;
    struct peer *p = &peers[fd - FD];
    size_t n = len > p->room ? p->room : len;
    errno = EAGAIN;
    if (n == 0)
        return -1;
    p->room -= n;
    peer_hear(p, buf, n);
    return (ssize_t)n;
}

static void peer_say(struct peer *p, const void *bytes, size_t len) {
    if (p->in_at == p->in_len)
        p->in_at = p->in_len = 0;
    if (len > INBOX - p->in_len)
        len = INBOX - p->in_len;
    if (len > 0)
        memcpy(p->in + p->in_len, bytes, len);
    p->in_len += len;
}

static void peer_frame(struct peer *p, uint8_t type, uint8_t flags, uint32_t stream, const uint8_t *bytes, size_t len) {
    const uint8_t head[9] = {(uint8_t)(len >> 16), (uint8_t)(len >> 8), (uint8_t)len, type, flags,
                             (uint8_t)(stream >> 24), (uint8_t)(stream >> 16), (uint8_t)(stream >> 8), (uint8_t)stream};
    peer_say(p, head, sizeof head);
    peer_say(p, bytes, len);
}

/* A literal field without indexing, RFC 7541 6.2.2. */
static size_t hpack_add(uint8_t *out, const char *name, const char *value) {
    size_t n = strlen(name), v = strlen(value);
    out[0] = 0;
    out[1] = (uint8_t)n;
    memcpy(out + 2, name, n);
    out[2 + n] = (uint8_t)v;
    memcpy(out + 3 + n, value, v);
    return 3 + n + v;
}

static void peer_request(struct peer *p, enum rpc rpc, uint8_t flags, uint32_t stream, const uint8_t *bytes,
                         size_t len) {
    uint8_t block[512], body[GRPC_PREFIX_BYTES + 256];
    size_t n = hpack_add(block, ":method", flags & 0x80 ? "GET" : "POST");
    n += hpack_add(block + n, ":scheme", "http");
    n += hpack_add(block + n, ":path", rpc == RPC_UNKNOWN ? "/metrics" : rpcs[rpc].path);
    n += hpack_add(block + n, "content-type", flags & 0x40 ? "text/plain" : "application/grpc");
    if (flags & 0x20)
        n += hpack_add(block + n, "grpc-timeout", "100m");
    if (flags & 0x10)
        n += hpack_add(block + n, "content-length", "10");
    grpc_prefix_write(body, len);
    if (flags & 0x08)
        body[4] = (uint8_t)(body[4] + 1); /* one byte that never comes, or not yet */
    if (len > 0)
        memcpy(body + GRPC_PREFIX_BYTES, bytes, len);
    peer_frame(p, NGHTTP2_HEADERS, (uint8_t)(NGHTTP2_FLAG_END_HEADERS | (flags & 0x04 ? 1 : 0)), stream, block, n);
    if (!(flags & 0x04))
        peer_frame(p, NGHTTP2_DATA, flags & 0x02 ? 0 : NGHTTP2_FLAG_END_STREAM, stream, body, GRPC_PREFIX_BYTES + len);
}

static struct conn *peer_conn(const struct peer *p) {
    for (struct conn *c = server.conns; c; c = c->next)
        if (!c->closed && c->source.fd == FD + (int)(p - peers))
            return c;
    return NULL;
}

static size_t base; /* what no connection holds, so that the limit is near */

/* What must hold between turns, whatever has come: the sum is that of its parts, and within the limit. */
static void server_check(void) {
    size_t held = 0, count = 0;
    for (struct conn *c = server.conns; c; c = c->next, count++) {
        size_t least = c->out ? c->out_len : 0;
        for (struct stream *s = c->streams; s; s = s->next) {
            least += sizeof *s + s->payload_len + (s->body ? s->body_cap : 0);
            HOLDS(s->body_len <= s->body_cap && s->payload_sent <= s->payload_len && *s->link == s);
        }
        HOLDS(!c->closed && least <= c->held);
        held += c->held;
    }
    HOLDS(server.held == base + held && server.held <= HELD_MAX && server.conn_count == count);
    HOLDS(server.kms.arena.used == 0);
}

/* Turns of the loop until nothing is ready. */
static void turns(void) {
    for (bool busy = true; busy;) {
        busy = false;
        server_clock(&server);
        for (struct peer *p = peers; p < peers + PEERS; p++) {
            struct conn *c = peer_conn(p);
            if (!c)
                continue;
            if (c->blocked ? p->room > 0 : p->in_at < p->in_len || p->ended) {
                conn_ready(c);
                busy = true;
            }
        }
        server.sweep_ms = 0;
        server_sweep(&server);
        server_reap(&server);
        server_check();
    }
}

static struct peer *peer_open(struct peer *p, unsigned flags) {
    static const char preface[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    if (peer_conn(p))
        return p;
    p->in_len = p->in_at = p->head_len = p->frame_left = 0;
    p->ended = p->greeted = false;
    p->room = flags & DEAF ? 64 : SIZE_MAX;
    server_admit(&server, FD + (int)(p - peers));
    if (flags & GREETED) {
        peer_say(p, preface, sizeof preface - 1);
        peer_frame(p, NGHTTP2_SETTINGS, 0, 0, NULL, 0);
    }
    return p;
}

static void server_begin(void) {
    static const struct serve_options options = {.uids = {0, 1}, .uid_count = 2};
    if (!server.callbacks)
        HOLDS(kms_init(&server.kms, fuzz_ring()) == 0 && sessions_init(&server) == 0);
    server.options = &options;
    server.conn_max = 3;
    server.share = IN_BYTES;
    server.drain_ms = INT64_MAX;
    server_clock(&server);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t len) {
    if (len < 3)
        return 0;
    unsigned flags = bytes[0];
    sizes = bytes[1];
    const uint8_t *at = bytes + 3, *end = bytes + len;
    server_begin();
    logging.level = flags & LOUD ? LOG_DEBUG : LOG_ERROR;
    server.held = base = flags & TIGHT ? HELD_MAX - 20 * 1024 - bytes[2] * 256u : 0;
    struct peer *p = peer_open(&peers[0], flags);
    if (!(flags & FRAMED)) {
        peer_say(p, at, (size_t)(end - at));
        at = end;
    }
    turns();
    for (int steps = 0; at < end && steps < STEPS_MAX; steps++) {
        uint8_t step = *at++, argument = at < end ? *at : 0;
        if (step >= 0xc0 && at < end)
            at++;
        if (step == 0xc0) {
            fuzz_time_ms += argument * 100;
        } else if (step == 0xc1) {
            p = &peers[argument % PEERS];
        } else if (step == 0xc2) {
            p->room = p->room > SIZE_MAX / 2 ? p->room : p->room + argument * 64u;
        } else if (step == 0xc3) {
            p->ended = true;
        } else if (step == 0xc4) {
            peer_open(p, flags);
        } else if (step == 0xc5) {
            for (struct conn *c = server.conns; c; c = c->next)
                if (!c->closed && conn_goaway(c) < 0)
                    conn_close(c, "drained");
        } else if (step == 0xc6 && end - at >= 2) {
            const uint8_t head[9] = {0, at[1], 0, argument, at[0], 0, 0, 0, 1};
            peer_say(p, head, sizeof head);
            at += 2;
        } else if (end - at >= 3) {
            uint8_t frame_flags = at[0];
            uint32_t stream = at[1];
            size_t n = at[2];
            at += 3;
            if (step >= 0x90) {
                for (; n > 0; n--, stream += 2)
                    peer_request(p, (step & 0xf) % RPCS, frame_flags, stream, ping, sizeof ping - 1);
                turns();
                continue;
            }
            n = n > (size_t)(end - at) ? (size_t)(end - at) : n;
            if (step >= 0x80)
                peer_request(p, (step & 0xf) % RPCS, frame_flags, stream, at, n);
            else
                peer_frame(p, step % 16, frame_flags, stream, at, n);
            at += n;
        } else {
            break;
        }
        turns();
    }
    for (struct conn *c = server.conns; c; c = c->next)
        conn_close(c, "the end");
    server_reap(&server);
    server_check();
    HOLDS(!server.conns);
    return 0;
}
