#!/bin/sh
# REQUESTS KMS v2 Encrypts of 32 bytes on SOCKET, by h2load; fails when one was refused.
#
#     encrypt.sh SOCKET REQUESTS CONNECTIONS STREAMS
set -eu
socket=$1 requests=$2 connections=$3 streams=$4
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' HUP INT TERM

# EncryptRequest behind a gRPC prefix: 32 bytes of plaintext and a uid of 36. Its answer has 130: prefix 5, ciphertext
# 2 + 89, key_id 2 + 32. h2load takes a gRPC error for a success, but an error has no body.
printf '\0\0\0\0\110\12\040%s\22\44%s' \
    0123456789abcdef0123456789abcdef 00000000-0000-4000-8000-000000000000 >"$tmp/body"
ANSWER_BYTES=130

timeout 100 h2load -n "$requests" -c "$connections" -m "$streams" -t 1 -B "unix:$socket" -d "$tmp/body" \
    -H 'content-type: application/grpc' -H 'te: trailers' -H 'grpc-timeout: 2999943u' \
    http://localhost/v2.KeyManagementService/Encrypt >"$tmp/h2load"
if ! grep -q "($((requests * ANSWER_BYTES))) data" "$tmp/h2load"; then
    cat "$tmp/h2load" >&2
    exit 1
fi
