/* What the functions under proof call and Eva does not see: only what is said here is known of them. */

/* nghttp2's. */
/*@ requires \valid_read(name + (0 .. len - 1)); assigns \result \from name[0 .. len - 1]; */
int nghttp2_check_header_name(const uint8_t *name, size_t len);
/*@ requires \valid_read(value + (0 .. len - 1)); assigns \result \from value[0 .. len - 1]; */
int nghttp2_check_header_value_rfc9113(const uint8_t *value, size_t len);
