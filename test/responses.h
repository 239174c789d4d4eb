/* What each RPC answers with: for tests that include kmsplugin.c, behind it. */
static const ProtobufCMessageDescriptor *const response_types[RPC_UNKNOWN] = {
    [V2_STATUS] = &v2__status_response__descriptor,
    [V2_ENCRYPT] = &v2__encrypt_response__descriptor,
    [V2_DECRYPT] = &v2__decrypt_response__descriptor,
    [V1_VERSION] = &v2__v1beta1__version_response__descriptor,
    [V1_ENCRYPT] = &v2__v1beta1__encrypt_response__descriptor,
    [V1_DECRYPT] = &v2__v1beta1__decrypt_response__descriptor,
};
