/*
 * Unit tests of kmsplugin.c, which is included whole: its functions are static.
 *
 *     build/unit [PREFIX]   runs all tests, or those whose names begin with PREFIX. Prints a
 *                           line "ok NAME" or "not ok NAME: why (line)" for each; exits 1 if
 *                           one failed
 *     UNIT_LONG=1           adds the million iterations of XAES-256-GCM
 *     UNIT_SEED=N           other pseudo-random numbers than usual
 *
 * The sections are those of kmsplugin.c, and a test's name begins with the name of the function
 * that it tests: build/unit gcm_crypt. A CHECK that fails ends its test.
 */
int kmsplugin_main(int argc, char **argv);
#define main kmsplugin_main
#define exit unit_exit
#include "../kmsplugin.c"
#undef main
#undef exit

#include <setjmp.h>
#include <sys/ioctl.h>

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

/*
 * TEST(name) {...} is a test: a constructor adds it to the list, which is in the order of the file. Once it is compiled, it
 * runs.
 */
static struct test {
    const char *name;
    void (*run)(void);
    int line;
} tests[300];

static void test_add(const char *name, void (*run)(void), int line) {
    size_t i = LEN(tests) - 1;
    for (; i > 0 && (!tests[i - 1].run || tests[i - 1].line > line); i--)
        tests[i] = tests[i - 1];
    tests[i] = (struct test){name, run, line};
}

#define TEST(name)                                                                                \
    static void name(void);                                                                      \
    __attribute__((constructor)) static void add_##name(void) { test_add(#name, name, __LINE__); } \
    static void name(void)

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

static const char *test_name; /* NULL in a child */

/* What kmsplugin.c calls to exit, as by die(): the end of a child, or a failure of the test. LeakSanitizer has no say. */
void unit_exit(int code) {
    if (test_name)
        test_fail(__LINE__, "it ended the program");
    fflush(stdout);
    _exit(code);
}

/* What became of a function that may end the process: child_run calls it in a child. */
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

/* -------------------------------------------------------------------- Text
 *
 * Lines as they are written (line_write, log_init, complain, die, die_usage): test_observe.py, test_cli.py.
 */

TEST(text_add_cuts) {
    static const char want[] = "sentence -12345 0abc";
    for (size_t cap = 1; cap < 24; cap++) {
        char *buf = test_alloc(cap);
        buf[cap] = '!';
        struct text t = {.buf = buf, .cap = cap};
        text_add(&t, "%s %d", "sentence", -12345);
        text_add(&t, " %04x", 0xabcu);
        row("cap %zu", cap);
        CHECK(t.len == (cap <= 20 ? cap - 1 : 20) && strlen(buf) == t.len);
        CHECK(memcmp(buf, want, t.len) == 0 && buf[cap] == '!');
        free(buf);
    }
}

/* Printable ASCII stays as it is. Every other byte becomes \xNN. */
TEST(text_escaped_every_byte) {
    for (unsigned c = 0; c < 256; c++) {
        char in = (char)c, out[8] = "", want[8];
        struct text t = {.buf = out, .cap = sizeof out};
        text_escaped(&t, &in, 1);
        snprintf(want, sizeof want, c >= ' ' && c <= '~' ? "%c" : "\\x%02x", c);
        row("byte %u: %.8s", c, out);
        CHECK(strcmp(out, want) == 0);
    }
}

/* Reads a value as go-logfmt does: a word, or a string of JSON in quotes. Returns its length, or -1. */
static long logfmt_parse(const char *s, size_t len, uint8_t *out) {
    long n = 0;
    bool quoted = len >= 2 && s[0] == '"' && s[len - 1] == '"';
    for (size_t i = quoted, end = len - quoted; i < end; i++) {
        if (s[i] < ' ' || s[i] > '~' || s[i] == '"' || (!quoted && strchr(" =\\", s[i])))
            return -1;
        if (s[i] != '\\') {
            out[n++] = (uint8_t)s[i];
        } else if (i + 5 < end && strncmp(&s[i], "\\u00", 4) == 0) {
            n += (long)unhex((const char[]){s[i + 4], s[i + 5], '\0'}, out + n);
            i += 5;
        } else if (i + 1 < end && (s[i + 1] == '"' || s[i + 1] == '\\')) {
            out[n++] = (uint8_t)s[++i];
        } else {
            return -1;
        }
    }
    return quoted || len > 0 ? n : -1;
}

TEST(text_value_reads_back) {
    static const char nasty[] = "\n\r\"\\= x\t\x7f\x80";
    for (int i = 0; i < 20000; i++) {
        uint8_t value[40], back[400];
        char line[400];
        size_t len = prng(sizeof value);
        for (size_t k = 0; k < len; k++)
            value[k] = (uint8_t)(prng(2) ? prng(256) : prng(4) ? 'a' : (uint8_t)nasty[prng(sizeof nasty)]);
        struct text t = {.buf = line, .cap = sizeof line};
        text_value(&t, (char *)value, len);
        row("round %d: %.100s", i, line);
        CHECK(logfmt_parse(line, t.len, back) == (long)len && memcmp(value, back, len) == 0);
    }
}

#ifdef __SANITIZE_ADDRESS__
static void body_die_over(const void *unused) {
    char name[4];
    memset(name, 'x', sizeof name);
    die("%s", name);
}

/*
 * AddressSanitizer makes all of the stack readable before it calls a function that does not return.
 * The sanitized tests are built without that attribute (test/test.mk), so an over-read in die's arguments is seen.
 */
TEST(die_over_read_is_seen) {
    const struct child *c = child_run(body_die_over, NULL);
    CHECK(c->code != CHILD_RETURNED && strstr(c->err, "AddressSanitizer: stack-buffer-overflow"));
}
#endif

/* ------------------------------------------------------------------- Bytes */

TEST(hex_encode_every_byte) {
    for (unsigned i = 0; i < 256; i++) {
        char out[3], want[3];
        hex_encode(&(uint8_t){(uint8_t)i}, 1, out);
        snprintf(want, sizeof want, "%02x", i);
        CHECK(strcmp(out, want) == 0);
    }
}

/* All small numbers, and those around 256. */
TEST(in_range_agrees) {
    for (unsigned c = 0; c < 300; c++)
        for (unsigned low = 0; low < 300; low += 1 + low / 40)
            for (unsigned high = low; high < 300; high += 1 + high / 40) {
                row("%u in %u to %u", c, low, high);
                CHECK(in_range(c, low, high) == (low <= c && c <= high ? ~0u : 0));
            }
}

static const char base64_alphabet[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

static long base64(const char *text, uint8_t *out, size_t cap) {
    uint8_t *exact = copy_of(text, strlen(text)); /* without a NUL */
    long n = base64_decode((char *)exact, strlen(text), out, cap);
    free(exact);
    return n;
}

TEST(base64_encode_vectors) {
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

TEST(base64_decode_other_bytes) {
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
TEST(base64_decode_trailing_bits) {
    for (unsigned i = 0; i < 64; i++) {
        uint8_t out[3];
        const char one[] = {'Z', base64_alphabet[i], '=', '='}, two[] = {'Z', 'm', base64_alphabet[i], '='};
        row("%.4s, %.4s", one, two);
        CHECK(base64_decode(one, 4, out, sizeof out) == (i % 16 == 0 ? 1 : -1));
        CHECK(base64_decode(two, 4, out, sizeof out) == (i % 4 == 0 ? 2 : -1));
    }
}

TEST(base64_decode_bad_padding) {
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

TEST(base64_decode_keeps_to_cap) {
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

/* What release/string.c has in place of the C library's, in the release build. */
TEST(memcpy_and_others) {
    enum { LENGTHS = 300, OFFSETS = 17, ROOM = LENGTHS + 2 * OFFSETS };
    void *(*volatile set)(void *, int, size_t) = memset;
    void *(*volatile copy)(void *restrict, const void *restrict, size_t) = memcpy;
    void *(*volatile move)(void *, const void *, size_t) = memmove;
    uint8_t from[ROOM], moved[ROOM], copied[ROOM], filled[ROOM];
    for (size_t i = 0; i < LENGTHS * OFFSETS * OFFSETS; i++) {
        size_t n = i / OFFSETS / OFFSETS, at = i / OFFSETS % OFFSETS, to = 2 * (i % OFFSETS); /* lower, higher */
        for (size_t k = 0; k < ROOM; k++)
            from[k] = moved[k] = copied[k] = filled[k] = (uint8_t)(k * 11);
        bool right = move(moved + to, moved + at, n) == moved + to && copy(copied + to, from + at, n) == copied + to &&
                     set(filled + to, 0xa5, n) == filled + to;
        for (size_t k = 0; k < ROOM; k++) {
            bool in = k >= to && k < to + n;
            right = right && moved[k] == from[in ? k - to + at : k] && copied[k] == moved[k];
            right = right && filled[k] == (in ? 0xa5 : from[k]);
        }
        row("%zu bytes from %zu to %zu", n, at, to);
        CHECK(right);
    }
}

/* ------------------------------------------------------------------ Memory */

TEST(arena_new_until_full) {
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
    arena_reset(&a);
    CHECK(!a.exhausted && a.used == 0 && all_zero(a.base, ARENA_BYTES));
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

TEST(xaes_crypt_known_answers) {
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

TEST(xaes_crypt_10000_iterations) {
    uint8_t out[16];
    struct shake s = {.at = 0};
    shake_finish(&s);
    shake_squeeze(&s, out, sizeof out);
    CHECK(hex_is(out, sizeof out, "7f9c2ba4e88f827d616045507605853e")); /* SHAKE-128 of nothing: FIPS 202 */
    CHECK(xaes_accumulated(10000, "e6b9edf2df6cec60c8cbd864e2211b597fb69a529160cd040d56c0c210081939"));
}

TEST(xaes_crypt_1000000_iterations) {
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
TEST(gcm_crypt_known_answers) {
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

TEST(hmac_sha256_known_answers) {
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
TEST(kek_init_key_ids) {
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

static void body_self_test(const void *suite) {
    sealing_self_test(suite);
}

static void ghash_wrong(void *y, const void *h, const void *data, size_t len) {
    br_ghash_ctmul64(y, h, data, len);
    *(uint8_t *)y ^= 1;
}

TEST(sealing_self_test_dies) {
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

/* Opens what may be damaged, as the service does: its shape, then the KEK that it names, then its tag. */
enum opened { OPENED, OPEN_MALFORMED, OPEN_UNKNOWN_KEY, OPEN_FORGED };

static enum opened open_with(const struct ring *ring, enum api api, const uint8_t *sealed, size_t len, uint8_t *out) {
    const struct kek *kek;
    return !sealed_shaped(sealed, len)                                        ? OPEN_MALFORMED
           : !(kek = ring_find(ring, sealed + 1))                             ? OPEN_UNKNOWN_KEY
           : open_sealed(&ring->suite, kek, api, sealed, len, out) < 0 ? OPEN_FORGED
                                                                              : OPENED;
}

TEST(seal_roundtrip) {
    struct ring *ring = ring_of(0, 2);
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
        CHECK(seal(ring, api, plain, len, sealed) == 0);
        CHECK(sealed_shaped(sealed, len + SEALED_OVERHEAD));
        ring->suite = suites[(len / 2 + 1) % count]; /* ... another opens */
        CHECK(open_with(ring, api, sealed, len + SEALED_OVERHEAD, opened) == OPENED);
        CHECK(memcmp(plain, opened, len) == 0);
        if (len >= 16)
            CHECK(memmem(sealed, len + SEALED_OVERHEAD, plain, 16) == NULL);
        free(plain);
        free(sealed);
        free(opened);
    }
    ring_free(ring);
}

TEST(open_sealed_tampered) {
    enum { PLAIN = 32, SEALED = PLAIN + SEALED_OVERHEAD };
    struct ring *ring = ring_of(0, 3), *other = ring_of(3, 2);
    uint8_t plain[PLAIN], sealed[SEALED + 1] = {0}, out[PLAIN + 1];
    prng_fill(plain, sizeof plain);
    CHECK(seal(ring, API_V2, plain, PLAIN, sealed) == 0);
    for (unsigned bit = 0; bit < 8 * SEALED; bit++) {
        unsigned byte = bit / 8;
        enum opened want = byte == 0                   ? OPEN_MALFORMED
                           : byte <= FINGERPRINT_BYTES ? OPEN_UNKNOWN_KEY
                                                       : OPEN_FORGED;
        memset(out, 0xaa, sizeof out);
        sealed[bit / 8] ^= (uint8_t)(1 << bit % 8);
        row("bit %u of byte %u", bit % 8, bit / 8);
        CHECK(open_with(ring, API_V2, sealed, SEALED, out) == want);
        if (want == OPEN_FORGED)
            CHECK(all_zero(out, PLAIN));
        sealed[bit / 8] ^= (uint8_t)(1 << bit % 8);
    }
    for (size_t len = 0; len <= SEALED; len++) {
        uint8_t *exact = copy_of(sealed, len);
        row("cut to %zu", len);
        CHECK(open_with(ring, API_V2, exact, len, out) ==
              (len < SEALED_OVERHEAD ? OPEN_MALFORMED : len < SEALED ? OPEN_FORGED : OPENED));
        free(exact);
    }
    row("a byte more, the other API, another ring, another KEK's fingerprint");
    CHECK(open_with(ring, API_V2, sealed, SEALED + 1, out) == OPEN_FORGED);
    CHECK(open_with(ring, API_V1, sealed, SEALED, out) == OPEN_FORGED && all_zero(out, PLAIN));
    CHECK(open_with(other, API_V2, sealed, SEALED, out) == OPEN_UNKNOWN_KEY);
    memcpy(sealed + 1, ring->keks[1].fingerprint, FINGERPRINT_BYTES);
    CHECK(open_with(ring, API_V2, sealed, SEALED, out) == OPEN_FORGED);
    ring_free(ring);
    ring_free(other);
}

/* -------------------------------------------------------------------- Keys
 *
 * Where keys come from (ring_load, key_file_read), and what is told of wrong ones (key_mistake): test_keys.py.
 */

/* With a buffer of 16 bytes, or without one. Every value of the variable goes from the environment, all of it. */
TEST(environment_take_wipes) {
    static const char *const before[] = {"A=1", "KMS_KEK=first", "KMS_KEK_FILE=/run/kek", "KMS_KEK=second and long",
                                         "XKMS_KEK=x", "KMS_KEK=", "KMS_KE=K", "KMS_KEK"};
    for (unsigned round = 0; round < 4; round++) {
        char copies[LEN(before)][32] = {{0}}, *mine[LEN(before) + 1] = {NULL}, **outer = environ, text[16] = "untouched";
        size_t count = 0, first = round < 2 ? 0 : round == 2 ? 2 : 6; /* round 2: the first does not fit; 3: none is there */
        for (size_t i = first; i < LEN(before); i++, count++)
            mine[count] = strcpy(copies[count], before[i]);
        environ = mine;
        bool found = environment_take(round ? text : NULL, round ? sizeof text : 0);
        environ = outer;
        row("round %u: %s", round, text);
        static const char *const texts[] = {"untouched", "first", "second and long", "untouched"};
        CHECK(found == (round < 3) && strcmp(text, texts[round]) == 0);
        for (size_t i = 0; i < count; i++) {
            bool ours = strncmp(before[first + i], "KMS_KEK=", 8) == 0;
            CHECK(ours ? all_zero((uint8_t *)copies[i] + 8, 24) : strcmp(copies[i], before[first + i]) == 0);
        }
    }
}

/* ------------------------------------------------------------- KMS service
 *
 * Through kms_call, which leads to answer_error, answer_no_memory and answer_message. What the six methods answer
 * (kms_seal, kms_open): test_rpc.py.
 */

/* A service with its ring, and the answer to the last call. */
struct service {
    struct kms kms;
    struct answer a;
    void *response; /* if the last call was answered with one */
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
    kms_call(&s->kms, rpc, exact, len, &s->a);
    memset(exact, 0xdd, len); /* no answer borrows from the request's bytes */
    free(exact);
    if (s->a.code == GRPC_OK) {
        CHECK(s->a.bytes);
        s->response = protobuf_c_message_unpack(response_types[rpc], NULL, s->a.len, s->a.bytes);
        CHECK(s->response);
    } else {
        CHECK(s->a.error && s->a.error[0] && strlen(s->a.error) < GRPC_MESSAGE_MAX);
    }
    CHECK(s->a.request_uid && s->a.key_id);
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

/* Status is healthy only after a real seal and open. */
TEST(v2_status_tells_the_truth) {
    struct service *s = service_new(ring_of(0, 1));
    V2__StatusRequest status = V2__STATUS_REQUEST__INIT;
    for (unsigned i = 0; i < 3; i++) {
        s->kms.ring->count = i == 1 ? 0 : 1; /* with 0, no KEK opens what is sealed */
        CHECK((service_call(s, V2_STATUS, &status) == GRPC_OK) == (i != 1));
        const V2__StatusResponse *r = s->response;
        CHECK(!r || (strcmp(r->version, "v2") == 0 && strcmp(r->healthz, "ok") == 0));
        CHECK(!r || strcmp(r->key_id, s->kms.ring->keks[0].key_id) == 0);
    }
    service_free(s);
}

/* A message of 64 KiB can hold more fields than the arena has room to unpack. */
TEST(kms_call_too_many_fields) {
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
TEST(kms_done_wipes) {
    struct service *s = service_new(ring_of(0, 1));
    static const char secret[] = "a secret that nobody else may see";
    CHECK(v2_encrypt_of(s, secret, sizeof secret) == GRPC_OK);
    CHECK(memmem(s->kms.arena.base, s->kms.arena.used, secret, sizeof secret));
    service_done(s);
    CHECK(all_zero(s->kms.arena.base, ARENA_BYTES));
    service_free(s);
}

/* ----------------------------------------------------------------- Metrics
 *
 * What the page says (metrics_metric, metrics_single, metrics_durations): test_observe.py.
 */

TEST(metrics_write_fits) {
    static char page[4 * METRICS_BYTES];
    struct text t = {.buf = page, .cap = sizeof page};
    struct metrics m;
    memset(&m, 0xff, sizeof m); /* every counter at its largest */
    metrics_write(&m, "0123456789abcdef0123456789abcdef", 4096, &t);
    row("%zu bytes", t.len);
    CHECK(t.len < METRICS_BYTES);
    for (unsigned rpc = 0; rpc < RPCS; rpc++)
        for (unsigned code = 0; code < GRPC_CODES; code++)
            CHECK(strstr(page, grpc_code_names[code]) && strstr(page, rpcs[rpc].method));
    CHECK(strcmp(grpc_code_names[GRPC_INTERNAL], "INTERNAL") == 0 && strcmp(grpc_code_names[16], "UNAUTHENTICATED") == 0);
}

/* -------------------------------------------------------------------- gRPC */

TEST(grpc_timeout_ms_rows) {
    static const struct {
        const char *value;
        int64_t ms;
    } rows[] = {
        {"1H", 3600000}, {"1M", 60000}, {"1S", 1000}, {"1m", 1}, {"1u", 1}, {"1n", 1}, {"0n", 0}, {"0S", 0}, {"1001u", 2},
        {"2999943u", 3000}, {"00000007m", 7}, {"000000007m", -1}, {"99999999u", 100000}, {"99999999S", 99999999000},
        {"99999999H", 99999999LL * 3600000}, {"", -1}, {"1", -1}, {"S", -1}, {"123456789S", -1}, {"-1S", -1}, {"+1S", -1},
        {" 1S", -1}, {"1 S", -1}, {"1S ", -1}, {"1.5S", -1}, {"0x1S", -1}, {"1s", -1}, {"1h", -1}, {"1N", -1}, {"1SS", -1},
        {"S1", -1}, {"12", -1}, {"infinity", -1},
    };
    for (size_t i = 0; i < LEN(rows); i++) {
        uint8_t *exact = copy_of(rows[i].value, strlen(rows[i].value));
        row("'%s'", rows[i].value);
        CHECK(grpc_timeout_ms(exact, strlen(rows[i].value)) == rows[i].ms);
        free(exact);
    }
}

TEST(grpc_prefix_roundtrip) {
    static const size_t lens[] = {0, 1, 255, 256, 65536, 0xffffffff};
    static const char *const hex[] = {"0000000000", "0000000001", "00000000ff", "0000000100", "0000010000", "00ffffffff"};
    for (size_t i = 0; i < LEN(lens); i++) {
        uint8_t prefix[GRPC_PREFIX_BYTES];
        row("%zu", lens[i]);
        grpc_prefix_write(prefix, lens[i]);
        CHECK(hex_is(prefix, sizeof prefix, hex[i]) && grpc_prefix_len(prefix) == lens[i]);
    }
}

/* ----------------------------------------------------------- HTTP requests
 *
 * The rules for heads, trailers and their size, paths and content types (request_header, request_known, request_path,
 * is_grpc, request_head_end): test_http2.py.
 */

#define REQUEST_NONE {.rpc = RPC_UNKNOWN, .content_length = -1, .timeout_ms = INT64_MAX}

/* Each byte at the start, the middle and the end of a name and of a value (RFC 9113 8.2.1). */
TEST(request_header_bytes) {
    for (unsigned c = 0; c < 256; c++) {
        for (size_t at = 0; at < 3; at++) {
            struct request in_name = REQUEST_NONE, in_value = REQUEST_NONE;
            uint8_t text[3] = {'a', 'b', 'c'};
            text[at] = (uint8_t)c;
            request_header(&in_name, text, 3, (const uint8_t *)"value", 5);
            request_header(&in_value, (const uint8_t *)"name", 4, text, 3);
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

/* ------------------------------------------------------------------ Server
 *
 * From here to Event loop, the tests work on a server with a ring, and on connections that are
 * one end of a socketpair. Nothing waits: a test calls what the loop would call.
 */

static struct server *session_server(void) {
    static const struct serve_options options = {.max_connections = 16};
    sigset_t none;
    sigemptyset(&none);
    logging.level = LOG_ERROR;
    struct server *s = server_new(&options, signalfd(-1, &none, SFD_CLOEXEC));
    ring_free(s->kms.ring);
    s->kms.ring = ring_of(0, 2);
    return s;
}

static void session_server_free(struct server *s) {
    server_free(s);
    logging.level = LOG_INFO;
}

/* A connection of the server; *fd is the peer's end. NULL if it was closed at once. */
static struct conn *session_open(struct server *s, int *fd) {
    int pair[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair) == 0);
    const struct ucred peer = {.pid = getpid(), .uid = geteuid()};
    *fd = pair[1];
    conn_new(s, pair[0], &peer);
    if (!s->conns || s->conns->closed)
        return NULL;
    return s->conns;
}

/* Ends a connection, if it has not ended itself, and all others; then nothing of them is left. */
static void session_close(struct server *s, struct conn *c, int fd) {
    for (; c; c = c->next)
        conn_close(c, "end of the test");
    server_reap(s);
    close(fd);
    CHECK(!s->conns && s->conn_count == 0 && s->held == 0);
}

/* Time passes, and the loop looks at the deadlines. */
static void session_sweep(struct server *s, int64_t ms) {
    s->now_ms += ms;
    s->sweep_ms = s->now_ms;
    server_sweep(s);
}

/* What the server sends, appended to `out`; what it sends is dropped if `out` is NULL. */
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
    if (c->blocked)
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
            conn_ready(c);
            session_drain(fd, out);
        }
    }
    session_drain(fd, out);
}

/* ------------------------------------------------------------------- Room
 *
 * Blocks (held_malloc, held_calloc, held_realloc, held_free, block_class, chunk_cut) and streams (stream_new,
 * stream_free) are those of the sessions below, under AddressSanitizer in build/unit-asan, and of make test-inject. The trace
 * of uses (conn_use) and server_minute_end: test_observe.py.
 */

/* The connection that holds most gives way; never the one that asks. */
TEST(conn_has_room_sheds) {
    enum { TENTH = HELD_MAX / 10 };
    struct server *s = session_server();
    struct conn *c[3];
    int fds[3];
    for (size_t i = 0; i < 3; i++) {
        CHECK((c[i] = session_open(s, &fds[i])));
        conn_hold(c[i], (ptrdiff_t)(2 * i + 1) * TENTH);
    }
    size_t left = HELD_MAX - s->held;
    CHECK(conn_has_room(c[0], left) && !c[1]->closed && !c[2]->closed);
    CHECK(conn_has_room(c[0], left + 1) && !c[1]->closed && c[2]->closed);
    CHECK(!conn_has_room(c[0], HELD_MAX - 3 * TENTH) && !c[1]->closed && !c[0]->closed); /* it would be the heaviest itself */
    session_close(s, s->conns, fds[2]);
    close(fds[0]);
    close(fds[1]);
    session_server_free(s);
}

/* ------------------------------------------------------------------ HTTP/2
 *
 * A dialogue leads through all callbacks: on_begin_headers, on_header, stream_head_end, on_data_chunk_recv, stream_prefix_end,
 * stream_end, stream_metrics, stream_http_error, stream_fail, stream_reset, on_data_source_read, on_send_data, out_append,
 * on_frame_send, on_stream_close, session_init. The rest is for fuzz/session.c and test_http2.py.
 */

/* What the client asks, and what it must be told. */
enum { PING_PLAIN = 4, MESSAGE_ROOM = 600, FRAME_HEAD = 9, PADDING = 20 };

static const char ping[] = "ping";

#define V2(method) "/v2.KeyManagementService/" method
#define V1(method) "/v1beta1.KeyManagementService/" method
#define GRPC "application/grpc"

static const struct question {
    const char *name, *method, *path, *content_type;
    const char *http, *status; /* expected; status NULL: none; both NULL: reset with PROTOCOL_ERROR */
    const char *raw; /* the body in hex, or NULL: the prefix and the message of dialogue_init */
    const char *extra, *value; /* one field more, or NULL */
} questions[] = {
    {"v2 Status", "POST", V2("Status"), GRPC, "200", "0", NULL, NULL, NULL},
    {"v2 Encrypt", "POST", V2("Encrypt"), GRPC, "200", "0", NULL, NULL, NULL},
    {"v2 Decrypt", "POST", V2("Decrypt"), GRPC "+proto", "200", "0", NULL, NULL, NULL},
    {"v1 Version", "POST", V1("Version"), GRPC, "200", "0", NULL, NULL, NULL},
    {"v1 Encrypt", "POST", V1("Encrypt"), GRPC, "200", "0", NULL, NULL, NULL},
    {"v1 Decrypt", "POST", V1("Decrypt"), GRPC, "200", "0", NULL, NULL, NULL},
    {"v2 Decrypt, wrong key_id", "POST", V2("Decrypt"), GRPC, "200", "3", NULL, NULL, NULL},
    {"an unknown method", "POST", V2("Rotate"), GRPC, "200", "12", "0000000000", NULL, NULL},
    {"a compressed message", "POST", V2("Status"), GRPC, "200", "12", "0100000002" "6162", NULL, NULL},
    {"a message over 64 KiB", "POST", V2("Encrypt"), GRPC, "200", "8", "0000010001" "61626364", NULL, NULL},
    {"a message cut short", "POST", V2("Encrypt"), GRPC, "200", "13", "0000000005" "0a0178", NULL, NULL},
    {"two messages", "POST", V2("Status"), GRPC, "200", "13", "0000000000" "0000000000", NULL, NULL},
    {"no message", "POST", V2("Status"), GRPC, "200", "13", "", NULL, NULL},
    {"bytes that are no message", "POST", V2("Encrypt"), GRPC, "200", "13", "0000000002" "ffff", NULL, NULL},
    {"PUT", "PUT", V2("Status"), GRPC, "405", NULL, "", NULL, NULL},
    {"GET of something else", "GET", "/healthz", NULL, "404", NULL, "", NULL, NULL},
    {"another content-type", "POST", V2("Status"), "application/json", "415", NULL, "0000000000", NULL, NULL},
    {"GET of the metrics", "GET", "/metrics", NULL, "200", NULL, "", NULL, NULL}, /* the one long answer */
    {"content-length as it is", "POST", V2("Status"), GRPC, "200", "0", "0000000000", "content-length", "5"},
    {"content-length too small", "POST", V2("Status"), GRPC, NULL, NULL, "0000000000", "content-length", "4"},
    {"content-length too large", "POST", V2("Status"), GRPC, NULL, NULL, "0000000000", "content-length", "500"},
    {"content-length no number", "POST", V2("Status"), GRPC, NULL, NULL, "0000000000", "content-length", "5 bytes"},
    {"a field of HTTP/1", "POST", V2("Status"), GRPC, NULL, NULL, "0000000000", "connection", "close"},
};
enum { DIALOGUE = LEN(questions) };

static struct exchange {
    const struct question *q;
    uint8_t body[MESSAGE_ROOM];
    size_t body_len;
    size_t sent; /* by the client */
    /* received: */
    char http_status[8], grpc_status[8], message[GRPC_MESSAGE_MAX + 1], type[80];
    uint8_t reply[METRICS_BYTES];
    size_t reply_len;
    uint32_t error;
    bool closed;
} dialogue[DIALOGUE];

/* Fills in the bodies. */
static void dialogue_init(struct server *s) {
    static uint8_t sealed1[PING_PLAIN + SEALED_OVERHEAD], sealed2[PING_PLAIN + SEALED_OVERHEAD];
    CHECK(seal(s->kms.ring, API_V1, (const uint8_t *)ping, PING_PLAIN, sealed1) == 0);
    CHECK(seal(s->kms.ring, API_V2, (const uint8_t *)ping, PING_PLAIN, sealed2) == 0);
    V2__StatusRequest status = V2__STATUS_REQUEST__INIT;
    V2__EncryptRequest encrypt = V2__ENCRYPT_REQUEST__INIT;
    encrypt.plaintext = binary(ping, PING_PLAIN);
    V2__DecryptRequest decrypt = V2__DECRYPT_REQUEST__INIT;
    decrypt.ciphertext = binary(sealed2, sizeof sealed2);
    decrypt.uid = encrypt.uid = text_of("uid");
    decrypt.key_id = s->kms.ring->keks[0].key_id;
    V2__DecryptRequest other_id = decrypt;
    other_id.key_id = s->kms.ring->keks[1].key_id;
    V2__V1beta1__VersionRequest version = V2__V1BETA1__VERSION_REQUEST__INIT;
    V2__V1beta1__EncryptRequest encrypt1 = V2__V1BETA1__ENCRYPT_REQUEST__INIT;
    V2__V1beta1__DecryptRequest decrypt1 = V2__V1BETA1__DECRYPT_REQUEST__INIT;
    version.version = encrypt1.version = decrypt1.version = text_of("v1beta1");
    encrypt1.plain = binary(ping, PING_PLAIN);
    decrypt1.cipher = binary(sealed1, sizeof sealed1);
    const void *const messages[] = {&status, &encrypt, &decrypt, &version, &encrypt1, &decrypt1, &other_id};
    for (size_t i = 0; i < DIALOGUE; i++) {
        struct exchange *x = &dialogue[i];
        x->q = &questions[i];
        if (x->q->raw) {
            x->body_len = unhex(x->q->raw, x->body);
        } else {
            size_t len = protobuf_c_message_pack(messages[i], x->body + GRPC_PREFIX_BYTES);
            grpc_prefix_write(x->body, len);
            x->body_len = GRPC_PREFIX_BYTES + len;
        }
    }
}

static ssize_t peer_read_body(nghttp2_session *session, int32_t id, uint8_t *buf, size_t cap, uint32_t *flags,
                              nghttp2_data_source *source, void *user) {
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

static int peer_on_header(nghttp2_session *session, const nghttp2_frame *frame, const uint8_t *name, size_t name_len,
                          const uint8_t *value, size_t len, uint8_t flags, void *user) {
    struct exchange *x = peer_exchange(frame->hd.stream_id);
    if (IS(name, name_len, ":status"))
        copy_text(x->http_status, sizeof x->http_status, value, len);
    else if (IS(name, name_len, "grpc-status"))
        copy_text(x->grpc_status, sizeof x->grpc_status, value, len);
    else if (IS(name, name_len, "grpc-message"))
        copy_text(x->message, sizeof x->message, value, len);
    else if (IS(name, name_len, "content-type"))
        copy_text(x->type, sizeof x->type, value, len);
    return 0;
}

static int peer_on_data(nghttp2_session *session, uint8_t flags, int32_t id, const uint8_t *data, size_t len,
                        void *user) {
    struct exchange *x = peer_exchange(id);
    CHECK(len <= sizeof x->reply - x->reply_len);
    memcpy(x->reply + x->reply_len, data, len);
    x->reply_len += len;
    return 0;
}

static int peer_on_close(nghttp2_session *session, int32_t id, uint32_t error, void *user) {
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
        nghttp2_nv fields[8] = {header_copied(":method", x->q->method, strlen(x->q->method)), HEADER(":scheme", "http"),
                                header_copied(":path", x->q->path, strlen(x->q->path)),
                                HEADER(":authority", "%2Frun%2Fkms.sock"), HEADER("te", "trailers"),
                                HEADER("grpc-timeout", "2999943u")};
        size_t count = 6;
        if (x->q->content_type)
            fields[count++] = header_copied("content-type", x->q->content_type, strlen(x->q->content_type));
        if (x->q->extra)
            fields[count++] = header_copied(x->q->extra, x->q->value, strlen(x->q->value));
        nghttp2_data_provider body = {.source.ptr = x, .read_callback = peer_read_body};
        x->sent = x->reply_len = 0;
        x->http_status[0] = x->grpc_status[0] = x->message[0] = x->type[0] = '\0';
        x->closed = false;
        bool get = strcmp(x->q->method, "GET") == 0;
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

/* The answer is what was expected. What the six RPCs answer is for test_rpc.py. */
static void exchange_check(const struct exchange *x) {
    const struct question *q = x->q;
    CHECK(x->closed && x->error == (q->http ? NGHTTP2_NO_ERROR : NGHTTP2_PROTOCOL_ERROR));
    CHECK(strcmp(x->http_status, q->http ? q->http : "") == 0);
    CHECK(strcmp(x->grpc_status, q->status ? q->status : "") == 0);
    CHECK(!q->status || strcmp(x->type, "application/grpc") == 0);
    if (strcmp(q->path, "/metrics") == 0) {
        CHECK(x->reply_len > 1500 && x->reply[x->reply_len - 1] == '\n');
        CHECK(strncmp(x->type, "text/plain; version=0.0.4", 25) == 0);
    } else if (!q->status || strcmp(q->status, "0") != 0) {
        CHECK(x->reply_len == 0 && (!q->status || x->message[0]));
    } else {
        size_t i = q->extra ? V2_STATUS : (size_t)(x - dialogue), len = x->reply_len - GRPC_PREFIX_BYTES;
        CHECK(x->reply_len > GRPC_PREFIX_BYTES && x->reply[0] == 0 && grpc_prefix_len(x->reply) == len);
        void *m = protobuf_c_message_unpack(response_types[i], NULL, len, x->reply + GRPC_PREFIX_BYTES);
        CHECK(m);
        const ProtobufCBinaryData *plain = i == V2_DECRYPT   ? &((V2__DecryptResponse *)m)->plaintext
                                           : i == V1_DECRYPT ? &((V2__V1beta1__DecryptResponse *)m)->plain
                                                             : NULL;
        CHECK(!plain || (plain->len == PING_PLAIN && memcmp(plain->data, ping, PING_PLAIN) == 0));
        protobuf_c_message_free_unpacked(m, NULL);
    }
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
    CHECK(c->greeted && !c->streams && !c->out);
    nghttp2_session_del(peer);
    session_close(s, c, fd);
    for (size_t i = 0; i < DIALOGUE; i++) {
        row("%s, split at %zu of %zu", questions[i].name, split, first);
        exchange_check(&dialogue[i]);
    }
    return first;
}

TEST(stream_answer_dialogue) {
    struct server *s = session_server();
    dialogue_init(s);
    size_t len = session_dialogue(s, sizeof said);
    CHECK(len > 500 && len < 4000);
    CHECK(s->metrics.requests[V2_STATUS][GRPC_OK] == 2 && s->metrics.requests[V1_DECRYPT][GRPC_OK] == 1);
    CHECK(s->metrics.requests[V2_DECRYPT][GRPC_INVALID_ARGUMENT] == 1 &&
          s->metrics.requests[RPC_UNKNOWN][GRPC_UNIMPLEMENTED] == 1);
    session_server_free(s);
}

TEST(stream_append_split_everywhere) {
    struct server *s = session_server();
    dialogue_init(s);
    size_t len = session_dialogue(s, SIZE_MAX);
    for (size_t split = 1; split < len; split++)
        session_dialogue(s, split);
    CHECK(s->metrics.requests[V2_STATUS][GRPC_OK] == 2 * len);
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
TEST(stack_wipe_reaches) {
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
        conn_ready(c);
        size_t depth = stack_depth();
        row("%s: %zu bytes deep", suites[i].name, depth);
        CHECK(s->metrics.requests[V2_ENCRYPT][GRPC_OK] == 2 && s->metrics.requests[V2_DECRYPT][GRPC_OK] == 2);
        CHECK(depth > 512 && depth <= STACK_WIPE_BYTES);
        session_close(s, c, fd);
        session_server_free(s);
    }
}
#endif

/* There is less and less room: the connection ends or is served, and no memory is lost. */
TEST(conn_has_room_less_and_less) {
    enum { MOST = 100 * 1024, STEP = 97 };
    struct server *s = session_server();
    dialogue_init(s);
    size_t len = peer_first_words(said, sizeof said), ended = 0, lived = 0;
    for (size_t room = 0; room < MOST; room += STEP) {
        size_t bias = HELD_MAX - room;
        int fd;
        row("%zu bytes", room);
        s->held += bias; /* as if something else held so much */
        struct conn *c = session_open(s, &fd);
        if (c)
            session_feed(c, fd, said, len, NULL);
        bool ends = !c || c->closed;
        ended += ends;
        lived += !ends;
        CHECK(s->held <= HELD_MAX);
        if (!ends)
            conn_close(c, "end of the test");
        CHECK(s->held == bias);
        s->held = 0;
        session_close(s, NULL, fd);
    }
    row("%zu ended, %zu lived", ended, lived);
    CHECK(ended > 20 && lived > 20);
    session_dialogue(s, sizeof said);
    session_server_free(s);
}

/* ------------------------------------------------------------- Connections
 *
 * Every session goes through conn_fill, conn_watch and buffer_new.
 */

/* --------------------------------------------------------------- Endpoints
 *
 * Sockets made, replaced and inherited (listener_open, listener_made, socket_clear, owner_check,
 * endpoint_mistake, listeners_open, listeners_inherit, listener_inherit, listeners_close, notify_open): test_socket.py,
 * test_cli.py and, for each call that fails, inject.py.
 */

/* Of two starts, one has the directory; a lock that somebody holds for ever keeps neither from it. */
TEST(directory_lock_is_one_at_a_time) {
    int first = directory_lock("/kms.sock"), other = open("/", O_RDONLY);
    CHECK(first >= 0 && flock(other, LOCK_EX | LOCK_NB) < 0 && errno == EWOULDBLOCK);
    close(first);
    CHECK(flock(other, LOCK_EX | LOCK_NB) == 0);
    CHECK((first = directory_lock("/kms.sock")) >= 0 && flock(first, LOCK_EX | LOCK_NB) < 0);
    close(first);
    close(other);
}

#define X10 "xxxxxxxxxx"
#define X100 X10 X10 X10 X10 X10 X10 X10 X10 X10 X10

TEST(endpoint_require_takes) {
    static const struct {
        const char *endpoint, *path; /* behind the NUL, if abstract */
        bool abstract;
    } rows[] = {
        {"unix:///run/kmsplugin/kms.sock", "/run/kmsplugin/kms.sock", false}, {"unix:///kms.sock", "/kms.sock", false},
        {"unix:///a b/with space", "/a b/with space", false}, {"unix:///run/@kms", "/run/@kms", false},
        {"unix:///caf\xc3\xa9", "/caf\xc3\xa9", false}, {"unix:///" X100 "123456", "/" X100 "123456", false}, /* 107 bytes */
        {"unix:///@k", "k", true}, {"unix:///@with/slash", "with/slash", true}, {"unix:///@@", "@", true},
        {"unix:///@" X100 "1234567", X100 "1234567", true}, /* 107 bytes and the NUL before them */
    };
    for (size_t i = 0; i < LEN(rows); i++) {
        struct sockaddr_un address;
        socklen_t len;
        char name[200];
        struct text t = {.buf = name, .cap = sizeof name};
        size_t path_len = strlen(rows[i].path);
        memset(&address, 0xee, sizeof address);
        row("%s", rows[i].endpoint);
        endpoint_require(rows[i].endpoint, &address, &len);
        CHECK(address.sun_family == AF_UNIX);
        CHECK(len == offsetof(struct sockaddr_un, sun_path) + path_len + 1); /* a NUL at one end or the other */
        CHECK(memcmp(address.sun_path + rows[i].abstract, rows[i].path, path_len) == 0);
        CHECK(address.sun_path[rows[i].abstract ? 0 : path_len] == '\0');
        CHECK(all_zero((uint8_t *)&address + len, sizeof address - len));
        endpoint_add(&t, &address, len);
        CHECK(strstr(name, rows[i].endpoint) || name[0] == '"');
    }
}

/* -------------------------------------------------------------- Event loop
 *
 * Deadlines (conn_expire): test_deadlines.py. The loop itself (server_run, server_wait, server_guard, listener_ready,
 * server_admit, server_log_refused, server_accept_from, server_signal, server_stop, server_capacity, signals_open) runs in all tests of the running server:
 * test_socket.py, test_bounds.py, test_surroundings.py.
 */

/* Nothing that waits for nothing wakes the loop: a connection that is greeted and idle has no deadline. */
TEST(server_sweep_rests) {
    static const uint8_t greeting[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0";
    struct server *s = session_server();
    int fd;
    struct conn *c = session_open(s, &fd);
    CHECK(c);
    session_sweep(s, 1);
    CHECK(s->waiting); /* for the preface */
    session_feed(c, fd, greeting, sizeof greeting, NULL);
    CHECK(c->greeted);
    session_sweep(s, 1);
    CHECK(!s->waiting && !c->closed);
    session_close(s, c, fd);
    session_server_free(s);
}

/* ------------------------------------------------------------ Confinement
 *
 * sandbox.c makes every system call under the filter (seccomp_install, capabilities_drop). without.c leaves out each call that
 * the filter allows.
 */

/* --------------------------------------------------------------- Rehearsal
 *
 * test_sandbox.py starts servers whose rehearsal fails (rehearse_request, rehearse_calls) by without.c, inject.py those that
 * cannot hold one (rehearse, rehearsal_passes).
 */

/* ------------------------------------------------------------------- Probe
 *
 * probe_open, probe_call, probe_run, probe_v2, probe_v1 and what they lose (probe_lost): test_cli.py, inject.py.
 */

/* ------------------------------------------------------------------ Rescue
 *
 * Values, by way of value_open: value_open_data, value_open_object, value_read_v1, value_open_encrypted. The verbs (unseal,
 * audit) and what they say of wrong input (input_name): test_rescue.py, fuzz/rescue.c.
 */

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
    uint8_t dek[64], sealed[64 + SEALED_OVERHEAD], info[33], key[32], data[400];
    const uint8_t *object = (const uint8_t *)o->object, *etcd_key = (const uint8_t *)o->etcd_key;
    size_t len = strlen(o->object), at = o->type == 1 ? 32 : 0, key_len = o->type == 1 ? 32 : o->dek_len;
    prng_fill(dek, o->dek_len);
    prng_fill(data, at + 12);
    CHECK(seal(ring, o->api, dek, o->dek_len, sealed) == 0);
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
    e.key_id = o->key_id ? binary(o->key_id, strlen(o->key_id)) : binary(ring->keks[0].key_id, KEY_ID_LEN);
    e.encrypted_dek_source = binary(sealed, sealed_len);
    e.encrypted_dek_source_type = (V2__Etcd__DEKSourceType)o->type;
    entry.key = text_of("a.example.org");
    e.annotations = entries;
    e.n_annotations = o->annotation;
    return n + protobuf_c_message_pack(&e.base, out + n);
}

#define ETCD_KEY "/registry/secrets/default/db"

#define OBJECT "the object"
static const struct {
    const char *name;
    struct stored stored;
    enum value_state want;
} stored_cases[] = {
    {"v2, a seed", {API_V2, 1, 32, ETCD_KEY, NULL, false, OBJECT}, VALUE_OPENED},
    {"v2, a seed of 64 bytes", {API_V2, 1, 64, ETCD_KEY, NULL, false, OBJECT}, VALUE_OPENED},
    {"v2, a key", {API_V2, 0, 32, ETCD_KEY, NULL, false, OBJECT}, VALUE_OPENED},
    {"v2, a key of AES-128", {API_V2, 0, 16, ETCD_KEY, NULL, false, OBJECT}, VALUE_OPENED},
    {"v2, an empty object", {API_V2, 1, 32, ETCD_KEY, NULL, false, ""}, VALUE_OPENED},
    {"v1", {API_V1, 0, 32, ETCD_KEY, NULL, false, OBJECT}, VALUE_OPENED},
    {"v1, an empty object", {API_V1, 0, 32, ETCD_KEY, NULL, false, ""}, VALUE_OPENED},
    {"v2, of another etcd key", {API_V2, 1, 32, ETCD_KEY "2", NULL, false, OBJECT}, VALUE_DAMAGED},
    {"v1, of another etcd key", {API_V1, 0, 32, ETCD_KEY "2", NULL, false, OBJECT}, VALUE_DAMAGED},
    {"v2, an unknown kind of DEK", {API_V2, 2, 32, ETCD_KEY, NULL, false, OBJECT}, VALUE_DAMAGED},
    {"v2, a key that is no AES key", {API_V2, 0, 31, ETCD_KEY, NULL, false, OBJECT}, VALUE_DAMAGED},
    {"v1, an empty key", {API_V1, 0, 0, ETCD_KEY, NULL, false, OBJECT}, VALUE_DAMAGED},
    {"v2, another keyID", {API_V2, 1, 32, ETCD_KEY, "0123456789abcdef0123456789abcdef", false, OBJECT}, VALUE_DAMAGED},
    {"v2, with an annotation", {API_V2, 1, 32, ETCD_KEY, NULL, true, OBJECT}, VALUE_DAMAGED},
    {"v2, a keyID unlike ours", {API_V2, 1, 32, ETCD_KEY, "projects/p/locations/l/keyRings/r", false, OBJECT}, VALUE_DAMAGED},
};

static enum value_state value_of(struct value *v, const struct ring *ring, const char *etcd_key, const uint8_t *bytes,
                                 size_t len) {
    uint8_t *key = copy_of(etcd_key, strlen(etcd_key)), *value = copy_of(bytes, len);
    value_open(v, ring, binary(key, strlen(etcd_key)), value, len);
    free(key);
    free(value);
    CHECK((v->state == VALUE_OPENED) == (v->object != NULL));
    CHECK(v->state == VALUE_OPENED || (v->why && v->why[0]));
    return v->state;
}

TEST(value_open_stored) {
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
            CHECK(value_of(&v, stranger, ETCD_KEY, bytes, len) == VALUE_MISSING);
            CHECK(strcmp(v.key_id, ring->keks[0].key_id) == 0 && v.api == stored->api); /* the KEK is named */
            CHECK(value_of(&v, ring, "/registry/secrets/default/other", bytes, len) == VALUE_DAMAGED);
            CHECK(value_of(&v, ring, "", bytes, len) == VALUE_DAMAGED);
        }
        value_wipe(&v);
    }
    ring_free(ring);
    ring_free(stranger);
}

/* What is not ours: it never keeps a KEK. What is ours, and damaged, does. */
TEST(value_open_others) {
    static const struct {
        enum value_state want;
        const char *name, *bytes;
        size_t len; /* 0: of the string */
    } rows[] = {
        {VALUE_OTHER, "nothing", "", 0},
        {VALUE_PLAINTEXT, "protobuf", "k8s\0\n", 5},
        {VALUE_PLAINTEXT, "JSON", "{\"kind\":\"Secret\"}", 0},
        {VALUE_PLAINTEXT, "CBOR", "\xd9\xd9\xf7\xa1", 0},
        {VALUE_OTHER, "a prefix cut short", "k8s:enc", 0},
        {VALUE_OTHER, "a key of kine", "1", 0},
        {VALUE_FOREIGN, "aescbc", "k8s:enc:aescbc:v1:key1:xxxxxxxxxxxxxxxx", 0},
        {VALUE_FOREIGN, "secretbox", "k8s:enc:secretbox:v1:key1:xxxxxxxxxxx", 0},
        {VALUE_FOREIGN, "a KMS version to come", "k8s:enc:kms:v3:vault:xxxxxxxxxxx", 0},
        {VALUE_DAMAGED, "v2, no name", "k8s:enc:kms:v2:x", 0},
        {VALUE_DAMAGED, "v2, no message", "k8s:enc:kms:v2:vault:\xff\xff\xff", 0},
        {VALUE_FOREIGN, "v2, another plugin's", "k8s:enc:kms:v2:vault:\x0a\x04" "data\x12\x03key\x1a\x08vault:v1", 0},
        {VALUE_DAMAGED, "v2, cut off behind its data", "k8s:enc:kms:v2:vault:\x0a\x04" "data", 0},
        {VALUE_FOREIGN, "v1, nothing behind the name", "k8s:enc:kms:v1:vault:", 0},
        {VALUE_FOREIGN, "v1, half a length", "k8s:enc:kms:v1:vault:\x01", 0},
        {VALUE_FOREIGN, "v1, a length too large", "k8s:enc:kms:v1:vault:\xff\xffxyz", 0},
        {VALUE_FOREIGN, "v1, a DEK that is text", "k8s:enc:kms:v1:vault:\0\x0avault:v1:xnonce-tag", 40},
        {VALUE_FOREIGN, "v1, a DEK that begins as ours", "k8s:enc:kms:v1:aws:\0\x20\x01xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx", 56},
    };
    struct ring *ring = ring_of(0, 1);
    for (size_t i = 0; i < LEN(rows); i++) {
        struct value v;
        row("%s", rows[i].name);
        size_t len = rows[i].len ? rows[i].len : strlen(rows[i].bytes);
        CHECK(value_of(&v, ring, ETCD_KEY, (const uint8_t *)rows[i].bytes, len) == rows[i].want);
        value_wipe(&v);
    }
    ring_free(ring);
}

/* A name of a v1 provider may hold colons, but not beyond what is looked at. */
TEST(value_open_v1_names) {
    static const struct stored stored = {API_V1, 0, 32, ETCD_KEY, NULL, false, OBJECT};
    enum { PREFIX_LEN = 15, NAME_LEN = 5 };
    struct ring *ring = ring_of(0, 1);
    uint8_t made[1000], bytes[V1_NAME_MAX + 1000];
    size_t len = stored_make(&stored, ring, made);
    struct value v;
    memcpy(bytes, made, PREFIX_LEN);
    memset(bytes + PREFIX_LEN, ':', V1_NAME_MAX);
    memcpy(bytes + PREFIX_LEN + V1_NAME_MAX, made + PREFIX_LEN + NAME_LEN, len - PREFIX_LEN - NAME_LEN);
    CHECK(value_of(&v, ring, ETCD_KEY, bytes, len - NAME_LEN + V1_NAME_MAX) == VALUE_FOREIGN);
    made[PREFIX_LEN + NAME_LEN + 1 + 2] ^= 2; /* the format: the fingerprint alone tells that it is ours */
    CHECK(value_of(&v, ring, ETCD_KEY, made, len) == VALUE_DAMAGED);
    ring_free(ring);
}

/* No part of a value opens, nor any value with a bit turned: but for the provider's name, which nothing seals. */
TEST(value_open_damaged) {
    static const struct stored kinds[] = {{API_V2, 1, 32, ETCD_KEY, NULL, false, OBJECT},
                                          {API_V2, 0, 32, ETCD_KEY, NULL, false, OBJECT},
                                          {API_V1, 0, 32, ETCD_KEY, NULL, false, OBJECT}};
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

static void body_range(const void *entries) {
    static struct reader r;
    V2__Etcd__KeyValue *entry;
    uint64_t n = 0;
    range_begin(&r);
    for (; (entry = range_next(&r)); n++)
        protobuf_c_message_free_unpacked(&entry->base, NULL);
    if (n != *(const uint64_t *)entries)
        abort();
}

/* A response of two entries, as etcd writes it; no beginning of it is taken for one: the header alone is a response of none. */
TEST(range_next_cut_anywhere) {
    static const char whole[] = "\x0a\x02\x08\x01" "\x12\x0a\x0a\x02/a\x2a\x04k8s" "\0" "\x12\x06\x0a\x02/b\x2a\0" "\x20\x02";
    static const uint64_t two = 2;
    for (size_t len = 0; len < sizeof whole; len++) {
        int input[2];
        CHECK(pipe(input) == 0 && write(input[1], whole, len) == (ssize_t)len);
        close(input[1]);
        dup2(input[0], STDIN_FILENO);
        close(input[0]);
        const struct child *c = child_run(body_range, &two);
        row("cut to %zu: %s", len, c->err);
        CHECK((c->code == CHILD_RETURNED) == (len == sizeof whole - 1));
        CHECK(len == 4 || len == sizeof whole - 1 || (child_died(c) && strstr(c->err, "standard input ")));
    }
}

/* ----------------------------------------------------------------- Options
 *
 * option_set, serve_option_set, options_allow, id_parse, mode_parse, number_parse, word_parse: test_cli.py.
 */

/* -------------------------------------------------------------------- Main
 *
 * The verbs (serve, genkey, keyid) and what surrounds them (descriptors_open, dump_protect, relro_protect, random_wait):
 * test_cli.py, test_keys.py, test_surroundings.py, test_secrets.py.
 */

/* ------------------------------------------------------------------- Tests */

/* Runs a test; false if a CHECK failed, or there was none. */
static bool test_run(void (*run)(void)) {
    test_row[0] = test_why[0] = '\0';
    test_checks = 0;
    prng_state = 0x9e3779b97f4a7c15 + (getenv("UNIT_SEED") ? strtoull(getenv("UNIT_SEED"), NULL, 10) : 0);
    logging.level = LOG_INFO;
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

int main(int argc, char **argv) {
    const char *prefix = argc > 1 ? argv[1] : "", *all = getenv("UNIT_LONG");
    size_t failed = 0;
    bool ran = false;
    setvbuf(stdout, NULL, _IOLBF, 0); /* should a test crash, the lines before it are there */
    signal(SIGPIPE, SIG_IGN);
    for (size_t i = 0; i < LEN(tests) && tests[i].run; i++) {
        if (strncmp(tests[i].name, prefix, strlen(prefix)) != 0)
            continue;
        if (tests[i].run == xaes_crypt_1000000_iterations && (!all || strcmp(all, "1") != 0))
            continue;
        test_name = tests[i].name;
        bool ok = test_run(tests[i].run);
        printf(ok ? "ok %s\n" : "not ok %s: %s\n", tests[i].name, test_why);
        failed += !ok;
        ran = true;
    }
    test_name = NULL;
    return failed > 0 || !ran;
}
