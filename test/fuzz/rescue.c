/*
 * Fuzzes unseal and audit: any standard input, and values made as kube-apiserver
 * makes them with at most one byte changed.
 *
 *     0   1   0 unseal with an etcd key; 1 without; 2 audit; 3 audit --strict --list;
 *             4 a v1 value, 5 a v2 value, 6 a v2 value under a seed, all in a RangeResponse to unseal;
 *             and 7 times the way there: 0 none, 1 through a terminal, 2 raw with a newline
 *     1   n   standard input; or, from 4 on: place (2 bytes) and change of a byte, then the object
 */
#define FUZZ_EXITS
#include "fuzz.h"

static const uint8_t *input;
static size_t input_len, said_len;
static uint8_t said[64 * 1024];

ssize_t fuzz_read(int fd, void *buf, size_t len) {
    HOLDS(fd == STDIN_FILENO);
    size_t n = len < input_len ? len : input_len;
    n = n > 100 ? n / 2 : n; /* in pieces */
    if (n > 0)
        memcpy(buf, input, n);
    input += n;
    input_len -= n;
    return (ssize_t)n;
}

ssize_t fuzz_write(int fd, const void *buf, size_t len) {
    size_t n = len < sizeof said - said_len ? len : sizeof said - said_len;
    if (fd == STDOUT_FILENO && n > 0) {
        memcpy(said + said_len, buf, n);
        said_len += n;
    }
    return (ssize_t)len;
}

static const char etcd_key[] = "/registry/secrets/default/s";

static struct reader reader;
static struct audit counts;

/* As unseal() does, which has a reader of its own that cannot be begun anew. */
static int run_unseal(const struct ring *ring, const char *key) {
    struct value v;
    if (key)
        unseal_raw(&v, ring, key, &reader);
    else
        unseal_response(&v, ring, &reader);
    HOLDS((v.state == VALUE_OPENED) == (v.object != NULL));
    if (v.state != VALUE_OPENED)
        die("unseal: the value %s", v.why);
    write_all(STDOUT_FILENO, v.object, v.len);
    value_wipe(&v);
    return 0;
}

/* As audit() does. */
static int run_audit(const struct ring *ring, bool strict) {
    V2__Etcd__KeyValue *entry;
    range_begin(&reader);
    while ((entry = range_next(&reader))) {
        struct value v;
        value_open(&v, ring, entry->key, entry->value.data, entry->value.len);
        bool sealing = v.state == VALUE_OPENED && v.kek == ring->keks;
        HOLDS(v.state < VALUE_STATES && (v.state == VALUE_OPENED) == (v.object != NULL));
        counts.counts[v.state]++;
        counts.sealing += sealing;
        if (v.state <= VALUE_DAMAGED)
            audit_count(&counts, &v, sealing);
        value_wipe(&v);
        protobuf_c_message_free_unpacked((ProtobufCMessage *)entry, NULL);
    }
    audit_print(&counts, reader.entries);
    audit_judge(&counts, strict);
    return 0;
}

/* A verb to its end, by return or exit(): its exit status. */
static int run(unsigned what) {
    reader.at = reader.len = 0;
    reader.entries = reader.count = 0;
    reader.more = false;
    memset(&counts, 0, sizeof counts);
    int status = setjmp(fuzz_exited);
    if (status) {
        fuzz_forget(true);
        return status - 1;
    }
    int rv = what < 2 ? run_unseal(fuzz_ring(), what == 0 ? etcd_key : NULL) : run_audit(fuzz_ring(), what == 3);
    fuzz_forget(what < 2); /* the only entry, which the end of the process frees */
    return rv;
}

/* What a terminal makes of it. */
static size_t terminal(const uint8_t *bytes, size_t len, uint8_t *out) {
    size_t n = 0;
    for (size_t i = 0; i < len; i++) {
        if (bytes[i] == '\n')
            out[n++] = '\r';
        out[n++] = bytes[i];
    }
    return n;
}

/* A value as it lies in etcd, in a RangeResponse. Returns its length, and where in it the value is. */
static size_t value_make(unsigned what, const uint8_t *object, size_t len, uint8_t *out, size_t *value_at,
                         size_t *value_len) {
    enum { GCM_NONCE_BYTES = 12, INFO_BYTES = 32, ROOM = 8192 };
    static uint8_t data[ROOM], value[ROOM], sealed[KEK_BYTES + SEALED_OVERHEAD];
    uint8_t dek[KEK_BYTES], key[KEK_BYTES], info[INFO_BYTES + 1];
    struct ring *ring = fuzz_ring();
    bool seed = what == 6;
    size_t info_len = seed ? INFO_BYTES : 0, n = 0;
    memset(dek, 0x42, sizeof dek);
    memset(info, 0x17, sizeof info);
    info[INFO_BYTES] = 1;
    HOLDS(seal(ring, what == 4 ? API_V1 : API_V2, dek, sizeof dek, sealed) == 0);
    memcpy(key, dek, sizeof key);
    if (seed)
        hmac_sha256(dek, sizeof dek, info, sizeof info, key, sizeof key);
    memcpy(data, info, info_len);
    memset(data + info_len, 0x33, GCM_NONCE_BYTES);
    gcm_crypt(&ring->suite, true, key, sizeof key, data + info_len, (const uint8_t *)etcd_key, sizeof etcd_key - 1,
              object, len, data + info_len + GCM_NONCE_BYTES);
    size_t data_len = info_len + GCM_NONCE_BYTES + len + TAG_BYTES;
    if (what == 4) {
        memcpy(value, "k8s:enc:kms:v1:n:", 17);
        value[17] = 0;
        value[18] = sizeof sealed;
        memcpy(value + 19, sealed, sizeof sealed);
        memcpy(value + 19 + sizeof sealed, data, data_len);
        n = 19 + sizeof sealed + data_len;
    } else {
        V2__Etcd__EncryptedObject o = V2__ETCD__ENCRYPTED_OBJECT__INIT;
        o.encrypted_data = (ProtobufCBinaryData){data_len, data};
        o.key_id = (ProtobufCBinaryData){KEY_ID_LEN, (uint8_t *)ring->keks[0].key_id};
        o.encrypted_dek_source = (ProtobufCBinaryData){sizeof sealed, sealed};
        o.encrypted_dek_source_type = seed ? V2__ETCD__DEKSOURCE_TYPE__HKDF_SHA256_XNONCE_AES_GCM_SEED : 0;
        memcpy(value, "k8s:enc:kms:v2:n:", 17);
        n = 17 + protobuf_c_message_pack(&o.base, value + 17);
    }
    V2__Etcd__KeyValue kv = V2__ETCD__KEY_VALUE__INIT;
    kv.key = (ProtobufCBinaryData){sizeof etcd_key - 1, (uint8_t *)(uintptr_t)etcd_key};
    kv.value = (ProtobufCBinaryData){n, value};
    size_t size = protobuf_c_message_get_packed_size(&kv.base), at = 4;
    memcpy(out, "\n\x02\x08\x01", at); /* the header */
    out[at++] = 2 << 3 | 2;
    for (size_t left = size; at < 12; left >>= 7) { /* a varint */
        out[at++] = (uint8_t)((left & 0x7f) | (left > 0x7f ? 0x80 : 0));
        if (left <= 0x7f)
            break;
    }
    protobuf_c_message_pack(&kv.base, out + at);
    *value_at = at + size - n;
    *value_len = n;
    memcpy(out + at + size, "\x20\x01", 2); /* the count */
    return at + size + 2;
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t len) {
    static uint8_t made[16 * 1024], shown[2 * sizeof made];
    enum { OBJECT_MAX = 4096, NAME_AT = 15 };
    if (len < 4)
        return 0;
    unsigned what = bytes[0] % 7, way = bytes[0] / 7 % 3;
    said_len = 0;
    if (what < 4) {
        input = bytes + 1;
        input_len = len - 1;
        int status = run(what);
        HOLDS(status == 0 || status == 1);
        HOLDS(status == 0 || what >= 2 || said_len == 0);
        return 0;
    }
    size_t object_len = len - 4 > OBJECT_MAX ? OBJECT_MAX : len - 4, at, n;
    size_t total = value_make(what, bytes + 4, object_len, made, &at, &n);
    size_t place = ((size_t)bytes[1] << 8 | bytes[2]) % n;
    made[at + place] ^= bytes[3];
    input = made;
    input_len = total;
    if (way == 2) { /* with etcdctl's newline */
        made[at + n] = '\n';
        input = made + at;
        input_len = n + 1;
    }
    if (way == 1) {
        input_len = terminal(input, input_len, shown);
        input = shown;
    }
    int status = run(way == 2 ? 0 : 1);
    /* the whole object or nothing; only a change of the provider's name, which nothing covers, may do no harm */
    HOLDS(status == 0 ? said_len == object_len && memcmp(said, bytes + 4, object_len) == 0 : said_len == 0);
    HOLDS(way == 1 || bytes[3] != 0 ? status == 1 || place == NAME_AT : status == 0);
    return 0;
}
