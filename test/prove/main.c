/*
 * Inputs for test/prove/run.sh: each entry point gives a parser every input up to a length,
 * with bytes that may be anything, in a block that ends where the input does.
 */
#include "__fc_builtin.h"

#define MAKE(most)                          \
    static uint8_t bytes[(most) + 1];       \
    size_t len = (size_t)Frama_C_interval(0, most); \
    Frama_C_make_unknown((char *)bytes, most)

void prove_base64(void) {
    enum { MOST = 48 };
    uint8_t out[KEK_BYTES];
    MAKE(MOST);
    long n = base64_decode((const char *)bytes, len, out, sizeof out);
    //@ assert n >= -1 && n <= MOST / 4 * 3;
}

/* Up to six bytes at the end of an array: more than the four of the longest sequence in UTF-8. */
static void at_every_length(void (*judge)(const uint8_t *, size_t)) {
    enum { MOST = 6 };
    static uint8_t bytes[MOST];
    //@ loop unroll 7;
    for (size_t len = 0; len <= MOST; len++) {
        Frama_C_make_unknown((char *)bytes, MOST);
        judge(bytes + MOST - len, len);
    }
}

static void judge_utf8(const uint8_t *s, size_t len) {
    utf8_check(s, len);
}

void prove_utf8(void) {
    at_every_length(judge_utf8);
}

void prove_prefix(void) {
    MAKE(GRPC_PREFIX_BYTES);
    size_t n = grpc_prefix_len(bytes);
    //@ assert n <= 0xffffffff;
    uint8_t prefix[GRPC_PREFIX_BYTES];
    grpc_prefix_write(prefix, n);
}

void prove_timeout(void) {
    MAKE(64);
    grpc_timeout_us(bytes, len);
}

void prove_content_length(void) {
    struct request r;
    MAKE(18);
    request_content_length(&r, bytes, len);
}

void prove_varint(void) {
    enum { MOST = 12 };
    static uint8_t bytes[MOST];
    Frama_C_make_unknown((char *)bytes, MOST);
    //@ loop unroll 13;
    for (size_t len = 0; len <= MOST; len++) {
        const uint8_t *at = bytes + MOST - len;
        uint64_t value;
        varint_next(&at, bytes + MOST, &value);
        //@ assert at <= bytes + MOST;
    }
}

static void field_lies_within(const uint8_t *start, const uint8_t *end) {
    const uint8_t *at = start;
    struct field f;
    if (field_next(&at, end, &f) == 1) {
        //@ assert start < at <= end;
        //@ assert start < f.bytes && f.bytes + f.len <= end;
    }
}

/* From any place in a message: the field lies within, and the place that comes next is farther on. So all fields do. */
void prove_field(void) {
    enum { MOST = 24 };
    static uint8_t bytes[MOST];
    Frama_C_make_unknown((char *)bytes, MOST);
    //@ loop unroll 25;
    for (size_t len = 0; len <= MOST; len++)
        field_lies_within(bytes + MOST - len, bytes + MOST);
}

void prove_hex(void) {
    uint8_t bytes[FINGERPRINT_BYTES];
    char out[KEY_ID_LEN + 1];
    Frama_C_make_unknown((char *)bytes, sizeof bytes);
    hex_encode(bytes, sizeof bytes, out);
}

void prove_sealed(void) {
    MAKE(SEALED_OVERHEAD + 8);
    sealed_shaped(bytes, len);
}

void prove_field_name(void) {
    MAKE(32);
    field_name(bytes, len);
    is_grpc(bytes, len);
}

void prove_percent(void) {
    static char text[24];
    char out[30];
    Frama_C_make_unknown(text, sizeof text - 1);
    size_t n = percent_encode(text, out, sizeof out);
    //@ assert n <= 30;
}

void prove_text_value(void) {
    char out[40];
    struct text t = {.buf = out, .cap = sizeof out};
    MAKE(16);
    text_value(&t, (const char *)bytes, len);
    //@ assert t.len <= 40;
}

void prove_decimal(void) {
    static char text[32];
    Frama_C_make_unknown(text, sizeof text - 1);
    long long n = decimal(text, 4294967294);
    //@ assert -1 <= n <= 4294967294;
    timeout_parse(text);
}

/* One field of a head or of trailers, in whatever state the request is: any name and value that are not too long. */
void prove_request_field(void) {
    enum { NAME_MOST = 18, VALUE_MOST = 40 };
    static uint8_t name[NAME_MOST], value[VALUE_MOST];
    static struct request r;
    Frama_C_make_unknown((char *)name, NAME_MOST);
    Frama_C_make_unknown((char *)value, VALUE_MOST);
    //@ loop unroll 19;
    for (size_t name_len = 0; name_len <= NAME_MOST; name_len++) {
        //@ loop unroll 41;
        for (size_t len = 0; len <= VALUE_MOST; len++) {
            request_init(&r);
            r.seen = (unsigned)Frama_C_interval(0, 2 * SEEN_REGULAR - 1);
            r.trailers = Frama_C_interval(0, 1);
            r.bad_timeout = Frama_C_interval(0, 1);
            r.malformed = Frama_C_interval(0, 1);
            r.field_bytes = (size_t)Frama_C_interval(0, FIELDS_MAX_BYTES);
            request_field(&r, name + NAME_MOST - name_len, name_len, value + VALUE_MOST - len, len);
            //@ assert r.method <= METHOD_CONNECT && r.rpc <= RPC_UNKNOWN && r.seen < 2 * SEEN_REGULAR;
            request_head_end(&r);
        }
    }
}

/* Whatever standard input begins with, if it is nothing else. */
static void judge_alphabet(const uint8_t *bytes, size_t len) {
    alphabet_name(bytes, len);
}

void prove_alphabet(void) {
    at_every_length(judge_alphabet);
}

void prove_crlf(void) {
    enum { MOST = 6 };
    static uint8_t bytes[MOST];
    //@ loop unroll 7;
    for (size_t from = 0; from <= MOST; from++) {
        Frama_C_make_unknown((char *)bytes, MOST);
        size_t left = crlf_undo(bytes, from, MOST);
        //@ assert from <= left <= MOST;
    }
}
