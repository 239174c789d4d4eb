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

void prove_prefix(void) {
    MAKE(GRPC_PREFIX_BYTES);
    size_t n = grpc_prefix_len(bytes);
    //@ assert n <= 0xffffffff;
    uint8_t prefix[GRPC_PREFIX_BYTES];
    grpc_prefix_write(prefix, n);
}

void prove_timeout(void) {
    MAKE(64);
    int64_t ms = grpc_timeout_ms(bytes, len);
    //@ assert ms >= -1;
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

void prove_header_name(void) {
    MAKE(32);
    header_name(bytes, len);
    is_grpc(bytes, len);
}

void prove_decimal(void) {
    MAKE(24);
    long long n = decimal(bytes, len, 4294967294);
    //@ assert -1 <= n <= 4294967294;
}

/* One header of a head or of trailers, in whatever state the request is: any name and value that are not too long. */
void prove_request_header(void) {
    enum { NAME_MOST = 18, VALUE_MOST = 40 };
    static uint8_t name[NAME_MOST], value[VALUE_MOST];
    static struct request r;
    Frama_C_make_unknown((char *)name, NAME_MOST);
    Frama_C_make_unknown((char *)value, VALUE_MOST);
    //@ loop unroll 19;
    for (size_t name_len = 0; name_len <= NAME_MOST; name_len++) {
        //@ loop unroll 41;
        for (size_t len = 0; len <= VALUE_MOST; len++) {
            r.seen = (unsigned)Frama_C_interval(0, 2 * SEEN_REGULAR - 1);
            r.trailers = Frama_C_interval(0, 1);
            r.timeout_ms = Frama_C_interval(-1, 1);
            r.malformed = Frama_C_interval(0, 1);
            r.header_bytes = (size_t)Frama_C_interval(0, HEADER_LIST_MAX);
            request_header(&r, name + NAME_MOST - name_len, name_len, value + VALUE_MOST - len, len);
            //@ assert r.method <= METHOD_HEAD && r.rpc <= RPC_UNKNOWN && r.seen < 2 * SEEN_REGULAR;
            request_head_end(&r);
        }
    }
}

/* Whatever standard input begins with, if it is nothing else. */
static void judge_input(const uint8_t *bytes, size_t len) {
    input_name(bytes, len);
}

void prove_input(void) {
    at_every_length(judge_input);
}
