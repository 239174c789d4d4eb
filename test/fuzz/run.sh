#!/bin/sh
# Replays the committed seeds of each fuzzer, then fuzzes it for FUZZ_SECONDS (0: only
# replays). What it finds that is new stays in build/fuzz/corpus, a crash in build/fuzz.
# The last line tells how many passed.
#
#     run.sh NAME...      fuzzers built by make fuzz: build/fuzz/NAME
set -eu
cd "$(dirname "$0")/../.."

FUZZ_SECONDS=${FUZZ_SECONDS:-60}
INPUT_MAX=4096          # bytes: longer ones find nothing more, and take longer
SLACK_SECONDS=120       # for start, replay and report
passed=0
failed=0
log=build/fuzz/log
words=build/fuzz/words  # the dictionary: every string of the program
grep -o '"[A-Za-z0-9:/@=+_.-]\{2,40\}"' kmsplugin.c | sort -u >"$words"

# run NAME WHAT OPTION...: one run of a fuzzer, with a line on what it came to.
run() {
    name=$1
    what=$2
    shift 2
    if timeout $((FUZZ_SECONDS + SLACK_SECONDS)) "build/fuzz/$name" -artifact_prefix="build/fuzz/$name-" \
        -timeout=20 -max_len="$INPUT_MAX" -dict="$words" -print_final_stats=1 "$@" >"$log" 2>&1; then
        runs=$(sed -n 's/^stat::number_of_executed_units: //p' "$log")
        cov=$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$log" | tail -n 1)
        echo "ok fuzz $name, $what: $runs runs, $cov edges"
        passed=$((passed + 1))
    else
        tail -n 40 "$log"
        echo "not ok fuzz $name, $what"
        failed=$((failed + 1))
    fi
}

# unpack NAME: its seeds, a line each with octal escapes, into files for libFuzzer.
unpack() {
    rm -rf "build/fuzz/seeds/$1"
    mkdir -p "build/fuzz/seeds/$1"
    count=0
    while IFS= read -r seed; do
        count=$((count + 1))
        # shellcheck disable=SC2059 # the escapes are in it; a percent sign is one
        printf -- "$seed" >"build/fuzz/seeds/$1/$count"
    done <"test/fuzz/$1.seeds"
}

for name; do
    seeds=build/fuzz/seeds/$name
    found=build/fuzz/corpus/$name
    unpack "$name"
    mkdir -p "$found"
    run "$name" "$count seeds" -runs=0 "$seeds"
    if [ "$FUZZ_SECONDS" -gt 0 ]; then
        run "$name" "$FUZZ_SECONDS s" -max_total_time="$FUZZ_SECONDS" "$found" "$seeds"
    fi
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
