/*
 * Unit tests of kmsplugin.c, which is included whole: its functions are static.
 *
 *     build/unit [PREFIX]   runs all tests, or those whose name starts so; a line
 *                           "ok NAME" or "not ok NAME: why (line)" each; exits 1
 *                           if one failed
 *     UNIT_LONG=1           adds the million iterations of XAES-256-GCM
 *     UNIT_SEED=N           other pseudo-random numbers than usual
 *
 * Tests stand in the order of kmsplugin.c. A CHECK that fails ends its test.
 */
int kmsplugin_main(int argc, char **argv);
#define main kmsplugin_main
#define vsnprintf kmsplugin_vsnprintf /* the C library has its own here: strftime needs it */
#define exit unit_exit
#include "../kmsplugin.c"
#undef main
#undef vsnprintf
#undef exit

#include <malloc.h>
#include <ctype.h>
#include <setjmp.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/wait.h>

#include "responses.h"

#define LEN(array) (sizeof(array) / sizeof *(array))

/* ----------------------------------------------------------------- Harness */

static jmp_buf test_end;
static char test_row[200], test_why[800];
static unsigned long test_checks;

__attribute__((noreturn))
static void test_fail(int line, const char *what) {
    snprintf(test_why, sizeof test_why, "%s%s%s (line %d)", test_row, test_row[0] ? ": " : "", what, line);
    longjmp(test_end, 1);
}

#define CHECK(x) (test_checks++, (x) ? (void)0 : test_fail(__LINE__, #x))

/* Names the row of a table, or the round of a loop, that the next CHECKs are of. */
__attribute__((format(printf, 1, 2)))
static void row(const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(test_row, sizeof test_row, format, args);
    va_end(args);
}

/* The same numbers in every run (xorshift64*). */
static uint64_t prng_state;

static uint32_t prng(uint32_t below) {
    prng_state ^= prng_state >> 12;
    prng_state ^= prng_state << 25;
    prng_state ^= prng_state >> 27;
    return (uint32_t)((prng_state * 0x2545f4914f6cdd1dULL) >> 32) % below;
}

static void prng_fill(uint8_t *bytes, size_t len) {
    for (size_t i = 0; i < len; i++)
        bytes[i] = (uint8_t)prng(256);
}

static void *test_alloc(size_t len) {
    void *p = malloc(len + 1); /* never of size 0 */
    if (!p)
        abort();
    return p;
}

/* A copy in a block of its own and of just that size: ASan sees what reads past it. */
static uint8_t *copy_of(const void *bytes, size_t len) {
    uint8_t *p = malloc(len ? len : 1);
    if (!p)
        abort();
    if (len > 0)
        memcpy(p, bytes, len);
    return p;
}

static size_t unhex(const char *hex, uint8_t *out) {
    size_t n = strlen(hex) / 2;
    for (size_t i = 0; i < n; i++) {
        unsigned byte;
        sscanf(hex + 2 * i, "%2x", &byte);
        out[i] = (uint8_t)byte;
    }
    return n;
}

static bool hex_is(const uint8_t *bytes, size_t len, const char *hex) {
    uint8_t want[512];
    return unhex(hex, want) == len && memcmp(bytes, want, len) == 0;
}

static bool all_zero(const uint8_t *bytes, size_t len) {
    for (size_t i = 0; i < len; i++)
        if (bytes[i] != 0)
            return false;
    return true;
}

/* What kmsplugin.c calls to exit, as by die(): the end of a child, or a test that failed. LeakSanitizer has no say. */
static const char *test_name; /* NULL in a child */

void unit_exit(int code) {
    if (test_name)
        printf("not ok %s: it ended the program, exit status %d\n", test_name, code);
    fflush(stdout);
    _exit(code);
}

/*
 * What a body came to that ended the process, or returned. A file descriptor and
 * a fork each: functions that die do so in a child.
 */
enum { CHILD_RETURNED = 77 };

struct child {
    int code; /* exit status; 128 and more: a signal */
    char out[8192], err[8192];
};

static void child_read(int fd, char *text, size_t cap) {
    size_t len = 0;
    for (ssize_t n; len < cap - 1 && (n = read(fd, text + len, cap - 1 - len)) > 0;)
        len += (size_t)n;
    text[len] = '\0';
    close(fd);
}

static const struct child *child_run(void (*body)(const void *), const void *argument) {
    static struct child child;
    int out[2], err[2], status;
    fflush(stdout);
    if (pipe(out) < 0 || pipe(err) < 0)
        abort();
    pid_t pid = fork();
    if (pid == 0) {
        dup2(out[1], STDOUT_FILENO);
        dup2(err[1], STDERR_FILENO);
        test_name = NULL;
        alarm(10);
        body(argument);
        _exit(CHILD_RETURNED);
    }
    close(out[1]);
    close(err[1]);
    child_read(out[0], child.out, sizeof child.out);
    child_read(err[0], child.err, sizeof child.err);
    if (pid < 0 || waitpid(pid, &status, 0) != pid)
        abort();
    child.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    return &child;
}

static size_t lines_of(const char *text) {
    size_t n = 0;
    for (; *text; text++)
        n += *text == '\n';
    return n;
}

/* One sentence on stderr that starts with the program's name, nothing on stdout. */
static bool child_died(const struct child *c) {
    return c->code == 1 && c->out[0] == '\0' && lines_of(c->err) == 1 && strncmp(c->err, "kmsplugin: ", 11) == 0;
}

/* Keys: number n has these 32 bytes, its first byte no text and no two alike. */
static void test_key(unsigned n, uint8_t key[KEK_BYTES]) {
    for (unsigned i = 0; i < KEK_BYTES; i++)
        key[i] = (uint8_t)(i == 0 ? 0x80 + n : 7 * n + 13 * i);
}

static const char *test_key_text(unsigned n) {
    static char text[64];
    uint8_t key[KEK_BYTES];
    test_key(n, key);
    base64_encode(key, sizeof key, text);
    return text;
}

/* A ring of the keys first, first + 1, ... */
static struct ring *ring_of(unsigned first, unsigned count) {
    struct ring *ring = ring_new();
    for (unsigned n = first; n < first + count; n++)
        CHECK(ring_add(ring, test_key_text(n), strlen(test_key_text(n))) == NULL);
    return ring;
}

/* SHAKE-128 (FIPS 202), which BearSSL 0.6 does not have. */
struct shake {
    uint64_t lanes[25];
    unsigned at;
};

enum { SHAKE128_RATE = 168 };

static uint64_t rotate(uint64_t x, unsigned n) {
    return n == 0 ? x : x << n | x >> (64 - n);
}

static void shake_permute(struct shake *s) {
    uint64_t *a = s->lanes;
    uint8_t lfsr = 1;
    for (int round = 0; round < 24; round++) {
        uint64_t c[5], lane;
        for (int x = 0; x < 5; x++)
            c[x] = a[x] ^ a[x + 5] ^ a[x + 10] ^ a[x + 15] ^ a[x + 20];
        for (int i = 0; i < 25; i++)
            a[i] ^= c[(i + 4) % 5] ^ rotate(c[(i + 1) % 5], 1);
        lane = a[1];
        for (unsigned x = 1, y = 0, t = 1; t <= 24; t++) {
            unsigned next = (2 * x + 3 * y) % 5;
            x = y;
            y = next;
            uint64_t moved = a[x + 5 * y];
            a[x + 5 * y] = rotate(lane, t * (t + 1) / 2 % 64);
            lane = moved;
        }
        for (int y = 0; y < 25; y += 5) {
            memcpy(c, a + y, sizeof c);
            for (int x = 0; x < 5; x++)
                a[y + x] = c[x] ^ (~c[(x + 1) % 5] & c[(x + 2) % 5]);
        }
        for (unsigned bit = 0; bit < 7; bit++) {
            a[0] ^= (uint64_t)(lfsr & 1) << ((1u << bit) - 1);
            lfsr = (uint8_t)(lfsr << 1 ^ (lfsr & 0x80 ? 0x71 : 0));
        }
    }
    s->at = 0;
}

static void shake_absorb(struct shake *s, const uint8_t *bytes, size_t len) {
    for (size_t i = 0; i < len; i++) {
        s->lanes[s->at / 8] ^= (uint64_t)bytes[i] << s->at % 8 * 8;
        if (++s->at == SHAKE128_RATE)
            shake_permute(s);
    }
}

static void shake_finish(struct shake *s) {
    s->lanes[s->at / 8] ^= (uint64_t)0x1f << s->at % 8 * 8;
    s->lanes[SHAKE128_RATE / 8 - 1] ^= (uint64_t)0x80 << 56;
    shake_permute(s);
}

static void shake_squeeze(struct shake *s, uint8_t *out, size_t len) {
    for (size_t i = 0; i < len; i++) {
        if (s->at == SHAKE128_RATE)
            shake_permute(s);
        out[i] = (uint8_t)(s->lanes[s->at / 8] >> s->at % 8 * 8);
        s->at++;
    }
}

/* -------------------------------------------------------------------- Text */

/* The small printf says what stdio's says. */
#define SAME_TEXT(...)                                             \
    do {                                                           \
        char want_[400], got_[400];                                \
        struct text t_ = {.buf = got_, .cap = sizeof got_ - 1};    \
        snprintf(want_, sizeof want_, __VA_ARGS__);                \
        text_add(&t_, __VA_ARGS__);                                \
        got_[t_.len] = '\0';                                       \
        row("%.80s, not %.80s", want_, got_);                      \
        CHECK(strcmp(want_, got_) == 0);                           \
    } while (0)

static void text_formats(void) {
    SAME_TEXT("plain");
    SAME_TEXT("%s", "");
    SAME_TEXT("<%s|%s>", "one", "two");
    SAME_TEXT("<%.*s>", 3, "abcdef");
    SAME_TEXT("<%.*s>", 0, "abcdef");
    SAME_TEXT("<%.*s>", 300, "shorter");
    SAME_TEXT("%c%c%c", 'a', '%', '\n');
    SAME_TEXT("100%% of %d%%", 7);
    SAME_TEXT("%d %d %d %d", 0, 1, -1, INT_MAX);
    SAME_TEXT("%d", INT_MIN + 1);
    SAME_TEXT("%u %u %u", 0u, 1u, UINT_MAX);
    SAME_TEXT("%x %x %x", 0u, 0xdeadbeefu, UINT_MAX);
    SAME_TEXT("%lu %lx", ULONG_MAX, ULONG_MAX);
    SAME_TEXT("%llu %llx", ULLONG_MAX, ULLONG_MAX);
    SAME_TEXT("%zu %zu", (size_t)0, SIZE_MAX);
    SAME_TEXT("%04d-%02d-%02d", 2024, 2, 29);
    SAME_TEXT("%02d %02d %02d", 0, 9, 100);
    SAME_TEXT("%03u.%06llu", 7u, 42ULL);
    SAME_TEXT("%02x%02x", 0u, 0x0fu);
    SAME_TEXT("%s=%zu, %c%d, %s", "a", (size_t)5, '#', -3, "end");
}

static void text_is_cut_at_cap(void) {
    for (size_t cap = 0; cap < 24; cap++) {
        char *buf = test_alloc(cap);
        buf[cap] = '!';
        struct text t = {.buf = buf, .cap = cap};
        text_add(&t, "%s %d %04x", "sentence", -12345, 0xabcu);
        row("cap %zu", cap);
        CHECK(t.len == (cap < 20 ? cap : 20));
        CHECK(memcmp(buf, "sentence -12345 0abc", t.len) == 0);
        CHECK(buf[cap] == '!');
        free(buf);
    }
}

static const struct {
    const char *value;
    size_t len;
    const char *want;
} logfmt_values[] = {
    {"plain", 5, "plain"},
    {"unix:///run/kms.sock", 20, "unix:///run/kms.sock"},
    {"", 0, "\"\""},
    {"two words", 9, "\"two words\""},
    {"a=b", 3, "\"a=b\""},
    {"say \"hi\"", 8, "\"say \\\"hi\\\"\""},
    {"back\\slash", 10, "\"back\\\\slash\""},
    {"x\ntime=2024 level=info msg=forged", 33, "\"x\\x0atime=2024 level=info msg=forged\""},
    {"\r\t\x1b[31m", 7, "\"\\x0d\\x09\\x1b[31m\""},
    {"nul\0nul", 7, "\"nul\\x00nul\""},
    {"\x7f\x80\xff", 3, "\"\\x7f\\x80\\xff\""},
    {"\xc3\xa9", 2, "\"\\xc3\\xa9\""},
};

static void logfmt_quotes(void) {
    for (size_t i = 0; i < LEN(logfmt_values); i++) {
        char buf[200];
        struct text t = {.buf = buf, .cap = sizeof buf - 1};
        text_value(&t, logfmt_values[i].value, logfmt_values[i].len);
        buf[t.len] = '\0';
        row("%s, not %s", logfmt_values[i].want, buf);
        CHECK(strcmp(buf, logfmt_values[i].want) == 0);
    }
}

/* Reads a logfmt value back: its length, or -1 if the text is no single value. */
static long logfmt_parse(const char *s, size_t len, uint8_t *out) {
    long n = 0;
    bool quoted = len >= 2 && s[0] == '"' && s[len - 1] == '"';
    for (size_t i = quoted, end = len - quoted; i < end; i++) {
        if (s[i] < ' ' || s[i] > '~' || s[i] == '"' || (!quoted && (s[i] == ' ' || s[i] == '=' || s[i] == '\\')))
            return -1;
        if (s[i] != '\\') {
            out[n++] = (uint8_t)s[i];
        } else if (i + 3 < end && s[i + 1] == 'x') {
            n += (long)unhex((const char[]){s[i + 2], s[i + 3], '\0'}, out + n);
            i += 3;
        } else {
            i++;
            if (i == end || (s[i] != '"' && s[i] != '\\'))
                return -1;
            out[n++] = (uint8_t)s[i];
        }
    }
    return quoted || len > 0 ? n : -1;
}

static void logfmt_reads_back(void) {
    static const char nasty[] = "\n\r\"\\= x\t\x7f\x80";
    for (int i = 0; i < 20000; i++) {
        uint8_t value[40], back[200];
        char line[200];
        size_t len = prng(sizeof value);
        for (size_t k = 0; k < len; k++)
            value[k] = (uint8_t)(prng(2) ? prng(256) : (uint8_t)nasty[prng(sizeof nasty)]);
        struct text t = {.buf = line, .cap = sizeof line};
        text_value(&t, (char *)value, len);
        row("round %d", i);
        CHECK(logfmt_parse(line, t.len, back) == (long)len);
        CHECK(memcmp(value, back, len) == 0);
    }
}

/* A date is what gmtime_r says: every day for 800 years, and the first and last second of some. */
static void times_are_utc(void) {
    const long long end = sizeof(time_t) > 4 ? 800 * 366 : INT32_MAX / 86400;
    for (long long day = 0; day < end; day++) {
        const struct timespec time = {.tv_sec = (time_t)(day * 86400 + day % 3 * 43199 + day % 3 / 2),
                                      .tv_nsec = day % 1000 * 1000000 + 999999};
        char ours[32], libc[32], with_ms[64];
        struct text t = {.buf = ours, .cap = sizeof ours - 1};
        struct tm utc;
        text_time(&t, &time);
        ours[t.len] = '\0';
        strftime(libc, sizeof libc, "%Y-%m-%dT%H:%M:%S", gmtime_r(&time.tv_sec, &utc));
        snprintf(with_ms, sizeof with_ms, "%s.%03lldZ", libc, day % 1000);
        row("day %lld: %s", day, ours);
        CHECK(strcmp(ours, with_ms) == 0);
    }
}

static void body_log(const void *uid) {
    log_level = LOG_DEBUG;
    log_line(LOG_DEBUG, "msg=rpc method=%s uid=%s code=%s", "/x", (const char *)uid, "OK");
}

/* Of each byte: printable ASCII stays as it is, all else comes as \xNN. */
static void every_byte_is_escaped(void) {
    for (unsigned c = 0; c < 256; c++) {
        char in = (char)c, out[8] = "", want[8];
        struct text t = {.buf = out, .cap = sizeof out};
        text_escaped(&t, &in, 1);
        int len = snprintf(want, sizeof want, c >= ' ' && c <= '~' ? "%c" : "\\x%02x", c);
        row("byte %u: %.8s", c, out);
        CHECK(t.len == (size_t)len && memcmp(out, want, t.len) == 0);
        t = (struct text){.buf = out, .cap = sizeof out};
        text_value(&t, &in, 1);
        for (size_t i = 0; i < t.len; i++)
            CHECK(out[i] >= ' ' && out[i] <= '~');
    }
}

static void log_lines_cannot_be_forged(void) {
    static char endless[3000];
    memset(endless, '\n', sizeof endless - 1);
    const char *const uids[] = {"quiet", "a\nb", "a\r\nlevel=error", "\"", " msg=x", endless};
    for (size_t i = 0; i < LEN(uids); i++) {
        const struct child *c = child_run(body_log, uids[i]);
        size_t len = strlen(c->err);
        row("row %zu: %.100s", i, c->err);
        CHECK(c->code == CHILD_RETURNED);
        CHECK(lines_of(c->err) == 1 && c->err[len - 1] == '\n' && len <= LOG_LINE_MAX);
        CHECK(c->err[5 + 4] == '-' && strncmp(c->err, "time=2", 6) == 0 && c->err[5 + 23] == 'Z');
        CHECK(strstr(c->err, " level=debug msg=rpc method=/x uid=") == c->err + 5 + 24);
        for (size_t k = 0; k + 1 < len; k++)
            CHECK(c->err[k] >= ' ' && c->err[k] <= '~');
    }
}

static void body_log_info(const void *level) {
    log_level = *(const enum log_level *)level;
    log_line(LOG_ERROR, "msg=error");
    log_line(LOG_INFO, "msg=info");
    log_line(LOG_DEBUG, "msg=debug");
}

static void log_level_filters(void) {
    static const struct {
        enum log_level level;
        size_t lines;
    } rows[] = {{LOG_ERROR, 1}, {LOG_INFO, 2}, {LOG_DEBUG, 3}};
    for (size_t i = 0; i < LEN(rows); i++) {
        row("level %d", (int)rows[i].level);
        CHECK(lines_of(child_run(body_log_info, &rows[i].level)->err) == rows[i].lines);
    }
}

/* ------------------------------------------------------------------- Bytes */

static void hex(void) {
    char out[2 * 256 + 1];
    uint8_t bytes[256];
    for (unsigned i = 0; i < 256; i++)
        bytes[i] = (uint8_t)i;
    hex_encode(bytes, 256, out);
    CHECK(strlen(out) == 512);
    for (unsigned i = 0; i < 256; i++) {
        char want[3];
        snprintf(want, sizeof want, "%02x", i);
        CHECK(memcmp(out + 2 * i, want, 2) == 0);
    }
    hex_encode(bytes, 0, out);
    CHECK(out[0] == '\0');
}

static const char base64_alphabet[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

static long base64(const char *text, uint8_t *out, size_t cap) {
    uint8_t *exact = copy_of(text, strlen(text)); /* without a NUL */
    long n = base64_decode((char *)exact, strlen(text), out, cap);
    free(exact);
    return n;
}

static void base64_vectors(void) {
    static const struct {
        const char *bytes, *text;
    } rows[] = {/* RFC 4648 section 10 */
                {"", ""},         {"f", "Zg=="},         {"fo", "Zm8="},         {"foo", "Zm9v"},
                {"foob", "Zm9vYg=="}, {"fooba", "Zm9vYmE="}, {"foobar", "Zm9vYmFy"},
                /* every letter of the alphabet */
                {"\x14\xfb\x9c\x03\xd9\x7e", "FPucA9l+"}, {"\xff\xff\xfe", "///+"}};
    for (size_t i = 0; i < LEN(rows); i++) {
        uint8_t out[16];
        char text[32];
        size_t len = strlen(rows[i].bytes);
        row("%s", rows[i].text);
        base64_encode((const uint8_t *)rows[i].bytes, len, text);
        CHECK(strcmp(text, rows[i].text) == 0);
        if (len == 0)
            continue; /* the decoder refuses nothing: no key is empty */
        CHECK(base64(rows[i].text, out, sizeof out) == (long)len);
        CHECK(memcmp(out, rows[i].bytes, len) == 0);
    }
}

static void base64_roundtrip(void) {
    for (size_t len = 1; len < 200; len++) {
        uint8_t bytes[200], back[200];
        char text[300];
        prng_fill(bytes, len);
        base64_encode(bytes, len, text);
        row("%zu bytes", len);
        CHECK(strlen(text) == (len + 2) / 3 * 4);
        CHECK(base64(text, back, sizeof back) == (long)len);
        CHECK(memcmp(bytes, back, len) == 0);
    }
}

static void base64_refuses_other_bytes(void) {
    for (unsigned c = 0; c < 256; c++) {
        for (size_t at = 0; at < 8; at++) {
            uint8_t out[6];
            char text[] = "AAAAAAAA";
            text[at] = (char)c;
            bool good = (c != 0 && strchr(base64_alphabet, (int)c)) || (c == '=' && at == 7);
            row("byte 0x%02x at %zu", c, at);
            CHECK((base64_decode(text, 8, out, sizeof out) >= 0) == good);
        }
    }
}

/* Bits behind the last byte must be 0: else one key would have several spellings. */
static void base64_refuses_trailing_bits(void) {
    for (unsigned i = 0; i < 64; i++) {
        uint8_t out[3];
        const char one[] = {'Z', base64_alphabet[i], '=', '='}, two[] = {'Z', 'm', base64_alphabet[i], '='};
        row("%.4s, %.4s", one, two);
        CHECK(base64_decode(one, 4, out, sizeof out) == (i % 16 == 0 ? 1 : -1));
        CHECK(base64_decode(two, 4, out, sizeof out) == (i % 4 == 0 ? 2 : -1));
    }
}

static void base64_refuses_bad_padding(void) {
    static const char *const rows[] = {
        "", "=", "==", "===", "====", "A", "AA", "AAA", "A===", "=AAA", "A=AA", "AA=A", "A=A=", "=A==", "AAAA=",
        "AAAA====", "AA==AAAA", "AAA=AAAA", "Zg=", "Zg==\n", "Zg== ", " Zg==", "Zg\n==", "Zg==Zg==", "Zg==Zm9v",
        "Z-_v", "AAAAA===",
    };
    for (size_t i = 0; i < LEN(rows); i++) {
        uint8_t out[16];
        row("'%s'", rows[i]);
        CHECK(base64(rows[i], out, sizeof out) == -1);
    }
}

static void base64_keeps_to_cap(void) {
    for (size_t len = 1; len < 40; len++) {
        uint8_t bytes[40], *out = test_alloc(KEK_BYTES);
        char text[64];
        prng_fill(bytes, len);
        base64_encode(bytes, len, text);
        memset(out, 0xee, KEK_BYTES);
        uint8_t *exact = copy_of(out, KEK_BYTES);
        row("%zu bytes", len);
        CHECK(base64(text, exact, KEK_BYTES) == (long)len); /* what is too long is told, and not written */
        CHECK(memcmp(exact, len <= KEK_BYTES ? bytes : out, len <= KEK_BYTES ? len : KEK_BYTES) == 0);
        free(exact);
        free(out);
    }
}

/* A second opinion: decodes by the numbers, and looks at the code point. */
static bool utf8_reference(const uint8_t *s, size_t len) {
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    while (len > 0) {
        unsigned n = s[0] < 0x80 ? 1 : s[0] >> 5 == 6 ? 2 : s[0] >> 4 == 14 ? 3 : s[0] >> 3 == 30 ? 4 : 0;
        if (n == 0 || n > len)
            return false;
        uint32_t point = n == 1 ? s[0] : s[0] & (0x7fu >> n);
        for (unsigned i = 1; i < n; i++) {
            if (s[i] >> 6 != 2)
                return false;
            point = point << 6 | (s[i] & 63);
        }
        if (point < least[n] || point > 0x10ffff || (point >= 0xd800 && point <= 0xdfff))
            return false;
        s += n;
        len -= n;
    }
    return true;
}

static void utf8_table(void) {
    static const struct {
        const char *bytes;
        bool valid;
    } rows[] = {
        {"", true},
        {"plain", true},
        {"caf\xc3\xa9", true},
        {"\xe2\x82\xac", true},
        {"\xf0\x9f\x94\x91", true},
        {"\xc2\x80", true},
        {"\xdf\xbf", true},
        {"\xe0\xa0\x80", true},
        {"\xed\x9f\xbf", true},
        {"\xee\x80\x80", true},
        {"\xef\xbf\xbf", true},
        {"\xf0\x90\x80\x80", true},
        {"\xf4\x8f\xbf\xbf", true},
        {"\x80", false},                 /* a continuation alone */
        {"a\xbf", false},
        {"\xc3", false},                 /* cut short */
        {"\xe2\x82", false},
        {"\xf0\x9f\x94", false},
        {"\xc3(", false},                /* no continuation */
        {"\xe2(\x82", false},
        {"\xf0\x9f\x94(", false},
        {"\xc0\x80", false},             /* overlong */
        {"\xc1\xbf", false},
        {"\xe0\x9f\xbf", false},
        {"\xf0\x8f\xbf\xbf", false},
        {"\xed\xa0\x80", false},         /* surrogates */
        {"\xed\xbf\xbf", false},
        {"\xed\xa0\xbd\xed\xb4\x91", false},
        {"\xf4\x90\x80\x80", false},     /* over U+10FFFF */
        {"\xf5\x80\x80\x80", false},
        {"\xf8\x88\x80\x80\x80", false},
        {"\xfe", false},
        {"\xff", false},
        {"good then \xff", false},
    };
    for (size_t i = 0; i < LEN(rows); i++) {
        uint8_t *exact = copy_of(rows[i].bytes, strlen(rows[i].bytes));
        row("row %zu", i);
        CHECK((utf8_check(exact, strlen(rows[i].bytes)) >= 0) == rows[i].valid);
        CHECK(utf8_reference(exact, strlen(rows[i].bytes)) == rows[i].valid);
        free(exact);
    }
    CHECK(utf8_check((const uint8_t *)"a\0b", 3) == 1 && utf8_check((const uint8_t *)"01234567\0\x80", 9) == 1);
}

static void utf8_everything(void) {
    uint8_t s[4];
    for (uint32_t i = 0; i < 0x10000; i++) {
        s[0] = (uint8_t)(i >> 8);
        s[1] = (uint8_t)i;
        row("%02x %02x", s[0], s[1]);
        CHECK((utf8_check(s, 1) >= 0) == utf8_reference(s, 1));
        CHECK((utf8_check(s, 2) >= 0) == utf8_reference(s, 2));
    }
    static const uint8_t edges[] = {0x00, 0x7f, 0x80, 0x8f, 0x90, 0x9f, 0xa0, 0xbf, 0xc0, 0xc2, 0xff};
    for (unsigned lead = 0xe0; lead < 0x100; lead++) {
        for (unsigned i = 0; i < LEN(edges) * LEN(edges) * LEN(edges); i++) {
            s[0] = (uint8_t)lead;
            s[1] = edges[i % LEN(edges)];
            s[2] = edges[i / LEN(edges) % LEN(edges)];
            s[3] = edges[i / LEN(edges) / LEN(edges)];
            row("%02x %02x %02x %02x", s[0], s[1], s[2], s[3]);
            CHECK((utf8_check(s, 3) >= 0) == utf8_reference(s, 3));
            CHECK((utf8_check(s, 4) >= 0) == utf8_reference(s, 4));
        }
    }
}

/* Every byte at every place of strings of any length, none longer than it is, for AddressSanitizer. */
static void text_of_any_length(void) {
    enum { LEN_MAX = 40 };
    for (size_t len = 0; len <= LEN_MAX; len++) {
        uint8_t *s = test_alloc(len);
        memset(s, 'a', len);
        CHECK(utf8_check(s, len) == 0 && is_value(s, len));
        for (size_t at = 0; at < len; at++) {
            for (unsigned c = 0; c < 256; c++) {
                s[at] = (uint8_t)c;
                row("byte 0x%02x at %zu of %zu", c, at, len);
                CHECK(utf8_check(s, len) == (c == 0 ? 1 : c < 0x80 ? 0 : -1));
                bool blank = c == ' ' || c == '\t', end = at == 0 || at == len - 1;
                CHECK(is_value(s, len) == (blank ? !end : c > ' ' && c != 0x7f));
            }
            s[at] = 'a';
        }
        free(s);
    }
}

/* What release/string.c has in place of the C library's, in the release build. */
static void memory_functions(void) {
    enum { SIZE_MAX_TRIED = 300, OFFSETS = 17, ROOM = SIZE_MAX_TRIED + 3 * OFFSETS };
    void *(*volatile set)(void *, int, size_t) = memset;
    void *(*volatile copy)(void *restrict, const void *restrict, size_t) = memcpy;
    void *(*volatile move)(void *, const void *, size_t) = memmove;
    int (*volatile compare)(const void *, const void *, size_t) = memcmp;
    uint8_t from[ROOM], to[ROOM], expected[ROOM];
    for (size_t i = 0; i < ROOM; i++)
        from[i] = (uint8_t)(i * 7 + 1);
    for (size_t n = 0; n <= SIZE_MAX_TRIED; n++) {
        for (size_t at = 0; at < OFFSETS; at++) {
            row("%zu bytes at %zu", n, at);
            for (size_t i = 0; i < ROOM; i++)
                to[i] = expected[i] = (uint8_t)i;
            for (size_t i = 0; i < n; i++)
                expected[at + i] = 0xa5;
            bool right = set(to + at, 0xa5, n) == to + at;
            for (size_t i = 0; i < ROOM; i++)
                right = right && to[i] == expected[i];
            for (size_t i = 0; i < n; i++)
                expected[at + i] = from[OFFSETS - at + i];
            right = right && copy(to + at, from + OFFSETS - at, n) == to + at;
            for (size_t i = 0; i < ROOM; i++)
                right = right && to[i] == expected[i];
            CHECK(right && compare(to + at, from + OFFSETS - at, n) == 0);
            for (size_t shift = 0; shift <= 2 * OFFSETS; shift += 2) { /* to lower and to higher addresses */
                for (size_t i = 0; i < ROOM; i++)
                    to[i] = expected[i] = (uint8_t)(i * 11);
                for (size_t i = 0; i < n; i++)
                    expected[shift + i] = (uint8_t)((at + i) * 11);
                right = right && move(to + shift, to + at, n) == to + shift;
                for (size_t i = 0; i < ROOM; i++)
                    right = right && to[i] == expected[i];
            }
            CHECK(right);
        }
        for (size_t i = 0; i < n; i++) {
            copy(to, from, n);
            to[i] ^= 0x80;
            CHECK((compare(to, from, n) < 0) == (to[i] < from[i]) && compare(to, from, n) != 0);
        }
    }
}

static void varints(void) {
    static const struct {
        const char *hex;
        int rv;
        uint64_t value;
    } rows[] = {
        {"00", 0, 0},
        {"01", 0, 1},
        {"7f", 0, 127},
        {"8001", 0, 128},
        {"ac02", 0, 300},
        {"ffffffff0f", 0, UINT32_MAX},
        {"ffffffffffffffffff01", 0, UINT64_MAX},
        {"8000", 0, 0}, /* longer than it need be: allowed */
        {"80808080808080808000", 0, 0},
        {"", -1, 0},
        {"80", -1, 0},
        {"ffffffffffffffffff", -1, 0},
        {"8080808080808080808000", -1, 0}, /* eleven bytes */
        {"ffffffffffffffffffffff01", -1, 0},
    };
    for (size_t i = 0; i < LEN(rows); i++) {
        uint8_t bytes[16];
        size_t len = unhex(rows[i].hex, bytes);
        uint8_t *exact = copy_of(bytes, len);
        const uint8_t *at = exact;
        uint64_t value;
        int rv = varint_next(&at, exact + len, &value);
        row("%s", rows[i].hex);
        CHECK(rv == rows[i].rv && at <= exact + len);
        if (rv == 0)
            CHECK(value == rows[i].value && at == exact + len);
        free(exact);
    }
}

static void fields(void) {
    static const struct {
        const char *hex;
        int rv;
        uint32_t number;
        unsigned wire_type;
        size_t len; /* of its contents */
    } rows[] = {
        {"", 0, 0, 0, 0},
        {"0800", 1, 1, 0, 1},
        {"08ac02", 1, 1, 0, 2},
        {"0a00", 1, 1, 2, 0},
        {"0a03616263", 1, 1, 2, 3},
        {"090102030405060708", 1, 1, 1, 8},
        {"0d01020304", 1, 1, 5, 4},
        {"faffffff0f00", 1, 0x1fffffff, 2, 0}, /* the largest field number */
        {"00", -1, 0, 0, 0},                   /* number 0 */
        {"0200", -1, 0, 0, 0},
        {"80", -1, 0, 0, 0}, /* truncated in the tag */
        {"08", -1, 0, 0, 0}, /* in a varint */
        {"0880", -1, 0, 0, 0},
        {"08ffffffffffffffffffff01", -1, 0, 0, 0}, /* a varint of eleven bytes */
        {"0901020304050607", -1, 0, 0, 0},         /* in 64 bits */
        {"0d010203", -1, 0, 0, 0},                 /* in 32 bits */
        {"0a", -1, 0, 0, 0},                       /* in a length */
        {"0a80", -1, 0, 0, 0},
        {"0a036162", -1, 0, 0, 0}, /* in its bytes */
        {"0affffffff0f61", -1, 0, 0, 0}, /* 4 GiB */
        {"0affffffffffffffffff0161", -1, 0, 0, 0}, /* 2^64 - 1: no pointer may wrap */
        {"0affffffffffffffff7f61", -1, 0, 0, 0},
        {"0b", -1, 0, 0, 0}, /* groups */
        {"0c", -1, 0, 0, 0},
        {"0b0c", -1, 0, 0, 0},
        {"0e00", -1, 0, 0, 0}, /* types 6 and 7 do not exist */
        {"0f00", -1, 0, 0, 0},
        {"828080801000", -1, 0, 0, 0}, /* number 2^29 */
        {"ffffffffffffffffff0100", -1, 0, 0, 0},
    };
    for (size_t i = 0; i < LEN(rows); i++) {
        uint8_t bytes[32];
        size_t len = unhex(rows[i].hex, bytes);
        uint8_t *exact = copy_of(bytes, len);
        const uint8_t *at = exact;
        struct field f;
        row("%s", rows[i].hex);
        int rv = field_next(&at, exact + len, &f);
        CHECK(rv == rows[i].rv);
        if (rv > 0) {
            CHECK(f.number == rows[i].number && f.wire_type == rows[i].wire_type && f.len == rows[i].len);
            CHECK(f.bytes + f.len == exact + len && at == exact + len);
            CHECK(field_next(&at, exact + len, &f) == 0);
        }
        free(exact);
    }
}

static void strings_of_messages(void) {
    static const struct {
        const char *name;
        const ProtobufCMessageDescriptor *type;
        const char *hex;
        int want;
    } rows[] = {
        {"no message at all", &v2__encrypt_request__descriptor, "", 0},
        {"a good uid", &v2__encrypt_request__descriptor, "12026869", 0},
        {"an empty uid", &v2__encrypt_request__descriptor, "1200", 0},
        {"a uid with NUL", &v2__encrypt_request__descriptor, "1203610062", 1},
        {"a uid that is not UTF-8", &v2__encrypt_request__descriptor, "1202c328", -1},
        {"NUL first, then not UTF-8", &v2__encrypt_request__descriptor, "120100" "1201ff", -1},
        {"not UTF-8, then a good one", &v2__encrypt_request__descriptor, "1201ff" "120161", -1},
        {"bytes may hold anything", &v2__encrypt_request__descriptor, "0a03ff00c0", 0},
        {"unknown fields too", &v2__encrypt_request__descriptor, "7a02ff00", 0},
        {"truncated behind a good string", &v2__encrypt_request__descriptor, "12026869" "0a05", -1},
        {"a good map key", &v2__decrypt_request__descriptor, "2207" "0a0161" "120200ff", 0},
        {"a map key with NUL", &v2__decrypt_request__descriptor, "2205" "0a03610062", 1},
        {"a map key that is not UTF-8", &v2__decrypt_request__descriptor, "2204" "0a02c328", -1},
        {"a map entry that is no message", &v2__decrypt_request__descriptor, "2202" "0a05", -1},
        {"NUL in one entry, not UTF-8 in the next", &v2__decrypt_request__descriptor, "2203" "0a0100" "2203" "0a01ff",
         -1},
        {"a map in EncryptedObject", &v2__etcd__encrypted_object__descriptor, "2203" "0a01ff", -1},
        {"no string in Status", &v2__status_request__descriptor, "0a01ff", 0},
        {"version of v1beta1", &v2__v1beta1__version_request__descriptor, "0a01ff", -1},
    };
    for (size_t i = 0; i < LEN(rows); i++) {
        uint8_t bytes[32];
        size_t len = unhex(rows[i].hex, bytes);
        uint8_t *exact = copy_of(bytes, len);
        row("%s", rows[i].name);
        CHECK(strings_check(rows[i].type, exact, len) == rows[i].want);
        free(exact);
    }
}

/* ------------------------------------------------------------------ Memory */

static void heap_classes(void) {
    struct heap h = {0};
    for (size_t size = 1; size < 5000; size += size < 300 ? 1 : 61) {
        unsigned class = heap_class(size);
        row("%zu bytes", size);
        if (class < HEAP_CLASSES)
            CHECK(size <= (size_t)HEAP_CLASS0_BYTES << class);
        if (class > 0)
            CHECK(size > (size_t)HEAP_CLASS0_BYTES << (class - 1));
        uint8_t *p = heap_new(&h, size);
        CHECK(p && (uintptr_t)p % _Alignof(max_align_t) == 0 && h.in_use == heap_cost(size));
        CHECK(heap_cost(size) >= malloc_usable_size(block_of(p))); /* no less than it really takes */
        memset(p, 0xaa, size); /* ASan: there is so much */
        CHECK(block_cost(p) == heap_cost(size));
        heap_free(&h, p);
        CHECK(h.in_use == 0);
        uint8_t *again = heap_new(&h, size);
        CHECK(again && (class >= HEAP_CLASSES || again == p)); /* a kept block is given out again */
        if (class < HEAP_CLASSES)
            CHECK(all_zero(again, size)); /* and was wiped before */
        heap_free(&h, again);
    }
    CHECK(h.total > 0);
    heap_tidy(&h);
    CHECK(h.total == 0 && h.in_use == 0);
    for (size_t i = 0; i < HEAP_CLASSES; i++)
        CHECK(h.free[i] == NULL);
    if (sizeof(size_t) > 4)
        CHECK(heap_new(&h, (size_t)UINT32_MAX + 1) == NULL);
}

/* What is free, but was not given back to malloc. */
static size_t kept(const struct heap *h) {
    return h->total - h->in_use;
}

static void heap_accounts(void) {
    static struct {
        uint8_t *bytes;
        size_t size;
        uint8_t fill;
    } live[200];
    struct heap h = {0};
    size_t in_use = 0;
    for (int round = 0; round < 20000; round++) {
        size_t i = prng(LEN(live));
        row("round %d", round);
        if (live[i].bytes) {
            for (size_t k = 0; k < live[i].size; k++)
                CHECK(live[i].bytes[k] == live[i].fill); /* nobody else was given it */
            CHECK(block_cost(live[i].bytes) == heap_cost(live[i].size));
            heap_free(&h, live[i].bytes);
            in_use -= heap_cost(live[i].size);
            live[i].bytes = NULL;
        } else {
            live[i].size = 1 + prng(prng(10) ? 300 : 9000);
            live[i].fill = (uint8_t)prng(256);
            live[i].bytes = heap_new(&h, live[i].size);
            CHECK(live[i].bytes);
            memset(live[i].bytes, live[i].fill, live[i].size);
            in_use += heap_cost(live[i].size);
        }
        CHECK(h.in_use == in_use && kept(&h) <= HEAP_KEEP_BYTES);
        if (round % 1000 == 0)
            heap_tidy(&h);
    }
    for (size_t i = 0; i < LEN(live); i++)
        if (live[i].bytes)
            heap_free(&h, live[i].bytes);
    CHECK(h.in_use == 0);
    heap_tidy(&h);
    CHECK(kept(&h) == 0);
}

/* A block that is kept was wiped when it came back, not when it goes out again. */
static void heap_wipes(void) {
    struct heap h = {0};
    for (unsigned class = 0; class < HEAP_CLASSES; class++) {
        size_t size = (size_t)HEAP_CLASS0_BYTES << class;
        uint8_t *p = heap_new(&h, size);
        memset(p, 0x55, size);
        heap_free(&h, p);
        row("class %u", class);
        CHECK(h.free[class] && h.free[class]->bytes == p && all_zero(p, size));
    }
    heap_tidy(&h);
}

static void heap_keeps_no_more_than_its_share(void) {
    enum { BLOCKS = HEAP_KEEP_BYTES / 2048 + 100 };
    static void *blocks[BLOCKS];
    struct heap h = {0};
    for (size_t i = 0; i < BLOCKS; i++)
        CHECK((blocks[i] = heap_new(&h, 2048)) != NULL);
    for (size_t i = 0; i < BLOCKS; i++)
        heap_free(&h, blocks[i]);
    CHECK(kept(&h) <= HEAP_KEEP_BYTES && kept(&h) > HEAP_KEEP_BYTES / 2 && h.in_use == 0);
    heap_tidy(&h);
    CHECK(kept(&h) == 0);
}

static void arena(void) {
    struct arena a;
    CHECK(arena_init(&a) == 0);
    for (size_t size = 0; size < 100; size++) {
        size_t before = a.used;
        uint8_t *p = arena_new(&a, size);
        row("%zu bytes", size);
        CHECK(p && (uintptr_t)p % _Alignof(max_align_t) == 0 && p == a.base + before && a.used >= before + size);
        memset(p, 0xaa, size);
    }
    arena_reset(&a);
    CHECK(a.used == 0 && all_zero(a.base, 8192));

    static const size_t too_much[] = {ARENA_BYTES + 1, SIZE_MAX, SIZE_MAX - 15, SIZE_MAX - 16, SIZE_MAX / 2};
    for (size_t i = 0; i < LEN(too_much); i++) {
        row("%zx bytes", too_much[i]);
        CHECK(arena_new(&a, too_much[i]) == NULL && a.exhausted && a.used == 0);
        arena_reset(&a);
        CHECK(!a.exhausted);
    }

    size_t count = 0;
    for (uint8_t *p; (p = arena_new(&a, 1000)); count++)
        memset(p, 0xaa, 1000);
    row("full");
    CHECK(count == ARENA_BYTES / 1008 && a.exhausted && a.used <= ARENA_BYTES);
    arena_free(&a, a.base); /* nothing: the reset frees all */
    arena_reset(&a);
    CHECK(!a.exhausted && a.used == 0 && all_zero(a.base, ARENA_BYTES));
    CHECK(arena_new(&a, ARENA_BYTES) == a.base && arena_new(&a, 1) == NULL);
    munmap(a.base, ARENA_BYTES);
}

/* ----------------------------------------------------------------- Sealing */

/* Every implementation that BearSSL has here; all of them must agree. */
static size_t suites_all(struct suite out[5]) {
    size_t n = 0;
    out[n++] = suite_choose();
    if (br_aes_x86ni_ctrcbc_get_vtable() && br_ghash_pclmul_get())
        out[n++] = (struct suite){br_aes_x86ni_ctrcbc_get_vtable(), br_aes_x86ni_ctr_get_vtable(), br_ghash_pclmul_get(),
                                  "x86ni"};
    out[n++] = (struct suite){&br_aes_ct64_ctrcbc_vtable, &br_aes_ct64_ctr_vtable, br_ghash_ctmul64, "ct64"};
    out[n++] = (struct suite){&br_aes_ct_ctrcbc_vtable, &br_aes_ct_ctr_vtable, br_ghash_ctmul, "ct, ctmul"};
    out[n++] = (struct suite){&br_aes_ct_ctrcbc_vtable, &br_aes_ct_ctr_vtable, br_ghash_ctmul32, "ct, ctmul32"};
    return n;
}

static const struct {
    uint8_t key;
    const char *aad, *l, *k1, *kx, *sealed;
} xaes_vectors[] = {
    {0x01, "", "7298caa565031eadc6ce23d23ea66378", "e531954aca063d5b8d9c47a47d4cc6f0",
     "c8612c9ed53fe43e8e005b828a1631a0bbcb6ab2f46514ec4f439fcfd0fa969b",
     "ce546ef63c9cc60765923609b33a9a1974e96e52daf2fcf7075e2271"},
    {0x03, "c2sp.org/XAES-256-GCM", "91c08762876dccf9ba204a33768fa5fe", "23810ec50edb99f374409466ed1f4b7b",
     "e9c621d4cdd9b11b00a6427ad7e559aeedd66b3857646677748f8ca796cb3fd8",
     "986ec1832593df5443a179437fd083bf3fdb41abd740a21f71eb769d"},
};

static void xaes_known_answers(void) {
    const uint8_t *nonce = (const uint8_t *)"ABCDEFGHIJKLMNOPQRSTUVWX";
    struct suite suites[5];
    size_t count = suites_all(suites);
    for (size_t i = 0; i < count * LEN(xaes_vectors); i++) {
        const struct suite *suite = &suites[i % count];
        size_t v = i / count, aad_len = strlen(xaes_vectors[v].aad);
        const uint8_t *aad = (const uint8_t *)xaes_vectors[v].aad;
        const uint8_t zero[BLOCK_BYTES] = {0};
        const uint8_t *plain = (const uint8_t *)"XAES-256-GCM";
        uint8_t key[KEK_BYTES], out[2 * BLOCK_BYTES] = {0}, sealed[12 + TAG_BYTES], opened[12];
        struct kek kek;
        row("vector %zu, %s", v + 1, suite->name);
        memset(key, xaes_vectors[v].key, sizeof key);
        kek_init(&kek, suite, key);
        aes_block(&kek.aes, zero, out);
        CHECK(hex_is(out, BLOCK_BYTES, xaes_vectors[v].l));
        CHECK(hex_is(kek.k1, BLOCK_BYTES, xaes_vectors[v].k1));
        for (uint8_t half = 0; half < 2; half++) {
            const uint8_t m[4] = {0, half + 1, 'X', 0};
            memcpy(out + half * BLOCK_BYTES, m, 4);
            memcpy(out + half * BLOCK_BYTES + 4, nonce, 12);
            aes_block(&kek.aes, kek.k1, out + half * BLOCK_BYTES);
        }
        CHECK(hex_is(out, sizeof out, xaes_vectors[v].kx));
        CHECK(xaes_crypt(suite, true, &kek, nonce, aad, aad_len, plain, 12, sealed) == 0);
        CHECK(hex_is(sealed, sizeof sealed, xaes_vectors[v].sealed));
        CHECK(xaes_crypt(suite, false, &kek, nonce, aad, aad_len, sealed, 12, opened) == 0);
        CHECK(memcmp(opened, plain, 12) == 0);
    }
}

/* C2SP's accumulated test: what all suites make of the same stream of inputs, hashed. */
static bool xaes_accumulated(unsigned long iterations, const char *want) {
    struct suite suites[5];
    size_t count = iterations > 10000 ? 1 : suites_all(suites);
    struct shake input = {.at = 0}, output = {.at = 0};
    uint8_t hash[32];
    suites[0] = suite_choose();
    shake_finish(&input);
    for (unsigned long i = 0; i < iterations; i++) {
        uint8_t key[KEK_BYTES], nonce[NONCE_BYTES], len, aad_len, plain[255], aad[255], first[255 + TAG_BYTES];
        shake_squeeze(&input, key, sizeof key);
        shake_squeeze(&input, nonce, sizeof nonce);
        shake_squeeze(&input, &len, 1);
        shake_squeeze(&input, plain, len);
        shake_squeeze(&input, &aad_len, 1);
        shake_squeeze(&input, aad, aad_len);
        for (size_t s = 0; s < count; s++) {
            struct kek kek;
            uint8_t sealed[255 + TAG_BYTES];
            kek_init(&kek, &suites[s], key);
            xaes_crypt(&suites[s], true, &kek, nonce, aad, aad_len, plain, len, sealed);
            if (s == 0)
                memcpy(first, sealed, len + (size_t)TAG_BYTES);
            row("iteration %lu, %s", i, suites[s].name);
            CHECK(memcmp(first, sealed, len + (size_t)TAG_BYTES) == 0);
        }
        shake_absorb(&output, first, len + (size_t)TAG_BYTES);
    }
    shake_finish(&output);
    shake_squeeze(&output, hash, sizeof hash);
    return hex_is(hash, sizeof hash, want);
}

static void xaes_10000_iterations(void) {
    uint8_t out[16];
    struct shake s = {.at = 0};
    shake_finish(&s);
    shake_squeeze(&s, out, sizeof out);
    CHECK(hex_is(out, sizeof out, "7f9c2ba4e88f827d616045507605853e")); /* SHAKE-128 of nothing: FIPS 202 */
    CHECK(xaes_accumulated(10000, "e6b9edf2df6cec60c8cbd864e2211b597fb69a529160cd040d56c0c210081939"));
}

static void xaes_1000000_iterations(void) {
    CHECK(xaes_accumulated(1000000, "2163ae1445985a30b60585ee67daa55674df06901b890593e824b8a7c885ab15"));
}

/* From the GCM specification of McGrew and Viega, appendix B, as NIST uses them. */
#define GCM_KEY "feffe9928665731c6d6a8f9467308308"
#define GCM_NONCE "cafebabefacedbaddecaf888"
#define GCM_AAD "feedfacedeadbeeffeedfacedeadbeefabaddad2"
#define GCM_PLAIN                                                      \
    "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72" \
    "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39"
#define ZERO16 "00000000000000000000000000000000"

static const struct {
    const char *name, *key, *nonce, *aad, *plain, *sealed, *tag;
} gcm_vectors[] = {
    {"case 1, AES-128", ZERO16, "000000000000000000000000", "", "", "", "58e2fccefa7e3061367f1d57a4e7455a"},
    {"case 2, AES-128", ZERO16, "000000000000000000000000", "", ZERO16, "0388dace60b6a392f328c2b971b2fe78",
     "ab6e47d42cec13bdf53a67b21257bddf"},
    {"case 4, AES-128", GCM_KEY, GCM_NONCE, GCM_AAD, GCM_PLAIN,
     "42831ec2217774244b7221b784d0d49ce3aa212f2c02a4e035c17e2329aca12e"
     "21d514b25466931c7d8f6a5aac84aa051ba30b396a0aac973d58e091",
     "5bc94fbc3221a5db94fae95ae7121a47"},
    {"case 7, AES-192", ZERO16 "0000000000000000", "000000000000000000000000", "", "", "",
     "cd33b28ac773f74ba00ed1f312572435"},
    {"case 10, AES-192", GCM_KEY "feffe9928665731c", GCM_NONCE, GCM_AAD, GCM_PLAIN,
     "3980ca0b3c00e841eb06fac4872a2757859e1ceaa6efd984628593b40ca1e19c"
     "7d773d00c144c525ac619d18c84a3f4718e2448b2fe324d9ccda2710",
     "2519498e80f1478f37ba55bd6d27618c"},
    {"case 13, AES-256", ZERO16 ZERO16, "000000000000000000000000", "", "", "", "530f8afbc74536b9a963b4f1c4cb738b"},
    {"case 14, AES-256", ZERO16 ZERO16, "000000000000000000000000", "", ZERO16, "cea7403d4d606b6e074ec5d3baf39d18",
     "d0d1c8a799996bf0265b98b5d48ab919"},
    {"case 16, AES-256", GCM_KEY GCM_KEY, GCM_NONCE, GCM_AAD, GCM_PLAIN,
     "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa"
     "8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662",
     "76fc6ece0f4e1768cddf8853bb2d551b"},
};

/* Every vector by every suite: sealed, opened, and not opened with any one bit of the tag wrong. */
static void gcm_known_answers(void) {
    struct suite suites[5];
    size_t count = suites_all(suites);
    for (size_t i = 0; i < count * LEN(gcm_vectors); i++) {
        const struct suite *suite = &suites[i % count];
        size_t v = i / count;
        uint8_t key[32], nonce[12], aad[32], plain[64], sealed[64 + TAG_BYTES], data[64];
        size_t key_len = unhex(gcm_vectors[v].key, key), aad_len = unhex(gcm_vectors[v].aad, aad);
        size_t len = unhex(gcm_vectors[v].plain, plain);
        unhex(gcm_vectors[v].nonce, nonce);
        row("%s, %s", gcm_vectors[v].name, suite->name);
        CHECK(gcm_crypt(suite, true, key, key_len, nonce, aad, aad_len, plain, len, sealed) == 0);
        CHECK(hex_is(sealed, len, gcm_vectors[v].sealed));
        CHECK(hex_is(sealed + len, TAG_BYTES, gcm_vectors[v].tag));
        CHECK(gcm_crypt(suite, false, key, key_len, nonce, aad, aad_len, sealed, len, data) == 0);
        CHECK(memcmp(data, plain, len) == 0);
        for (unsigned bit = 0; bit < 8 * TAG_BYTES; bit++) {
            sealed[len + bit / 8] ^= (uint8_t)(1 << bit % 8);
            CHECK(gcm_crypt(suite, false, key, key_len, nonce, aad, aad_len, sealed, len, data) == -1);
            CHECK(all_zero(data, len)); /* no plaintext without its tag */
            sealed[len + bit / 8] ^= (uint8_t)(1 << bit % 8);
        }
    }
}

/* Lengths that the vectors leave out, against BearSSL's own GCM. */
static void gcm_as_bearssl(void) {
    struct suite suites[5];
    size_t count = suites_all(suites);
    for (size_t i = 0; i < count * 300; i++) {
        const struct suite *suite = &suites[i % count];
        uint8_t bytes[32 + 12 + 40 + 300], sealed[300 + TAG_BYTES], opened[300], want[300 + TAG_BYTES];
        size_t len = i / count, aad_len = len % 41;
        const uint8_t *key = bytes, *nonce = bytes + 32, *aad = aad_len > 0 ? bytes + 44 : NULL;
        br_aes_ct_ctr_keys aes;
        br_gcm_context gcm;
        for (size_t b = 0; b < sizeof bytes; b++)
            bytes[b] = (uint8_t)(131 * b + 7 * i + (b * i >> 3));
        row("%zu bytes, %zu of associated data, %s", len, aad_len, suite->name);
        memcpy(want, bytes + 84, len);
        br_aes_ct_ctr_init(&aes, key, 32);
        br_gcm_init(&gcm, &aes.vtable, br_ghash_ctmul);
        br_gcm_reset(&gcm, nonce, 12);
        br_gcm_aad_inject(&gcm, aad, aad_len);
        br_gcm_flip(&gcm);
        br_gcm_run(&gcm, 1, want, len);
        br_gcm_get_tag(&gcm, want + len);
        CHECK(gcm_crypt(suite, true, key, 32, nonce, aad, aad_len, bytes + 84, len, sealed) == 0);
        CHECK(memcmp(sealed, want, len + TAG_BYTES) == 0);
        CHECK(gcm_crypt(suite, false, key, 32, nonce, aad, aad_len, sealed, len, opened) == 0);
        CHECK(memcmp(opened, bytes + 84, len) == 0);
    }
}

static void hmac_known_answers(void) {
    static const struct {
        const char *name, *key, *data, *want;
    } rows[] = {
        {"RFC 4231, 1", "0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b", "4869205468657265",
         "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"},
        {"RFC 4231, 2", "4a656665", "7768617420646f2079612077616e7420666f72206e6f7468696e673f",
         "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"},
        {"RFC 5869, 1: T(1)", "077709362c2e32df0ddc3f0dc47bba6390b6c73bb50f9c3122ec844ad7c2b3e5",
         "f0f1f2f3f4f5f6f7f8f901", "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"},
    };
    for (size_t i = 0; i < LEN(rows); i++) {
        uint8_t key[64], data[64], out[33] = {0};
        size_t key_len = unhex(rows[i].key, key), len = unhex(rows[i].data, data);
        row("%s", rows[i].name);
        hmac_sha256(key, key_len, data, len, out, 32);
        CHECK(hex_is(out, 32, rows[i].want) && out[32] == 0);
        memset(out, 0, sizeof out);
        hmac_sha256(key, key_len, data, len, out, 16);
        CHECK(memcmp(out + 16, (uint8_t[17]){0}, 17) == 0);
    }
}

/* Made with Python's hmac: hmac.new(key, b"kmsplugin key_id v1", "sha256").hexdigest()[:32]. */
static void key_ids(void) {
    static const struct {
        uint8_t first, step;
        const char *key_id;
    } rows[] = {
        {0x01, 0, "fad1e91a654dbf1fdec047c069af5acd"},
        {0x03, 0, "b20b6e29eadd861677f8c4fc31838b68"},
        {0x00, 1, "14c740c2e9cfd299daba6c1dd0a86c1f"},
        {0xe0, 1, "0779863873c3f6576cc25424c8a33e60"},
    };
    struct suite suites[5];
    size_t count = suites_all(suites);
    for (size_t i = 0; i < count * LEN(rows); i++) {
        uint8_t key[KEK_BYTES];
        struct kek kek;
        for (unsigned k = 0; k < KEK_BYTES; k++)
            key[k] = (uint8_t)(rows[i / count].first + k * rows[i / count].step);
        kek_init(&kek, &suites[i % count], key);
        row("%s by %s", kek.key_id, suites[i % count].name);
        CHECK(strcmp(kek.key_id, rows[i / count].key_id) == 0);
        CHECK(hex_is(kek.fingerprint, FINGERPRINT_BYTES, rows[i / count].key_id));
    }
}

static void body_keyid(const void *keys) {
    struct ring *ring = ring_new(); /* here: a child has none of its parent's */
    ring_parse(ring, "test", keys, strlen(keys));
    keyid(ring);
}

static void keyid_prints_hashes(void) {
    static const char keys[] = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=,"
                               "4OHi4+Tl5ufo6err7O3u7/Dx8vP09fb3+Pn6+/z9/v8=";
    static const char want[] =
        "14c740c2e9cfd299daba6c1dd0a86c1f "
        "sha256:34d519c98d6af272ccb316fdd8e37853bd3169902422433b6da75e7e143b67c8\n"
        "0779863873c3f6576cc25424c8a33e60 "
        "sha256:cb870923ae1bb0401668e42500691598e6e544be2480ba6c2e2a4b140b1d2de3\n";
    const struct child *c = child_run(body_keyid, keys);
    CHECK(c->code == CHILD_RETURNED && c->err[0] == '\0');
    CHECK(strcmp(c->out, want) == 0);
}

/* What fork(2) leaves of a ring's pages: nothing; of what lies on either side: nothing that can be read. */
static void body_look(const void *ring) {
    size_t page = (size_t)getpagesize();
    int pipe_fds[2];
    bool ours = pipe(pipe_fds) == 0;
    for (int at = -1; at <= 0; at++)
        ours = ours && write(pipe_fds[1], (const char *)ring + at * (long)page, 1) < 0 && errno == EFAULT;
    if (!ours)
        die("it can be read");
}

static void a_ring_is_fenced_and_not_forked(void) {
    struct ring *ring = ring_new();
    size_t page = (size_t)getpagesize(), size = (sizeof *ring + page - 1) / page * page;
    int pipe_fds[2];
    CHECK(ring->unforked);
    CHECK(child_run(body_look, ring)->code == CHILD_RETURNED);
    CHECK(pipe(pipe_fds) == 0);
    CHECK(write(pipe_fds[1], ring, 1) == 1);
    CHECK(write(pipe_fds[1], (char *)ring - 1, 1) < 0 && errno == EFAULT);
    CHECK(write(pipe_fds[1], (char *)ring + size, 1) < 0 && errno == EFAULT);
    close(pipe_fds[0]);
    close(pipe_fds[1]);
    ring_free(ring);
}

static void body_self_test(const void *suite) {
    sealing_self_test(suite);
}

static void ghash_wrong(void *y, const void *h, const void *data, size_t len) {
    br_ghash_ctmul64(y, h, data, len);
    *(uint8_t *)y ^= 1;
}

static void self_test(void) {
    struct suite suites[5];
    for (size_t count = suites_all(suites); count > 0; count--) {
        row("%s", suites[count - 1].name);
        CHECK(child_run(body_self_test, &suites[count - 1])->code == CHILD_RETURNED);
    }
    const struct suite wrong = {&br_aes_ct64_ctrcbc_vtable, &br_aes_ct64_ctr_vtable, ghash_wrong, "broken"};
    const struct child *c = child_run(body_self_test, &wrong);
    row("a broken suite: %s", c->err);
    CHECK(child_died(c));
}

static void seal_roundtrip(void) {
    struct ring *ring = ring_of(0, 2);
    static struct random random;
    struct suite suites[5];
    size_t count = suites_all(suites);
    for (size_t len = 0; len <= 2048; len++) {
        enum api api = len % 2 ? API_V1 : API_V2;
        uint8_t *plain = test_alloc(len), *sealed = copy_of("", 0), *opened = copy_of("", 0);
        sealed = realloc(sealed, len + SEALED_OVERHEAD);
        opened = realloc(opened, len ? len : 1);
        prng_fill(plain, len);
        ring->suite = suites[len % count]; /* what one suite seals ... */
        kek_init(&ring->keks[0], &ring->suite, (const uint8_t *)"0123456789abcdef0123456789abcde\xff");
        row("%zu bytes", len);
        CHECK(seal(ring, &random, api, plain, len, sealed) == 0);
        CHECK(sealed_shaped(sealed, len + SEALED_OVERHEAD));
        ring->suite = suites[(len / 2 + 1) % count]; /* ... another opens */
        CHECK(open_sealed(ring, api, sealed, len + SEALED_OVERHEAD, opened) == OPENED);
        CHECK(memcmp(plain, opened, len) == 0);
        if (len >= 16)
            CHECK(memmem(sealed, len + SEALED_OVERHEAD, plain, 16) == NULL);
        free(plain);
        free(sealed);
        free(opened);
    }
    ring_free(ring);
}

/* The form in etcd, taken apart by hand. */
static void seal_layout(void) {
    for (unsigned api = API_V1; api <= API_V2; api++) {
        struct ring *ring = ring_of(5, 1);
        static struct random random;
        uint8_t sealed[11 + SEALED_OVERHEAD], aad[18], data[11];
        row("API %u", api);
        CHECK(SEALED_OVERHEAD == 57);
        CHECK(seal(ring, &random, (enum api)api, (const uint8_t *)"hello world", 11, sealed) == 0);
        CHECK(sealed[0] == 0x01);
        CHECK(hex_is(sealed + 1, 16, ring->keks[0].key_id));
        memcpy(aad, sealed, 17);
        aad[17] = (uint8_t)api;
        CHECK(xaes_crypt(&ring->suite, false, &ring->keks[0], sealed + 17, aad, 18, sealed + 41, 11, data) == 0);
        CHECK(memcmp(data, "hello world", 11) == 0);
        ring_free(ring);
    }
}

static void seal_tampered(void) {
    enum { PLAIN = 32, SEALED = PLAIN + SEALED_OVERHEAD };
    struct ring *ring = ring_of(0, 3), *other = ring_of(3, 2);
    static struct random random;
    uint8_t plain[PLAIN], sealed[SEALED + 1] = {0}, out[PLAIN + 1];
    prng_fill(plain, sizeof plain);
    CHECK(seal(ring, &random, API_V2, plain, PLAIN, sealed) == 0);
    for (unsigned bit = 0; bit < 8 * SEALED; bit++) {
        unsigned byte = bit / 8;
        enum opened want = byte == 0                   ? OPEN_MALFORMED
                           : byte <= FINGERPRINT_BYTES ? OPEN_UNKNOWN_KEY
                                                       : OPEN_FORGED;
        memset(out, 0xaa, sizeof out);
        sealed[bit / 8] ^= (uint8_t)(1 << bit % 8);
        row("bit %u of byte %u", bit % 8, bit / 8);
        CHECK(open_sealed(ring, API_V2, sealed, SEALED, out) == want);
        if (want == OPEN_FORGED)
            CHECK(all_zero(out, PLAIN));
        sealed[bit / 8] ^= (uint8_t)(1 << bit % 8);
    }
    for (size_t len = 0; len <= SEALED; len++) {
        uint8_t *exact = copy_of(sealed, len);
        row("cut to %zu", len);
        CHECK(open_sealed(ring, API_V2, exact, len, out) ==
              (len < SEALED_OVERHEAD ? OPEN_MALFORMED : len < SEALED ? OPEN_FORGED : OPENED));
        free(exact);
    }
    row("a byte more");
    CHECK(open_sealed(ring, API_V2, sealed, SEALED + 1, out) == OPEN_FORGED);
    row("the other API");
    CHECK(open_sealed(ring, API_V1, sealed, SEALED, out) == OPEN_FORGED && all_zero(out, PLAIN));
    row("another ring");
    CHECK(open_sealed(other, API_V2, sealed, SEALED, out) == OPEN_UNKNOWN_KEY);
    row("another key's fingerprint");
    memcpy(sealed + 1, ring->keks[1].fingerprint, FINGERPRINT_BYTES);
    CHECK(open_sealed(ring, API_V2, sealed, SEALED, out) == OPEN_FORGED);
    ring_free(ring);
    ring_free(other);
}

/* The order rule of rotation: the first seals, all open. */
static void seal_rotation(void) {
    static struct random random;
    struct ring *rings[] = {ring_of(0, 1), ring_of(1, 1), ring_new(), ring_new()};
    char text[128];
    snprintf(text, sizeof text, "%s,", test_key_text(0));
    strcat(text, test_key_text(1));
    ring_parse(rings[2], "old,new", text, strlen(text));
    snprintf(text, sizeof text, "%s,", test_key_text(1));
    strcat(text, test_key_text(0));
    ring_parse(rings[3], "new,old", text, strlen(text));
    static const struct {
        size_t sealer, opener;
        enum opened want;
    } rows[] = {
        {0, 0, OPENED}, {0, 1, OPEN_UNKNOWN_KEY}, {0, 2, OPENED}, {0, 3, OPENED}, {2, 0, OPENED},
        {2, 1, OPEN_UNKNOWN_KEY}, {2, 3, OPENED}, {3, 2, OPENED}, {3, 1, OPENED}, {3, 0, OPEN_UNKNOWN_KEY},
    };
    for (size_t i = 0; i < LEN(rows); i++) {
        uint8_t sealed[4 + SEALED_OVERHEAD], out[4];
        row("row %zu", i);
        CHECK(seal(rings[rows[i].sealer], &random, API_V1, (const uint8_t *)"data", 4, sealed) == 0);
        CHECK(open_sealed(rings[rows[i].opener], API_V1, sealed, sizeof sealed, out) == rows[i].want);
    }
    for (size_t i = 0; i < LEN(rings); i++)
        ring_free(rings[i]);
}

static int compare_nonces(const void *a, const void *b) {
    return memcmp(a, b, NONCE_BYTES);
}

/* Within a turn and across many: none twice, each wiped as it is given, and nothing left when a turn ends. */
static void nonces(void) {
    enum { COUNT = 2000, TURN = 700 };
    static uint8_t all[COUNT][NONCE_BYTES];
    static struct random random;
    struct ring *ring = ring_of(0, 1);
    size_t bought[16], buys = 0;
    for (size_t i = 0; i < COUNT; i++) {
        uint8_t sealed[SEALED_OVERHEAD];
        size_t before = random.left;
        CHECK(seal(ring, &random, API_V2, NULL, 0, sealed) == 0);
        memcpy(all[i], sealed + HEADER_BYTES, NONCE_BYTES);
        row("nonce %zu", i);
        if (before == 0 && buys < LEN(bought))
            bought[buys++] = random.left / NONCE_BYTES + 1;
        CHECK(random.left < sizeof random.bytes && random.left % NONCE_BYTES == 0);
        CHECK(all_zero(random.bytes + random.left, sizeof random.bytes - random.left));
        CHECK(random.left == 0 || !all_zero(random.bytes + random.left - NONCE_BYTES, NONCE_BYTES));
        if (i % TURN == TURN - 1) {
            random_drop(&random);
            CHECK(random.left == 0 && all_zero(random.bytes, sizeof random.bytes));
        }
    }
    static const size_t right[] = {1, 2, 4, 8, 16, 32, 64, 128, 128, 128, 128, 128, 1, 2, 4, 8};
    for (size_t i = 0; i < LEN(right); i++) {
        row("purchase %zu", i);
        CHECK(bought[i] == right[i]);
    }
    qsort(all, COUNT, sizeof *all, compare_nonces);
    for (size_t i = 1; i < COUNT; i++)
        CHECK(memcmp(all[i - 1], all[i], NONCE_BYTES) != 0);
    ring_free(ring);
}

/* -------------------------------------------------------------------- Keys */

/* 32 bytes in base64: one repeated, or a password. */
#define KEY_ZEROS "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
#define KEY_ONES "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE="
#define KEY_FF "//////////////////////////////////////////8="
#define KEY_PASSWORD "Y29ycmVjdCBob3JzZSBiYXR0ZXJ5IHN0YXBsZSAxMjM=" /* correct horse battery staple 123 */
#define KEY_GOOD "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
#define KEY_OTHER "4OHi4+Tl5ufo6err7O3u7/Dx8vP09fb3+Pn6+/z9/v8="
#define KEY_TWO KEY_GOOD "," KEY_OTHER

/* Text of keys, and the place (from 1) of the first that is refused, 0: none, and what is said of it. */
static const struct ring_case {
    const char *name, *text;
    unsigned refused;
    size_t keys;
    const char *what;
} ring_cases[] = {
    {"one", KEY_GOOD, 0, 1, NULL},
    {"two", KEY_TWO, 0, 2, NULL},
    {"white space around", " \t\r\n\v\f" KEY_GOOD "\n", 0, 1, NULL},
    {"white space around both", "\n" KEY_GOOD " ,\r\n\t" KEY_OTHER "  \n", 0, 2, NULL},
    {"nothing", "", 1, 0, "empty"},
    {"only white space", " \n", 1, 0, "empty"},
    {"only a comma", ",", 1, 0, "empty"},
    {"comma first", "," KEY_GOOD, 1, 0, "empty"},
    {"comma last", KEY_GOOD ",", 2, 1, "empty"},
    {"comma and newline last", KEY_GOOD ",\n", 2, 1, "empty"},
    {"two commas", KEY_GOOD ",," KEY_OTHER, 2, 1, "empty"},
    {"a space for a comma", KEY_GOOD " " KEY_OTHER, 1, 0, "commas between"},
    {"a newline for a comma", KEY_GOOD "\n" KEY_OTHER, 1, 0, "commas between"},
    {"a semicolon for a comma", KEY_GOOD ";" KEY_OTHER, 1, 0, "semicolon"},
    {"white space inside", "AAECAwQFBgcICQoLDA0O DxAREhMUFRYXGBkaGxwdHh8=", 1, 0, "white space"},
    {"no padding", "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8", 1, 0, "padding, the ="},
    {"too much padding", KEY_GOOD "=", 1, 0, "standard base64"},
    {"trailing bits", "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh9=", 1, 0, "standard base64"},
    {"base64url", "4OHi4-Tl5ufo6err7O3u7_Dx8vP09fb3-Pn6-_z9_v8=", 1, 0, "URL-safe"},
    {"hex", "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f", 1, 0, "hexadecimal"},
    {"hex in capitals", "E0E1E2E3E4E5E6E7E8E9EAEBECEDEEEFF0F1F2F3F4F5F6F7F8F9FAFBFCFDFEFF", 1, 0, "hexadecimal"},
    {"quotes", "\"" KEY_GOOD "\"", 1, 0, "quotes"},
    {"single quotes", "'" KEY_GOOD "'", 1, 0, "quotes"},
    {"a variable", "KMS_KEK=" KEY_GOOD, 1, 0, "name of a variable"},
    {"a shell's command", "export KMS_KEK=" KEY_GOOD, 1, 0, "command of a shell"},
    {"a comment", "# of 2026\n" KEY_GOOD, 1, 0, "comment"},
    {"PEM", "-----BEGIN PRIVATE KEY-----\n" KEY_GOOD "\n-----END PRIVATE KEY-----", 1, 0, "PEM"},
    {"a byte order mark", "\xef\xbb\xbf" KEY_GOOD, 1, 0, "byte order mark"},
    {"UTF-16", "\xff\xfe" KEY_GOOD, 1, 0, "UTF-16, as PowerShell"},
    {"UTF-16 of big endian", "\xfe\xff" KEY_GOOD, 1, 0, "UTF-16"},
    {"binary", "\x8f\x02\xb1\x7f\xc3\x05\x99\xe0\x8f\x02\xb1\x7f\xc3\x05\x99\xe0", 1, 0, "not text"},
    {"base64 twice", "QUFFQ0F3UUZCZ2NJQ1FvTERBME9EeEFSRWhNVUZSWVhHQmthR3h3ZEhoOD0=", 1, 0, "base64 twice"},
    {"base64 twice, of a line", "QUFFQ0F3UUZCZ2NJQ1FvTERBME9EeEFSRWhNVUZSWVhHQmthR3h3ZEhoOD0K", 1, 0, "base64 twice"},
    {"a prefix", "base64:" KEY_GOOD, 1, 0, "standard base64"},
    {"31 bytes", "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHg==", 1, 0, "32 bytes, but to fewer"},
    {"33 bytes", "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8g", 1, 0, "32 bytes, but to more"},
    {"16 bytes", "AAECAwQFBgcICQoLDA0ODw==", 1, 0, "32 bytes, but to fewer"},
    {"64 bytes", "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8gISIjJCUmJygpKissLS4vMDEyMzQ1Njc4OTo7PD0+Pw==", 1, 0,
     "32 bytes, but to more"},
    {"zeros", KEY_ZEROS, 1, 0, "one byte repeated"},
    {"one byte repeated", KEY_ONES, 1, 0, "one byte repeated"},
    {"ff repeated", KEY_GOOD "," KEY_FF, 2, 1, "one byte repeated"},
    {"a password", KEY_PASSWORD, 1, 0, "a password"},
    {"a password behind a key", KEY_GOOD "," KEY_PASSWORD, 2, 1, "a password"},
    {"twice", KEY_GOOD "," KEY_GOOD, 2, 1, "twice"},
    {"twice with white space", KEY_GOOD "," KEY_OTHER ", " KEY_GOOD "\n", 3, 2, "twice"},
};

static void body_ring_parse(const void *text) {
    ring_parse(ring_new(), "SOURCE", text, strlen(text));
}

/* Whether eight characters in a row of `text` that could be of a key stand in `message`. */
static bool echoes(const char *message, const char *text) {
    char window[9];
    for (size_t i = 0; i + 8 <= strlen(text); i++) {
        memcpy(window, text + i, 8);
        window[8] = '\0';
        if (strcspn(window, " ,;\t\r\n") == 8 && strstr(message, window))
            return true;
    }
    return false;
}

static void ring_forms(void) {
    for (size_t i = 0; i < LEN(ring_cases); i++) {
        const struct ring_case *k = &ring_cases[i];
        row("%s", k->name);
        if (k->refused == 0) {
            struct ring *ring = ring_new();
            ring_parse(ring, "SOURCE", k->text, strlen(k->text));
            CHECK(ring->count == k->keys && strcmp(ring->keks[0].key_id, "14c740c2e9cfd299daba6c1dd0a86c1f") == 0);
            CHECK(k->keys < 2 || strcmp(ring->keks[1].key_id, "0779863873c3f6576cc25424c8a33e60") == 0);
            ring_free(ring);
            continue;
        }
        char place[16];
        snprintf(place, sizeof place, "key %u ", k->refused);
        const struct child *c = child_run(body_ring_parse, k->text);
        row("%s: %s", k->name, c->err);
        CHECK(child_died(c));
        CHECK(strstr(c->err, "SOURCE") && strstr(c->err, place) && strstr(c->err, k->what));
        CHECK(!echoes(c->err, k->text) && !strstr(c->err, "correct") && !strstr(c->err, "battery"));
    }
}

static void ring_takes_16_keys(void) {
    char text[KEK_TEXT_MAX] = "";
    for (unsigned n = 0; n < 17; n++) {
        strcat(text, n ? ",\n" : "");
        strcat(text, test_key_text(n));
        row("%u keys", n + 1);
        if (n < 16) {
            struct ring *ring = ring_new();
            ring_parse(ring, "SOURCE", text, strlen(text));
            CHECK(ring->count == n + 1);
            for (unsigned k = 0; k <= n; k++)
                CHECK(ring_find(ring, ring->keks[k].fingerprint) == &ring->keks[k]);
            CHECK(ring_find(ring, (const uint8_t *)"no such KEK here") == NULL);
            ring_free(ring);
        } else {
            const struct child *c = child_run(body_ring_parse, text);
            CHECK(child_died(c) && strstr(c->err, "key 17 ") && !echoes(c->err, text));
        }
    }
}

/* A refused key leaves the ring as it was. */
static void ring_add_refusals(void) {
    static const char *const rows[] = {"", "x", KEY_ZEROS, KEY_PASSWORD, KEY_GOOD, "AAECAwQFBgcICQoLDA0ODw=="};
    struct ring *ring = ring_new();
    CHECK(ring_add(ring, KEY_GOOD, strlen(KEY_GOOD)) == NULL && ring->count == 1);
    for (size_t i = 0; i < LEN(rows); i++) {
        const char *wrong = ring_add(ring, rows[i], strlen(rows[i]));
        row("%s", rows[i]);
        CHECK(wrong && wrong[0] && ring->count == 1 && !echoes(wrong, rows[i]));
    }
    CHECK(ring_add(ring, KEY_OTHER, strlen(KEY_OTHER)) == NULL && ring->count == 2);
    row("a NUL in the text");
    CHECK(strstr(ring_add(ring, KEY_GOOD "\0", strlen(KEY_GOOD) + 1), "NUL"));
    row("UTF-16 without a mark");
    CHECK(strstr(ring_add(ring, "A\0A\0E\0C\0", 8), "UTF-16"));
    ring_free(ring);
}

/* Of a raw KEK nothing stays in the ring but its key schedule. */
static void ring_holds_no_text(void) {
    struct ring *ring = ring_of(0, 2);
    uint8_t key[KEK_BYTES];
    size_t found = 0;
    test_key(0, key);
    const uint8_t *at = (const uint8_t *)ring, *end = at + sizeof *ring;
    for (; (at = memmem(at, (size_t)(end - at), key, KEK_BYTES)); at++)
        found++;
    CHECK(found <= 1); /* an AES-256 schedule starts with the key */
    CHECK(memmem(ring, sizeof *ring, test_key_text(0), 20) == NULL);
    ring_free(ring);
}

static char unit_dir[] = "/tmp/kmsplugin-unit-XXXXXX";

static const char *unit_path(const char *name) {
    static char path[200];
    snprintf(path, sizeof path, "%s/%s", unit_dir, name);
    return path;
}

static void file_write(const char *name, const char *text, size_t len, mode_t mode) {
    unlink(unit_path(name)); // one of mode 0400 would not open
    int fd = open(unit_path(name), O_WRONLY | O_CREAT | O_EXCL, 0600);
    if (fd < 0 || write(fd, text, len) != (ssize_t)len || fchmod(fd, mode) < 0) {
        perror(unit_path(name));
        abort();
    }
    close(fd);
}

static void body_key_file(const void *name) {
    char text[KEK_TEXT_MAX + 1];
    size_t len = key_file_read(unit_path(name), text, sizeof text);
    print(STDOUT_FILENO, "%zu %.*s", len, (int)(len < 44 ? len : 44), text);
}

static void key_file_modes(void) {
    static const struct {
        mode_t mode;
        bool good;
    } rows[] = {
        {0600, true}, {0400, true}, {0440, true}, {0640, true}, {0700, true}, {0444, false}, {0644, false},
        {0604, false}, {0602, false}, {0601, false}, {0620, false}, {0660, false}, {0666, false}, {0777, false},
    };
    for (size_t i = 0; i < LEN(rows); i++) {
        file_write("kek", KEY_GOOD "\n", 45, rows[i].mode);
        const struct child *c = child_run(body_key_file, "kek");
        row("mode %04o: %s", (unsigned)rows[i].mode, c->err);
        if (rows[i].good) {
            CHECK(c->code == CHILD_RETURNED && strcmp(c->out, "45 " KEY_GOOD) == 0);
        } else {
            CHECK(child_died(c) && strstr(c->err, unit_path("kek")) && !echoes(c->err, KEY_GOOD));
        }
    }
}

static void key_file_kinds(void) {
    static char large[KEK_TEXT_MAX + 1];
    memset(large, ' ', sizeof large);
    memcpy(large, KEY_GOOD, strlen(KEY_GOOD));
    file_write("good", KEY_GOOD, 44, 0600);
    file_write("open", KEY_GOOD, 44, 0644);
    file_write("empty", "", 0, 0600);
    file_write("full", large, KEK_TEXT_MAX, 0600);
    file_write("large", large, KEK_TEXT_MAX + 1, 0600);
    CHECK(mkfifo(unit_path("fifo"), 0600) == 0 && mkdir(unit_path("dir"), 0700) == 0);
    CHECK(symlink("good", unit_path("to-good")) == 0 && symlink("open", unit_path("to-open")) == 0);
    CHECK(symlink("fifo", unit_path("to-fifo")) == 0 && symlink("nothing", unit_path("to-nothing")) == 0);
    CHECK(symlink("loop", unit_path("loop")) == 0);
    static const struct {
        const char *name;
        const char *out; /* NULL: refused */
    } rows[] = {
        {"good", "44 " KEY_GOOD}, {"to-good", "44 " KEY_GOOD}, {"empty", "0 "}, {"full", "4096 " KEY_GOOD},
        {"large", NULL}, {"open", NULL}, {"to-open", NULL}, {"fifo", NULL}, {"to-fifo", NULL}, {"dir", NULL},
        {"nothing", NULL}, {"to-nothing", NULL}, {"loop", NULL}, {"good/kek", NULL}, {"../../dev/null", NULL},
    };
    for (size_t i = 0; i < LEN(rows); i++) {
        const struct child *c = child_run(body_key_file, rows[i].name);
        row("%s: %s", rows[i].name, c->err);
        if (rows[i].out)
            CHECK(c->code == CHILD_RETURNED && strcmp(c->out, rows[i].out) == 0);
        else
            CHECK(child_died(c) && strstr(c->err, rows[i].name) && !echoes(c->err, KEY_GOOD));
    }
}

static void environment(void) {
    char copies[][32] = {
        "A=1", "KMS_KEK=first", "KMS_KEK_FILE=/run/kek", "KMS_KEK=second", "XKMS_KEK=x", "KMS_KEK=", "KMS_KE=K",
        "KMS_KEK",
    };
    static const char *const after[] = {
        "A=1", "KMS_KEK=", "KMS_KEK_FILE=/run/kek", "KMS_KEK=", "XKMS_KEK=x", "KMS_KEK=", "KMS_KE=K", "KMS_KEK",
    };
    char *mine[LEN(copies) + 1] = {NULL}, **before = environ, text[16] = "untouched";
    for (unsigned with_text = 0; with_text < 2; with_text++) {
        row("%s text", with_text ? "with" : "without");
        strcpy(copies[1], "KMS_KEK=first");
        strcpy(copies[3], "KMS_KEK=second");
        for (size_t i = 0; i < LEN(copies); i++)
            mine[i] = copies[i];
        environ = mine;
        bool found = environment_take(with_text ? text : NULL, with_text ? sizeof text : 0);
        environ = before;
        CHECK(found && strcmp(text, with_text ? "first" : "untouched") == 0);
        for (size_t i = 0; i < LEN(copies); i++)
            CHECK(strcmp(copies[i], after[i]) == 0);
        CHECK(all_zero((uint8_t *)copies[1] + 8, 5) && all_zero((uint8_t *)copies[3] + 8, 6));
    }
    row("not set");
    mine[0] = copies[0];
    mine[1] = copies[2];
    mine[2] = NULL;
    environ = mine;
    bool found = environment_take(text, sizeof text);
    environ = before;
    CHECK(!found && strcmp(copies[2], after[2]) == 0);
}

static void environment_too_long(void) {
    static char copy[200] = "KMS_KEK=";
    char *mine[] = {copy, NULL}, **before = environ, text[32];
    memset(copy + 8, 'k', 100);
    environ = mine;
    bool found = environment_take(text, sizeof text);
    environ = before;
    CHECK(found && memchr(text, '\0', sizeof text));
    CHECK(all_zero((uint8_t *)copy + 8, 100)); /* all of it, not what fitted */
}

struct load_case {
    const char *name, *variable, *file; /* NULL: not set */
    const char *out; /* key_ids, or NULL: refused */
};

static void body_ring_load(const void *load) {
    const struct load_case *l = load;
    unsetenv("KMS_KEK");
    unsetenv("KMS_KEK_FILE");
    if (l->variable)
        setenv("KMS_KEK", l->variable, 1);
    if (l->file)
        setenv("KMS_KEK_FILE", unit_path(l->file), 1);
    struct ring *ring = ring_load();
    for (size_t i = 0; i < ring->count; i++)
        print(STDOUT_FILENO, "%s\n", ring->keks[i].key_id);
    print(STDOUT_FILENO, "%s", l->variable && getenv("KMS_KEK")[0] ? "still in the environment" : "");
    print(STDOUT_FILENO, "%s", all_zero((uint8_t *)ring->text, sizeof ring->text) ? "" : "text not wiped");
}

static void ring_load_sources(void) {
    static char long_space[KEK_TEXT_MAX + 200], long_keys[KEK_TEXT_MAX + 200];
    file_write("one", KEY_OTHER "\n", 45, 0600);
    file_write("bad", "not a key", 9, 0600);
    /* As a file both would be refused for their size: nothing may be cut off a variable either. */
    memset(long_space, ' ', sizeof long_space - 1);
    memcpy(long_space, KEY_GOOD, 44);
    memcpy(long_space + KEK_TEXT_MAX + 10, "," KEY_OTHER, 45);
    memset(long_keys, ' ', sizeof long_keys - 1);
    memcpy(long_keys, KEY_GOOD, 44);
    memcpy(long_keys + KEK_TEXT_MAX + 10, ",rubbish", 8);
    const struct load_case rows[] = {
        {"variable", KEY_GOOD, NULL, "14c740c2e9cfd299daba6c1dd0a86c1f\n"},
        {"two in the variable", KEY_TWO, NULL, "14c740c2e9cfd299daba6c1dd0a86c1f\n0779863873c3f6576cc25424c8a33e60\n"},
        {"file", NULL, "one", "0779863873c3f6576cc25424c8a33e60\n"},
        {"both", KEY_GOOD, "one", NULL},
        {"neither", NULL, NULL, NULL},
        {"an empty variable", "", NULL, NULL},
        {"a bad variable", "not a key", NULL, NULL},
        {"a bad file", NULL, "bad", NULL},
        {"no such file", NULL, "absent", NULL},
        {"a variable too long, a key at its end", long_space, NULL, NULL},
        {"a variable too long, rubbish at its end", long_keys, NULL, NULL},
    };
    for (size_t i = 0; i < LEN(rows); i++) {
        const struct child *c = child_run(body_ring_load, &rows[i]);
        row("%s: %.80s", rows[i].name, c->out[0] ? c->out : c->err);
        if (rows[i].out)
            CHECK(c->code == CHILD_RETURNED && strcmp(c->out, rows[i].out) == 0);
        else
            CHECK(child_died(c) && strstr(c->err, "KMS_KEK") && !echoes(c->err, KEY_TWO) &&
                  !strstr(c->err, "not a key"));
    }
}

/* ------------------------------------------------------------- KMS service */

/* A service with its ring, and the answer to the last call. */
struct service {
    struct kms kms;
    struct answer a;
    void *response; /* if the last call was answered with one */
    enum rpc rpc;
};

static struct service *service_new(struct ring *ring) {
    struct service *s = test_alloc(sizeof *s);
    memset(s, 0, sizeof *s);
    CHECK(kms_init(&s->kms, ring) == 0);
    return s;
}

static void service_done(struct service *s) {
    if (s->response)
        protobuf_c_message_free_unpacked(s->response, NULL);
    s->response = NULL;
    kms_done(&s->kms);
}

static void service_free(struct service *s) {
    service_done(s);
    munmap(s->kms.arena.base, ARENA_BYTES);
    ring_free(s->kms.ring);
    free(s);
}

/* Calls with bytes, unpacks what is answered. An answer is an error with a sentence or a message. */
static enum grpc_code service_call_bytes(struct service *s, enum rpc rpc, const uint8_t *bytes, size_t len) {
    uint8_t *exact = copy_of(bytes, len);
    service_done(s);
    s->rpc = rpc;
    kms_call(&s->kms, rpc, exact, len, &s->a);
    memset(exact, 0xdd, len); /* no answer borrows from the request's bytes */
    free(exact);
    if (s->a.code == GRPC_OK) {
        CHECK(s->a.bytes);
        s->response = protobuf_c_message_unpack(response_types[rpc], NULL, s->a.len, s->a.bytes);
        CHECK(s->response);
    } else {
        CHECK(s->a.message && s->a.message[0] && strlen(s->a.message) < MESSAGE_TEXT_MAX);
    }
    CHECK(s->a.uid && s->a.key_id);
    return s->a.code;
}

static enum grpc_code service_call(struct service *s, enum rpc rpc, const void *message) {
    uint8_t *packed = test_alloc(protobuf_c_message_get_packed_size(message));
    size_t len = protobuf_c_message_pack(message, packed);
    enum grpc_code code = service_call_bytes(s, rpc, packed, len);
    free(packed);
    return code;
}

static ProtobufCBinaryData binary(const void *bytes, size_t len) {
    return (ProtobufCBinaryData){len, (uint8_t *)(uintptr_t)bytes};
}

static char *text_of(const char *s) {
    return (char *)(uintptr_t)s;
}

static enum grpc_code v2_encrypt_of(struct service *s, const void *plain, size_t len) {
    V2__EncryptRequest r = V2__ENCRYPT_REQUEST__INIT;
    r.plaintext = binary(plain, len);
    r.uid = text_of("uid-1");
    return service_call(s, V2_ENCRYPT, &r);
}

static enum grpc_code v2_decrypt_of(struct service *s, const void *sealed, size_t len, const char *key_id) {
    V2__DecryptRequest r = V2__DECRYPT_REQUEST__INIT;
    r.ciphertext = binary(sealed, len);
    r.uid = text_of("uid-2");
    r.key_id = text_of(key_id);
    return service_call(s, V2_DECRYPT, &r);
}

static enum grpc_code v1_encrypt_of(struct service *s, const char *version, const void *plain, size_t len) {
    V2__V1beta1__EncryptRequest r = V2__V1BETA1__ENCRYPT_REQUEST__INIT;
    r.version = text_of(version);
    r.plain = binary(plain, len);
    return service_call(s, V1_ENCRYPT, &r);
}

static enum grpc_code v1_decrypt_of(struct service *s, const char *version, const void *sealed, size_t len) {
    V2__V1beta1__DecryptRequest r = V2__V1BETA1__DECRYPT_REQUEST__INIT;
    r.version = text_of(version);
    r.cipher = binary(sealed, len);
    return service_call(s, V1_DECRYPT, &r);
}

static void rpc_status_and_version(void) {
    struct service *s = service_new(ring_of(0, 2));
    V2__StatusRequest status = V2__STATUS_REQUEST__INIT;
    for (int i = 0; i < 3; i++) {
        CHECK(service_call(s, V2_STATUS, &status) == GRPC_OK);
        const V2__StatusResponse *r = s->response;
        CHECK(strcmp(r->version, "v2") == 0 && strcmp(r->healthz, "ok") == 0);
        CHECK(strcmp(r->key_id, s->kms.ring->keks[0].key_id) == 0);
    }
    static const struct {
        const char *version;
        enum grpc_code code;
    } rows[] = {
        {"v1beta1", GRPC_OK}, {"", GRPC_INVALID_ARGUMENT}, {"v1", GRPC_INVALID_ARGUMENT},
        {"v2", GRPC_INVALID_ARGUMENT}, {"v1beta1 ", GRPC_INVALID_ARGUMENT}, {"V1BETA1", GRPC_INVALID_ARGUMENT},
        {"v1beta", GRPC_INVALID_ARGUMENT}, {"v1beta10", GRPC_INVALID_ARGUMENT},
    };
    for (size_t i = 0; i < LEN(rows); i++) {
        V2__V1beta1__VersionRequest version = V2__V1BETA1__VERSION_REQUEST__INIT;
        version.version = text_of(rows[i].version);
        row("version '%s'", rows[i].version);
        CHECK(service_call(s, V1_VERSION, &version) == rows[i].code);
        if (rows[i].code == GRPC_OK) {
            const V2__V1beta1__VersionResponse *r = s->response;
            CHECK(strcmp(r->version, "v1beta1") == 0 && strcmp(r->runtime_name, "kmsplugin") == 0);
            CHECK(strcmp(r->runtime_version, VERSION) == 0);
        }
        CHECK(v1_encrypt_of(s, rows[i].version, "ping", 4) == rows[i].code);
        if (rows[i].code == GRPC_OK) {
            const V2__V1beta1__EncryptResponse *r = s->response;
            uint8_t *sealed = copy_of(r->cipher.data, r->cipher.len);
            size_t len = r->cipher.len;
            for (size_t k = 0; k < LEN(rows); k++)
                CHECK(v1_decrypt_of(s, rows[k].version, sealed, len) == rows[k].code);
            free(sealed);
        }
    }
    service_free(s);
}

/* Status is healthy only after a real seal and open. */
static void rpc_status_tells_the_truth(void) {
    struct service *s = service_new(ring_of(0, 1));
    V2__StatusRequest status = V2__STATUS_REQUEST__INIT;
    CHECK(service_call(s, V2_STATUS, &status) == GRPC_OK);
    s->kms.ring->count = 0; /* what is sealed now, no KEK opens */
    CHECK(service_call(s, V2_STATUS, &status) != GRPC_OK);
    s->kms.ring->count = 1;
    CHECK(service_call(s, V2_STATUS, &status) == GRPC_OK);
    service_free(s);
}

static void rpc_v2_roundtrip(void) {
    static const size_t sizes[] = {0, 1, 16, 32, 100, 966, 967, 968, 1024, 4000, 60000};
    static uint8_t plain[60000];
    struct service *s = service_new(ring_of(0, 2));
    const char *key_id = s->kms.ring->keks[0].key_id;
    prng_fill(plain, sizeof plain);
    for (size_t i = 0; i < LEN(sizes); i++) {
        enum grpc_code want = sizes[i] <= 967 ? GRPC_OK : GRPC_INVALID_ARGUMENT;
        row("%zu bytes", sizes[i]);
        CHECK(v2_encrypt_of(s, plain, sizes[i]) == want);
        CHECK(strcmp(s->a.uid, "uid-1") == 0 && strcmp(s->a.key_id, key_id) == 0);
        if (want != GRPC_OK)
            continue;
        const V2__EncryptResponse *r = s->response;
        CHECK(strcmp(r->key_id, key_id) == 0 && r->n_annotations == 0);
        CHECK(r->ciphertext.len == sizes[i] + SEALED_OVERHEAD && r->ciphertext.len <= 1024);
        uint8_t *sealed = copy_of(r->ciphertext.data, r->ciphertext.len);
        CHECK(v2_decrypt_of(s, sealed, sizes[i] + SEALED_OVERHEAD, key_id) == GRPC_OK);
        const V2__DecryptResponse *d = s->response;
        CHECK(d->plaintext.len == sizes[i] && (sizes[i] == 0 || memcmp(d->plaintext.data, plain, sizes[i]) == 0));
        CHECK(v1_decrypt_of(s, "v1beta1", sealed, sizes[i] + SEALED_OVERHEAD) == GRPC_INVALID_ARGUMENT);
        free(sealed);
    }
    service_free(s);
}

/* v1 takes what a Decrypt request of 64 KiB can bring back, and not a byte more. */
static void rpc_v1_roundtrip(void) {
    enum { MOST = 65536 - 9 - 4 - 57 };
    static const size_t sizes[] = {0, 1, 4, 32, 967, 968, 4096, MOST - 1, MOST, MOST + 1, 65000 + 500};
    static uint8_t plain[65536];
    struct service *s = service_new(ring_of(0, 2));
    prng_fill(plain, sizeof plain);
    for (size_t i = 0; i < LEN(sizes); i++) {
        enum grpc_code want = sizes[i] <= MOST ? GRPC_OK : GRPC_INVALID_ARGUMENT;
        row("%zu bytes", sizes[i]);
        CHECK(v1_encrypt_of(s, "v1beta1", plain, sizes[i]) == want);
        if (want != GRPC_OK)
            continue;
        const V2__V1beta1__EncryptResponse *r = s->response;
        size_t len = r->cipher.len;
        uint8_t *sealed = copy_of(r->cipher.data, len);
        CHECK(len == sizes[i] + SEALED_OVERHEAD);
        V2__V1beta1__DecryptRequest request = V2__V1BETA1__DECRYPT_REQUEST__INIT;
        request.version = text_of("v1beta1");
        request.cipher = binary(sealed, len);
        CHECK(protobuf_c_message_get_packed_size(&request.base) <= MESSAGE_MAX);
        CHECK(service_call(s, V1_DECRYPT, &request) == GRPC_OK);
        const V2__V1beta1__DecryptResponse *d = s->response;
        CHECK(d->plain.len == sizes[i] && (sizes[i] == 0 || memcmp(d->plain.data, plain, sizes[i]) == 0));
        CHECK(v2_decrypt_of(s, sealed, len, s->kms.ring->keks[0].key_id) == GRPC_INVALID_ARGUMENT);
        free(sealed);
    }
    service_free(s);
}

/*
 * Decrypt looks in this order: shape, key_id, annotations, ring, tag. A request
 * wrong in several ways gets the sentence of the first.
 */
static void rpc_v2_decrypt_order(void) {
    enum { SHAPE = 1, KEY_ID = 2, ANNOTATION = 4, RING = 8, TAG = 16, ALL = 31 };
    static const enum grpc_code codes[] = {
        GRPC_INVALID_ARGUMENT, GRPC_INVALID_ARGUMENT, GRPC_INVALID_ARGUMENT, GRPC_NOT_FOUND, GRPC_INVALID_ARGUMENT,
    };
    struct service *s = service_new(ring_of(0, 2));
    static struct random random;
    struct ring *stranger = ring_of(7, 1);
    char sentences[5][MESSAGE_TEXT_MAX];
    for (unsigned pass = 0; pass < 2; pass++) { /* first each fault alone, then all mixtures */
        for (unsigned faults = 0; faults <= ALL; faults++) {
            unsigned first = 0;
            while (first < 5 && !(faults >> first & 1))
                first++;
            if (pass == 0 && faults != 0 && faults != 1u << first)
                continue;
            V2__DecryptRequest r = V2__DECRYPT_REQUEST__INIT;
            V2__DecryptRequest__AnnotationsEntry entry = V2__DECRYPT_REQUEST__ANNOTATIONS_ENTRY__INIT,
                *entries[] = {&entry};
            const struct ring *ring = faults & RING ? stranger : s->kms.ring;
            uint8_t sealed[4 + SEALED_OVERHEAD];
            CHECK(seal(ring, &random, API_V2, (const uint8_t *)"data", 4, sealed) == 0);
            if (faults & SHAPE)
                sealed[0] = 0x02;
            if (faults & TAG)
                sealed[sizeof sealed - 1] ^= 1;
            r.ciphertext = binary(sealed, sizeof sealed);
            r.key_id = text_of(faults & KEY_ID ? s->kms.ring->keks[1].key_id : ring->keks[0].key_id);
            entry.key = text_of("a.example.org");
            r.annotations = entries;
            r.n_annotations = faults & ANNOTATION ? 1 : 0;
            row("faults %u", faults);
            CHECK(service_call(s, V2_DECRYPT, &r) == (faults ? codes[first] : GRPC_OK));
            if (faults && pass == 0)
                snprintf(sentences[first], sizeof sentences[first], "%s", s->a.message);
            else if (faults)
                CHECK(strcmp(s->a.message, sentences[first]) == 0);
        }
    }
    row("sentences");
    for (unsigned i = 0; i < 5; i++)
        for (unsigned k = 0; k < i; k++)
            CHECK(strcmp(sentences[i], sentences[k]) != 0);
    CHECK(strstr(sentences[3], stranger->keks[0].key_id)); /* the missing KEK is named */
    ring_free(stranger);
    service_free(s);
}

static void rpc_decrypt_lengths(void) {
    struct service *s = service_new(ring_of(0, 1));
    const char *key_id = s->kms.ring->keks[0].key_id;
    static const size_t lens[] = {0, 1, 16, 17, 41, 56, 57, 1024, 1025};
    static uint8_t plain[968], large[968 + SEALED_OVERHEAD];
    CHECK(seal(s->kms.ring, &s->kms.random, API_V2, plain, sizeof plain, large) == 0);
    for (size_t i = 0; i < LEN(lens); i++) {
        row("%zu bytes", lens[i]); /* the last is sealed well, but over 1,024 bytes */
        CHECK(v2_decrypt_of(s, large, lens[i], key_id) == GRPC_INVALID_ARGUMENT);
        CHECK(v1_decrypt_of(s, "v1beta1", large, lens[i]) == GRPC_INVALID_ARGUMENT);
    }
    row("v1, unknown KEK");
    struct ring *stranger = ring_of(7, 1);
    CHECK(seal(stranger, &s->kms.random, API_V1, plain, 10, large) == 0);
    CHECK(v1_decrypt_of(s, "v1beta1", large, 10 + SEALED_OVERHEAD) == GRPC_NOT_FOUND);
    CHECK(strstr(s->a.message, stranger->keks[0].key_id));
    ring_free(stranger);
    row("a key_id in capitals");
    CHECK(v2_encrypt_of(s, "x", 1) == GRPC_OK);
    uint8_t one[1 + SEALED_OVERHEAD];
    memcpy(one, ((const V2__EncryptResponse *)s->response)->ciphertext.data, sizeof one);
    char capitals[KEY_ID_LEN + 1];
    for (size_t i = 0; i <= KEY_ID_LEN; i++)
        capitals[i] = (char)toupper(key_id[i]);
    CHECK(v2_decrypt_of(s, one, sizeof one, capitals) == GRPC_INVALID_ARGUMENT);
    CHECK(v2_decrypt_of(s, one, sizeof one, "") == GRPC_INVALID_ARGUMENT);
    CHECK(v2_decrypt_of(s, one, sizeof one, key_id) == GRPC_OK);
    service_free(s);
}

static void rpc_malformed(void) {
    static const struct {
        const char *name;
        enum rpc rpc;
        const char *hex;
        enum grpc_code code;
    } rows[] = {
        {"Status, nothing", V2_STATUS, "", GRPC_OK},
        {"Status, an unknown field", V2_STATUS, "7a0161", GRPC_OK},
        {"Status, garbage", V2_STATUS, "ffffff", GRPC_INTERNAL},
        {"Status, a group", V2_STATUS, "0b0c", GRPC_INTERNAL},
        {"Encrypt, nothing", V2_ENCRYPT, "", GRPC_OK},
        {"Encrypt, cut short", V2_ENCRYPT, "0a05616263", GRPC_INTERNAL},
        {"Encrypt, field number 0", V2_ENCRYPT, "0001", GRPC_INTERNAL},
        {"Encrypt, huge length", V2_ENCRYPT, "0affffffff7f61", GRPC_INTERNAL},
        {"Encrypt, uid not UTF-8", V2_ENCRYPT, "0a01611201ff", GRPC_INTERNAL},
        {"Encrypt, uid a surrogate", V2_ENCRYPT, "1203eda080", GRPC_INTERNAL},
        {"Encrypt, plaintext a varint", V2_ENCRYPT, "0805", GRPC_INTERNAL},
        {"Encrypt, the last plaintext counts", V2_ENCRYPT, "0a01610a0162", GRPC_OK},
        {"Decrypt, nothing", V2_DECRYPT, "", GRPC_INVALID_ARGUMENT},
        {"Decrypt, key_id not UTF-8", V2_DECRYPT, "1a01ff", GRPC_INTERNAL},
        {"Decrypt, annotation not UTF-8", V2_DECRYPT, "22030a01ff", GRPC_INTERNAL},
        {"Decrypt, annotation cut short", V2_DECRYPT, "22020a05", GRPC_INTERNAL},
        {"Version, nothing", V1_VERSION, "", GRPC_INVALID_ARGUMENT},
        {"Version, not UTF-8", V1_VERSION, "0a01c0", GRPC_INTERNAL},
        {"Version, cut short", V1_VERSION, "0a", GRPC_INTERNAL},
        {"v1 Encrypt, nothing", V1_ENCRYPT, "", GRPC_INVALID_ARGUMENT},
        {"v1 Encrypt, cut short", V1_ENCRYPT, "0a07763162657461311205", GRPC_INTERNAL},
        {"v1 Decrypt, nothing", V1_DECRYPT, "", GRPC_INVALID_ARGUMENT},
        {"v1 Decrypt, no cipher", V1_DECRYPT, "0a0776316265746131", GRPC_INVALID_ARGUMENT},
    };
    struct service *s = service_new(ring_of(0, 1));
    for (size_t i = 0; i < LEN(rows); i++) {
        uint8_t bytes[64];
        size_t len = unhex(rows[i].hex, bytes);
        row("%s", rows[i].name);
        CHECK(service_call_bytes(s, rows[i].rpc, bytes, len) == rows[i].code);
    }
    static const char *const nul[] = {"1203610062", "0a0161" "120100"};
    for (size_t i = 0; i < LEN(nul); i++) {
        uint8_t bytes[64];
        size_t len = unhex(nul[i], bytes);
        row("a NUL in uid: %s", nul[i]);
        CHECK(service_call_bytes(s, V2_ENCRYPT, bytes, len) != GRPC_OK);
    }
    uint8_t decrypt[64 + 80] = {0x0a, 4 + SEALED_OVERHEAD};
    CHECK(seal(s->kms.ring, &s->kms.random, API_V2, (const uint8_t *)"data", 4, decrypt + 2) == 0);
    uint8_t *at = decrypt + 2 + 4 + SEALED_OVERHEAD;
    *at++ = 0x1a;
    *at++ = KEY_ID_LEN + 2;
    memcpy(at, s->kms.ring->keks[0].key_id, KEY_ID_LEN);
    memcpy(at + KEY_ID_LEN, "\0x", 2);
    row("a key_id with a NUL behind it");
    CHECK(service_call_bytes(s, V2_DECRYPT, decrypt, (size_t)(at + KEY_ID_LEN + 2 - decrypt)) != GRPC_OK);
    service_free(s);
}

/* A message of 64 KiB can hold more fields than the arena has room to unpack. */
static void rpc_too_many_fields(void) {
    static uint8_t bytes[MESSAGE_MAX];
    static const struct {
        const char *name, *field;
        size_t len;
    } rows[] = {
        {"varints", "\x78\x00", 2}, {"empty bytes", "\x7a\x00", 2}, {"map entries", "\x22\x00", 2},
        {"uids", "\x12\x00", 2},
    };
    struct service *s = service_new(ring_of(0, 1));
    V2__StatusRequest status = V2__STATUS_REQUEST__INIT;
    for (size_t i = 0; i < LEN(rows); i++) {
        size_t some = 0, refused = 0;
        for (size_t at = 0; at < sizeof bytes; at += rows[i].len)
            memcpy(bytes + at, rows[i].field, rows[i].len);
        row("%s", rows[i].name);
        for (size_t len = 1000; len <= sizeof bytes; len += len < 60000 ? 5000 : 2268) {
            enum grpc_code code = service_call_bytes(s, V2_DECRYPT, bytes, len);
            CHECK(code == GRPC_INVALID_ARGUMENT || code == GRPC_RESOURCE_EXHAUSTED);
            some += code == GRPC_INVALID_ARGUMENT;
            refused += code == GRPC_RESOURCE_EXHAUSTED;
            CHECK(service_call(s, V2_STATUS, &status) == GRPC_OK); /* the next one is served */
        }
        CHECK(some > 0);
        CHECK(refused > 0 || rows[i].field[0] == '\x12'); /* of a singular field only the last is kept */
        CHECK(service_call_bytes(s, V2_DECRYPT, bytes, sizeof bytes) == GRPC_RESOURCE_EXHAUSTED ||
              rows[i].field[0] == '\x12');
    }
    service_free(s);
}

/* The response leaves nothing behind: what was unpacked and opened is wiped. */
static void rpc_wipes(void) {
    struct service *s = service_new(ring_of(0, 1));
    static const char secret[] = "a secret that nobody else may see";
    CHECK(v2_encrypt_of(s, secret, sizeof secret) == GRPC_OK);
    CHECK(memmem(s->kms.arena.base, s->kms.arena.used, secret, sizeof secret));
    service_done(s);
    CHECK(all_zero(s->kms.arena.base, ARENA_BYTES));
    service_free(s);
}

/* Mutations of valid requests. What decrypts is what was encrypted; nothing crashes. */
static void rpc_random_bytes(void) {
    enum { ROUNDS = 100000, SECRET = 32 };
    struct service *s = service_new(ring_of(0, 2));
    static uint8_t seeds[RPC_UNKNOWN][256];
    size_t lens[RPC_UNKNOWN] = {0}, answered = 0, refused = 0;
    uint8_t secret[SECRET], sealed[2][SECRET + SEALED_OVERHEAD];
    prng_fill(secret, sizeof secret);
    CHECK(seal(s->kms.ring, &s->kms.random, API_V1, secret, SECRET, sealed[0]) == 0);
    CHECK(seal(s->kms.ring, &s->kms.random, API_V2, secret, SECRET, sealed[1]) == 0);
    V2__EncryptRequest encrypt = V2__ENCRYPT_REQUEST__INIT;
    encrypt.plaintext = binary(secret, SECRET);
    encrypt.uid = text_of("6f1f3a44-uid");
    V2__DecryptRequest decrypt = V2__DECRYPT_REQUEST__INIT;
    decrypt.ciphertext = binary(sealed[1], sizeof sealed[1]);
    decrypt.uid = text_of("6f1f3a44-uid");
    decrypt.key_id = s->kms.ring->keks[0].key_id;
    V2__V1beta1__VersionRequest version = V2__V1BETA1__VERSION_REQUEST__INIT;
    version.version = text_of("v1beta1");
    V2__V1beta1__EncryptRequest encrypt1 = V2__V1BETA1__ENCRYPT_REQUEST__INIT;
    encrypt1.version = text_of("v1beta1");
    encrypt1.plain = binary(secret, SECRET);
    V2__V1beta1__DecryptRequest decrypt1 = V2__V1BETA1__DECRYPT_REQUEST__INIT;
    decrypt1.version = text_of("v1beta1");
    decrypt1.cipher = binary(sealed[0], sizeof sealed[0]);
    lens[V2_ENCRYPT] = protobuf_c_message_pack(&encrypt.base, seeds[V2_ENCRYPT]);
    lens[V2_DECRYPT] = protobuf_c_message_pack(&decrypt.base, seeds[V2_DECRYPT]);
    lens[V1_VERSION] = protobuf_c_message_pack(&version.base, seeds[V1_VERSION]);
    lens[V1_ENCRYPT] = protobuf_c_message_pack(&encrypt1.base, seeds[V1_ENCRYPT]);
    lens[V1_DECRYPT] = protobuf_c_message_pack(&decrypt1.base, seeds[V1_DECRYPT]);
    for (unsigned round = 0; round < ROUNDS; round++) {
        enum rpc seed = (enum rpc)prng(RPC_UNKNOWN), rpc = prng(8) ? seed : (enum rpc)prng(RPC_UNKNOWN);
        uint8_t bytes[300];
        size_t len = lens[seed];
        memcpy(bytes, seeds[seed], len);
        for (unsigned n = prng(4); n > 0; n--) {
            size_t at = len ? prng((uint32_t)len) : 0;
            switch (prng(5)) {
            case 0: /* a bit */
                bytes[at] ^= (uint8_t)(1 << prng(8));
                break;
            case 1: /* a byte */
                bytes[at] = (uint8_t)prng(256);
                break;
            case 2: /* cut */
                len = at;
                break;
            case 3: /* one byte more */
                memmove(bytes + at + 1, bytes + at, len - at);
                bytes[at] = (uint8_t)prng(256);
                len++;
                break;
            case 4: /* one byte less */
                if (len > 0)
                    memmove(bytes + at, bytes + at + 1, --len - at);
                break;
            }
        }
        row("round %u", round);
        enum grpc_code code = service_call_bytes(s, rpc, bytes, len);
        answered += code == GRPC_OK;
        refused += code != GRPC_OK;
        CHECK(code == GRPC_OK || code == GRPC_INVALID_ARGUMENT || code == GRPC_INTERNAL || code == GRPC_NOT_FOUND);
        if (code == GRPC_OK && rpc == V2_DECRYPT) {
            const V2__DecryptResponse *r = s->response;
            CHECK(r->plaintext.len == SECRET && memcmp(r->plaintext.data, secret, SECRET) == 0);
        }
        if (code == GRPC_OK && rpc == V1_DECRYPT) {
            const V2__V1beta1__DecryptResponse *r = s->response;
            CHECK(r->plain.len == SECRET && memcmp(r->plain.data, secret, SECRET) == 0);
        }
    }
    CHECK(answered > ROUNDS / 10 && refused > ROUNDS / 10);
    service_free(s);
}

/* ----------------------------------------------------------------- Metrics */

/* Text as Prometheus reads it: each sample of a family that was declared, no series twice, buckets that only grow. */
static void metrics_check(char *text) {
    char family[100] = "", type[20] = "", *save = NULL;
    static char series[400][200];
    size_t count = 0;
    unsigned long long cumulative = 0;
    CHECK(text[0] && text[strlen(text) - 1] == '\n');
    for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
        char name[100] = "", *end;
        row("%s", line);
        if (strncmp(line, "# HELP ", 7) == 0) {
            CHECK(sscanf(line, "# HELP %99s %*c", family) == 1);
            continue;
        }
        if (strncmp(line, "# TYPE ", 7) == 0) {
            CHECK(sscanf(line, "# TYPE %99s %19s", name, type) == 2 && strcmp(name, family) == 0);
            CHECK(strcmp(type, "counter") == 0 || strcmp(type, "gauge") == 0 || strcmp(type, "histogram") == 0);
            continue;
        }
        size_t name_len = strspn(line, "abcdefghijklmnopqrstuvwxyz_");
        memcpy(name, line, name_len);
        char *space = strrchr(line, ' ');
        CHECK(strncmp(name, family, strlen(family)) == 0);
        const char *suffix = name + strlen(family);
        bool histogram = strcmp(type, "histogram") == 0;
        CHECK(histogram == (strcmp(suffix, "_bucket") == 0 || strcmp(suffix, "_sum") == 0 ||
                            strcmp(suffix, "_count") == 0));
        CHECK(histogram || suffix[0] == '\0');
        CHECK(space && (line[name_len] == '{' ? space[-1] == '}' : line + name_len == space));
        CHECK(isdigit((unsigned char)space[1]) && (strtod(space + 1, &end), *end == '\0'));
        if (strcmp(suffix, "_bucket") == 0) {
            unsigned long long n = strtoull(space + 1, NULL, 10);
            CHECK(strstr(line, "le=\"0.00005\"") || n >= cumulative);
            cumulative = n;
        } else if (strcmp(suffix, "_count") == 0) {
            CHECK(strtoull(space + 1, NULL, 10) == cumulative); /* as le="+Inf" */
        }
        *space = '\0';
        for (size_t i = 0; i < count; i++)
            CHECK(strcmp(series[i], line) != 0);
        CHECK(count < LEN(series) && strlen(line) < sizeof *series);
        strcpy(series[count++], line);
    }
    CHECK(count > 10);
}

static struct user metrics_users[ALLOWED_UIDS_MAX];

static char *metrics_text(const struct metrics *m, size_t *len) {
    enum { ROOM = 4 * METRICS_BYTES };
    static char buf[ROOM];
    struct text t = {.buf = buf, .cap = ROOM - 1};
    metrics_write(m, "0123456789abcdef0123456789abcdef", 4096, metrics_users, LEN(metrics_users), &t);
    buf[t.len] = '\0';
    *len = t.len;
    return buf;
}

static void metrics_lines(void) {
    struct metrics m = {.statm = -1};
    size_t len;
    metrics_init(&m);
    CHECK(metrics_resident(&m) > 100 * 1024);
    metrics_check(metrics_text(&m, &len));
    static const struct {
        enum rpc rpc;
        enum grpc_code code;
        uint64_t us;
    } calls[] = {{V2_STATUS, GRPC_OK, 0},  {V2_STATUS, GRPC_OK, 50},          {V2_STATUS, GRPC_OK, 51},
                 {V1_DECRYPT, GRPC_OK, 7}, {V1_DECRYPT, GRPC_NOT_FOUND, 5000000}, {RPC_UNKNOWN, GRPC_UNIMPLEMENTED, 1}};
    static const char *const want[] = {
        "kmsplugin_grpc_requests_total{service=\"v2\",method=\"Status\",code=\"OK\"} 3\n",
        "kmsplugin_grpc_requests_total{service=\"v1beta1\",method=\"Decrypt\",code=\"OK\"} 1\n",
        "kmsplugin_grpc_requests_total{service=\"v1beta1\",method=\"Decrypt\",code=\"NOT_FOUND\"} 1\n",
        ",code=\"UNIMPLEMENTED\"} 1\n",
        "_bucket{service=\"v2\",method=\"Status\",le=\"0.00005\"} 2\n",
        "_bucket{service=\"v2\",method=\"Status\",le=\"0.0001\"} 3\n",
        "_bucket{service=\"v2\",method=\"Status\",le=\"+Inf\"} 3\n",
        "_bucket{service=\"v1beta1\",method=\"Decrypt\",le=\"1\"} 1\n",
        "_bucket{service=\"v1beta1\",method=\"Decrypt\",le=\"+Inf\"} 2\n",
        "_sum{service=\"v1beta1\",method=\"Decrypt\"} 5.000007\n",
        "_sum{service=\"v2\",method=\"Status\"} 0.000101\n",
        "_count{service=\"v1beta1\",method=\"Decrypt\"} 2\n",
        "kmsplugin_connections 4096\n",
        "kmsplugin_connections_total 12\n",
        "kmsplugin_refused_peers_total 3\n",
        "kmsplugin_key_info{key_id=\"0123456789abcdef0123456789abcdef\"} 1\n",
        "kmsplugin_build_info{version=\"" VERSION "\"} 1\n",
    };
    m.accepted = 12;
    m.refused = 3;
    for (size_t i = 0; i < LEN(calls); i++)
        metrics_count(&m, calls[i].rpc, calls[i].code, calls[i].us);
    for (size_t i = 0; i < LEN(want); i++) {
        row("%s", want[i]);
        CHECK(strstr(metrics_text(&m, &len), want[i]));
    }
    metrics_check(metrics_text(&m, &len));
    close(m.statm);
}

static void metrics_fit(void) {
    struct metrics m;
    size_t len;
    memset(&m, 0xff, sizeof m); /* every counter at its largest, and there is no statm */
    char *text = metrics_text(&m, &len);
    row("%zu bytes", len);
    CHECK(len < METRICS_BYTES);
    for (unsigned rpc = 0; rpc < RPCS; rpc++)
        for (unsigned code = 0; code < GRPC_CODES; code++)
            CHECK(strstr(text, grpc_code_name(code)) && strstr(text, rpcs[rpc].method));
    memset(m.buckets, 0, sizeof m.buckets); /* whose sums would wrap */
    metrics_check(metrics_text(&m, &len));
}

/* -------------------------------------------------------------------- gRPC */

static void grpc_timeouts(void) {
    static const struct {
        const char *value;
        uint64_t us;
    } rows[] = {
        {"1H", 3600000000},
        {"1M", 60000000},
        {"1S", 1000000},
        {"1m", 1000},
        {"1u", 1},
        {"1n", 1},
        {"0n", 0},
        {"0S", 0},
        {"999n", 1},
        {"1000n", 1},
        {"1001n", 2},
        {"2999943u", 2999943},
        {"00000007m", 7000},
        {"99999999u", 99999999},
        {"99999999n", 100000},
        {"99999999S", 99999999000000},
        {"99999999H", 99999999ULL * 3600000000ULL},
        {"", UINT64_MAX},
        {"1", UINT64_MAX},
        {"S", UINT64_MAX},
        {"123456789S", UINT64_MAX}, /* nine digits */
        {"000000001S", UINT64_MAX},
        {"-1S", UINT64_MAX},
        {"+1S", UINT64_MAX},
        {" 1S", UINT64_MAX},
        {"1 S", UINT64_MAX},
        {"1S ", UINT64_MAX},
        {"1.5S", UINT64_MAX},
        {"0x1S", UINT64_MAX},
        {"1s", UINT64_MAX},
        {"1h", UINT64_MAX},
        {"1N", UINT64_MAX},
        {"1U", UINT64_MAX},
        {"1SS", UINT64_MAX},
        {"S1", UINT64_MAX},
        {"12", UINT64_MAX},
        {"infinity", UINT64_MAX},
    };
    for (size_t i = 0; i < LEN(rows); i++) {
        uint8_t *exact = copy_of(rows[i].value, strlen(rows[i].value));
        row("'%s'", rows[i].value);
        CHECK(grpc_timeout_us(exact, strlen(rows[i].value)) == rows[i].us);
        free(exact);
    }
}

static void percent_encoding(void) {
    static const struct {
        const char *text;
        size_t cap;
        const char *want;
    } rows[] = {
        {"", 10, ""},
        {"plain words, and: ~!\"&", 40, "plain words, and: ~!\"&"},
        {"100%", 10, "100%25"},
        {"a\nb\r\t", 20, "a%0Ab%0D%09"},
        {"\x7f\x80\xff", 20, "%7F%80%FF"},
        {"caf\xc3\xa9", 20, "caf%C3%A9"},
        {"abcdef", 3, "abc"},
        {"abcdef", 0, ""},
        {"ab%", 5, "ab%25"},
        {"ab%", 4, "ab"}, /* never half an escape */
        {"ab%", 3, "ab"},
        {"ab%c", 4, "ab"}, /* and nothing behind one that did not fit */
        {"%%%", 8, "%25%25"},
    };
    for (size_t i = 0; i < LEN(rows); i++) {
        char *out = test_alloc(rows[i].cap);
        out[rows[i].cap] = '!';
        size_t n = percent_encode(rows[i].text, out, rows[i].cap);
        row("row %zu", i);
        CHECK(n == strlen(rows[i].want) && memcmp(out, rows[i].want, n) == 0 && out[rows[i].cap] == '!');
        free(out);
    }
}

static void grpc_code_names(void) {
    CHECK(strcmp(grpc_code_name(GRPC_OK), "OK") == 0);
    CHECK(strcmp(grpc_code_name(GRPC_INVALID_ARGUMENT), "INVALID_ARGUMENT") == 0);
    CHECK(strcmp(grpc_code_name(GRPC_DEADLINE_EXCEEDED), "DEADLINE_EXCEEDED") == 0);
    CHECK(strcmp(grpc_code_name(GRPC_NOT_FOUND), "NOT_FOUND") == 0);
    CHECK(strcmp(grpc_code_name(GRPC_RESOURCE_EXHAUSTED), "RESOURCE_EXHAUSTED") == 0);
    CHECK(strcmp(grpc_code_name(GRPC_UNIMPLEMENTED), "UNIMPLEMENTED") == 0);
    CHECK(strcmp(grpc_code_name(GRPC_INTERNAL), "INTERNAL") == 0);
    CHECK(strcmp(grpc_code_name(16), "UNAUTHENTICATED") == 0);
    for (unsigned code = 0; code < 40; code++)
        CHECK(grpc_code_name(code)[0] != '\0');
    CHECK(grpc_code_name(UINT_MAX)[0] != '\0');
}

/* ----------------------------------------------------------- HTTP requests */

#define STATUS_PATH "/v2.KeyManagementService/Status"
#define POST ":method: POST"
#define HTTP ":scheme: http"
#define PATH ":path: " STATUS_PATH
#define LOCAL ":authority: localhost"
#define HEAD POST, HTTP, PATH, LOCAL

/* Judges one field, "name: value"; the name may be empty, or start with a colon. */
static void judge_field(struct request *r, const char *field) {
    const char *colon = strstr(field + (field[0] == ':' && field[1] != ' '), ": ");
    size_t name_len = (size_t)(colon - field), len = strlen(colon + 2);
    uint8_t *name = copy_of(field, name_len), *value = copy_of(colon + 2, len);
    request_field(r, name, name_len, value, len);
    free(name);
    free(value);
}

static const struct head_case {
    const char *name;
    bool malformed;
    const char *fields[10];
} head_cases[] = {
    {"as grpc-go sends it", false, {POST, HTTP, PATH, LOCAL, "content-type: application/grpc",
     "user-agent: grpc-go/1.65.0", "te: trailers", "grpc-timeout: 2999943u"}},
    {":authority the path, percent-encoded", false, {POST, HTTP, PATH, ":authority: %2Frun%2Fkms.sock"}},
    {":authority the path", false, {POST, HTTP, PATH, ":authority: /run/kms.sock"}},
    {":authority the abstract name", false, {POST, HTTP, PATH, ":authority: @kms"}},
    {":authority empty", false, {POST, HTTP, PATH, ":authority: "}},
    {":authority absent", false, {POST, HTTP, PATH}},
    {"pseudo fields in another order", false, {LOCAL, PATH, HTTP, POST}},
    {"host in its stead", false, {POST, HTTP, PATH, "host: localhost"}},
    {"another scheme", false, {POST, ":scheme: https", PATH}},
    {"GET", false, {":method: GET", HTTP, ":path: /metrics", LOCAL}},
    {"any other method", false, {":method: BREW", HTTP, PATH}},
    {"OPTIONS *", false, {":method: OPTIONS", HTTP, ":path: *"}},
    {"a field twice", false, {HEAD, "x-a: 1", "x-a: 2"}},
    {"cookies", false, {HEAD, "cookie: a=1", "cookie: b=2"}},
    {"an empty value", false, {HEAD, "x-empty: "}},
    {"a value with a space and a tab within", false, {HEAD, "x-a: one two\tthree"}},
    {"bytes over 0x7f in a value", false, {HEAD, "x-a: caf\xc3\xa9"}},
    {"every letter of a token", false, {HEAD, "abcdefghijklmnopqrstuvwxyz0123456789!#$%&'*+-.^_`|~: x"}},
    {"te: trailers", false, {HEAD, "te: trailers"}},
    {"user-agent twice", false, {HEAD, "user-agent: a", "user-agent: b"}},
    {"user-agent, empty", false, {HEAD, "user-agent: "}},
    {"user-agent with a control character", true, {HEAD, "user-agent: a\x01b"}},
    {"user-agent with a space behind", true, {HEAD, "user-agent: a "}},
    {"grpc-timeout twice is gRPC's to refuse", false, {HEAD, "grpc-timeout: 1S", "grpc-timeout: 1S"}},

    {"nothing", true, {NULL}},
    {"no :method", true, {HTTP, PATH, LOCAL}},
    {"no :scheme", true, {POST, PATH, LOCAL}},
    {"no :path", true, {POST, HTTP, LOCAL}},
    {"an empty :method", true, {":method: ", HTTP, PATH}},
    {"an empty :scheme", true, {POST, ":scheme: ", PATH}},
    {"an empty :path", true, {POST, HTTP, ":path: "}},
    {"a relative :path", true, {POST, HTTP, ":path: v2.KeyManagementService/Status"}},
    {"an absolute URL as :path", true, {POST, HTTP, ":path: http://localhost/x"}},
    {":method twice", true, {POST, POST, HTTP, PATH}},
    {":method twice, another", true, {":method: GET", POST, HTTP, PATH}},
    {":scheme twice", true, {POST, HTTP, HTTP, PATH}},
    {":path twice", true, {POST, HTTP, PATH, PATH}},
    {":authority twice", true, {POST, HTTP, PATH, LOCAL, LOCAL}},
    {":authority twice, empty", true, {POST, HTTP, PATH, ":authority: ", ":authority: "}},
    {":status", true, {HEAD, ":status: 200"}},
    {":protocol", true, {HEAD, ":protocol: websocket"}},
    {"an unknown pseudo field", true, {HEAD, ":x: y"}},
    {"a colon alone", true, {HEAD, ":: y"}},
    {"an empty name", true, {HEAD, ": y"}},
    {"pseudo behind regular", true, {POST, HTTP, "x-a: b", PATH}},
    {":authority behind regular", true, {POST, HTTP, PATH, "te: trailers", LOCAL}},
    {"upper case", true, {HEAD, "Content-Type: application/grpc"}},
    {"upper case within", true, {HEAD, "x-A: b"}},
    {"upper case in a pseudo field", true, {":Method: POST", HTTP, PATH}},
    {"a colon in a name", true, {HEAD, "x:a: b"}},
    {"a space in a name", true, {HEAD, "x a: b"}},
    {"a space behind a name", true, {HEAD, "x-a : b"}},
    {"a space before a name", true, {HEAD, " x-a: b"}},
    {"a byte over 0x7f in a name", true, {HEAD, "caf\xc3\xa9: x"}},
    {"space before a value", true, {HEAD, "x-a:  b"}},
    {"space behind a value", true, {HEAD, "x-a: b "}},
    {"tab before a value", true, {HEAD, "x-a: \tb"}},
    {"tab behind a value", true, {HEAD, "x-a: b\t"}},
    {"only a space", true, {HEAD, "x-a:  "}},
    {"CR LF and another field", true, {HEAD, "x-a: b\r\nx-c: d"}},
    {"connection", true, {HEAD, "connection: keep-alive"}},
    {"connection, empty", true, {HEAD, "connection: "}},
    {"proxy-connection", true, {HEAD, "proxy-connection: keep-alive"}},
    {"keep-alive", true, {HEAD, "keep-alive: timeout=5"}},
    {"transfer-encoding", true, {HEAD, "transfer-encoding: chunked"}},
    {"upgrade", true, {HEAD, "upgrade: h2c"}},
    {"te: gzip", true, {HEAD, "te: gzip"}},
    {"te: two", true, {HEAD, "te: trailers, gzip"}},
    {"te, empty", true, {HEAD, "te: "}},
    {"content-type twice", true, {HEAD, "content-type: application/grpc", "content-type: application/grpc"}},

    {"content-length 0", false, {HEAD, "content-length: 0"}},
    {"content-length", false, {HEAD, "content-length: 5"}},
    {"content-length with leading zeros", false, {HEAD, "content-length: 0000000005"}},
    {"content-length, the largest", false, {HEAD, "content-length: 999999999999999999"}},
    {"content-length, empty", true, {HEAD, "content-length: "}},
    {"content-length negative", true, {HEAD, "content-length: -1"}},
    {"content-length with a sign", true, {HEAD, "content-length: +5"}},
    {"content-length in hex", true, {HEAD, "content-length: 0x5"}},
    {"content-length, a list", true, {HEAD, "content-length: 5, 5"}},
    {"content-length, a fraction", true, {HEAD, "content-length: 5.0"}},
    {"content-length, letters behind", true, {HEAD, "content-length: 5a"}},
    {"content-length 2^64 + 5", true, {HEAD, "content-length: 18446744073709551621"}},
    {"content-length, endless", true, {HEAD, "content-length: 99999999999999999999999999999999999999"}},
    {"content-length twice", true, {HEAD, "content-length: 5", "content-length: 6"}},

    {"CONNECT", false, {":method: CONNECT", ":authority: localhost:443"}},
    {"CONNECT without :authority", true, {":method: CONNECT"}},
    {"CONNECT with :scheme", true, {":method: CONNECT", HTTP, LOCAL}},
    {"CONNECT with :path", true, {":method: CONNECT", ":path: /", LOCAL}},
    {"CONNECT as POST", true, {":method: CONNECT", HTTP, PATH, LOCAL}},
};

static void head_rules(void) {
    for (size_t i = 0; i < LEN(head_cases); i++) {
        struct request r;
        request_init(&r);
        for (size_t k = 0; k < LEN(head_cases[i].fields) && head_cases[i].fields[k]; k++)
            judge_field(&r, head_cases[i].fields[k]);
        request_head_end(&r);
        row("%s", head_cases[i].name);
        CHECK(r.malformed == head_cases[i].malformed);
    }
}

/* Each byte at the start, the middle and the end of a name and of a value (RFC 9113 8.2.1). */
static void head_bytes(void) {
    for (unsigned c = 0; c < 256; c++) {
        for (size_t at = 0; at < 3; at++) {
            struct request in_name, in_value;
            uint8_t text[3] = {'a', 'b', 'c'};
            text[at] = (uint8_t)c;
            request_init(&in_name);
            request_init(&in_value);
            request_field(&in_name, text, 3, (const uint8_t *)"value", 5);
            request_field(&in_value, (const uint8_t *)"name", 4, text, 3);
            bool token = (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || (c && strchr("!#$%&'*+-.^_`|~", (int)c));
            bool edge = at != 1 && (c == ' ' || c == '\t');
            row("byte 0x%02x at %zu", c, at);
            CHECK(in_name.malformed == !token);
            if (c == '\0' || c == '\r' || c == '\n' || edge)
                CHECK(in_value.malformed);
            else if (c >= ' ' && c != 0x7f)
                CHECK(!in_value.malformed);
        }
    }
}

#define NONE UINT64_MAX

static void head_values(void) {
    static const struct {
        const char *field;
        enum http_method method;
        enum rpc rpc;
        bool metrics, grpc, bad_timeout;
        uint64_t timeout_us, content_length;
    } rows[] = {
        {":method: POST", METHOD_POST, RPC_UNKNOWN, false, false, false, NONE, NONE},
        {":method: GET", METHOD_GET, RPC_UNKNOWN, false, false, false, NONE, NONE},
        {":method: CONNECT", METHOD_CONNECT, RPC_UNKNOWN, false, false, false, NONE, NONE},
        {":method: post", METHOD_OTHER, RPC_UNKNOWN, false, false, false, NONE, NONE},
        {":method: POSTS", METHOD_OTHER, RPC_UNKNOWN, false, false, false, NONE, NONE},
        {":method: PUT", METHOD_OTHER, RPC_UNKNOWN, false, false, false, NONE, NONE},
        {":path: /v2.KeyManagementService/Status", METHOD_OTHER, V2_STATUS, false, false, false, NONE, NONE},
        {":path: /v2.KeyManagementService/Encrypt", METHOD_OTHER, V2_ENCRYPT, false, false, false, NONE, NONE},
        {":path: /v2.KeyManagementService/Decrypt", METHOD_OTHER, V2_DECRYPT, false, false, false, NONE, NONE},
        {":path: /v1beta1.KeyManagementService/Version", METHOD_OTHER, V1_VERSION, false, false, false, NONE, NONE},
        {":path: /v1beta1.KeyManagementService/Encrypt", METHOD_OTHER, V1_ENCRYPT, false, false, false, NONE, NONE},
        {":path: /v1beta1.KeyManagementService/Decrypt", METHOD_OTHER, V1_DECRYPT, false, false, false, NONE, NONE},
        {":path: /v1beta1.KeyManagementService/Status", METHOD_OTHER, RPC_UNKNOWN, false, false, false, NONE, NONE},
        {":path: /v2.KeyManagementService/Version", METHOD_OTHER, RPC_UNKNOWN, false, false, false, NONE, NONE},
        {":path: /v2.KeyManagementService/Status/", METHOD_OTHER, RPC_UNKNOWN, false, false, false, NONE, NONE},
        {":path: /v2.KeyManagementService/Statu", METHOD_OTHER, RPC_UNKNOWN, false, false, false, NONE, NONE},
        {":path: /V2.KeyManagementService/Status", METHOD_OTHER, RPC_UNKNOWN, false, false, false, NONE, NONE},
        {":path: /metrics", METHOD_OTHER, RPC_UNKNOWN, true, false, false, NONE, NONE},
        {":path: /metrics/", METHOD_OTHER, RPC_UNKNOWN, false, false, false, NONE, NONE},
        {":path: /", METHOD_OTHER, RPC_UNKNOWN, false, false, false, NONE, NONE},
        {"content-type: application/grpc", METHOD_OTHER, RPC_UNKNOWN, false, true, false, NONE, NONE},
        {"content-type: application/grpc+proto", METHOD_OTHER, RPC_UNKNOWN, false, true, false, NONE, NONE},
        {"content-type: Application/GRPC", METHOD_OTHER, RPC_UNKNOWN, false, true, false, NONE, NONE},
        {"content-type: application/grpc;charset=utf-8", METHOD_OTHER, RPC_UNKNOWN, false, true, false, NONE, NONE},
        {"content-type: application/grpc+json", METHOD_OTHER, RPC_UNKNOWN, false, false, false, NONE, NONE},
        {"content-type: application/grpc-web", METHOD_OTHER, RPC_UNKNOWN, false, false, false, NONE, NONE},
        {"content-type: application/grpc+", METHOD_OTHER, RPC_UNKNOWN, false, false, false, NONE, NONE},
        {"content-type: application/grp", METHOD_OTHER, RPC_UNKNOWN, false, false, false, NONE, NONE},
        {"content-type: application/json", METHOD_OTHER, RPC_UNKNOWN, false, false, false, NONE, NONE},
        {"content-type: ", METHOD_OTHER, RPC_UNKNOWN, false, false, false, NONE, NONE},
        {"content-type: ;", METHOD_OTHER, RPC_UNKNOWN, false, false, false, NONE, NONE},
        {"grpc-timeout: 3S", METHOD_OTHER, RPC_UNKNOWN, false, false, false, 3000000, NONE},
        {"grpc-timeout: 3s", METHOD_OTHER, RPC_UNKNOWN, false, false, true, NONE, NONE},
        {"grpc-timeout: ", METHOD_OTHER, RPC_UNKNOWN, false, false, true, NONE, NONE},
        {"content-length: 0", METHOD_OTHER, RPC_UNKNOWN, false, false, false, NONE, 0},
        {"content-length: 65541", METHOD_OTHER, RPC_UNKNOWN, false, false, false, NONE, 65541},
    };
    for (size_t i = 0; i < LEN(rows); i++) {
        struct request r;
        request_init(&r);
        judge_field(&r, rows[i].field);
        row("%s", rows[i].field);
        CHECK(!r.malformed && r.method == rows[i].method && r.rpc == rows[i].rpc && r.metrics == rows[i].metrics);
        CHECK(r.grpc == rows[i].grpc && r.bad_timeout == rows[i].bad_timeout);
        CHECK(r.timeout_us == rows[i].timeout_us && r.content_length == rows[i].content_length);
    }
}

static void trailer_rules(void) {
    static const struct {
        const char *field;
        bool malformed;
    } rows[] = {
        {"x-checksum: 7", false}, {"content-type: text/plain", false}, {"content-length: 7", false},
        {"grpc-timeout: x", false}, {":path: /", true}, {":status: 200", true}, {"X-A: b", true},
        {"connection: close", true}, {"transfer-encoding: gzip", true}, {"x-a:  b", true},
        {"user-agent: a", false}, {"user-agent: a ", true},
    };
    for (size_t i = 0; i < LEN(rows); i++) {
        static const char *const head[] = {HEAD, "content-type: application/grpc", "content-length: 5"};
        struct request r;
        request_init(&r);
        for (size_t k = 0; k < LEN(head); k++)
            judge_field(&r, head[k]);
        request_head_end(&r);
        row("%s", rows[i].field);
        CHECK(!r.malformed);
        judge_field(&r, rows[i].field);
        CHECK(r.malformed == rows[i].malformed);
        /* trailers change nothing of the head */
        CHECK(r.rpc == V2_STATUS && r.grpc && r.content_length == 5 && !r.bad_timeout);
    }
    static const char *const bare[] = {HEAD};
    struct request r;
    request_init(&r);
    for (size_t k = 0; k < LEN(bare); k++)
        judge_field(&r, bare[k]);
    request_head_end(&r);
    judge_field(&r, ":path: /");
    row("a pseudo field, and no regular one before it");
    CHECK(r.malformed);
}

/* A list is measured as RFC 9113 6.5.2 does: names, values, and 32 bytes a field. */
static void head_size(void) {
    static uint8_t value[FIELDS_MAX_BYTES];
    static const char *const head[] = {HEAD};
    memset(value, 'v', sizeof value);
    size_t used = 0;
    for (size_t k = 0; k < LEN(head); k++)
        used += strlen(head[k]) - 2 + 32;
    for (int over = -1; over <= 1; over++) {
        struct request r;
        request_init(&r);
        for (size_t k = 0; k < LEN(head); k++)
            judge_field(&r, head[k]);
        request_field(&r, (const uint8_t *)"x", 1, value, FIELDS_MAX_BYTES - used - 33 + (size_t)(over + 1) - 1);
        request_head_end(&r);
        row("%d over the limit", over);
        CHECK(!r.malformed);
        CHECK((r.field_bytes > FIELDS_MAX_BYTES) == (over > 0) && (int)r.field_bytes - FIELDS_MAX_BYTES == over);
    }
    struct request r;
    request_init(&r);
    for (int i = 0; i < 1000; i++)
        judge_field(&r, "a: b");
    row("a thousand small fields");
    CHECK(r.field_bytes == 34000);
}

/* --------------------------------------------------------------- Endpoints */

#define X10 "xxxxxxxxxx"
#define X100 X10 X10 X10 X10 X10 X10 X10 X10 X10 X10

static void endpoints_good(void) {
    static const struct {
        const char *endpoint, *path; /* behind the NUL, if abstract */
        bool abstract;
    } rows[] = {
        {"unix:///run/kmsplugin/kms.sock", "/run/kmsplugin/kms.sock", false},
        {"unix:///kms.sock", "/kms.sock", false},
        {"unix:///a b/with space", "/a b/with space", false},
        {"unix:///run/@kms", "/run/@kms", false},
        {"unix:///x:y=z,&+~!$'()*;[]", "/x:y=z,&+~!$'()*;[]", false},
        {"unix:///caf\xc3\xa9", "/caf\xc3\xa9", false},
        {"unix:///" X100 "123456", "/" X100 "123456", false}, /* 107 bytes */
        {"unix:///@k", "k", true},
        {"unix:///@kmsplugin.sock", "kmsplugin.sock", true},
        {"unix:///@with/slash", "with/slash", true},
        {"unix:///@@", "@", true},
        {"unix:///@" X100 "1234567", X100 "1234567", true}, /* 107 bytes and the NUL before them */
    };
    for (size_t i = 0; i < LEN(rows); i++) {
        struct sockaddr_un address;
        socklen_t len;
        char name[ENDPOINT_NAME_BYTES];
        size_t path_len = strlen(rows[i].path);
        memset(&address, 0xee, sizeof address);
        row("%s", rows[i].endpoint);
        CHECK(endpoint_parse(rows[i].endpoint, &address, &len) == NULL);
        CHECK(address.sun_family == AF_UNIX);
        CHECK(len == offsetof(struct sockaddr_un, sun_path) + path_len + 1); /* a NUL at one end or the other */
        CHECK(memcmp(address.sun_path + rows[i].abstract, rows[i].path, path_len) == 0);
        CHECK(address.sun_path[rows[i].abstract ? 0 : path_len] == '\0');
        CHECK(all_zero((uint8_t *)&address + len, sizeof address - len));
        CHECK(strcmp(endpoint_name(&address, len, name, sizeof name), rows[i].endpoint) == 0);
    }
}

static void endpoints_bad(void) {
    static const char *const rows[] = {
        "", "unix", "unix:", "unix:/", "unix://", "unix:run", "unix:/run/kms.sock", "unix://run/kms.sock",
        "unix://@kms", "unix:@kms",
        "unix://./kms.sock", "unix://localhost/run/kms.sock", "unix:///", "unix:///run/", "unix:///@", "/run/kms.sock",
        "@kms", "run/kms.sock",
        "UNIX:///run/kms.sock", " unix:///run/kms.sock", "tcp://127.0.0.1:8080", "http://localhost/",
        "https://localhost/", "dns:///x", "127.0.0.1:8080",
        "unix-abstract:kms", "vsock:2:8080",
        "unix:///run/kms%20.sock", "unix:///run/kms?.sock", "unix:///run/kms#.sock", "unix:///run/%", "unix:///@kms%41",
        "unix:///@kms?x", "unix:///@kms#x",
        "unix:///run/kms\n.sock", "unix:///run/\x1b.sock", "unix:///@\x7f", "unix:///run/kms.sock\n",
        "unix:///" X100 "1234567",  /* 108 bytes */
        "unix:///@" X100 "12345678",
        "unix:///" X100 X100, "unix:///@" X100 X100,
    };
    for (size_t i = 0; i < LEN(rows); i++) {
        struct sockaddr_un address;
        socklen_t len;
        const char *wrong = endpoint_parse(rows[i], &address, &len);
        row("'%s'", rows[i]);
        CHECK(wrong && strlen(wrong) > 10 && !strchr(wrong, '\n'));
    }
}

/* The kernel's own idea of an address, as accepted from systemd. */
static void endpoint_names_of_sockets(void) {
    struct sockaddr_un address = {.sun_family = AF_UNIX}, got;
    socklen_t len = sizeof(sa_family_t), got_len = sizeof got;
    char name[ENDPOINT_NAME_BYTES];
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    CHECK(fd >= 0);
    CHECK(getsockname(fd, (struct sockaddr *)&got, &got_len) == 0);
    CHECK(strcmp(endpoint_name(&got, got_len, name, sizeof name), "unix://") == 0); /* not bound */
    CHECK(bind(fd, (struct sockaddr *)&address, len) == 0); /* autobind: five hexadecimal digits */
    got_len = sizeof got;
    CHECK(getsockname(fd, (struct sockaddr *)&got, &got_len) == 0);
    endpoint_name(&got, got_len, name, sizeof name);
    row("%s", name);
    CHECK(strncmp(name, "unix:///@", 9) == 0 && strlen(name) == 9 + 5);
    close(fd);
}

/* ---------------------------------------------------- Sessions, in memory
 *
 * A server with its ring and no socket but one end of a pair. The client is
 * nghttp2's; what it says is recorded, fed whole, in pieces, and damaged.
 */

static struct server *session_server(void) {
    static struct serve_options options;
    static char endpoint[64];
    static unsigned number; /* a test that failed may have left its server */
    snprintf(endpoint, sizeof endpoint, "unix:///@kmsplugin-unit-%d-%u", (int)getpid(), number++);
    options = (struct serve_options){.endpoints = {endpoint}, .endpoint_count = 1, .mode = 0600, .max_connections = 16,
                                     .uids = {geteuid()}, .uid_count = 1};
    sigset_t before;
    sigprocmask(SIG_BLOCK, NULL, &before);
    log_level = LOG_ERROR;
    struct server *s = server_new(ring_of(0, 2), &options);
    listeners_open(s);
    sigprocmask(SIG_SETMASK, &before, NULL);
    return s;
}

static void session_server_free(struct server *s) {
    while (s->listener_count > 0)
        listener_close(&s->listeners[--s->listener_count]);
    server_free(s);
    log_level = LOG_INFO;
}

/* A connection of the server; *fd is the peer's end. NULL if it was closed at once. */
static struct conn *session_open(struct server *s, int *fd) {
    int pair[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair) == 0);
    const struct ucred peer = {.pid = getpid(), .uid = geteuid()};
    *fd = pair[1];
    conn_new(s, pair[0], &peer, &s->users[0]);
    if (!s->conns || s->conns->closed)
        return NULL;
    return s->conns;
}

/* Ends the connection, if it has not ended itself; then nothing of it is left. */
static void session_close(struct server *s, struct conn *c, int fd) {
    if (c)
        conn_close(c, "end of the test");
    server_reap(s);
    close(fd);
    CHECK(!s->conns && s->heap.in_use == 0);
    for (enum resource r = 0; r < RESOURCES; r++)
        CHECK(s->used[r] == 0 && s->users[0].used[r] == 0);
}

/* What the server sends, appended to `out`; all of it when out is NULL is dropped. */
struct sink {
    uint8_t *bytes;
    size_t len, cap;
};

static void session_drain(int fd, struct sink *out) {
    static uint8_t dropped[64 * 1024];
    ssize_t n;
    do {
        n = out ? read(fd, out->bytes + out->len, out->cap - out->len) : read(fd, dropped, sizeof dropped);
        if (n > 0 && out)
            out->len += (size_t)n;
        CHECK(!out || out->len < out->cap);
    } while (n > 0);
}

/* Whether there is something for the connection to do. */
static bool session_pending(const struct conn *c) {
    int n = 0;
    if (c->writing)
        return true;
    return ioctl(c->source.fd, FIONREAD, &n) == 0 && n > 0;
}

/* Gives the server bytes to read, and turns the loop until it has dealt with them. */
static void session_feed(struct conn *c, int fd, const uint8_t *bytes, size_t len, struct sink *out) {
    while (len > 0 && !c->closed) {
        ssize_t n = write(fd, bytes, len < 16384 ? len : 16384);
        CHECK(n > 0 || errno == EPIPE);
        if (n < 0)
            break;
        bytes += n;
        len -= (size_t)n;
        for (int turns = 0; !c->closed && session_pending(c); turns++) {
            CHECK(turns < 10000);
            conn_ready(c, c->writing ? EPOLLOUT : EPOLLIN);
            session_drain(fd, out);
        }
    }
    session_drain(fd, out);
}

/* What the client asks, and what it must be told. */
enum { PING_PLAIN = 4, MESSAGE_ROOM = 600, DIALOGUE = 23, FRAME_HEAD = 9, PADDING = 20 };

static const char ping[] = "ping";

struct exchange {
    const char *name, *method, *path, *content_type;
    const char *http, *status; /* expected; status NULL: none; both NULL: reset with PROTOCOL_ERROR */
    const char *extra, *value; /* one field more, or NULL */
    uint8_t body[MESSAGE_ROOM];
    size_t body_len;
    size_t sent; /* by the client */
    /* received: */
    char http_status[8], grpc_status[8], message[MESSAGE_TEXT_MAX + 1], type[80];
    uint8_t reply[METRICS_BYTES];
    size_t reply_len;
    uint32_t error;
    bool closed, headers_first;
};

static struct exchange dialogue[DIALOGUE];

static void exchange_set(size_t i, const char *name, const char *method, const char *path, const char *type,
                         const char *http, const char *status) {
    dialogue[i] = (struct exchange){
        .name = name, .method = method, .path = path, .content_type = type, .http = http, .status = status};
}

static void exchange_bytes(size_t i, const char *prefix, const void *bytes, size_t len) {
    memcpy(dialogue[i].body, prefix, GRPC_PREFIX_BYTES);
    if (len > 0)
        memcpy(dialogue[i].body + GRPC_PREFIX_BYTES, bytes, len);
    dialogue[i].body_len = GRPC_PREFIX_BYTES + len;
}

static void exchange_message(size_t i, const void *message) {
    uint8_t packed[MESSAGE_ROOM];
    size_t len = protobuf_c_message_pack(message, packed);
    const char prefix[] = {0, 0, 0, (char)(len >> 8), (char)len};
    exchange_bytes(i, prefix, packed, len);
}

#define V2(method) "/v2.KeyManagementService/" method
#define V1(method) "/v1beta1.KeyManagementService/" method

static void dialogue_init(struct server *s) {
    static const char grpc[] = "application/grpc";
    static uint8_t sealed1[PING_PLAIN + SEALED_OVERHEAD], sealed2[PING_PLAIN + SEALED_OVERHEAD];
    CHECK(seal(s->kms.ring, &s->kms.random, API_V1, (const uint8_t *)ping, PING_PLAIN, sealed1) == 0);
    CHECK(seal(s->kms.ring, &s->kms.random, API_V2, (const uint8_t *)ping, PING_PLAIN, sealed2) == 0);
    V2__StatusRequest status = V2__STATUS_REQUEST__INIT;
    V2__EncryptRequest encrypt = V2__ENCRYPT_REQUEST__INIT;
    encrypt.plaintext = binary(ping, PING_PLAIN);
    encrypt.uid = text_of("uid");
    V2__DecryptRequest decrypt = V2__DECRYPT_REQUEST__INIT;
    decrypt.ciphertext = binary(sealed2, sizeof sealed2);
    decrypt.uid = text_of("uid");
    decrypt.key_id = s->kms.ring->keks[0].key_id;
    V2__V1beta1__VersionRequest version = V2__V1BETA1__VERSION_REQUEST__INIT;
    version.version = text_of("v1beta1");
    V2__V1beta1__EncryptRequest encrypt1 = V2__V1BETA1__ENCRYPT_REQUEST__INIT;
    encrypt1.version = text_of("v1beta1");
    encrypt1.plain = binary(ping, PING_PLAIN);
    V2__V1beta1__DecryptRequest decrypt1 = V2__V1BETA1__DECRYPT_REQUEST__INIT;
    decrypt1.version = text_of("v1beta1");
    decrypt1.cipher = binary(sealed1, sizeof sealed1);
    exchange_set(0, "v2 Status", "POST", V2("Status"), grpc, "200", "0");
    exchange_message(0, &status);
    exchange_set(1, "v2 Encrypt", "POST", V2("Encrypt"), grpc, "200", "0");
    exchange_message(1, &encrypt);
    exchange_set(2, "v2 Decrypt", "POST", V2("Decrypt"), "application/grpc+proto", "200", "0");
    exchange_message(2, &decrypt);
    exchange_set(3, "v1 Version", "POST", V1("Version"), grpc, "200", "0");
    exchange_message(3, &version);
    exchange_set(4, "v1 Encrypt", "POST", V1("Encrypt"), grpc, "200", "0");
    exchange_message(4, &encrypt1);
    exchange_set(5, "v1 Decrypt", "POST", V1("Decrypt"), grpc, "200", "0");
    exchange_message(5, &decrypt1);
    decrypt.key_id = s->kms.ring->keks[1].key_id;
    exchange_set(6, "v2 Decrypt, wrong key_id", "POST", V2("Decrypt"), grpc, "200", "3");
    exchange_message(6, &decrypt);
    exchange_set(7, "an unknown method", "POST", V2("Rotate"), grpc, "200", "12");
    exchange_message(7, &status);
    exchange_set(8, "a compressed message", "POST", V2("Status"), grpc, "200", "12");
    exchange_bytes(8, "\1\0\0\0\2", "ab", 2);
    exchange_set(9, "a message over 64 KiB", "POST", V2("Encrypt"), grpc, "200", "8");
    exchange_bytes(9, "\0\0\1\0\1", "start of it", 11);
    exchange_set(10, "a message cut short", "POST", V2("Encrypt"), grpc, "200", "13");
    exchange_bytes(10, "\0\0\0\0\5", "\12\1x", 3); /* as far as it goes it is a message */
    exchange_set(11, "two messages", "POST", V2("Status"), grpc, "200", "13");
    exchange_bytes(11, "\0\0\0\0\0", "\0\0\0\0\0", 5);
    exchange_set(12, "no message", "POST", V2("Status"), grpc, "200", "13");
    exchange_set(13, "bytes that are no message", "POST", V2("Encrypt"), grpc, "200", "13");
    exchange_bytes(13, "\0\0\0\0\2", "\xff\xff", 2);
    exchange_set(14, "PUT", "PUT", V2("Status"), grpc, "405", NULL);
    exchange_set(15, "GET of something else", "GET", "/healthz", NULL, "404", NULL);
    exchange_set(16, "another content-type", "POST", V2("Status"), "application/json", "415", NULL);
    exchange_message(16, &status);
    exchange_set(17, "GET of the metrics", "GET", "/metrics", NULL, "200", NULL); /* the one long answer */
    exchange_set(18, "content-length as it is", "POST", V2("Status"), grpc, "200", "0");
    exchange_set(19, "content-length too small", "POST", V2("Status"), grpc, NULL, NULL);
    exchange_set(20, "content-length too large", "POST", V2("Encrypt"), grpc, NULL, NULL);
    exchange_set(21, "content-length no number", "POST", V2("Status"), grpc, NULL, NULL);
    exchange_set(22, "a field of HTTP/1", "POST", V2("Status"), grpc, NULL, NULL);
    static const char *const lengths[] = {"5", "4", "500", "5 bytes"};
    for (size_t i = 18; i < DIALOGUE; i++) {
        exchange_message(i, i == 20 ? (const void *)&encrypt : &status);
        dialogue[i].extra = i < 22 ? "content-length" : "connection";
        dialogue[i].value = i < 22 ? lengths[i - 18] : "close";
    }
}

static ssize_t peer_read_body(nghttp2_session *session, int32_t id, uint8_t *buf, size_t cap, uint32_t *flags,
                              nghttp2_data_source *source, void *user) {
    (void)session;
    (void)user;
    struct exchange *x = source->ptr;
    size_t n = x->body_len - x->sent < cap ? x->body_len - x->sent : cap;
    bool apart = id / 2 % 3 == 1 && n > 0; /* every third stream ends with a frame of its own */
    memcpy(buf, x->body + x->sent, n);
    x->sent += n;
    if (x->sent == x->body_len && !apart)
        *flags |= NGHTTP2_DATA_FLAG_EOF;
    return (ssize_t)n;
}

static struct exchange *peer_exchange(int32_t id) {
    CHECK(id > 0 && id % 2 == 1 && (size_t)id / 2 < DIALOGUE);
    return &dialogue[id / 2];
}

static bool is_text(const uint8_t *bytes, size_t len, const char *text) {
    return len == strlen(text) && memcmp(bytes, text, len) == 0;
}

static int peer_on_header(nghttp2_session *session, const nghttp2_frame *frame, const uint8_t *name, size_t name_len,
                          const uint8_t *value, size_t len, uint8_t flags, void *user) {
    (void)session;
    (void)flags;
    (void)user;
    struct exchange *x = peer_exchange(frame->hd.stream_id);
    if (is_text(name, name_len, ":status"))
        copy_text(x->http_status, sizeof x->http_status, value, len);
    else if (is_text(name, name_len, "grpc-status"))
        copy_text(x->grpc_status, sizeof x->grpc_status, value, len);
    else if (is_text(name, name_len, "grpc-message"))
        copy_text(x->message, sizeof x->message, value, len);
    else if (is_text(name, name_len, "content-type"))
        copy_text(x->type, sizeof x->type, value, len);
    return 0;
}

static int peer_on_data(nghttp2_session *session, uint8_t flags, int32_t id, const uint8_t *data, size_t len,
                        void *user) {
    (void)session;
    (void)flags;
    (void)user;
    struct exchange *x = peer_exchange(id);
    CHECK(len <= sizeof x->reply - x->reply_len);
    memcpy(x->reply + x->reply_len, data, len);
    x->reply_len += len;
    return 0;
}

static int peer_on_close(nghttp2_session *session, int32_t id, uint32_t error, void *user) {
    (void)session;
    (void)user;
    struct exchange *x = peer_exchange(id);
    x->closed = true;
    x->error = error;
    return 0;
}

/* A client that has the whole dialogue to say. */
static nghttp2_session *peer_new(void) {
    nghttp2_session_callbacks *callbacks;
    nghttp2_session *session;
    CHECK(nghttp2_session_callbacks_new(&callbacks) == 0);
    nghttp2_session_callbacks_set_on_header_callback(callbacks, peer_on_header);
    nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, peer_on_data);
    nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, peer_on_close);
    CHECK(nghttp2_session_client_new(&session, callbacks, NULL) == 0);
    nghttp2_session_callbacks_del(callbacks);
    CHECK(nghttp2_submit_settings(session, NGHTTP2_FLAG_NONE, NULL, 0) == 0);
    CHECK(nghttp2_submit_ping(session, NGHTTP2_FLAG_NONE, (const uint8_t *)"kms ping") == 0);
    for (size_t i = 0; i < DIALOGUE; i++) {
        struct exchange *x = &dialogue[i];
        nghttp2_nv fields[8] = {field_copied(":method", x->method, strlen(x->method)), FIELD(":scheme", "http"),
                                field_copied(":path", x->path, strlen(x->path)),
                                FIELD(":authority", "%2Frun%2Fkms.sock"), FIELD("te", "trailers"),
                                FIELD("grpc-timeout", "2999943u")};
        size_t count = 6;
        if (x->content_type)
            fields[count++] = field_copied("content-type", x->content_type, strlen(x->content_type));
        if (x->extra)
            fields[count++] = field_copied(x->extra, x->value, strlen(x->value));
        nghttp2_data_provider body = {.source.ptr = x, .read_callback = peer_read_body};
        x->sent = x->reply_len = 0;
        x->http_status[0] = x->grpc_status[0] = x->message[0] = x->type[0] = '\0';
        x->closed = false;
        bool get = strcmp(x->method, "GET") == 0;
        CHECK(nghttp2_submit_request(session, NULL, fields, count, get ? NULL : &body, NULL) == (int32_t)(2 * i + 1));
    }
    return session;
}

/* Pads a DATA frame (RFC 9113 6.1), in place; for the release's nghttp2 pads none. Returns its new length. */
static size_t frame_pad(uint8_t *frame, size_t len) {
    size_t padded = len + 1 + PADDING - FRAME_HEAD;
    memmove(frame + FRAME_HEAD + 1, frame + FRAME_HEAD, len - FRAME_HEAD);
    memset(frame + len + 1, 0, PADDING);
    frame[1] = (uint8_t)(padded >> 8);
    frame[2] = (uint8_t)padded;
    frame[4] |= NGHTTP2_FLAG_PADDED;
    frame[FRAME_HEAD] = PADDING;
    return FRAME_HEAD + padded;
}

/* What the client has to say now, a frame at a time. Every other message is followed by padding. */
static size_t peer_say(nghttp2_session *session, uint8_t *out, size_t cap) {
    size_t len = 0;
    const uint8_t *bytes;
    for (ssize_t n; (n = nghttp2_session_mem_send(session, &bytes)) > 0;) {
        CHECK(len + (size_t)n + 64 <= cap);
        memcpy(out + len, bytes, (size_t)n);
        bool pad = bytes[3] == NGHTTP2_DATA && bytes[8] / 2 % 2 == 1;
        len += pad ? frame_pad(out + len, (size_t)n) : (size_t)n;
    }
    return len;
}

/* What a client that has the whole dialogue to say says at first. */
static size_t peer_first_words(uint8_t *out, size_t cap) {
    nghttp2_session *peer = peer_new();
    size_t len = peer_say(peer, out, cap);
    nghttp2_session_del(peer);
    return len;
}

static void exchange_check(const struct exchange *x, const struct server *s) {
    static const uint8_t none[1] = {0};
    CHECK(x->closed && x->error == (x->http ? NGHTTP2_NO_ERROR : NGHTTP2_PROTOCOL_ERROR));
    CHECK(strcmp(x->http_status, x->http ? x->http : "") == 0);
    CHECK(strcmp(x->grpc_status, x->status ? x->status : "") == 0);
    if (!x->status) {
        bool numbers = strcmp(x->path, "/metrics") == 0;
        CHECK(numbers ? x->reply_len > 5000 && x->reply[x->reply_len - 1] == '\n' : x->reply_len == 0);
        CHECK(!numbers || strncmp(x->type, "text/plain; version=0.0.4", 25) == 0);
        return;
    }
    CHECK(strcmp(x->type, "application/grpc") == 0);
    if (strcmp(x->status, "0") != 0) {
        CHECK(x->message[0] && x->reply_len == 0);
        return;
    }
    CHECK(x->reply_len >= GRPC_PREFIX_BYTES && x->reply[0] == 0 && x->reply[1] == 0 && x->reply[2] == 0);
    size_t len = (size_t)x->reply[3] << 8 | x->reply[4];
    CHECK(len == x->reply_len - GRPC_PREFIX_BYTES);
    size_t i = x->extra ? V2_STATUS : (size_t)(x - dialogue);
    void *m = protobuf_c_message_unpack(response_types[i], NULL, len, len ? x->reply + GRPC_PREFIX_BYTES : none);
    CHECK(m);
    uint8_t out[PING_PLAIN];
    const V2__EncryptResponse *e2 = m;
    const V2__DecryptResponse *d2 = m;
    const V2__V1beta1__EncryptResponse *e1 = m;
    const V2__V1beta1__DecryptResponse *d1 = m;
    switch ((enum rpc)i) {
    case V2_STATUS:
        CHECK(strcmp(((const V2__StatusResponse *)m)->key_id, s->kms.ring->keks[0].key_id) == 0);
        break;
    case V2_ENCRYPT:
        CHECK(e2->ciphertext.len == PING_PLAIN + SEALED_OVERHEAD);
        CHECK(open_sealed(s->kms.ring, API_V2, e2->ciphertext.data, e2->ciphertext.len, out) == OPENED &&
              memcmp(out, ping, PING_PLAIN) == 0);
        break;
    case V2_DECRYPT:
        CHECK(d2->plaintext.len == PING_PLAIN && memcmp(d2->plaintext.data, ping, PING_PLAIN) == 0);
        break;
    case V1_VERSION:
        CHECK(strcmp(((const V2__V1beta1__VersionResponse *)m)->version, "v1beta1") == 0);
        break;
    case V1_ENCRYPT:
        CHECK(e1->cipher.len == PING_PLAIN + SEALED_OVERHEAD);
        CHECK(open_sealed(s->kms.ring, API_V1, e1->cipher.data, e1->cipher.len, out) == OPENED &&
              memcmp(out, ping, PING_PLAIN) == 0);
        break;
    case V1_DECRYPT:
        CHECK(d1->plain.len == PING_PLAIN && memcmp(d1->plain.data, ping, PING_PLAIN) == 0);
        break;
    default:
        test_fail(__LINE__, "no other call is answered OK");
    }
    protobuf_c_message_free_unpacked(m, NULL);
}

static uint8_t said[16 * 1024], heard_bytes[256 * 1024];

/*
 * One session: what the client says goes over in two pieces, or a byte at a time
 * if split is SIZE_MAX. Returns how much it said at first.
 */
static size_t session_dialogue(struct server *s, size_t split) {
    struct sink heard = {.bytes = heard_bytes, .cap = sizeof heard_bytes};
    int fd;
    nghttp2_session *peer = peer_new();
    size_t first = peer_say(peer, said, sizeof said), len = first;
    struct conn *c = session_open(s, &fd);
    CHECK(c);
    while (len > 0) {
        size_t step = split == SIZE_MAX ? 1 : split < len ? split : len;
        for (size_t at = 0; at < len; at += step) {
            if (split != SIZE_MAX && at > 0)
                step = len - at;
            session_feed(c, fd, said + at, step, &heard);
            CHECK(!c->closed);
            if (step == 0)
                step = len;
        }
        if (len == first)
            CHECK(heard.len > 9 && heard.bytes[3] == NGHTTP2_SETTINGS); /* ahead of all else */
        CHECK(nghttp2_session_mem_recv(peer, heard.bytes, heard.len) == (ssize_t)heard.len);
        heard.len = 0;
        len = peer_say(peer, said, sizeof said);
        split = len;
    }
    CHECK(c->greeted && !c->streams && c->unread == 0);
    nghttp2_session_del(peer);
    session_close(s, c, fd);
    for (size_t i = 0; i < DIALOGUE; i++) {
        row("%s, split at %zu of %zu", dialogue[i].name, split, first);
        exchange_check(&dialogue[i], s);
    }
    return first;
}

static void session_whole(void) {
    struct server *s = session_server();
    dialogue_init(s);
    size_t len = session_dialogue(s, sizeof said);
    CHECK(len > 500 && len < 4000);
    CHECK(s->metrics.requests[V2_STATUS][GRPC_OK] == 2 && s->metrics.requests[V1_DECRYPT][GRPC_OK] == 1);
    CHECK(s->metrics.requests[V2_DECRYPT][GRPC_INVALID_ARGUMENT] == 1 &&
          s->metrics.requests[RPC_UNKNOWN][GRPC_UNIMPLEMENTED] == 1);
    session_server_free(s);
}

#ifndef __SANITIZE_ADDRESS__ /* which has larger frames */
enum { STACK_PAINTED = 64 * 1024, STACK_READ = 32 * 1024, STACK_PAINT = 0xa5 };

__attribute__((noinline))
static void stack_paint(void) {
    uint8_t below[STACK_PAINTED];
    memset(below, STACK_PAINT, sizeof below);
    __asm__ volatile("" : : "r"(below) : "memory");
}

/* How much of the stack was written since, below the caller. */
__attribute__((noinline))
static size_t stack_depth(void) {
    static size_t untouched; /* static: nothing may be written where it reads */
    uint8_t below[STACK_READ];
    __asm__ volatile("" : "=m"(below)); /* whatever is there */
    for (untouched = 0; untouched < sizeof below && below[untouched] == STACK_PAINT;)
        untouched++;
    return sizeof below - untouched;
}

/* What a turn leaves on the stack, stack_wipe reaches, with every suite. */
static void session_stack_depth(void) {
    struct suite suites[5];
    size_t count = suites_all(suites);
    for (size_t i = 0; i < count; i++) {
        struct server *s = session_server();
        int fd;
        s->kms.ring->suite = suites[i];
        for (size_t k = 0; k < s->kms.ring->count; k++) {
            uint8_t key[KEK_BYTES] = {(uint8_t)k};
            kek_init(&s->kms.ring->keks[k], &suites[i], key);
        }
        dialogue_init(s);
        session_dialogue(s, sizeof said); /* the dynamic linker's stack is not ours: it has done its work now */
        size_t len = peer_first_words(said, sizeof said);
        struct conn *c = session_open(s, &fd);
        CHECK(c && write(fd, said, len) == (ssize_t)len);
        stack_paint();
        conn_ready(c, EPOLLIN);
        size_t depth = stack_depth();
        row("%s: %zu bytes deep", suites[i].name, depth);
        CHECK(s->metrics.requests[V2_ENCRYPT][GRPC_OK] == 2 && s->metrics.requests[V2_DECRYPT][GRPC_OK] == 2);
        CHECK(depth > 512 && depth <= STACK_WIPE_BYTES);
        session_close(s, c, fd);
        session_server_free(s);
    }
}
#endif

static void session_split_everywhere(void) {
    struct server *s = session_server();
    dialogue_init(s);
    size_t len = session_dialogue(s, SIZE_MAX);
    for (size_t split = 1; split < len; split++)
        session_dialogue(s, split);
    CHECK(s->metrics.requests[V2_STATUS][GRPC_OK] == 2 * len);
    session_server_free(s);
}

/* What the client says first, and the frames that it consists of. */
struct recording {
    uint8_t bytes[8 * 1024];
    size_t len, frames[200], frame_count; /* frames: where each starts; the last entry is the end */
};

static void recording_index(struct recording *r) {
    size_t at = 24; /* the preface */
    r->frame_count = 0;
    while (at + FRAME_HEAD <= r->len && r->frame_count + 1 < LEN(r->frames)) {
        r->frames[r->frame_count++] = at;
        at += FRAME_HEAD + ((size_t)r->bytes[at] << 16 | (size_t)r->bytes[at + 1] << 8 | r->bytes[at + 2]);
    }
    r->frames[r->frame_count] = r->len;
}

/* The dialogue, and frames of the kinds that it does not have. */
static void recording_make(struct recording *r) {
    static const char *const frames[] = {
        "000004080000000000" "00010000",     /* WINDOW_UPDATE */
        "00000502000000000f" "0000000d10",   /* PRIORITY */
        "000004030000000003" "00000008",     /* RST_STREAM of a stream that is done */
        "000008060000000000" "0102030405060708",
        "0000060400000000000004" "00000000", /* SETTINGS: a window of 0 */
        "0000060400000000000004" "0000ffff",
        "00000401040000003d" "83868488",     /* HEADERS without END_STREAM, and no DATA */
        "00000101000000003f" "83",           /* HEADERS, CONTINUATION, CONTINUATION */
        "00000109000000003f" "86",
        "00000109040000003f" "84",
        "00000a000900000041" "04" "0000000000" "00000000", /* padded DATA on a stream that is not there */
        "000008070000000000" "0000000000000000", /* GOAWAY */
    };
    r->len = peer_first_words(r->bytes, sizeof r->bytes);
    for (size_t i = 0; i < LEN(frames); i++)
        r->len += unhex(frames[i], r->bytes + r->len);
    recording_index(r);
    CHECK(r->frame_count > 40);
}

static void recording_splice(struct recording *r, size_t at, size_t old, const uint8_t *bytes, size_t len) {
    if (r->len - old + len > sizeof r->bytes || at + old > r->len)
        return;
    memmove(r->bytes + at + len, r->bytes + at + old, r->len - at - old);
    if (len > 0)
        memcpy(r->bytes + at, bytes, len);
    r->len = r->len - old + len;
}

/* One thing wrong with the bytes, or with a frame. */
static void recording_mutate(struct recording *r) {
    static uint8_t frame[8 * 1024];
    recording_index(r);
    if (r->frame_count == 0)
        return; /* little more than the preface is left */
    size_t at = prng((uint32_t)r->len), f = prng((uint32_t)r->frame_count), start = r->frames[f],
        end = r->frames[f + 1];
    memcpy(frame, r->bytes + start, end - start);
    switch (prng(12)) {
    case 0: r->bytes[at] ^= (uint8_t)(1 << prng(8)); break;
    case 1: r->bytes[at] = (uint8_t)prng(256); break;
    case 2: r->len = at > 24 ? at : r->len; break;
    case 3: recording_splice(r, at, 1, NULL, 0); break;
    case 4: frame[0] = (uint8_t)prng(256); recording_splice(r, at, 0, frame, 1); break;
    case 5: recording_splice(r, start, end - start, NULL, 0); break; /* no frame */
    case 6: recording_splice(r, start, 0, frame, end - start); break; /* twice */
    /* elsewhere too */
    case 7: recording_splice(r, r->frames[prng((uint32_t)r->frame_count)], 0, frame, end - start); break;
    case 8: r->bytes[start + 3] = (uint8_t)prng(12); break; /* another type */
    case 9: r->bytes[start + 4] ^= (uint8_t)(1 << prng(8)); break; /* a flag */
    case 10: r->bytes[start + 8] = (uint8_t)(prng(80)); break; /* another stream */
    case 11: r->bytes[start + 2] = (uint8_t)(r->bytes[start + 2] + prng(9) - 4); break; /* a length */
    }
}

/* Damaged sessions: the server survives, gives back all memory, and serves the next. */
static void session_random_bytes(void) {
    enum { ROUNDS = 12000 };
    static struct recording whole, r;
    struct server *s = session_server();
    size_t ended = 0, answered = 0;
    dialogue_init(s);
    recording_make(&whole);
    for (unsigned round = 0; round < ROUNDS; round++) {
        int fd;
        r = whole;
        for (unsigned n = 1 + prng(3); n > 0; n--)
            recording_mutate(&r);
        uint64_t before = s->metrics.requests[V2_STATUS][GRPC_OK];
        struct conn *c = session_open(s, &fd);
        row("round %u", round);
        CHECK(c);
        for (size_t at = 0, step; at < r.len && !c->closed; at += step) {
            step = prng(4) ? r.len - at : 1 + prng((uint32_t)(r.len - at));
            session_feed(c, fd, r.bytes + at, step, NULL);
        }
        ended += c->closed;
        answered += s->metrics.requests[V2_STATUS][GRPC_OK] > before;
        if (round % 4 == 0) { /* the clock of what is left unfinished */
            s->now_ms += REQUEST_TIMEOUT_MS + 1;
            server_expire(s);
            session_drain(fd, NULL);
        }
        if (round % 8 < 2)
            shutdown(fd, round % 8 == 0 ? SHUT_RD : SHUT_WR);
        if (round % 8 < 2 && !c->closed)
            conn_ready(c, c->writing ? EPOLLOUT : EPOLLIN);
        session_close(s, c, fd);
    }
    row("%zu ended, %zu answered", ended, answered);
    CHECK(ended > ROUNDS / 10 && answered > ROUNDS / 10);
    session_dialogue(s, sizeof said);
    session_server_free(s);
}

/* No memory at each allocation in turn: the connection ends, and nothing is lost. */
static void session_without_memory(void) {
    struct server *s = session_server();
    dialogue_init(s);
    size_t len = peer_first_words(said, sizeof said), ended = 0, lived = 0;
    const struct {
        const char *name;
        size_t *counter, max, most, step;
    } limits[] = {{"heap", &s->used[HELD], HEAP_MAX, 70000, 67}, {"buffers", &s->used[BUFFERED], BUFFERED_MAX, 25000, 31}};
    for (size_t i = 0; i < LEN(limits); i++) {
        for (size_t room = 0; room < limits[i].most; room += limits[i].step) {
            size_t bias = limits[i].max - room;
            int fd;
            row("%zu bytes of %s", room, limits[i].name);
            *limits[i].counter += bias; /* as if other connections held so much */
            struct conn *c = session_open(s, &fd);
            if (c)
                session_feed(c, fd, said, len, NULL);
            bool ends = !c || c->closed;
            ended += ends;
            lived += !ends;
            if (!ends)
                conn_close(c, "end of the test");
            CHECK(*limits[i].counter == bias);
            *limits[i].counter = 0;
            server_reap(s);
            session_close(s, NULL, fd);
        }
    }
    row("%zu ended, %zu lived", ended, lived);
    CHECK(ended > 100 && lived > 100);
    session_dialogue(s, sizeof said);
    session_server_free(s);
}

/* Newcomers stand in front in the list, so of those idle for as long the last gives way. */
static void session_idlest(void) {
    struct server s = {.user_count = 2};
    struct user *one = &s.users[0], *two = &s.users[1];
    struct conn old = {.user = one}, middle = {.next = &old, .user = two}, young = {.next = &middle, .user = one};
    s.conns = &young;
    old.idle_since_ms = middle.idle_since_ms = young.idle_since_ms = 5;
    CHECK(server_idlest(&s, one) == &old);
    CHECK(server_idlest(&s, two) == &middle);
    young.idle_since_ms = 4;
    CHECK(server_idlest(&s, one) == &young);
    young.closed = true;
    CHECK(server_idlest(&s, one) == &old);
    old.closed = true;
    CHECK(server_idlest(&s, one) == NULL);
}

/* Who gives way is of the user who holds most, what is asked for counted; who holds nothing never does. */
static void session_heaviest(void) {
    struct server s = {.user_count = 3};
    struct user *one = &s.users[0], *two = &s.users[1], *three = &s.users[2];
    const struct {
        size_t one, two, more;
        struct user *asking, *expected;
    } rows[] = {
        {0, 0, 1, one, NULL}, {1, 0, 1, two, one}, {5, 4, 1, two, two}, {5, 4, 1, one, one}, {5, 5, 1, NULL, one},
        {5, 5, 1, three, one}, {5, 6, 1, three, two}, {5, 0, 9, two, one}, {4, 5, 0, one, two}, {5, 5, 0, two, two},
    };
    for (size_t i = 0; i < LEN(rows); i++) {
        row("row %zu", i);
        for (enum resource r = 0; r < RESOURCES; r++) {
            one->used[r] = rows[i].one;
            two->used[r] = rows[i].two;
            CHECK(server_heaviest_user(&s, r, rows[i].asking, rows[i].more) == rows[i].expected);
            one->used[r] = two->used[r] = 0;
        }
    }
    struct conn a = {.user = one}, b = {.next = &a, .user = one}, c = {.next = &b, .user = two};
    s.conns = &c;
    a.used[HELD] = 3, b.used[HELD] = 4, c.used[HELD] = 9;
    a.used[STREAMS] = 2, b.used[STREAMS] = 1;
    CHECK(server_heaviest_conn(&s, one, HELD) == &b);
    CHECK(server_heaviest_conn(&s, one, STREAMS) == &a);
    CHECK(server_heaviest_conn(&s, two, STREAMS) == &c);
    CHECK(server_heaviest_conn(&s, three, HELD) == NULL);
    b.closed = true;
    CHECK(server_heaviest_conn(&s, one, HELD) == &a);
}

/*
 * The same with a hundred requests at once, whose answers nghttp2 keeps in a queue that
 * grows, and with freed blocks really freed, so that AddressSanitizer sees one used again.
 */
static void session_without_memory_for_a_queue(void) {
    static const char block[] = "\x83\x86\x00\x05:path\x1f/v2.KeyManagementService/Status"
                                "\x00\x0c" "content-type\x10" "application/grpc";
    enum { REQUESTS = 100, FRAME_BYTES = 9, ROOM_LEAST = 20 * 1024, ROOM_MOST = 400 * 1024, STEP = 500 };
    struct server *s = session_server();
    size_t len = 33, ended = 0, lived = 0, head_len = sizeof block - 1;
    memcpy(said, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0", len);
    for (unsigned i = 0; i < REQUESTS; i++) {
        const uint8_t id = (uint8_t)(2 * i + 1);
        const uint8_t headers[] = {0, 0, (uint8_t)head_len, NGHTTP2_HEADERS, NGHTTP2_FLAG_END_HEADERS, 0, 0, 0, id};
        const uint8_t data[FRAME_BYTES + GRPC_PREFIX_BYTES] = {0, 0, GRPC_PREFIX_BYTES, NGHTTP2_DATA, 1, 0, 0, 0, id};
        CHECK(len + sizeof headers + head_len + sizeof data <= sizeof said);
        memcpy(said + len, headers, sizeof headers);
        memcpy(said + len + sizeof headers, block, head_len);
        memcpy(said + len + sizeof headers + head_len, data, sizeof data);
        len += sizeof headers + head_len + sizeof data;
    }
    for (size_t room = ROOM_LEAST; room < ROOM_MOST; room += STEP) {
        size_t bias = HEAP_MAX - room;
        int fd;
        row("%zu bytes", room);
        s->used[HELD] += bias;
        s->heap.total += HEAP_KEEP_BYTES; /* no more, that is */
        struct conn *c = session_open(s, &fd);
        if (c)
            session_feed(c, fd, said, len, NULL);
        bool ends = !c || c->closed;
        ended += ends;
        lived += !ends;
        CHECK(s->used[HELD] <= HEAP_MAX);
        if (!ends)
            conn_close(c, "end of the test");
        CHECK(s->used[HELD] == bias && s->heap.in_use == 0);
        s->used[HELD] = s->heap.total = 0;
        server_reap(s);
        session_close(s, NULL, fd);
    }
    row("%zu ended, %zu lived", ended, lived);
    CHECK(ended > 20 && lived > 20 && s->metrics.requests[V2_STATUS][GRPC_OK] > 20 * REQUESTS);
    session_server_free(s);
}

/* A peer that takes its answers a few bytes at a time gets them whole. */
static void session_slow_reader(void) {
    struct server *s = session_server();
    struct sink heard = {.bytes = heard_bytes, .cap = sizeof heard_bytes};
    int fd, small = 1, waited = 0;
    dialogue_init(s);
    nghttp2_session *peer = peer_new();
    size_t len = peer_say(peer, said, sizeof said);
    struct conn *c = session_open(s, &fd);
    CHECK(c && setsockopt(c->source.fd, SOL_SOCKET, SO_SNDBUF, &small, sizeof small) == 0);
    CHECK(write(fd, said, len) == (ssize_t)len);
    for (int turns = 0; session_pending(c); turns++) {
        CHECK(turns < 100000 && !c->closed);
        conn_ready(c, c->writing ? EPOLLOUT : EPOLLIN);
        waited += c->writing;
        if (c->writing)
            CHECK(c->out && c->out_len > c->out_sent && s->used[BUFFERED] >= c->out_len);
        ssize_t n = read(fd, heard.bytes + heard.len, 7);
        heard.len += n > 0 ? (size_t)n : 0;
    }
    session_drain(fd, &heard);
    CHECK(waited > 0 && !c->out && nghttp2_session_mem_recv(peer, heard.bytes, heard.len) == (ssize_t)heard.len);
    for (size_t i = 0; i < DIALOGUE; i++) {
        row("%s", dialogue[i].name);
        exchange_check(&dialogue[i], s);
    }
    row("a peer that takes nothing");
    nghttp2_session_del(peer);
    session_close(s, c, fd);
    c = session_open(s, &fd);
    CHECK(c && setsockopt(c->source.fd, SOL_SOCKET, SO_SNDBUF, &small, sizeof small) == 0);
    len = peer_say(peer = peer_new(), said, sizeof said);
    CHECK(write(fd, said, len) == (ssize_t)len);
    for (int turns = 0; turns < 100 && !c->writing; turns++)
        conn_ready(c, EPOLLIN);
    CHECK(c->writing && !c->closed);
    s->now_ms += UNREAD_TIMEOUT_MS - 1;
    server_expire(s);
    CHECK(!c->closed);
    s->now_ms += 1;
    server_expire(s);
    CHECK(c->closed);
    nghttp2_session_del(peer);
    session_close(s, c, fd);
    session_server_free(s);
}

/* The numbers of /metrics come over the same socket. */
static void session_metrics(void) {
    struct server *s = session_server();
    struct sink heard = {.bytes = heard_bytes, .cap = sizeof heard_bytes};
    int fd;
    uint8_t bytes[128];
    size_t len = unhex("505249202a20485454502f322e300d0a0d0a534d0d0a0d0a" /* preface */
                       "000000040000000000"                              /* SETTINGS */
                       "00000c010500000001"                              /* HEADERS, END_STREAM, END_HEADERS */
                       "8286"                                            /* :method GET, :scheme http */
                       "0408" "2f6d657472696373",                        /* :path /metrics, literal */
                       bytes);
    struct conn *c = session_open(s, &fd);
    CHECK(c);
    session_feed(c, fd, bytes, len, &heard);
    CHECK(!c->closed && memmem(heard.bytes, heard.len, "kmsplugin_connections 1\n", 24));
    CHECK(memmem(heard.bytes, heard.len, s->kms.ring->keks[0].key_id, KEY_ID_LEN));
    session_close(s, c, fd);
    session_server_free(s);
}

/* A header list of 16 KiB is borne, and one over it is not answered; the connection lives. */
static void session_large_head(void) {
    static const size_t counts[] = {0, 400, 478, 479, 1000, 2500};
    enum { LIST_BYTES = 7 + 3 + 7 + 4 + 5 + 8 + 3 * 32, FIELD_BYTES = 1 + 1 + 32 }; /* as RFC 9113 6.5.2 counts */
    for (size_t i = 0; i < LEN(counts); i++) {
        static uint8_t bytes[16 * 1024];
        struct server *s = session_server();
        struct sink heard = {.bytes = heard_bytes, .cap = sizeof heard_bytes};
        int fd;
        size_t len = unhex("505249202a20485454502f322e300d0a0d0a534d0d0a0d0a" "000000040000000000"
                           "000000010500000001" "8286" "0408" "2f6d657472696373", bytes), at = 24 + 9, payload;
        for (size_t n = 0; n < counts[i]; n++)
            len += unhex("0001610162", bytes + len); /* a: b */
        payload = len - at - 9;
        bytes[at + 1] = (uint8_t)(payload >> 8);
        bytes[at + 2] = (uint8_t)payload;
        struct conn *c = session_open(s, &fd);
        CHECK(c);
        session_feed(c, fd, bytes, len, &heard);
        bool fits = LIST_BYTES + counts[i] * FIELD_BYTES <= 16384;
        row("%zu fields", counts[i]);
        CHECK(!c->closed && !c->streams);
        CHECK((memmem(heard.bytes, heard.len, "kmsplugin_connections 1\n", 24) != NULL) == fits);
        session_close(s, c, fd);
        session_server_free(s);
    }
}

/* However many ask for /metrics in a turn, it is rendered once; and it does not outlive the turn. */
static void session_renders_once(void) {
    struct server *s = session_server();
    CHECK(server_render(s) == 0 && s->page && s->page_len > 1000);
    const uint8_t *page = s->page;
    s->metrics.accepted = 4711;
    CHECK(server_render(s) == 0 && s->page == page && !memmem(page, s->page_len, "4711", 4));
    server_turn_end(s);
    CHECK(!s->page);
    CHECK(server_render(s) == 0 && memmem(s->page, s->page_len, "4711", 4));
    session_server_free(s);
}

/* Lines that peers cause: each user has an even share of a minute's, and what is left out is told when it is over. */
static void session_lines_a_minute(void) {
    struct server *s = session_server();
    struct user *first = &s->users[0], *second = &s->users[1];
    s->user_count = 2;
    s->minute_ms = s->now_ms - MINUTE_MS;
    for (unsigned i = 0; i < LINES_A_MINUTE / 2; i++)
        CHECK(server_may_log(s, first));
    CHECK(!server_may_log(s, first) && !server_may_log(s, first) && server_may_log(s, second));
    CHECK(s->lines_left_out == 2 && s->next_ms == s->minute_ms + MINUTE_MS);
    enum log_level before = log_level;
    log_level = LOG_ERROR;
    s->now_ms += MINUTE_MS - 1;
    server_expire(s);
    CHECK(s->lines_left_out == 2);
    s->now_ms++;
    server_expire(s);
    CHECK(s->lines_left_out == 0);
    log_level = before;
    CHECK(server_may_log(s, first));
    session_server_free(s);
}

/* When the timer would go off, in milliseconds from now; 0 if it is not set. */
static int64_t timer_left(const struct server *s) {
    struct itimerspec left;
    CHECK(timerfd_gettime(s->timer.fd, &left) == 0);
    return (int64_t)left.it_value.tv_sec * 1000 + (left.it_value.tv_nsec + 999999) / 1000000;
}

/* The timer is set for what is due first, stays set while that is so, and never for what nothing can be done about. */
static void session_timer(void) {
    struct server *s = session_server();
    s->active_ms = s->now_ms;
    server_set_timer(s);
    CHECK(s->timer_ms == INT64_MAX && timer_left(s) == 0); /* nothing is due: the loop sleeps for good */

    heap_free(&s->heap, heap_new(&s->heap, 100));
    s->used[STREAMS] = 1; /* what is kept stays while a request is under way: no time to look at it would be right */
    s->active_ms = s->now_ms - 10 * TIDY_AFTER_MS;
    server_set_timer(s);
    CHECK(s->timer_ms == INT64_MAX && timer_left(s) == 0);
    s->used[STREAMS] = 0;
    s->active_ms = s->now_ms;
    server_set_timer(s);
    CHECK(s->timer_ms == s->now_ms + TIDY_AFTER_MS && timer_left(s) > 0 && timer_left(s) <= TIDY_AFTER_MS + 1);

    s->active_ms = s->now_ms += TIDY_AFTER_MS / 2; /* more requests: it goes off in vain, once, and is set anew */
    int64_t before = s->timer_ms;
    server_set_timer(s);
    CHECK(s->timer_ms == before);
    s->now_ms = before;
    server_timer(s);
    CHECK(s->timer_ms == before); /* it has not gone off */
    s->timer_ms = INT64_MAX;
    server_expire(s);
    CHECK(s->heap.total > s->heap.in_use);
    server_set_timer(s);
    CHECK(s->timer_ms == s->active_ms + TIDY_AFTER_MS);

    server_due(s, s->now_ms + 1); /* earlier than that */
    server_set_timer(s);
    CHECK(s->timer_ms == s->now_ms + 1);
    s->now_ms = s->active_ms + TIDY_AFTER_MS;
    s->timer_ms = INT64_MAX;
    server_expire(s);
    CHECK(s->heap.total == s->heap.in_use && s->next_ms == INT64_MAX);
    server_set_timer(s);
    CHECK(s->timer_ms == INT64_MAX);
    session_server_free(s);
}

/* What is not finished in time: a preface, a head, a body. */
static void session_deadlines(void) {
    enum { PREFACE_BYTES = 24, TIMEOUT_MS = 3000 };
    static struct recording whole;
    struct server *s = session_server();
    dialogue_init(s);
    recording_make(&whole);
    size_t head = 0;
    while (whole.bytes[whole.frames[head] + 3] != NGHTTP2_HEADERS)
        head++;
    const struct {
        const char *name;
        size_t len;
        int64_t after_ms;
        bool closed; /* else answered, and the connection lives */
    } rows[] = {
        {"nothing at all", 0, PREFACE_TIMEOUT_MS, true},
        {"half a preface", PREFACE_BYTES / 2, PREFACE_TIMEOUT_MS, true},
        {"a preface without SETTINGS", PREFACE_BYTES, PREFACE_TIMEOUT_MS, true},
        {"half a head", whole.frames[head] + 9 + 4, REQUEST_TIMEOUT_MS, true},
        {"a head with a grpc-timeout of 2999943u", whole.frames[head + 1], TIMEOUT_MS, false},
    };
    for (size_t i = 0; i < LEN(rows); i++) {
        int fd;
        struct conn *c = session_open(s, &fd);
        CHECK(c);
        session_feed(c, fd, whole.bytes, rows[i].len, NULL);
        row("%s", rows[i].name);
        CHECK(!c->closed && s->next_ms <= s->now_ms + rows[i].after_ms);
        s->now_ms += rows[i].after_ms - 1;
        server_expire(s);
        CHECK(!c->closed && s->metrics.requests[V2_STATUS][GRPC_DEADLINE_EXCEEDED] == 0);
        s->now_ms += 1;
        server_expire(s);
        CHECK(c->closed == rows[i].closed);
        CHECK(s->metrics.requests[V2_STATUS][GRPC_DEADLINE_EXCEEDED] == (rows[i].closed ? 0 : 1));
        session_close(s, c, fd);
    }
    session_server_free(s);
}

/* ------------------------------------------------------------------ Rescue */

/* An etcd value as kube-apiserver would write it. What is NULL or 0 is as it should be. */
struct stored {
    enum api api;
    unsigned type; /* of the DEK source */
    size_t dek_len;
    const char *etcd_key, *key_id; /* key_id: of v2 */
    bool annotation;
    const char *object;
};

static size_t stored_make(const struct stored *o, const struct ring *ring, uint8_t *out) {
    static struct random random;
    uint8_t dek[64], sealed[64 + SEALED_OVERHEAD], info[33], key[32], data[400];
    const uint8_t *object = (const uint8_t *)o->object, *etcd_key = (const uint8_t *)o->etcd_key;
    size_t len = strlen(o->object), at = o->type == 1 ? 32 : 0, key_len = o->type == 1 ? 32 : o->dek_len;
    prng_fill(dek, o->dek_len);
    prng_fill(data, at + 12);
    CHECK(seal(ring, &random, o->api, dek, o->dek_len, sealed) == 0);
    memcpy(key, dek, o->dek_len < 32 ? o->dek_len : 32);
    if (o->type == 1) { /* HKDF-Expand-SHA-256(seed, info, 32) */
        br_hmac_key_context kc;
        br_hmac_context hc;
        memcpy(info, data, 32);
        info[32] = 1;
        br_hmac_key_init(&kc, &br_sha256_vtable, dek, o->dek_len);
        br_hmac_init(&hc, &kc, 0);
        br_hmac_update(&hc, info, 33);
        br_hmac_out(&hc, key);
    }
    CHECK(gcm_crypt(&ring->suite, true, key, key_len > 32 ? 32 : key_len, data + at, etcd_key, strlen(o->etcd_key),
                    object, len, data + at + 12) == 0);
    size_t data_len = at + 12 + len + TAG_BYTES, sealed_len = o->dek_len + SEALED_OVERHEAD, n = 15 + 6;
    memcpy(out, o->api == API_V2 ? "k8s:enc:kms:v2:vault:" : "k8s:enc:kms:v1:vault:", n);
    if (o->api == API_V1) {
        out[n++] = (uint8_t)(sealed_len >> 8);
        out[n++] = (uint8_t)sealed_len;
        memcpy(out + n, sealed, sealed_len);
        memcpy(out + n + sealed_len, data, data_len);
        return n + sealed_len + data_len;
    }
    V2__Etcd__EncryptedObject e = V2__ETCD__ENCRYPTED_OBJECT__INIT;
    V2__Etcd__EncryptedObject__AnnotationsEntry entry = V2__ETCD__ENCRYPTED_OBJECT__ANNOTATIONS_ENTRY__INIT,
        *entries[] = {&entry};
    e.encrypted_data = binary(data, data_len);
    e.key_id = text_of(o->key_id ? o->key_id : ring->keks[0].key_id);
    e.encrypted_dek_source = binary(sealed, sealed_len);
    e.encrypted_dek_source_type = (V2__Etcd__DEKSourceType)o->type;
    entry.key = text_of("a.example.org");
    e.annotations = entries;
    e.n_annotations = o->annotation;
    return n + protobuf_c_message_pack(&e.base, out + n);
}

#define ETCD_KEY "/registry/secrets/default/db"

static const struct {
    const char *name;
    struct stored stored;
    enum value_state want;
} stored_cases[] = {
    {"v2, a seed", {API_V2, 1, 32, ETCD_KEY, NULL, false, "the object"}, VALUE_OPENED},
    {"v2, a seed of 64 bytes", {API_V2, 1, 64, ETCD_KEY, NULL, false, "the object"}, VALUE_OPENED},
    {"v2, a key", {API_V2, 0, 32, ETCD_KEY, NULL, false, "the object"}, VALUE_OPENED},
    {"v2, a key of AES-128", {API_V2, 0, 16, ETCD_KEY, NULL, false, "the object"}, VALUE_OPENED},
    {"v2, an empty object", {API_V2, 1, 32, ETCD_KEY, NULL, false, ""}, VALUE_OPENED},
    {"v1", {API_V1, 0, 32, ETCD_KEY, NULL, false, "the object"}, VALUE_OPENED},
    {"v1, an empty object", {API_V1, 0, 32, ETCD_KEY, NULL, false, ""}, VALUE_OPENED},
    {"v2, of another etcd key", {API_V2, 1, 32, ETCD_KEY "2", NULL, false, "the object"}, VALUE_BROKEN},
    {"v1, of another etcd key", {API_V1, 0, 32, ETCD_KEY "2", NULL, false, "the object"}, VALUE_BROKEN},
    {"v2, an unknown kind of DEK", {API_V2, 2, 32, ETCD_KEY, NULL, false, "the object"}, VALUE_BROKEN},
    {"v2, a key that is no AES key", {API_V2, 0, 31, ETCD_KEY, NULL, false, "the object"}, VALUE_BROKEN},
    {"v1, an empty key", {API_V1, 0, 0, ETCD_KEY, NULL, false, "the object"}, VALUE_BROKEN},
    {"v2, another keyID of ours", {API_V2, 1, 32, ETCD_KEY, "0123456789abcdef0123456789abcdef", false, "the object"},
     VALUE_BROKEN},
    {"v2, with an annotation", {API_V2, 1, 32, ETCD_KEY, NULL, true, "the object"}, VALUE_BROKEN},
    {"v2, a keyID unlike ours over a fingerprint of ours", {API_V2, 1, 32, ETCD_KEY, "projects/p/locations/l/keyRings/r",
     false, "the object"}, VALUE_BROKEN},
};

static enum value_state value_of(struct value *v, const struct ring *ring, const char *etcd_key, const uint8_t *bytes,
                                 size_t len) {
    uint8_t *key = copy_of(etcd_key, strlen(etcd_key)), *value = copy_of(bytes, len);
    value_open(v, ring, &(struct field){.bytes = key, .len = strlen(etcd_key)}, value, len);
    free(key);
    free(value);
    CHECK((v->state == VALUE_OPENED) == (v->object != NULL));
    CHECK(v->state == VALUE_OPENED || (v->why && v->why[0]));
    return v->state;
}

static void values_stored(void) {
    struct ring *ring = ring_of(0, 2), *stranger = ring_of(7, 1);
    for (size_t i = 0; i < LEN(stored_cases); i++) {
        const struct stored *stored = &stored_cases[i].stored;
        uint8_t bytes[1000];
        struct value v;
        size_t len = stored_make(stored, ring, bytes);
        row("%s", stored_cases[i].name);
        CHECK(value_of(&v, ring, ETCD_KEY, bytes, len) == stored_cases[i].want);
        if (v.state == VALUE_OPENED) {
            CHECK(v.api == stored->api && strcmp(v.key_id, ring->keks[0].key_id) == 0);
            CHECK(v.len == strlen(stored->object) && memcmp(v.object, stored->object, v.len) == 0);
            value_wipe(&v);
            CHECK(v.object == NULL);
            CHECK(value_of(&v, stranger, ETCD_KEY, bytes, len) == VALUE_UNKNOWN_KEY);
            CHECK(strcmp(v.key_id, ring->keks[0].key_id) == 0 && v.api == stored->api); /* the KEK is named */
            CHECK(value_of(&v, ring, "/registry/secrets/default/other", bytes, len) == VALUE_BROKEN);
            CHECK(value_of(&v, ring, "", bytes, len) == VALUE_BROKEN);
        }
        value_wipe(&v);
    }
    ring_free(ring);
    ring_free(stranger);
}

static void values_not_ours(void) {
    static const struct {
        const char *name, *bytes;
        enum value_state want;
    } rows[] = {
        {"nothing", "", VALUE_BROKEN},
        {"a value in base64", "azhzOmVuYzprbXM6djI6dmF1bHQ6", VALUE_BROKEN},
        {"protobuf in the clear", "k8s", VALUE_PLAIN}, /* and its NUL */
        {"JSON in the clear", "{\"kind\":\"Secret\"}", VALUE_PLAIN},
        {"a prefix cut short", "k8s:enc", VALUE_BROKEN},
        {"aescbc", "k8s:enc:aescbc:v1:key1:xxxxxxxxxxxxxxxx", VALUE_FOREIGN},
        {"aesgcm", "k8s:enc:aesgcm:v1:key1:xxxxxxxxxxxxxxxx", VALUE_FOREIGN},
        {"secretbox", "k8s:enc:secretbox:v1:key1:xxxxxxxxxxx", VALUE_FOREIGN},
        {"a KMS version to come", "k8s:enc:kms:v3:vault:xxxxxxxxxxx", VALUE_FOREIGN},
        {"v2, no name", "k8s:enc:kms:v2:x", VALUE_BROKEN},
        {"v2, nothing behind the name", "k8s:enc:kms:v2:vault:", VALUE_BROKEN},
        {"v2, no message", "k8s:enc:kms:v2:vault:\xff\xff\xff", VALUE_BROKEN},
        {"v1, nothing behind the name", "k8s:enc:kms:v1:vault:", VALUE_BROKEN},
        {"v1, half a length", "k8s:enc:kms:v1:vault:\x01", VALUE_BROKEN},
        {"v1, a length too large", "k8s:enc:kms:v1:vault:\xff\xffxyz", VALUE_BROKEN},
        {"v1, a DEK of another plugin", "k8s:enc:kms:v1:vault:\x01\x04" "abcd" "nonce-nonce-tag-tag-tag-tag-",
         VALUE_BROKEN},
    };
    struct ring *ring = ring_of(0, 1);
    for (size_t i = 0; i < LEN(rows); i++) {
        struct value v;
        row("%s", rows[i].name);
        size_t len = strlen(rows[i].bytes) + (rows[i].want == VALUE_PLAIN);
        CHECK(value_of(&v, ring, ETCD_KEY, (const uint8_t *)rows[i].bytes, len) == rows[i].want);
        value_wipe(&v);
    }
    ring_free(ring);
}

/* Names of v1's providers that hold colons: the tag tells where they end. Of v2's, none does. */
static void values_named_with_colons(void) {
    static const struct {
        const char *name;
        enum value_state want;
    } rows[] = {
        {"vault", VALUE_OPENED}, {":", VALUE_OPENED}, {"a:b", VALUE_OPENED}, {"::::", VALUE_OPENED},
        {"arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab", VALUE_OPENED},
    };
    static const struct stored stored = {API_V1, 0, 32, ETCD_KEY, NULL, false, "the object"};
    enum { PREFIX_LEN = 15, NAME_LEN = 5 };
    struct ring *ring = ring_of(0, 1), *stranger = ring_of(7, 1);
    uint8_t made[1000], bytes[V1_NAME_MAX + 1000];
    size_t len = stored_make(&stored, ring, made);
    struct value v;
    for (size_t i = 0; i < LEN(rows); i++) {
        size_t name_len = strlen(rows[i].name), total = len - NAME_LEN + name_len;
        memcpy(bytes, made, PREFIX_LEN);
        memcpy(bytes + PREFIX_LEN, rows[i].name, name_len);
        memcpy(bytes + PREFIX_LEN + name_len, made + PREFIX_LEN + NAME_LEN, len - PREFIX_LEN - NAME_LEN);
        row("%s", rows[i].name);
        CHECK(value_of(&v, ring, ETCD_KEY, bytes, total) == rows[i].want);
        CHECK(v.len == strlen(stored.object) && memcmp(v.object, stored.object, v.len) == 0);
        value_wipe(&v);
        CHECK(value_of(&v, stranger, ETCD_KEY, bytes, total) == VALUE_UNKNOWN_KEY);
        CHECK(strcmp(v.key_id, ring->keks[0].key_id) == 0);
        bytes[total - 1] ^= 1;
        CHECK(value_of(&v, ring, ETCD_KEY, bytes, total) == VALUE_BROKEN && strstr(v.why, "does not open"));
    }
    row("a colon beyond what is looked at");
    memcpy(bytes, made, PREFIX_LEN);
    memset(bytes + PREFIX_LEN, ':', V1_NAME_MAX);
    memcpy(bytes + PREFIX_LEN + V1_NAME_MAX, made + PREFIX_LEN + NAME_LEN, len - PREFIX_LEN - NAME_LEN);
    CHECK(value_of(&v, ring, ETCD_KEY, bytes, len - NAME_LEN + V1_NAME_MAX) == VALUE_BROKEN);
    ring_free(ring);
    ring_free(stranger);
}

/* Any bytes are judged as something that can be said, and never as a value that they are not. */
static void inputs_judged(void) {
    static const char *const starts[] = {"", "k8s:enc:kms:v1:", "k8s:enc:kms:v2:x:", "/registry/a\n", "{", "\n\x02\x08\x01",
                                         "\x12", "azhz", "6b38"};
    for (unsigned round = 0; round < 20000; round++) {
        uint8_t bytes[64];
        const char *start = starts[prng(LEN(starts))];
        size_t len = strlen(start), more = prng(20);
        memcpy(bytes, start, len);
        prng_fill(bytes + len, more);
        uint8_t *exact = copy_of(bytes, len + more);
        struct input in = input_judge(exact, len + more);
        row("round %u: %s", round, in.what);
        CHECK(in.what && (strncmp(in.what, "is ", 3) == 0 || strncmp(in.what, "has ", 4) == 0 || strncmp(in.what, "looks ", 6) == 0));
        CHECK(in.kind != INPUT_V1 || memcmp(exact, "k8s:enc:kms:v1:", 15) == 0);
        CHECK(in.kind != INPUT_V2 || memcmp(exact, "k8s:enc:kms:v2:", 15) == 0);
        CHECK(in.kind != INPUT_PLAIN || exact[0] == '{' || exact[0] == '/' || memcmp(exact, "k8s", 4) == 0);
        free(exact);
    }
}

/* \r\n in any number of pieces. */
static void crlf_undone(void) {
    static const struct {
        const char *from, *to;
    } rows[] = {{"", ""}, {"\r", "\r"}, {"\n", "\n"}, {"\r\n", "\n"}, {"\r\r\n", "\r\n"}, {"a\r\nb\rc\n\r\n", "a\nb\rc\n\n"}};
    for (size_t i = 0; i < LEN(rows); i++) {
        size_t len = strlen(rows[i].from);
        for (size_t cut = 0; cut <= len; cut++) {
            uint8_t *bytes = copy_of(rows[i].from, len);
            row("%zu, cut at %zu", i, cut);
            size_t first = crlf_undo(bytes, 0, cut);
            memmove(bytes + first, bytes + cut, len - cut);
            size_t n = crlf_undo(bytes, first - (first > 0 && bytes[first - 1] == '\r'), first + len - cut);
            CHECK(n == strlen(rows[i].to) && memcmp(bytes, rows[i].to, n) == 0);
            free(bytes);
        }
    }
}

/* No etcd key makes a name that leads elsewhere. */
static void file_names(void) {
    static const struct {
        const char *part, *name;
    } rows[] = {
        {"registry", "registry"}, {"", "%"}, {".", "%2e"}, {"..", "%2e."}, {".ssh", "%2essh"}, {"-rf", "%2drf"},
        {"a.b-c_d", "a.b-c_d"}, {"system:node", "system:node"}, {"100%", "100%25"}, {"a b", "a%20b"}, {"\n\x1b", "%0a%1b"},
        {"\xc3\xa4", "%c3%a4"}, {"\\$(x)*~", "%5c%24%28x%29%2a%7e"},
    };
    char name[NAME_MAX + 1], longest[NAME_MAX + 2];
    for (size_t i = 0; i < LEN(rows); i++) {
        row("%s", rows[i].part);
        CHECK(file_name(name, (const uint8_t *)rows[i].part, strlen(rows[i].part)) == 0 && strcmp(name, rows[i].name) == 0);
    }
    memset(longest, 'n', sizeof longest);
    CHECK(file_name(name, (const uint8_t *)longest, NAME_MAX) == 0 && strlen(name) == NAME_MAX);
    CHECK(file_name(name, (const uint8_t *)longest, NAME_MAX + 1) == -1 && errno == ENAMETOOLONG);
    for (unsigned c = 0; c < 256; c++) {
        uint8_t part[] = {(uint8_t)c, (uint8_t)c};
        row("byte %u", c);
        CHECK(file_name(name, part, 2) == 0 && !strchr(name, '/') && name[0] != '.' && name[0] != '-');
    }
}

/* More key_ids than there are rows: those of the ring keep theirs. */
static void audit_rows(void) {
    static struct audit a;
    struct value v = {.state = VALUE_UNKNOWN_KEY, .api = API_V2};
    for (unsigned i = 0; i < 1000; i++) {
        snprintf(v.key_id, sizeof v.key_id, "%032x", i);
        audit_count(&a, &v);
    }
    CHECK(a.row_count == AUDIT_ROWS_MAX - 2 * KEK_MAX && a.missing == 1000 - a.row_count);
    v.state = VALUE_OPENED;
    for (unsigned i = 0; i < 2 * KEK_MAX; i++) {
        v.api = i % 2 ? API_V1 : API_V2;
        snprintf(v.key_id, sizeof v.key_id, "%032x", 5000 + i / 2);
        audit_count(&a, &v);
        audit_count(&a, &v);
    }
    CHECK(a.row_count == AUDIT_ROWS_MAX && a.rows[AUDIT_ROWS_MAX - 1].count == 2);
}

/* No part of a value opens, nor any value with a bit turned: but for the provider's name, which nothing seals. */
static void values_damaged(void) {
    static const struct stored kinds[] = {{API_V2, 1, 32, ETCD_KEY, NULL, false, "the object"},
                                          {API_V2, 0, 32, ETCD_KEY, NULL, false, "the object"},
                                          {API_V1, 0, 32, ETCD_KEY, NULL, false, "the object"}};
    enum { NAME_AT = 15, NAME_LEN = 5 };
    struct ring *ring = ring_of(0, 1);
    for (size_t i = 0; i < LEN(kinds); i++) {
        uint8_t bytes[1000];
        struct value v;
        size_t len = stored_make(&kinds[i], ring, bytes);
        for (size_t cut = 0; cut < len; cut++) {
            row("kind %zu, cut to %zu of %zu", i, cut, len);
            CHECK(value_of(&v, ring, ETCD_KEY, bytes, cut) != VALUE_OPENED);
        }
        for (size_t bit = 0; bit < 8 * len; bit++) {
            row("kind %zu, bit %zu of byte %zu", i, bit % 8, bit / 8);
            if (bit / 8 >= NAME_AT && bit / 8 < NAME_AT + NAME_LEN)
                continue;
            bytes[bit / 8] ^= (uint8_t)(1 << bit % 8);
            CHECK(value_of(&v, ring, ETCD_KEY, bytes, len) != VALUE_OPENED);
            bytes[bit / 8] ^= (uint8_t)(1 << bit % 8);
        }
        row("kind %zu, a byte more", i);
        bytes[len] = '\n';
        CHECK(value_of(&v, ring, ETCD_KEY, bytes, len + 1) != VALUE_OPENED);
        row("kind %zu, whole", i);
        CHECK(value_of(&v, ring, ETCD_KEY, bytes, len) == VALUE_OPENED);
        value_wipe(&v);
    }
    ring_free(ring);
}

static void values_random_bytes(void) {
    static const struct stored kinds[] = {{API_V2, 1, 32, ETCD_KEY, NULL, false, "the object"},
                                          {API_V1, 0, 32, ETCD_KEY, NULL, false, "the object"}};
    struct ring *ring = ring_of(0, 1);
    uint8_t whole[2][1000], bytes[1000];
    size_t lens[2], opened = 0;
    for (size_t i = 0; i < 2; i++)
        lens[i] = stored_make(&kinds[i], ring, whole[i]);
    for (unsigned round = 0; round < 20000; round++) {
        size_t i = prng(2), len = lens[i];
        struct value v;
        memcpy(bytes, whole[i], len);
        for (unsigned n = prng(4); n > 0; n--) {
            size_t at = 21 + prng((uint32_t)len - 22);
            bytes[at] = (uint8_t)prng(256);
            if (prng(8) == 0)
                len = at + 2;
        }
        row("round %u", round);
        if (value_of(&v, ring, ETCD_KEY, bytes, len) == VALUE_OPENED) {
            CHECK(v.len == 10 && memcmp(v.object, "the object", 10) == 0);
            opened++;
        }
        value_wipe(&v);
    }
    CHECK(opened > 1000 && opened < 10000);
    ring_free(ring);
}

/* ----------------------------------------------------------------- Options */

enum { ARGS = 40 };

/* Splits at spaces; '' is an empty argument. */
static int split_args(const char *line, char **argv) {
    static char words[4096];
    int argc = 0;
    char *save = NULL;
    snprintf(words, sizeof words, "kmsplugin %s", line);
    for (char *w = strtok_r(words, " ", &save); w && argc < ARGS - 1; w = strtok_r(NULL, " ", &save))
        argv[argc++] = strcmp(w, "''") == 0 ? w + 2 : w;
    argv[argc] = NULL;
    return argc;
}

static void options_defaults(void) {
    struct options o;
    char *argv[ARGS];
    CHECK(options_parse(&o, split_args("", argv), argv) == SERVE);
    CHECK(o.serve.endpoint_count == 0 && o.serve.mode == 0600 && !o.serve.has_group && o.serve.uid_count == 0);
    CHECK(o.serve.max_connections == 256 && o.timeout_ms == 3000 && !o.argument && !o.strict && !o.list);
    CHECK(log_level == LOG_INFO);
    options_allow_default(&o.serve);
    CHECK(o.serve.uids[0] == 0 && (o.serve.uid_count == 1 || (o.serve.uid_count == 2 && o.serve.uids[1] == geteuid())));
    CHECK(options_parse(&o, 0, (char *[]){NULL}) == SERVE); /* execve can leave even argv[0] out */
}

static void options_verbs(void) {
    static const struct {
        const char *line;
        enum verb verb;
        const char *argument;
    } rows[] = {
        {"", SERVE, NULL},
        {"serve", SERVE, NULL},
        {"--log-level info", SERVE, NULL},
        {"serve --", SERVE, NULL},
        {"probe", PROBE, NULL},
        {"probe unix:///@x", PROBE, "unix:///@x"},
        {"probe --timeout 1 unix:///@x", PROBE, "unix:///@x"},
        {"probe unix:///@x --timeout=1", PROBE, "unix:///@x"},
        {"genkey", GENKEY, NULL},
        {"keyid", KEYID, NULL},
        {"unseal", UNSEAL, NULL},
        {"unseal /registry/secrets/default/a", UNSEAL, "/registry/secrets/default/a"},
        {"unseal -- --help", UNSEAL, "--help"},
        {"unseal -- -x", UNSEAL, "-x"},
        {"unseal a=b", UNSEAL, "a=b"},
        {"audit", AUDIT, NULL},
        {"audit --strict --list", AUDIT, NULL},
    };
    for (size_t i = 0; i < LEN(rows); i++) {
        struct options o;
        char *argv[ARGS];
        row("kmsplugin %s", rows[i].line);
        CHECK(options_parse(&o, split_args(rows[i].line, argv), argv) == rows[i].verb);
        CHECK(rows[i].argument ? o.argument && strcmp(o.argument, rows[i].argument) == 0 : !o.argument);
        CHECK((o.strict && o.list) == (strstr(rows[i].line, "--strict") != NULL));
    }
}

static void options_values(void) {
    static const char line[] = "serve --listen unix:///a --listen=unix:///@b --mode 0660 --group=0 "
                               "--allow-uid 0,1000,4294967294 --max-connections=12 --log-level debug";
    for (unsigned defaulted = 0; defaulted < 2; defaulted++) { /* "serve" may be left out */
        struct options o;
        char *argv[ARGS];
        row("%s", line + 6 * defaulted);
        CHECK(options_parse(&o, split_args(line + 6 * defaulted, argv), argv) == SERVE);
        CHECK(o.serve.endpoint_count == 2);
        CHECK(strcmp(o.serve.endpoints[0], "unix:///a") == 0 && strcmp(o.serve.endpoints[1], "unix:///@b") == 0);
        CHECK(o.serve.mode == 0660 && o.serve.has_group && o.serve.group == 0 && o.serve.max_connections == 12);
        CHECK(o.serve.uid_count == 3 && o.serve.uids[0] == 0 && o.serve.uids[1] == 1000 &&
              o.serve.uids[2] == 4294967294u);
        CHECK(log_level == LOG_DEBUG);
        log_level = LOG_INFO;
    }
}

static void options_numbers(void) {
    static const struct {
        const char *line;
        mode_t mode;
        size_t connections;
        int64_t timeout_ms;
    } rows[] = {
        {"serve --mode 0", 0, 256, 3000},
        {"serve --mode 600", 0600, 256, 3000},
        {"serve --mode 0777", 0777, 256, 3000},
        {"serve --mode=00660", 0660, 256, 3000},
        {"serve --mode 0600 --mode 0660", 0660, 256, 3000}, /* the last counts */
        {"serve --max-connections 1", 0600, 1, 3000},
        {"serve --max-connections 4096", 0600, 4096, 3000},
        {"probe --timeout 1", 0600, 256, 1000},
        {"probe --timeout 0.5", 0600, 256, 500},
        {"probe --timeout 0.001", 0600, 256, 1},
        {"probe --timeout 2.25", 0600, 256, 2250},
        {"probe --timeout 10.125", 0600, 256, 10125},
        {"probe --timeout 3600", 0600, 256, 3600000},
        {"probe --timeout 007", 0600, 256, 7000},
    };
    for (size_t i = 0; i < LEN(rows); i++) {
        struct options o;
        char *argv[ARGS];
        options_parse(&o, split_args(rows[i].line, argv), argv);
        row("kmsplugin %s", rows[i].line);
        CHECK(o.serve.mode == rows[i].mode && o.serve.max_connections == rows[i].connections &&
              o.timeout_ms == rows[i].timeout_ms);
    }
}

static void options_many(void) {
    char line[2000] = "serve", text[40];
    struct options o;
    char *argv[ARGS];
    for (unsigned i = 0; i < LISTENERS_MAX; i++) {
        snprintf(text, sizeof text, " --listen=unix:///@%u", i);
        strcat(line, text);
    }
    strcat(line, " --allow-uid=0");
    for (unsigned i = 1; i < ALLOWED_UIDS_MAX; i++) {
        snprintf(text, sizeof text, ",%u", i);
        strcat(line, text);
    }
    CHECK(options_parse(&o, split_args(line, argv), argv) == SERVE);
    CHECK(o.serve.endpoint_count == LISTENERS_MAX && strcmp(o.serve.endpoints[LISTENERS_MAX - 1], "unix:///@15") == 0);
    CHECK(o.serve.uid_count == ALLOWED_UIDS_MAX && o.serve.uids[ALLOWED_UIDS_MAX - 1] == ALLOWED_UIDS_MAX - 1);
}

static void options_names(void) {
    struct options o;
    char *argv[ARGS];
    CHECK(options_parse(&o, split_args("--allow-uid root --group root", argv), argv) == SERVE);
    CHECK(o.serve.uid_count == 1 && o.serve.uids[0] == 0 && o.serve.has_group && o.serve.group == 0);
    CHECK(options_parse(&o, split_args("--allow-uid 7 --allow-uid root,1", argv), argv) == SERVE); /* the last counts */
    CHECK(o.serve.uid_count == 2 && o.serve.uids[0] == 0 && o.serve.uids[1] == 1);
}

static void body_options(const void *line) {
    struct options o;
    char *argv[ARGS];
    options_parse(&o, split_args(line, argv), argv);
}

static void options_bad(void) {
    static char many_listen[1000] = "serve", many_uids[1000] = "serve --allow-uid 0";
    for (unsigned i = 0; i <= LISTENERS_MAX; i++)
        strcat(many_listen, " --listen=unix:///@x");
    for (unsigned i = 1; i <= ALLOWED_UIDS_MAX; i++)
        snprintf(many_uids + strlen(many_uids), 8, ",%u", i);
    const char *const rows[] = {
        "frobnicate", "Serve", "''", "help", "version", "serves", "-", "serve -", "serve x", "genkey x", "keyid x",
        "audit x", "probe a b", "unseal a b", "--frobnicate", "-x", "serve -l", "--listen", "serve --listen",
        "serve --mode", "serve --verbose", "serve --list", "probe --listen unix:///a", "genkey --mode 0600",
        "serve --timeout 3", "audit --strict=yes", "audit --list=", "audit --timeout 1", "serve --listenunix:///a",
        "--aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "serve --version", "--version x",
        "serve -- --mode", "--mode ''", "--mode=", "--mode 8", "--mode 0800", "--mode 1777", "--mode 01000",
        "--mode 4755", "--mode -600", "--mode 0x180", "--mode rw", "--mode 600x", "--mode 000000600", "--mode +600",
        "--mode 99999999999999999999", "--max-connections 0", "--max-connections -1", "--max-connections 4097",
        "--max-connections x", "--max-connections ''", "--max-connections 1.5",
        "--max-connections 18446744073709551617", "--max-connections 1x", "--log-level ''", "--log-level warning",
        "--log-level INFO", "--log-level 1", "--log-level infos", "--allow-uid ''", "--allow-uid ,", "--allow-uid 0,",
        "--allow-uid ,0", "--allow-uid 0,,1", "probe --timeout 0", "probe --timeout 0.0", "probe --timeout -1",
        "probe --timeout ''", "probe --timeout .5", "probe --timeout 1.", "probe --timeout .",
        "probe --timeout 1.2345", "probe --timeout 3601", "probe --timeout 3600.001",
        "probe --timeout 99999999999999999999", "probe --timeout 1s", "probe --timeout 1e3", "probe --timeout 1,5",
        "probe --timeout 1.x", "probe --timeout 1.5x", "probe --timeout 1.-5", "probe --timeout nan",
        "probe --timeout +1", many_listen, many_uids,
    };
    for (size_t i = 0; i < LEN(rows); i++) {
        const struct child *c = child_run(body_options, rows[i]);
        row("kmsplugin %.100s", rows[i]);
        CHECK(c->code == 2 && c->out[0] == '\0');
        CHECK(strncmp(c->err, "kmsplugin: ", 11) == 0 && lines_of(c->err) == 2 &&
              strstr(c->err, "\nTry 'kmsplugin --help'.\n"));
    }
}

/* What is well said, and not so here: exit status 1, and one line. */
static void options_unknown_names(void) {
    static const char *const rows[] = {
        "--allow-uid no-such-user", "--allow-uid 0,no-such-user", "--allow-uid 4294967295", "--allow-uid -1",
        "--allow-uid 1x", "--group no-such-group", "--group ''", "--group 4294967295", "--group -1",
    };
    for (size_t i = 0; i < LEN(rows); i++) {
        const struct child *c = child_run(body_options, rows[i]);
        row("kmsplugin %s: %s", rows[i], c->err);
        CHECK(child_died(c) || c->code == 2);
        CHECK(strncmp(c->err, "kmsplugin: --", 13) == 0);
    }
    const struct child *c = child_run(body_options, "--allow-uid 65534");
    row("uid 65534: %s", c->err);
    CHECK(uid_map_is_identity() ? c->code == CHILD_RETURNED : child_died(c));
}

static void ids_are_found(void) {
    static char file[4096];
    struct text t = {.buf = file, .cap = sizeof file};
    text_add(&t, "root:x:0:0:root:/root:/bin/sh\n\n#kms:x:1:\nkmsx:5:2:2::/:\nno-id:x::\nwords:x:1o:\nshort:x:3\n");
    text_add(&t, "huge:x:4294967295:\nlargest:x:4294967294:\n:x:4:\nlong:x:5:");
    while (t.len < 2000) /* members, past what is kept of a line and what is read at a time */
        text_add(&t, "kms:x:6:%zu,", t.len);
    text_add(&t, "\nkms:x:7:\nkms:x:8:\nlast:x:9:");
    file_write("passwd", file, t.len, 0600);
    static const struct {
        const char *name;
        long long id;
    } rows[] = {
        {"root", 0}, {"kms", 7}, {"kmsx", 2}, {"long", 5}, {"last", 9}, {"largest", 4294967294},
        {"huge", -1}, {"no-id", -1}, {"words", -1}, {"short", -1}, {"roo", -1}, {"x", -1}, {"root:x", -1},
    };
    for (size_t i = 0; i < LEN(rows); i++) {
        row("%s", rows[i].name);
        CHECK(id_find(unit_path("passwd"), rows[i].name) == rows[i].id);
    }
    CHECK(id_find(unit_path("no-such-file"), "root") == -1);
}

static void options_help(void) {
    static const char *const rows[] = {
        "--help", "-h", "serve --help", "probe -h", "genkey --help", "audit --strict --help", "--mode 0600 --help",
    };
    for (size_t i = 0; i < LEN(rows); i++) {
        const struct child *c = child_run(body_options, rows[i]);
        row("kmsplugin %s", rows[i]);
        CHECK(c->code == 0 && c->err[0] == '\0' && strncmp(c->out, "Usage: kmsplugin ", 17) == 0);
        for (size_t v = 0; v < VERBS; v++)
            CHECK(strstr(c->out, verbs[v].name));
        CHECK(strcmp(c->out, help) == 0); /* no buffer cuts it */
    }
    const struct child *c = child_run(body_options, "--version");
    row("--version");
    CHECK(c->code == 0 && c->err[0] == '\0' && strncmp(c->out, "kmsplugin " VERSION "\n", 11 + strlen(VERSION)) == 0);
    CHECK(strstr(c->out, "nghttp2 ") && strstr(c->out, "protobuf-c ") && strstr(c->out, "BearSSL "));
}

static void body_main(const void *line) {
    char *argv[ARGS];
    unsetenv("KMS_KEK_FILE");
    setenv("KMS_KEK", KEY_GOOD, 1);
    unit_exit(kmsplugin_main(split_args(line, argv), argv));
}

static void verbs_run(void) {
    uint8_t key[2][KEK_BYTES];
    for (int i = 0; i < 2; i++) {
        const struct child *c = child_run(body_main, "genkey");
        CHECK(c->code == 0 && c->err[0] == '\0' && strlen(c->out) == 45 && c->out[44] == '\n');
        CHECK(base64_decode(c->out, 44, key[i], KEK_BYTES) == KEK_BYTES);
    }
    CHECK(memcmp(key[0], key[1], KEK_BYTES) != 0);
    const struct child *c = child_run(body_main, "keyid");
    CHECK(c->code == 0 && strncmp(c->out, "14c740c2e9cfd299daba6c1dd0a86c1f sha256:34d519c98d6af272", 56) == 0);
    c = child_run(body_main, "probe unix:///@kmsplugin-unit-nobody-there");
    row("%s", c->err);
    CHECK(child_died(c));
}

/* -------------------------------------------------------------------- Main */

static const struct {
    const char *name;
    void (*run)(void);
} tests[] = {
#define TEST(name) {#name, name}
    TEST(text_formats), TEST(text_is_cut_at_cap), TEST(logfmt_quotes), TEST(logfmt_reads_back),
    TEST(times_are_utc), TEST(every_byte_is_escaped), TEST(log_lines_cannot_be_forged), TEST(log_level_filters),
    TEST(hex), TEST(base64_vectors), TEST(base64_roundtrip), TEST(base64_refuses_other_bytes),
    TEST(base64_refuses_trailing_bits), TEST(base64_refuses_bad_padding), TEST(base64_keeps_to_cap), TEST(utf8_table),
    TEST(utf8_everything), TEST(text_of_any_length), TEST(memory_functions), TEST(varints), TEST(fields),
    TEST(strings_of_messages),
    TEST(heap_classes), TEST(heap_accounts), TEST(heap_wipes), TEST(heap_keeps_no_more_than_its_share), TEST(arena),
    TEST(xaes_known_answers), TEST(xaes_10000_iterations), TEST(xaes_1000000_iterations), TEST(gcm_known_answers),
    TEST(gcm_as_bearssl), TEST(hmac_known_answers), TEST(key_ids), TEST(keyid_prints_hashes),
    TEST(a_ring_is_fenced_and_not_forked), TEST(self_test), TEST(seal_roundtrip),
    TEST(seal_layout), TEST(seal_tampered), TEST(seal_rotation), TEST(nonces),
    TEST(ring_forms), TEST(ring_takes_16_keys), TEST(ring_add_refusals), TEST(ring_holds_no_text),
    TEST(key_file_modes), TEST(key_file_kinds), TEST(environment), TEST(environment_too_long), TEST(ring_load_sources),
    TEST(rpc_status_and_version), TEST(rpc_status_tells_the_truth), TEST(rpc_v2_roundtrip), TEST(rpc_v1_roundtrip),
    TEST(rpc_v2_decrypt_order), TEST(rpc_decrypt_lengths), TEST(rpc_malformed), TEST(rpc_too_many_fields),
    TEST(rpc_wipes), TEST(rpc_random_bytes),
    TEST(metrics_lines), TEST(metrics_fit), TEST(grpc_timeouts), TEST(percent_encoding), TEST(grpc_code_names),
    TEST(head_rules), TEST(head_bytes), TEST(head_values), TEST(trailer_rules), TEST(head_size),
    TEST(endpoints_good), TEST(endpoints_bad), TEST(endpoint_names_of_sockets),
    TEST(session_whole), TEST(session_split_everywhere),
#ifndef __SANITIZE_ADDRESS__
    TEST(session_stack_depth),
#endif
    TEST(session_slow_reader), TEST(session_metrics), TEST(session_lines_a_minute),
    TEST(session_large_head), TEST(session_deadlines), TEST(session_timer), TEST(session_renders_once), TEST(session_random_bytes),
    TEST(session_without_memory),
    TEST(session_idlest), TEST(session_heaviest), TEST(session_without_memory_for_a_queue),
    TEST(values_stored), TEST(values_not_ours), TEST(values_damaged), TEST(values_random_bytes),
    TEST(values_named_with_colons), TEST(inputs_judged), TEST(crlf_undone),
    TEST(file_names), TEST(audit_rows),
    TEST(options_defaults), TEST(options_verbs), TEST(options_values), TEST(options_numbers), TEST(options_many),
    TEST(options_names), TEST(options_bad), TEST(options_unknown_names), TEST(ids_are_found),
    TEST(options_help), TEST(verbs_run),
};

/* Runs a test; false if a CHECK failed, or there was none. */
static bool test_run(void (*run)(void)) {
    test_row[0] = test_why[0] = '\0';
    test_checks = 0;
    prng_state = 0x9e3779b97f4a7c15 + (getenv("UNIT_SEED") ? strtoull(getenv("UNIT_SEED"), NULL, 10) : 0);
    log_level = LOG_INFO;
    if (setjmp(test_end) == 0) {
        run();
        if (test_checks == 0)
            snprintf(test_why, sizeof test_why, "it asserts nothing");
    }
    for (char *c = test_why; *c; c++)
        if ((unsigned char)*c < ' ')
            *c = ' ';
    return test_why[0] == '\0';
}

static void unit_dir_remove(void) {
    static const char *const names[] = {
        "kek", "good", "open", "empty", "full", "large", "fifo", "to-good", "to-open", "to-fifo", "to-nothing",
        "loop", "one", "bad",
    };
    for (size_t i = 0; i < LEN(names); i++)
        unlink(unit_path(names[i]));
    rmdir(unit_path("dir"));
    rmdir(unit_dir);
}

int main(int argc, char **argv) {
    const char *prefix = argc > 1 ? argv[1] : "", *all = getenv("UNIT_LONG");
    size_t failed = 0;
    setvbuf(stdout, NULL, _IOLBF, 0); /* should a test crash, the lines before it are there */
    signal(SIGPIPE, SIG_IGN);
    if (!mkdtemp(unit_dir))
        abort();
    for (size_t i = 0; i < LEN(tests); i++) {
        if (strncmp(tests[i].name, prefix, strlen(prefix)) != 0)
            continue;
        if (tests[i].run == xaes_1000000_iterations && (!all || strcmp(all, "1") != 0))
            continue;
        test_name = tests[i].name;
        bool ok = test_run(tests[i].run);
        printf(ok ? "ok %s\n" : "not ok %s: %s\n", tests[i].name, test_why);
        failed += !ok;
    }
    test_name = NULL;
    unit_dir_remove();
    return failed > 0;
}
