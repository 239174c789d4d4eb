/*
 * Fuzzes the KMS service: what an RPC makes of any message, and of one that holds a
 * ciphertext with at most one byte changed.
 *
 *     0   1   RPC number; SEALED: the bytes are a plaintext, and the request to open it is made here
 *     1   3   with SEALED: which key, which byte (big-endian) is changed ...
 *     4   1   ... and what with (0: nothing)
 *     .   n   the message, or the plaintext
 */
#include "fuzz.h"

#include "../responses.h"

enum { SEALED = 0x80, CHANGE_BYTES = 4 };

ssize_t fuzz_read(int fd, void *buf, size_t len) {
    return 0;
}

ssize_t fuzz_write(int fd, const void *buf, size_t len) {
    return (ssize_t)len;
}

/* One call, from a block of just that size; its response, unpacked, or NULL for an error. */
static void *call(struct kms *kms, enum rpc rpc, const uint8_t *bytes, size_t len, enum grpc_code *code) {
    static const uint8_t none[1] = {0};
    struct answer a;
    uint8_t *copy = fuzz_copy(bytes, len);
    void *response = NULL;
    kms_call(kms, rpc, copy, len, &a);
    HOLDS(a.request_uid && a.key_id);
    if (a.code == GRPC_OK) {
        response = protobuf_c_message_unpack(response_types[rpc], NULL, a.len, a.len ? a.bytes : none);
        HOLDS(response && a.len <= MESSAGE_MAX);
    } else {
        HOLDS(a.code == GRPC_INVALID_ARGUMENT || a.code == GRPC_NOT_FOUND || a.code == GRPC_RESOURCE_EXHAUSTED ||
              a.code == GRPC_INTERNAL);
        HOLDS(strlen(a.error) >= 8 && strlen(a.error) < GRPC_MESSAGE_MAX);
    }
    *code = a.code;
    size_t used = kms->arena.used;
    kms_done(kms);
    for (size_t i = 0; i < used; i += 61) /* nothing stays behind */
        HOLDS(kms->arena.base[i] == 0);
    free(copy);
    return response;
}

/* The plaintext comes back if and only if nothing was changed. */
static void round_trip(struct kms *kms, enum rpc rpc, const uint8_t *change, const uint8_t *plain, size_t len) {
    enum { SLACK = 256 };
    uint8_t *sealed = malloc(len + SEALED_OVERHEAD), *request = malloc(len + SEALED_OVERHEAD + SLACK);
    struct ring one = *kms->ring;
    bool v2 = rpc == V2_DECRYPT;
    size_t sealed_len = len + SEALED_OVERHEAD, at = ((size_t)change[1] << 8 | change[2]) % sealed_len;
    enum grpc_code code;
    HOLDS(sealed && request);
    one.keks[0] = kms->ring->keks[change[0] % 3];
    HOLDS(seal(&one, v2 ? API_V2 : API_V1, plain, len, sealed) == 0);
    sealed[at] ^= change[3];
    if (v2) {
        V2__DecryptRequest r = V2__DECRYPT_REQUEST__INIT;
        r.ciphertext = (ProtobufCBinaryData){sealed_len, sealed};
        r.key_id = one.keks[0].key_id;
        r.uid = (char *)"u";
        size_t n = protobuf_c_message_pack(&r.base, request);
        V2__DecryptResponse *d = call(kms, rpc, request, n, &code);
        HOLDS((d != NULL) == (change[3] == 0 && sealed_len <= V2_CIPHERTEXT_MAX));
        HOLDS(!d || (d->plaintext.len == len && (len == 0 || memcmp(d->plaintext.data, plain, len) == 0)));
        if (d)
            protobuf_c_message_free_unpacked(&d->base, NULL);
    } else {
        V2__V1beta1__DecryptRequest r = V2__V1BETA1__DECRYPT_REQUEST__INIT;
        r.cipher = (ProtobufCBinaryData){sealed_len, sealed};
        r.version = (char *)"v1beta1";
        size_t n = protobuf_c_message_pack(&r.base, request);
        V2__V1beta1__DecryptResponse *d = call(kms, rpc, request, n, &code);
        HOLDS((d != NULL) == (change[3] == 0 && sealed_len <= V1_CIPHERTEXT_MAX));
        HOLDS(!d || (d->plain.len == len && (len == 0 || memcmp(d->plain.data, plain, len) == 0)));
        if (d)
            protobuf_c_message_free_unpacked(&d->base, NULL);
    }
    wipe(&one, sizeof one);
    free(sealed);
    free(request);
}

/* What Encrypt gave opens to what it was given. */
static void reopen(struct kms *kms, enum rpc rpc, const uint8_t *bytes, size_t len, void *response) {
    uint8_t plain[MESSAGE_MAX];
    ProtobufCBinaryData sealed, before;
    if (rpc == V2_ENCRYPT) {
        V2__EncryptRequest *r = (void *)protobuf_c_message_unpack(rpcs[rpc].request, NULL, len, bytes);
        HOLDS(r);
        sealed = ((V2__EncryptResponse *)response)->ciphertext;
        before = r->plaintext;
        HOLDS(sealed.len == before.len + SEALED_OVERHEAD && sealed.len <= V2_CIPHERTEXT_MAX);
        HOLDS(strcmp(((V2__EncryptResponse *)response)->key_id, kms->ring->keks[0].key_id) == 0);
        HOLDS(open_sealed(&kms->ring->suite, kms->ring->keks, API_V2, sealed.data, sealed.len, plain) == 0);
        HOLDS(before.len == 0 || memcmp(plain, before.data, before.len) == 0);
        HOLDS(open_sealed(&kms->ring->suite, kms->ring->keks, API_V1, sealed.data, sealed.len, plain) < 0);
        protobuf_c_message_free_unpacked(&r->base, NULL);
    } else if (rpc == V1_ENCRYPT) {
        V2__V1beta1__EncryptRequest *r = (void *)protobuf_c_message_unpack(rpcs[rpc].request, NULL, len, bytes);
        HOLDS(r);
        sealed = ((V2__V1beta1__EncryptResponse *)response)->cipher;
        before = r->plain;
        HOLDS(sealed.len == before.len + SEALED_OVERHEAD && sealed.len <= V1_CIPHERTEXT_MAX);
        HOLDS(open_sealed(&kms->ring->suite, kms->ring->keks, API_V1, sealed.data, sealed.len, plain) == 0);
        HOLDS(before.len == 0 || memcmp(plain, before.data, before.len) == 0);
        protobuf_c_message_free_unpacked(&r->base, NULL);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t len) {
    static struct kms kms;
    enum grpc_code code;
    if (!kms.ring)
        HOLDS(kms_init(&kms, fuzz_ring()) == 0);
    if (len < 1 + CHANGE_BYTES)
        return 0;
    enum rpc rpc = (bytes[0] & 0x7f) % RPC_UNKNOWN;
    if (bytes[0] & SEALED) {
        round_trip(&kms, bytes[0] & 1 ? V2_DECRYPT : V1_DECRYPT, bytes + 1, bytes + 1 + CHANGE_BYTES,
                   len - 1 - CHANGE_BYTES);
        return 0;
    }
    void *response = call(&kms, rpc, bytes + 1, len - 1, &code);
    if (response) {
        reopen(&kms, rpc, bytes + 1, len - 1, response);
        protobuf_c_message_free_unpacked(response, NULL);
    }
    return 0;
}
