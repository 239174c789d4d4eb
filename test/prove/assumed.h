/* What the functions under proof call and Eva does not see: only what is said here is known of them. */

/*@ assigns \nothing; ensures \false; */
void die_usage(const char *format, ...);

/* nghttp2's. */
/*@ requires \valid_read(name + (0 .. len - 1)); assigns \result \from name[0 .. len - 1]; */
int nghttp2_check_header_name(const uint8_t *name, size_t len);
/*@ requires \valid_read(value + (0 .. len - 1)); assigns \result \from value[0 .. len - 1]; */
int nghttp2_check_header_value_rfc9113(const uint8_t *value, size_t len);

/* memchr as the standard has it, so that Eva tells its results apart. */
#define memchr find
static void *find(const void *bytes, int c, size_t len) {
    for (const uint8_t *at = bytes; len > 0; at++, len--)
        if (*at == c)
            return (void *)at;
    return NULL;
}

/* The value of an etcd key: what its prefix leaves has to be all of the rest, up to the end. */
static uint8_t stored[24];
#define STORED ((const uint8_t *)stored)
#define STORED_END (STORED + sizeof(stored))

/*@ requires STORED < sealed && sealed + sealed_len == data && data + len == STORED_END;
  @ assigns v->state \from sealed[0 .. sealed_len - 1], data[0 .. len - 1]; */
void value_open_data(struct value *v, const struct ring *ring, const uint8_t *sealed, size_t sealed_len,
                     const uint8_t *key, size_t key_len, const uint8_t *data, size_t len, bool seed);
/*@ requires STORED < bytes && bytes + len == STORED_END;
  @ assigns v->state \from bytes[0 .. len - 1]; */
void value_open_v2(struct value *v, const struct ring *ring, const uint8_t *key, size_t key_len,
                   const uint8_t *bytes, size_t len);
/*@ requires STORED <= bytes && bytes + len == STORED_END;
  @ assigns v->state \from bytes[0 .. len - 1]; */
static void value_open_v1(struct value *v, const struct ring *ring, const uint8_t *key, size_t key_len,
                          const uint8_t *bytes, size_t len);
