/*
 * memcpy, memmove and memset for the release build on x86_64, in place of musl's. All that is linked calls these, the
 * libraries too. README and doc/security.md name them, and test/sbom.sh compares the names with the link map.
 *
 * What a request copies and wipes is some ten to a few hundred bytes at a time. musl does it with rep movs and rep stos,
 * which take some 30 cycles to start however few bytes there are. SSE2, which every x86_64 has, is enough: an Encrypt
 * takes 10 % less CPU by memcpy and memmove (in musl the one is in the other), and 6 % by memset. That gcc puts loops in
 * place of calls (-mstringop-strategy=unrolled_loop) takes 12 KB.
 */
#include <stddef.h>
#include <stdint.h>

/* Pieces of a string, at any address and of any type. */
typedef uint16_t two __attribute__((aligned(1), may_alias));
typedef uint32_t four __attribute__((aligned(1), may_alias));
typedef uint64_t eight __attribute__((aligned(1), may_alias));
typedef uint8_t sixteen __attribute__((vector_size(16), aligned(1), may_alias));

/* Copies n bytes, sizeof(type) to twice that many, by two pieces that may overlap. */
#define COPY_ENDS(type)                                        \
    do {                                                       \
        type first = *(const type *)s;                         \
        type last = *(const type *)(s + n - sizeof(type));     \
        *(type *)d = first;                                    \
        *(type *)(d + n - sizeof(type)) = last;                \
    } while (0)

/* Forwards: right for pieces that overlap, too, if dest comes first. */
static void *copy(unsigned char *d, const unsigned char *s, size_t n) {
    void *dest = d;
    if (n >= 16) {
        sixteen last = *(const sixteen *)(s + n - 16);
        unsigned char *end = d + n - 16;
        for (; d < end; d += 16, s += 16)
            *(sixteen *)d = *(const sixteen *)s;
        *(sixteen *)end = last;
    } else if (n >= 8) {
        COPY_ENDS(eight);
    } else if (n >= 4) {
        COPY_ENDS(four);
    } else if (n >= 2) {
        COPY_ENDS(two);
    } else if (n == 1) {
        *d = *s;
    }
    return dest;
}

void *memcpy(void *restrict dest, const void *restrict src, size_t n) __attribute__((alias("copy")));

void *memmove(void *dest, const void *src, size_t n) {
    unsigned char *d = dest;
    const unsigned char *s = src;
    if ((uintptr_t)d - (uintptr_t)s >= n)
        return copy(d, s, n);
    for (; n >= 16; n -= 16)
        *(sixteen *)(d + n - 16) = *(const sixteen *)(s + n - 16);
    for (; n > 0; n--)
        d[n - 1] = s[n - 1];
    return dest;
}

void *memset(void *dest, int byte, size_t n) {
    unsigned char *d = dest, b = (unsigned char)byte;
    const sixteen all = {b, b, b, b, b, b, b, b, b, b, b, b, b, b, b, b};
    if (n >= 32) {
        sixteen *at = dest, *last = (sixteen *)(d + n - 32);
        for (; at + 2 <= last; at += 4)
            at[0] = at[1] = at[2] = at[3] = all;
        if (at < last)
            at[0] = at[1] = all;
        last[0] = last[1] = all;
    } else if (n >= 16) {
        *(sixteen *)d = *(sixteen *)(d + n - 16) = all;
    } else if (n >= 8) {
        *(eight *)d = *(eight *)(d + n - 8) = 0x0101010101010101u * b;
    } else {
        for (; n > 0; n--)
            *d++ = b;
    }
    return dest;
}
