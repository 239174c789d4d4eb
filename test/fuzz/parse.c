/*
 * Fuzzes what reads text: endpoints, options, keys, header fields, grpc-timeout. The
 * first byte says which; where there is a second way to know the answer, both are asked.
 */
#include "fuzz.h"

#include <stdio.h>

static char said[8192];
static size_t said_len;

ssize_t fuzz_read(int fd, void *buf, size_t len) {
    return 0;
}

/* What the program prints is text of whole lines. */
ssize_t fuzz_write(int fd, const void *buf, size_t len) {
    size_t n = len < sizeof said - said_len ? len : sizeof said - said_len;
    memcpy(said + said_len, buf, n);
    said_len += n;
    return (ssize_t)len;
}

/* A string of its own size; freed by fuzz_texts_free, since exit() may come between. */
static char *texts[64];
static size_t text_count;

static char *fuzz_text(const uint8_t *bytes, size_t len) {
    char *s = malloc(len + 1);
    HOLDS(s && text_count < sizeof texts / sizeof *texts);
    if (len > 0)
        memcpy(s, bytes, len);
    s[len] = '\0';
    return texts[text_count++] = s;
}

static void fuzz_texts_free(void) {
    while (text_count > 0)
        free(texts[--text_count]);
}

/* An endpoint that is taken is named by the same words again. */
static void endpoint_try(const uint8_t *bytes, size_t len) {
    struct sockaddr_un address;
    socklen_t address_len = 0;
    char name[1024];
    struct text t = {.buf = name, .cap = sizeof name};
    const char *endpoint = fuzz_text(bytes, len);
    if (setjmp(fuzz_exited)) {
        HOLDS(said_len > 0 && said[said_len - 1] == '\n');
        return;
    }
    endpoint_require(endpoint, &address, &address_len);
    HOLDS(address_len <= sizeof address && address_len > offsetof(struct sockaddr_un, sun_path) + 1);
    endpoint_add(&t, &address, address_len);
    HOLDS(name[0] == '"' || strcmp(name, endpoint) == 0);
}

/* base64 the plain way, as a second opinion; -1 for what is not canonical. */
static long base64_reference(const char *text, size_t len, uint8_t *out) {
    static const char alphabet[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    uint32_t bits = 0;
    long n = 0;
    int have = 0;
    size_t padding = len > 0 && text[len - 1] == '=' ? len > 1 && text[len - 2] == '=' ? 2 : 1 : 0;
    if (len == 0 || len % 4 != 0)
        return -1;
    for (size_t i = 0; i < len - padding; i++) {
        const char *at = text[i] ? strchr(alphabet, text[i]) : NULL;
        if (!at)
            return -1;
        bits = bits << 6 | (uint32_t)(at - alphabet);
        if ((have += 6) >= 8)
            out[n++] = (uint8_t)(bits >> (have -= 8));
    }
    return bits & ((1u << have) - 1) ? -1 : n;
}

static void base64_try(const uint8_t *bytes, size_t len) {
    static uint8_t got[4096], want[4096], again[4096 * 2];
    if (len > sizeof got)
        return;
    char *text = (char *)fuzz_copy(bytes, len);
    long n = base64_decode(text, len, got, sizeof got);
    HOLDS(n == base64_reference(text, len, want));
    HOLDS(n <= 0 || memcmp(got, want, (size_t)n) == 0);
    if (n > 0) {
        base64_encode(got, (size_t)n, (char *)again);
        HOLDS(memcmp(again, text, len) == 0 && again[len] == '\0');
    }
    if (n > KEK_BYTES) { /* more than fits is counted and not written */
        memset(got, 0xa5, sizeof got);
        HOLDS(base64_decode(text, len, got, KEK_BYTES) == n && got[0] == 0xa5 && got[KEK_BYTES] == 0xa5);
    }
    free(text);
}

/* A ring from any text: keys that are taken are whole, and differ. */
static void ring_try(const uint8_t *bytes, size_t len) {
    static struct ring *ring;
    if (len > KEK_TEXT_MAX)
        return;
    if (!ring)
        ring = ring_new();
    struct suite suite = ring->suite;
    memset(ring, 0, sizeof *ring);
    ring->suite = suite;
    char *text = fuzz_text(bytes, len);
    if (setjmp(fuzz_exited)) {
        HOLDS(said_len > 0 && said[said_len - 1] == '\n' && memchr(said, '\n', said_len) == said + said_len - 1);
        return;
    }
    ring_parse(ring, "KMS_KEK", text, strlen(text));
    HOLDS(ring->count >= 1 && ring->count <= KEK_MAX);
    for (size_t i = 0; i < ring->count; i++)
        for (size_t j = 0; j < i; j++)
            HOLDS(strcmp(ring->keks[i].key_id, ring->keks[j].key_id) != 0);
}

/* A command line: words with a newline between. */
static void options_try(const uint8_t *bytes, size_t len) {
    enum { WORDS_MAX = 40 };
    char *argv[WORDS_MAX + 1] = {fuzz_text((const uint8_t *)"kmsplugin", 9)};
    static struct options o;
    int argc = 1;
    for (const uint8_t *at = bytes, *end = bytes + len; at < end && argc < WORDS_MAX; argc++) {
        const uint8_t *newline = memchr(at, '\n', (size_t)(end - at));
        const uint8_t *stop = newline ? newline : end;
        argv[argc] = fuzz_text(at, (size_t)(stop - at));
        at = stop + 1;
    }
    int status = setjmp(fuzz_exited);
    if (status) {
        HOLDS(status - 1 <= 2 && said_len > 0 && said[said_len - 1] == '\n');
        return;
    }
    enum verb verb = options_parse(&o, argc, argv);
    HOLDS(verb < VERBS && o.timeout_s > 0 && o.serve.endpoint_count <= LISTENERS_MAX);
    HOLDS(o.serve.max_connections >= 1 && o.serve.max_connections <= CONNECTIONS_LIMIT);
    HOLDS(o.serve.uid_count <= ALLOWED_UIDS_MAX && o.serve.mode <= 0777);
}

/* A header list: name, newline, value, newline, as often as there is. */
static void fields_try(const uint8_t *bytes, size_t len) {
    struct request r = {.rpc = RPC_UNKNOWN, .content_length = -1, .timeout_ms = INT64_MAX};
    bool trailers = false;
    for (const uint8_t *at = bytes, *end = bytes + len; at < end;) {
        const uint8_t *parts[2];
        size_t lens[2];
        for (int i = 0; i < 2; i++) {
            const uint8_t *newline = at < end ? memchr(at, '\n', (size_t)(end - at)) : NULL;
            lens[i] = newline ? (size_t)(newline - at) : (size_t)(end - at);
            parts[i] = fuzz_copy(at, lens[i]);
            at = newline ? newline + 1 : end;
        }
        if (lens[0] == 0 && lens[1] == 0 && !trailers) {
            request_head_end(&r);
            trailers = true;
        } else {
            request_header(&r, parts[0], lens[0], parts[1], lens[1]);
        }
        if (!r.malformed && r.header_bytes <= HEADER_LIST_MAX) /* what nghttp2 must never be given */
            for (size_t i = 0; i < lens[0]; i++)
                HOLDS(parts[0][i] > ' ' && parts[0][i] < 0x7f && !(parts[0][i] >= 'A' && parts[0][i] <= 'Z'));
        free((void *)parts[0]);
        free((void *)parts[1]);
    }
    if (!trailers)
        request_head_end(&r);
    HOLDS(r.rpc <= RPC_UNKNOWN && r.trailers);
}

/* grpc-timeout, and sscanf's word on it. */
static void timeout_try(const uint8_t *bytes, size_t len) {
    uint8_t *value = fuzz_copy(bytes, len);
    int64_t ms = grpc_timeout_ms(value, len);
    if (ms >= 0) {
        char text[16] = {0}, unit;
        unsigned long n;
        HOLDS(len >= 2 && len <= 9);
        memcpy(text, bytes, len);
        HOLDS(sscanf(text, "%lu%c", &n, &unit) == 2 && strchr("HMSmun", unit));
        HOLDS(unit != 'm' || ms == (int64_t)n);
        HOLDS(unit != 'H' || ms == (int64_t)n * 3600 * 1000);
    }
    free(value);
}

/* What an operator may paste has a name, and what is taken for an object begins as one. */
static void input_try(const uint8_t *bytes, size_t len) {
    uint8_t *copy = fuzz_copy(bytes, len);
    const char *name = input_name(copy, len);
    HOLDS(strncmp(name, "is ", 3) == 0 || strncmp(name, "has ", 4) == 0 || strncmp(name, "was ", 4) == 0 ||
          strncmp(name, "begins ", 7) == 0);
    HOLDS(!is_plaintext(copy, len) || copy[0] == 'k' || copy[0] == '{' || copy[0] == 0xd9);
    HOLDS(!is_of_terminal(copy, len) || memmem(copy, len, "\r\n", 2));
    free(copy);
}

/* A peer's words in a log line: one line, no control characters, and the pairs behind it as they are. */
static void words_try(const uint8_t *bytes, size_t len) {
    char line[512], *words = fuzz_text(bytes, len);
    struct text t = {.buf = line, .cap = sizeof line};
    text_pair(&t, "uid", words);
    text_add(&t, " key_id=%s n=%d", "x", -5);
    for (size_t i = 0; i < t.len; i++)
        HOLDS(line[i] >= ' ' && line[i] < 0x7f);
    HOLDS(t.len > 14 && memcmp(line + t.len - 14, " key_id=x n=-5", 14) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t len) {
    static void (*const tries[])(const uint8_t *, size_t) = {
        endpoint_try, base64_try, ring_try, options_try, fields_try, timeout_try, input_try, words_try,
    };
    if (len < 1)
        return 0;
    said_len = 0;
    logging.level = LOG_INFO;
    tries[bytes[0] % (sizeof tries / sizeof *tries)](bytes + 1, len - 1);
    fuzz_texts_free();
    return 0;
}
