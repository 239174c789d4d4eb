/*
 * kmsplugin.c, which is included whole, but for its random bytes: each request for some gets a0 a1 a2 and so on, so that
 * what it answers is the same each time. The tour is made with it. Never let it seal anything real: a nonce that
 * comes twice gives plaintexts away.
 *
 * At its end it writes to the file TOUR_CALLS which functions one request has called, from conn_ready on: the first
 * request that came as far as kms_call. A line is the depth of a call, and the function's distance from main.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

static long syscall_fixed(long number, uintptr_t a, uintptr_t b, uintptr_t c, uintptr_t d);
#define syscall(...) SYSCALL(__VA_ARGS__, 0, 0, 0)
#define SYSCALL(number, a, b, c, d, ...) \
    syscall_fixed(number, (uintptr_t)(a), (uintptr_t)(b), (uintptr_t)(c), (uintptr_t)(d))
int kmsplugin_main(int argc, char **argv);
#define main kmsplugin_main
#include "../../kmsplugin.c"
#undef main
#undef syscall

#define UNSEEN __attribute__((no_instrument_function))
enum { FIRST_OCTET = 0xa0, CALLS_MAX = 4096 };

static long syscall_fixed(long number, uintptr_t a, uintptr_t b, uintptr_t c, uintptr_t d) {
    if (number != SYS_getrandom)
        return syscall(number, a, b, c, d);
    for (uintptr_t i = 0; i < b; i++)
        ((uint8_t *)a)[i] = (uint8_t)(FIRST_OCTET + i);
    return (long)b;
}

/* The calls of one turn, from conn_ready on. */
static struct {
    unsigned depth, count;
    bool kept; /* kms_call is among them */
    struct {
        unsigned depth;
        uintptr_t function;
    } calls[CALLS_MAX];
} turn;

UNSEEN void __cyg_profile_func_enter(void *function, void *site);
UNSEEN void __cyg_profile_func_exit(void *function, void *site);

void __cyg_profile_func_enter(void *function, void *site) {
    (void)site;
    if (turn.depth == 0) {
        if (turn.kept || (uintptr_t)function != (uintptr_t)conn_ready)
            return;
        turn.count = 0;
    }
    turn.calls[turn.count].depth = turn.depth;
    turn.calls[turn.count].function = (uintptr_t)function;
    turn.count += turn.count + 1 < CALLS_MAX;
    turn.kept |= (uintptr_t)function == (uintptr_t)kms_call;
    turn.depth++;
}

void __cyg_profile_func_exit(void *function, void *site) {
    (void)function;
    (void)site;
    if (turn.depth > 0)
        turn.depth--;
}

UNSEEN int main(int argc, char **argv) {
    const char *path = getenv("TOUR_CALLS");
    int calls = path ? open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600) : -1; /* the sandbox lets none be opened later */
    int status = kmsplugin_main(argc, argv);
    for (unsigned i = 0; calls >= 0 && i < turn.count; i++)
        print(calls, "%u %lx\n", turn.calls[i].depth, (unsigned long)(turn.calls[i].function - (uintptr_t)main));
    return status;
}
