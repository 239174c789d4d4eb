#!/bin/sh
# Counts the instructions that a server runs in user space for one KMS v2 Encrypt of 32 bytes, with callgrind.
#
#     instructions.sh PROGRAM CONNECTIONS STREAMS [PROFILE]
#
# PROGRAM serves h2load on a real socket, CONNECTIONS times STREAMS requests at a time. A run less one of half its
# length leaves the requests alone: start, first use of everything and end are in both. Time has no part in it: under
# valgrind the server is so much slower than h2load that it always finds a whole window of requests, however busy
# the machine. PROFILE receives what callgrind_annotate reads (of a PROGRAM with its symbols: link it without -s).
set -eu
program=$1 connections=$2 streams=$3 profile=${4-}
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

# count REQUESTS: all instructions of a server that answers so many.
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
    "$(dirname "$0")/encrypt.sh" "$tmp/kms.sock" "$1" "$connections" "$streams" || { cat "$tmp/log" >&2; exit 1; }
    kill "$pid"
    wait "$pid" || { cat "$tmp/log" >&2; exit 1; }
    pid=
    instructions=$(sed -n 's/^totals: *//p' "$tmp/profile")
}

rounds=$((4096 / (connections * streams)))
requests=$((rounds * connections * streams)) # whole windows, all at their fullest
count "$requests"
short=$instructions
count $((2 * requests))
if [ -n "$profile" ]; then cp "$tmp/profile" "$profile"; fi
echo $(((instructions - short + requests / 2) / requests))
