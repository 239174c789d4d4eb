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

# States that Eva keeps apart at one place: as many as the proof needs.
level() {
    case $1 in
    prove_percent | prove_text_value) echo 400 ;;
    *) echo 8000 ;;
    esac
}

FUNCTIONS='text_char text_bytes text_escaped text_value hex_encode in_range base64_decode utf8_check
    varint_next field_next is_space
    sealed_shaped grpc_prefix_write grpc_prefix_len grpc_timeout_us percent_encode field_name is_value is_grpc
    request_content_length request_path request_known request_init request_field request_head_end decimal
    timeout_parse alphabet_name crlf_undo'

{
    cat <<'END'
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
END
    # constants of one value each, two structs, and the functions
    sed -n '/^enum {$/,/^};$/p' kmsplugin.c | sed '/^};$/q'
    for type in 'enum http_method' 'enum field_name' 'struct text' 'struct field'; do
        sed -n "/^$type {.*};/{p;q}; /^$type {/,/^};\$/p" kmsplugin.c
    done
    sed -n '/^enum rpc {$/,/^};$/p' kmsplugin.c
    sed -n '/^struct request {/,/^};$/p' kmsplugin.c
    sed -n '/^enum { SEEN_REGULAR/p; /^#define IS(/p' kmsplugin.c
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

# Functions whose results Eva keeps apart; one that has a proof of its own; where not even an unsigned number may wrap.
more() {
    case $1 in
    prove_field) echo -eva-split-return-function varint_next:full,field_next:full ;;
    prove_timeout | prove_content_length | prove_decimal | prove_prefix) echo -warn-unsigned-overflow ;;
    esac
}

passed=0
failed=0
sed -n 's,^void \(prove_[a-z0-9_]*\)(void) {$,\1,p' test/prove/main.c >"$dir/names"
while read -r proof; do
    # shellcheck disable=SC2046 # words, or none
    if timeout "$PROOF_SECONDS" frama-c -c11 -machdep gcc_x86_64 -eva -eva-precision 4 -eva-slevel "$(level "$proof")" \
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
