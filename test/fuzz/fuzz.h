/*
 * What the fuzzers share: kmsplugin.c whole, with the world at its edges replaced.
 * Time stands still until a fuzzer moves it, random bytes are a counter's, and
 * exit() comes back to the fuzzer. Each call below is renamed before the system's
 * headers declare it, so that only kmsplugin.c is led here and no library.
 *
 * A fuzzer says what read() and write() do, and has LLVMFuzzerTestOneInput.
 */
#define main kmsplugin_main
#define read fuzz_read
#define write fuzz_write
#define close fuzz_close
#define exit fuzz_exit
#define ppoll fuzz_ppoll
#define epoll_ctl fuzz_epoll_ctl
#define getsockopt fuzz_getsockopt
#define getrandom fuzz_getrandom
#define clock_gettime fuzz_clock_gettime
#define open fuzz_open
#ifdef FUZZ_EXITS /* what is fuzzed ends in exit(), and leaves its memory to the system */
#define malloc fuzz_malloc
#define realloc fuzz_realloc
#define free fuzz_free
#endif
int kmsplugin_main(int argc, char **argv);
#include "../../kmsplugin.c"
#undef main
#undef exit
#undef malloc
#undef realloc
#undef free

#include <setjmp.h>

void *malloc(size_t);
void *realloc(void *, size_t);
void free(void *);
int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t len);

/* A finding. */
#define HOLDS(x) ((x) ? (void)0 : __builtin_trap())

static int64_t fuzz_time_ms = 1000;
static jmp_buf fuzz_exited;

/* exit(): back to the fuzzer, with the status. Memory that the process would have left behind is freed there. */
__attribute__((noreturn)) void fuzz_exit(int status) {
    longjmp(fuzz_exited, status + 1);
}

int fuzz_close(int fd) {
    (void)fd;
    return 0;
}

int fuzz_ppoll(struct pollfd *p, nfds_t n, const struct timespec *timeout, const sigset_t *set) {
    (void)n, (void)timeout, (void)set;
    p->revents = p->events;
    return 1;
}

int fuzz_epoll_ctl(int epoll, int op, int fd, struct epoll_event *event) {
    (void)epoll, (void)op, (void)fd, (void)event;
    return 0;
}

int fuzz_getsockopt(int fd, int level, int name, void *value, socklen_t *len) {
    (void)level, (void)name;
    const struct ucred peer = {.pid = 1, .uid = (uid_t)fd % 2}; /* two users */
    HOLDS(*len == sizeof peer);
    memcpy(value, &peer, sizeof peer);
    return 0;
}

ssize_t fuzz_getrandom(void *bytes, size_t len, unsigned flags) {
    static uint64_t count;
    (void)flags;
    for (size_t i = 0; i < len; i++)
        ((uint8_t *)bytes)[i] = (uint8_t)(++count * 0x9e3779b97f4a7c15 >> 56);
    return (ssize_t)len;
}

int fuzz_clock_gettime(clockid_t clock, struct timespec *now) {
    (void)clock;
    *now = (struct timespec){.tv_sec = fuzz_time_ms / 1000, .tv_nsec = fuzz_time_ms % 1000 * 1000000};
    return 0;
}

/* What is read next is the beginning of a file. */
static bool fuzz_opened;

int fuzz_open(const char *path, int flags, ...) {
    (void)path;
    (void)flags;
    fuzz_opened = true;
    return 3;
}

#ifdef FUZZ_EXITS
static void *fuzz_blocks[8]; /* that there are */

static void *fuzz_replace(const void *old, void *p) {
    size_t i = 0;
    while (fuzz_blocks[i] != old)
        HOLDS(++i < sizeof fuzz_blocks / sizeof *fuzz_blocks);
    return fuzz_blocks[i] = p;
}

void *fuzz_malloc(size_t size) {
    return fuzz_replace(NULL, malloc(size));
}

void *fuzz_realloc(void *p, size_t size) {
    uintptr_t old = (uintptr_t)p;
    return fuzz_replace((void *)old, realloc(p, size));
}

void fuzz_free(void *p) {
    if (p)
        fuzz_replace(p, NULL);
    free(p);
}

/* Frees what an exit() has left. Without one, nothing is. */
static inline void fuzz_forget(bool exited) {
    for (size_t i = 0; i < sizeof fuzz_blocks / sizeof *fuzz_blocks; i++) {
        HOLDS(exited || !fuzz_blocks[i]);
        free(fuzz_blocks[i]);
        fuzz_blocks[i] = NULL;
    }
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
