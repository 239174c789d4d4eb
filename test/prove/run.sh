#!/bin/sh
# Frama-C's Eva shows that the byte parsers of kmsplugin.c have no undefined behaviour for
# any input up to the lengths in main.c: no read or write out of bounds, no overflow of a
# signed number, no shift too far, no uninitialised value; and what main.c and assumed.h
# assert of lengths and places. The functions are taken from kmsplugin.c as they stand. The
# last line tells how many were shown.
#
# Assumed: a 64-bit little-endian machine (gcc_x86_64); the C library as Frama-C specifies
# it; inputs no longer than those of main.c; assumed.h, of what the functions call. Not
# shown: protobuf-c, nghttp2 and BearSSL, and what calls into them (the fuzzers' part).
set -eu
cd "$(dirname "$0")/../.."
dir=build/prove
mkdir -p "$dir"

PROOF_SECONDS=300

# States that Eva keeps apart at one place: as many as the proofs need.
LEVEL=8000

FUNCTIONS='hex_encode in_range base64_decode is_of starts_with decimal sealed_shaped grpc_prefix_write grpc_prefix_len
    grpc_timeout_ms header_name is_grpc request_path is_value request_known request_header request_head_end is_of_terminal
    is_plaintext input_name'

{
    cat <<'END'
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
END
    # constants, types, macros and tables that the functions need, and the functions
    sed '/^\/\* -* Server/q' kmsplugin.c | sed -n '/^enum {$/,/^};$/p'
    for type in 'enum rpc' 'enum http_method' 'enum header_name' 'struct request'; do
        sed -n "/^$type {.*};/{p;q}; /^$type {/,/^};\$/p" kmsplugin.c
    done
    sed -n '/^enum { SEEN_REGULAR/p; /^#define STARTS_WITH(/p; /^#define IS(/p; /^static const char white_space/p' kmsplugin.c
    sed -n '/^enum { RANGE_HEADER/p; /^static const char of_terminal/,/;$/p' kmsplugin.c
    sed -n '/^#define RPC(/,/^};$/p' kmsplugin.c |
        sed 's/&v2__##type##__descriptor, call/NULL, NULL/; s/ProtobufCMessageDescriptor/void/'
    cat test/prove/assumed.h
    for function in $FUNCTIONS; do
        grep -q "^static [a-z].*[ *]$function(" kmsplugin.c ||
            { echo "no $function in kmsplugin.c" >&2; exit 1; }
        sed -n "/^static [a-z].*[ *]$function(/,/^}\$/p" kmsplugin.c
    done
    cat test/prove/main.c
} >"$dir/parsers.c"

# Where not even an unsigned number may wrap.
more() {
    case $1 in
    prove_timeout | prove_decimal | prove_prefix) echo -warn-unsigned-overflow ;;
    esac
}

passed=0
failed=0
sed -n 's,^void \(prove_[a-z0-9_]*\)(void) {$,\1,p' test/prove/main.c >"$dir/names"
while read -r proof; do
    # shellcheck disable=SC2046 # words, or none
    if timeout "$PROOF_SECONDS" frama-c -c11 -machdep gcc_x86_64 -eva -eva-precision 4 -eva-slevel "$LEVEL" \
        $(more "$proof") -main "$proof" "$dir/parsers.c" >"$dir/$proof.log" 2>&1 &&
        grep -q '^ *0 alarms generated' "$dir/$proof.log" &&
        ! grep -q 'got status \(unknown\|invalid\)' "$dir/$proof.log"; then
        echo "ok $proof"
        passed=$((passed + 1))
    else
        grep -E -A1 'eva:alarm|rror:|got status (unknown|invalid)' "$dir/$proof.log" | head -4
        echo "not ok $proof"
        failed=$((failed + 1))
    fi
done <"$dir/names"
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
