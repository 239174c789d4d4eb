/*
 * kmsplugin.c, which is included whole, but for one system call that its filter then no longer allows: what it
 * would be on a libc that makes a call nobody has foreseen.
 *
 *     build/without                          the numbers of the calls that the filter allows, a line each
 *     WITHOUT=NUMBER build/without ARG...    kmsplugin ARG..., whose filter does not allow that one
 */
#define _GNU_SOURCE
#include <sys/prctl.h>

static int prctl_without(int option, unsigned long a, const void *b, unsigned long c, unsigned long d);
#define prctl(option, ...) PRCTL(option, __VA_ARGS__, 0, 0, 0, 0)
#define PRCTL(option, a, b, c, d, ...) prctl_without(option, a, (const void *)(uintptr_t)(b), c, d)
int kmsplugin_main(int argc, char **argv);
#define main kmsplugin_main
#include "../kmsplugin.c"
#undef main
#undef prctl

#include <stdio.h>

static long left_out = -1;
static bool listing;

/* Whether an instruction of the filter looks for a call's number and lets it through, at once or after a look at its arguments. */
static bool allows(const struct sock_filter *code, unsigned len, unsigned i) {
    const struct sock_filter *then = &code[i + 1 + code[i].jt];
    bool call = code[i].code == (BPF_JMP | BPF_JEQ | BPF_K) && i > 1 && i + 2 < len; /* the first compares the machine */
    bool direct = then->code == (BPF_RET | BPF_K) && then->k == SECCOMP_RET_ALLOW;
    return call && (direct || then->code == (BPF_LD | BPF_W | BPF_ABS));
}

static int prctl_without(int option, unsigned long a, const void *b, unsigned long c, unsigned long d) {
    if (option != PR_SET_SECCOMP)
        return prctl(option, a, b, c, d);
    struct sock_fprog program = *(const struct sock_fprog *)b;
    struct sock_filter code[BPF_MAXINSNS];
    memcpy(code, program.filter, program.len * sizeof *code);
    program.filter = code;
    for (unsigned i = 0; i < program.len; i++) {
        if (!allows(code, program.len, i))
            continue;
        if (listing)
            printf("%u\n", code[i].k);
        else if (code[i].k == (uint32_t)left_out)
            code[i].k = UINT32_MAX;
    }
    return listing ? 0 : prctl(option, a, &program, c, d);
}

int main(int argc, char **argv) {
    const char *number = getenv("WITHOUT");
    listing = !number;
    if (listing)
        return seccomp_install() < 0 || fflush(stdout) != 0;
    left_out = decimal(number, strlen(number), INT_MAX);
    return kmsplugin_main(argc, argv);
}
