/*
 * Constant time, shown on the built code (after Langley's ctgrind): valgrind is told that
 * KEKs and plaintexts are undefined, and reports each branch and each index that depends
 * on them. kmsplugin.c is included whole.
 *
 *     valgrind build/ct SUITE TEST        as test/ct.sh does, which judges the reports
 *
 *     SUITE   aesni, ct64 or ct32
 *     TEST    all, or a control, which valgrind has to report: branch, index, memcmp, table-aes
 *
 * What is public is said to be defined again where it becomes so, and nowhere else: the
 * padding of a key's text and the verdict on it, key_ids, what was sealed, and whether a
 * tag was right. Cutting KMS_KEK at its commas and white space is not looked at: where
 * those stand is no secret.
 */
int kmsplugin_main(int argc, char **argv);
#define main kmsplugin_main
#include "../kmsplugin.c"
#undef main

#include <stdio.h>
#include <valgrind/memcheck.h>

#define SECRET(p, n) VALGRIND_MAKE_MEM_UNDEFINED(p, n)
#define PUBLIC(p, n) VALGRIND_MAKE_MEM_DEFINED(p, n)

static const uint8_t secret_key[KEK_BYTES] = "\x81kmsplugin: one KEK of 32 bytes";

static struct suite suite_of(const char *name) {
    const struct suite ct64 = {&br_aes_ct64_ctrcbc_vtable, &br_aes_ct64_ctr_vtable, br_ghash_ctmul64, "ct64"};
    const struct suite ct32 = {&br_aes_ct_ctrcbc_vtable, &br_aes_ct_ctr_vtable, br_ghash_ctmul, "ct32"};
    struct suite s = strcmp(name, "ct64") == 0 ? ct64 : strcmp(name, "ct32") == 0 ? ct32 : suite_choose();
    if (strcmp(s.name, name) != 0) {
        printf("skip ct %s: this machine has no such code\n", name);
        exit(0);
    }
    return s;
}

/* What follows from a key and is no secret. */
static void kek_publish(struct ring *ring) {
    for (size_t i = 0; i < KEK_MAX; i++) {
        PUBLIC(ring->keks[i].fingerprint, FINGERPRINT_BYTES);
        PUBLIC(ring->keks[i].key_id, KEY_ID_LEN + 1);
        PUBLIC(&ring->keks[i].aes.vtable, sizeof ring->keks[i].aes.vtable);
    }
}

/* The text of a key to the ring: what stands in the text is secret, its padding is not. */
static void parse(struct ring *ring) {
    char text[2 * KEK_BYTES];
    uint8_t key[KEK_BYTES];
    base64_encode(secret_key, sizeof secret_key, text);
    size_t len = strlen(text);
    SECRET(text, len - 2); /* padding, and the character that might have been */
    long n = base64_decode(text, len, key, sizeof key);
    PUBLIC(&n, sizeof n); /* whether it was base64 at all: the program says so, or starts */
    if (n != KEK_BYTES)
        abort();
    const char *weakness = kek_weakness(key);
    PUBLIC(&weakness, sizeof weakness); /* so is this */
    if (weakness)
        abort();
    kek_init(&ring->keks[0], &ring->suite, key);
    ring->count = 1;
    kek_publish(ring);
}

static void seal_and_open(struct ring *ring, enum api api, size_t len) {
    uint8_t plain[1000], sealed[sizeof plain + SEALED_OVERHEAD], opened[sizeof plain];
    memset(plain, 'p', sizeof plain);
    SECRET(plain, len);
    if (seal(ring, api, plain, len, sealed) < 0)
        abort();
    PUBLIC(sealed, len + SEALED_OVERHEAD); /* it goes to etcd */
    for (int forged = 0; forged < 2; forged++) {
        sealed[CIPHERTEXT_AT + len] ^= (uint8_t)forged;
        int verdict = open_sealed(&ring->suite, &ring->keks[0], api, sealed, len + SEALED_OVERHEAD, opened);
        PUBLIC(&verdict, sizeof verdict);
        PUBLIC(opened, sizeof opened);
        PUBLIC(plain, sizeof plain);
        if (verdict != (forged ? -1 : 0) || (!forged && memcmp(plain, opened, len) != 0))
            abort();
    }
}

/* The whole service, unpacking and packing included, with only the plaintext's bytes secret. */
static void calls(struct ring *ring) {
    static struct kms kms;
    static const uint8_t head[] = {0x0a, 32};
    uint8_t message[sizeof head + 32];
    struct answer a;
    memcpy(message, head, sizeof head);
    memset(message + sizeof head, 'p', 32);
    SECRET(message + sizeof head, 32);
    if (kms_init(&kms, ring) < 0)
        abort();
    kms_call(&kms, V2_ENCRYPT, message, sizeof message, &a);
    if (a.code != GRPC_OK)
        abort();
    kms_done(&kms);
    kms_call(&kms, V2_STATUS, message, 0, &a);
    if (a.code != GRPC_OK)
        abort();
    kms_done(&kms);
}

/* A branch and an index on secrets, and code that is not constant-time: valgrind must see all of them. */
static int control(const char *name) {
    volatile uint8_t table[256] = {0};
    uint8_t key[KEK_BYTES];
    memcpy(key, secret_key, sizeof key);
    SECRET(key, sizeof key);
    if (strcmp(name, "branch") == 0)
        return key[0] & 1 ? printf("odd\n") : printf("even\n");
    if (strcmp(name, "index") == 0)
        return table[key[0]];
    if (strcmp(name, "table-aes") == 0) { /* BearSSL's fast code with tables */
        br_aes_big_ctr_keys big;
        uint8_t block[BLOCK_BYTES] = {0};
        br_aes_big_ctr_init(&big, key, sizeof key);
        br_aes_big_ctr_run(&big, block, 0, block, sizeof block);
        return 0;
    }
    if (strcmp(name, "memcmp") == 0)
        return memcmp(key, secret_key, sizeof key) == 0 ? printf("same\n") : printf("other\n");
    fprintf(stderr, "no such control: %s\n", name);
    return 2;
}

int main(int argc, char **argv) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc != 3)
        return 2;
    struct ring *ring = ring_new();
    ring->suite = suite_of(argv[1]);
    if (!RUNNING_ON_VALGRIND) {
        fprintf(stderr, "not under valgrind: nothing is shown\n");
        return 2;
    }
    if (strcmp(argv[2], "all") != 0)
        return control(argv[2]) < 0;
    static const size_t lens[] = {0, 1, 15, 16, 17, 32, 64, 967};
    parse(ring);
    for (size_t i = 0; i < sizeof lens / sizeof *lens; i++)
        for (enum api api = API_V1; api <= API_V2; api++)
            seal_and_open(ring, api, lens[i]);
    calls(ring);
    ring_free(ring);
    printf("ok ct %s\n", argv[1]);
    return 0;
}
