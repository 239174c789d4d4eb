#!/bin/sh
# Counts the instructions that a server runs in user space for one KMS v2 Encrypt of 32 bytes, with callgrind.
#
#     instructions.sh PROGRAM CONNECTIONS STREAMS [PROFILE]
#
# PROGRAM serves load.c (make build/bench/load) on a real socket, CONNECTIONS times STREAMS requests at a time. A run
# less one of half its length leaves the requests alone: start, first use of everything and end are in both. Time has no
# part in it: a batch of requests comes in one piece, however busy the machine. PROFILE receives what callgrind_annotate reads (of a PROGRAM with its symbols: link it without -s).
set -eu
program=$1 connections=$2 streams=$3 profile=${4-}
load=$(dirname "$0")/../../build/bench/load
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

# count ROUNDS: all instructions of a server that answers so many batches on each connection.
count() {
    : >"$tmp/log"
    env -i KMS_KEK=ssxskDYHxBjHGLnaWxSraatiyVqL4s248mq1e/w1Knc= \
        setpriv --pdeathsig KILL valgrind -q --tool=callgrind --callgrind-out-file="$tmp/profile" \
        "$program" serve --sandbox off --listen "unix://$tmp/kms.sock" 2>"$tmp/log" &
    pid=$!
    until grep -q 'msg=ready' "$tmp/log"; do
        kill -0 "$pid" 2>/dev/null || { cat "$tmp/log" >&2; exit 1; }
        sleep 0.05
    done
    timeout 100 "$load" "$connections" "$streams" "$1" "$tmp/kms.sock" /v2.KeyManagementService/Encrypt \
        "$tmp/body" >"$tmp/load" || { cat "$tmp/log" >&2; exit 1; }
    kill "$pid"
    wait "$pid" || { cat "$tmp/log" >&2; exit 1; }
    pid=
    instructions=$(sed -n 's/^totals: *//p' "$tmp/profile")
}

# EncryptRequest behind a gRPC prefix: 32 bytes of plaintext and a uid of 36.
printf '\0\0\0\0\110\12\040%s\22\44%s' \
    0123456789abcdef0123456789abcdef 00000000-0000-4000-8000-000000000000 >"$tmp/body"
rounds=$((4096 / (connections * streams)))
requests=$((rounds * connections * streams))
count "$rounds"
short=$instructions
count $((2 * rounds))
if [ -n "$profile" ]; then cp "$tmp/profile" "$profile"; fi
echo $(((instructions - short + requests / 2) / requests))
