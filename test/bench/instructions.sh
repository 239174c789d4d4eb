#!/bin/sh
# Counts the instructions that a server runs in user space for one request, with
# callgrind: exact, the same in every run, on a busy machine too.
#
#     instructions.sh PROGRAM CONNECTIONS STREAMS [PROFILE]
#
# PROGRAM serves KMS v2 Encrypt on a real socket, CONNECTIONS times STREAMS requests a
# round, one batch at a time (load -s). Start and end are not counted: a long run less a
# short one leaves only rounds. PROFILE receives what callgrind_annotate reads.
set -eu
program=$1 connections=$2 streams=$3 profile=${4-}
CC=${CC:-cc}
here=$(dirname "$0")
tmp=$(mktemp -d)
pid=
# shellcheck disable=SC2317 # called by the trap
clean() {
    if [ -n "$pid" ]; then
        kill -KILL "$pid" 2>/dev/null || :
        wait "$pid" 2>/dev/null || :
    fi
    rm -rf "$tmp"
}
trap clean EXIT
trap 'exit 1' HUP INT TERM

LOAD=${LOAD:-$tmp/load}
if [ ! -x "$LOAD" ]; then $CC -std=c11 -O2 -o "$LOAD" "$here/load.c" -lnghttp2; fi

# EncryptRequest behind a gRPC prefix: 32 bytes of plaintext and a uid of 36.
printf '\0\0\0\0\110\12\040%s\22\44%s' \
    0123456789abcdef0123456789abcdef 00000000-0000-4000-8000-000000000000 >"$tmp/body"
rounds=$((4096 / (connections * streams)))
if [ "$rounds" -eq 0 ]; then rounds=1; fi

# count ROUNDS: all instructions of a server that serves so many rounds. It is told to
# stop while the client still holds its connections, so that it closes all of them in
# one turn. Nothing else about it depends on time: no environment, no deadlines met.
count() {
    : >"$tmp/answers"
    : >"$tmp/log"
    mkfifo "$tmp/hold"
    env -i KMS_KEK=ssxskDYHxBjHGLnaWxSraatiyVqL4s248mq1e/w1Knc= \
        valgrind -q --tool=callgrind --callgrind-out-file="$tmp/profile" \
        "$program" serve --sandbox off --listen "unix://$tmp/kms.sock" 2>"$tmp/log" &
    pid=$!
    until grep -q 'msg=ready' "$tmp/log"; do
        kill -0 "$pid" 2>/dev/null || { cat "$tmp/log" >&2; exit 1; }
        sleep 0.05
    done
    "$LOAD" -s -w -c "$connections" -m "$streams" -n "$1" "$tmp/kms.sock" /v2.KeyManagementService/Encrypt "$tmp/body" \
        <"$tmp/hold" >"$tmp/answers" &
    load=$!
    exec 3>"$tmp/hold"
    until grep -q requests "$tmp/answers"; do
        kill -0 "$load" 2>/dev/null || exit 1
        sleep 0.05
    done
    kill "$pid"
    wait "$pid" || { cat "$tmp/log" >&2; exit 1; }
    pid=
    exec 3>&-
    wait "$load"
    rm "$tmp/hold"
    instructions=$(sed -n 's/^totals: *//p' "$tmp/profile")
}

count "$rounds"
short=$instructions
count $((3 * rounds))
if [ -n "$profile" ]; then cp "$tmp/profile" "$profile"; fi
requests=$((2 * rounds * connections * streams))
echo $(((instructions - short + requests / 2) / requests))
