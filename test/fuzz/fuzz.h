/*
 * What the fuzzers share: kmsplugin.c whole, with the world at its edges replaced.
 * Time stands still until a fuzzer moves it, random bytes are a counter's, and
 * exit() comes back to the fuzzer. Each call below is renamed before the system's
 * headers declare it, so that only kmsplugin.c is led here and no library. The word
 * noreturn is not there either: test/test.mk says why.
 *
 * A fuzzer says what read() and write() do, and has LLVMFuzzerTestOneInput.
 */
#define main kmsplugin_main
#define read fuzz_read
#define write fuzz_write
#define close fuzz_close
#define exit fuzz_exit
#define vdprintf fuzz_vdprintf
#define dprintf fuzz_dprintf
#define ppoll fuzz_ppoll
#define epoll_ctl fuzz_epoll_ctl
#define getsockopt fuzz_getsockopt
#define syscall fuzz_syscall /* getrandom */
#define clock_gettime fuzz_clock_gettime
#ifdef FUZZ_EXITS /* what is fuzzed ends in exit(), and leaves its memory to the system */
#define _GNU_SOURCE
#include <protobuf-c/protobuf-c.h>
#define malloc(size) fuzz_malloc(size)
#define free(p) fuzz_free(p)
#define protobuf_c_message_unpack(type, allocator, len, bytes) \
    protobuf_c_message_unpack(type, (allocator) ? (allocator) : &fuzz_allocator, len, bytes)
#define protobuf_c_message_free_unpacked(message, allocator) protobuf_c_message_free_unpacked(message, &fuzz_allocator)
static ProtobufCAllocator fuzz_allocator;
#endif
int kmsplugin_main(int argc, char **argv);
#include "../../kmsplugin.c"
#undef main
#undef exit
#undef malloc
#undef free

#include <setjmp.h>

void *malloc(size_t);
void free(void *);
int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t len);
const char *__asan_default_options(void);

/* A finding. */
#define HOLDS(x) ((x) ? (void)0 : __builtin_trap())

static int64_t fuzz_time_ms = 1000;
static jmp_buf fuzz_exited;

/* Functions that end in exit() are inlined; with frames on the heap, over-reads in the arguments of die() are seen all the same. */
const char *__asan_default_options(void) {
    return "detect_stack_use_after_return=1";
}

/* exit(): back to the fuzzer, with the status. Memory that the process would have left behind is freed there. */
void fuzz_exit(int status) {
    longjmp(fuzz_exited, status + 1);
}

int fuzz_vdprintf(int fd, const char *format, va_list args) {
    char text[8192];
    int n = vsnprintf(text, sizeof text, format, args);
    HOLDS(n >= 0 && n < (int)sizeof text);
    return (int)fuzz_write(fd, text, (size_t)n);
}

int fuzz_dprintf(int fd, const char *format, ...) {
    va_list args;
    va_start(args, format);
    int n = fuzz_vdprintf(fd, format, args);
    va_end(args);
    return n;
}

int fuzz_close(int fd) {
    return 0;
}

int fuzz_ppoll(struct pollfd *p, nfds_t n, const struct timespec *timeout, const sigset_t *set) {
    p->revents = p->events;
    return 1;
}

int fuzz_epoll_ctl(int epoll, int op, int fd, struct epoll_event *event) {
    return 0;
}

int fuzz_getsockopt(int fd, int level, int name, void *value, socklen_t *len) {
    const struct ucred peer = {.pid = 1, .uid = (uid_t)fd % 2}; /* two users */
    HOLDS(*len == sizeof peer);
    memcpy(value, &peer, sizeof peer);
    return 0;
}

long fuzz_syscall(long number, ...) {
    static uint64_t count;
    va_list args;
    va_start(args, number);
    uint8_t *bytes = va_arg(args, uint8_t *);
    size_t len = va_arg(args, size_t);
    va_end(args);
    HOLDS(number == SYS_getrandom);
    for (size_t i = 0; i < len; i++)
        bytes[i] = (uint8_t)(++count * 0x9e3779b97f4a7c15 >> 56);
    return (long)len;
}

int fuzz_clock_gettime(clockid_t clock, struct timespec *now) {
    *now = (struct timespec){.tv_sec = fuzz_time_ms / 1000, .tv_nsec = fuzz_time_ms % 1000 * 1000000};
    return 0;
}

#ifdef FUZZ_EXITS
static void *fuzz_blocks[16 * 1024]; /* that there are, in the first fuzz_block_count */
static size_t fuzz_block_count;

void *fuzz_malloc(size_t size) {
    void *p = malloc(size);
    HOLDS(p && fuzz_block_count < sizeof fuzz_blocks / sizeof *fuzz_blocks);
    return fuzz_blocks[fuzz_block_count++] = p;
}

void fuzz_free(void *p) {
    size_t i = fuzz_block_count;
    while (p && fuzz_blocks[--i] != p)
        HOLDS(i > 0);
    if (p)
        fuzz_blocks[i] = fuzz_blocks[--fuzz_block_count];
    free(p);
}

static void *fuzz_unpack_new(void *unused, size_t size) {
    return fuzz_malloc(size);
}

static void fuzz_unpack_free(void *unused, void *p) {
    fuzz_free(p);
}

static ProtobufCAllocator fuzz_allocator = {fuzz_unpack_new, fuzz_unpack_free, NULL};

/* Frees what an exit() has left. Without one, nothing is. */
static inline void fuzz_forget(bool exited) {
    HOLDS(exited || fuzz_block_count == 0);
    while (fuzz_block_count > 0)
        free(fuzz_blocks[--fuzz_block_count]);
}
#endif

/* Key number n, which no check refuses. */
static inline void fuzz_key(unsigned n, uint8_t key[KEK_BYTES]) {
    for (unsigned i = 0; i < KEK_BYTES; i++)
        key[i] = (uint8_t)(i == 0 ? 0x80 + n : 7 * n + 13 * i);
}

/* The ring of keys 0, 1 and 2. */
static inline struct ring *fuzz_ring(void) {
    static struct ring *ring;
    if (ring)
        return ring;
    ring = ring_new();
    for (unsigned n = 0; n < 3; n++) {
        uint8_t key[KEK_BYTES];
        char text[2 * KEK_BYTES];
        fuzz_key(n, key);
        base64_encode(key, sizeof key, text);
        HOLDS(!ring_add(ring, text, strlen(text)));
    }
    return ring;
}

/* A copy of just that size, so that AddressSanitizer sees what reads past it; the caller frees it. */
static inline uint8_t *fuzz_copy(const void *bytes, size_t len) {
    uint8_t *p = malloc(len ? len : 1);
    HOLDS(p);
    if (len > 0)
        memcpy(p, bytes, len);
    return p;
}
