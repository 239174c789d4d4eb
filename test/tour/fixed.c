/*
 * kmsplugin.c, which is included whole, but for its random bytes: each request for some gets a0 a1 a2 and so on, so that
 * what it answers is the same each time. The tour is made with it. Never let it seal anything real: a nonce that
 * comes twice gives plaintexts away.
 *
 * At its end it writes to the file TOUR_CALLS which functions have been called, in their order. A line is the depth of
 * a call, and the function's distance from main; or `read` and a number: so many octets have come from a client.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <sys/random.h>
#include <sys/syscall.h>
#include <unistd.h>

static long syscall_fixed(long number, uintptr_t a, uintptr_t b, uintptr_t c, uintptr_t d);
static ssize_t read_counted(int fd, void *bytes, size_t cap);
#define syscall(...) SYSCALL(__VA_ARGS__, 0, 0, 0)
#define SYSCALL(number, a, b, c, d, ...) syscall_fixed(number, (uintptr_t)(a), (uintptr_t)(b), (uintptr_t)(c), (uintptr_t)(d))
#define getrandom(out, len, flags) syscall(SYS_getrandom, out, len, flags)
#define read(fd, bytes, cap) read_counted(fd, bytes, cap)
int kmsplugin_main(int argc, char **argv);
#define main kmsplugin_main
#include "../../kmsplugin.c"
#undef main
#undef syscall
#undef read

#define UNSEEN __attribute__((no_instrument_function))
enum { FIRST_OCTET = 0xa0, CALLS_MAX = 1 << 17, READ = -1 };

static struct {
    long depth;
    uintptr_t number; /* a function, or octets read */
} calls[CALLS_MAX];
static size_t call_count;
static long depth;

UNSEEN static void call_add(long at, uintptr_t number) {
    calls[call_count].depth = at;
    calls[call_count].number = number;
    call_count += call_count + 1 < CALLS_MAX;
}

UNSEEN static long syscall_fixed(long number, uintptr_t a, uintptr_t b, uintptr_t c, uintptr_t d) {
    if (number != SYS_getrandom)
        return syscall(number, a, b, c, d);
    for (uintptr_t i = 0; i < b; i++)
        ((uint8_t *)a)[i] = (uint8_t)(FIRST_OCTET + i);
    return (long)b;
}

UNSEEN static ssize_t read_counted(int fd, void *bytes, size_t cap) {
    ssize_t n = read(fd, bytes, cap);
    if (n > 0 && call_count > 0 && calls[call_count - 1].number == (uintptr_t)conn_read)
        call_add(READ, (uintptr_t)n);
    return n;
}

UNSEEN void __cyg_profile_func_enter(void *function, void *site);
UNSEEN void __cyg_profile_func_exit(void *function, void *site);

void __cyg_profile_func_enter(void *function, void *site) {
    (void)site;
    call_add(depth++, (uintptr_t)function);
}

void __cyg_profile_func_exit(void *function, void *site) {
    (void)function;
    (void)site;
    depth--;
}

UNSEEN int main(int argc, char **argv) {
    const char *path = getenv("TOUR_CALLS");
    int out = path ? open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600) : -1; /* the sandbox lets none be opened later */
    int status = kmsplugin_main(argc, argv);
    for (size_t i = 0; out >= 0 && i < call_count; i++) { /* no stdio: it makes calls that the sandbox forbids */
        char line[64];
        int len = calls[i].depth == READ ? snprintf(line, sizeof line, "read %zu\n", (size_t)calls[i].number) :
            snprintf(line, sizeof line, "%ld %lx\n", calls[i].depth, (unsigned long)(calls[i].number - (uintptr_t)main));
        if (write(out, line, (size_t)len) != len)
            return 1;
    }
    return status;
}
