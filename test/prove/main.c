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

void prove_utf8(void) {
    enum { MOST = 8 };
    static uint8_t bytes[MOST];
    //@ loop unroll 9;
    for (size_t len = 0; len <= MOST; len++) {
        Frama_C_make_unknown((char *)bytes, MOST);
        utf8_valid(bytes + MOST - len, len);
    }
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

/* That the field lies within is for test/unit.c and the fuzzers: Eva does not relate its length and place. */
void prove_field(void) {
    enum { MOST = 24 };
    static uint8_t bytes[MOST];
    Frama_C_make_unknown((char *)bytes, MOST);
    //@ loop unroll 25;
    for (size_t len = 0; len <= MOST; len++) {
        const uint8_t *at = bytes + MOST - len;
        struct field f;
        field_next(&at, bytes + MOST, &f);
    }
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
