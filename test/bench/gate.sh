#!/bin/sh
# Fails when one KMS v2 Encrypt takes more instructions than LIMIT, when a request's share grows with the number of
# connections or streams, or when the release build is larger than BYTES.
#
#     gate.sh PROGRAM        the release build: build/static/kmsplugin
#
# The count hardly varies (0.05 % over five runs, see instructions.sh), but compiler, libraries and AES instructions of
# the CPU are part of it.
set -eu
LIMIT=20000             # instructions, 8 connections x 32 streams
BYTES=262144            # of the release build on x86_64
GROWTH=20               # percent between the least and the most, over all shapes of load

here=$(dirname "$0")
passed=0
failed=0

# at_most LIMIT VALUE WHAT
at_most() {
    if [ "$2" -le "$1" ]; then
        echo "ok $3: $2, at most $1"
        passed=$((passed + 1))
    else
        echo "not ok $3: $2, at most $1"
        failed=$((failed + 1))
    fi
}

least=
for shape in '8 32' '1 32' '64 32' '8 1' '8 250'; do
    # shellcheck disable=SC2086 # two arguments
    count=$("$here/instructions.sh" "$1" $shape) || { echo '0 passed, 1 failed'; exit 1; }
    echo "instructions an Encrypt, connections and streams $shape: $count"
    if [ -z "$least" ]; then usual=$count least=$count most=$count; fi
    if [ "$count" -lt "$least" ]; then least=$count; fi
    if [ "$count" -gt "$most" ]; then most=$count; fi
done
at_most "$LIMIT" "$usual" 'instructions an Encrypt'
at_most $((100 + GROWTH)) $((100 * most / least)) 'from the least shape to the most, %'
case $(uname -m):$1 in x86_64:*/static/*) at_most "$BYTES" "$(wc -c <"$1")" 'bytes of the program' ;; esac
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
