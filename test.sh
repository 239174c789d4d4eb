#!/bin/sh
# Builds and tests all that needs no cluster: the functions (test/unit.c), the
# generated messages, and the running server (test/test_*.py), each program also
# with sanitizers. The last line tells how many tests passed and failed.
#
#     KMSPLUGIN=PROGRAM ./test.sh     another program than ./kmsplugin
set -eu
cd "$(dirname "$0")"

PYTHON=${PYTHON:-/usr/bin/python3}
KMSPLUGIN=${KMSPLUGIN:-./kmsplugin}
PASS_SECONDS=900        # of one suite, should it hang

tmp=$(mktemp -d)
chmod 755 "$tmp"        # tests run as other users, too
export TMPDIR="$tmp"
: >"$tmp/lines"
pid=

clean() {
    if [ -n "$pid" ]; then
        kill "$pid" 2>/dev/null || :
        wait "$pid" || :
    fi
    rm -rf "$tmp"
}
trap clean EXIT
trap 'exit 1' HUP INT TERM

# suite NAME COMMAND...: runs a command that prints a line `ok`, `not ok` or `skip`
# for each of its tests. One that fails without such a line is a failed test itself.
suite() {
    name=$1
    shift
    echo "== $name"
    status=0
    timeout "$PASS_SECONDS" "$@" >"$tmp/output" 2>&1 &
    pid=$!
    wait "$pid" || status=$?
    pid=
    if [ "$status" -ne 0 ] && ! grep -q '^not ok ' "$tmp/output"; then
        echo "not ok $name: exit status $status" >>"$tmp/output"
    elif [ "$status" -eq 0 ] && ! grep -q '^ok ' "$tmp/output"; then
        echo "not ok $name: no test ran" >>"$tmp/output"
    fi
    cat "$tmp/output"
    cat "$tmp/output" >>"$tmp/lines"
}

# check NAME COMMAND...: a command that is one test.
check() {
    name=$1
    shift
    if "$@" >"$tmp/output" 2>&1; then
        echo "ok $name" | tee -a "$tmp/lines"
    else
        cat "$tmp/output"
        echo "not ok $name: $*" | tee -a "$tmp/lines"
        return 1
    fi
}

# The committed kms.pb-c.[ch] are what protoc-c makes of kms.proto.
same_messages() {
    protoc-c --c_out="$tmp" kms.proto
    cmp "$tmp/kms.pb-c.c" kms.pb-c.c && cmp "$tmp/kms.pb-c.h" kms.pb-c.h
}

count() {
    grep -c "^$1 " "$tmp/lines" || :
}

# with a real instruction to the sanitizers: stop at the first report, leaks included
ASAN_OPTIONS=${ASAN_OPTIONS:-detect_stack_use_after_return=1:strict_string_checks=1}
UBSAN_OPTIONS=${UBSAN_OPTIONS:-print_stacktrace=1}
export ASAN_OPTIONS UBSAN_OPTIONS

check messages same_messages || :
check build make -s kmsplugin || :
if check build/unit make -s build/unit; then
    suite unit build/unit
fi
if check build/unit-asan make -s build/unit-asan; then
    suite 'unit, sanitized' build/unit-asan
fi
if check build/sandbox make -s build/sandbox; then
    suite sandbox build/sandbox
fi
suite server env KMSPLUGIN="$KMSPLUGIN" "$PYTHON" test/run.py
if check build/kmsplugin-asan make -s build/kmsplugin-asan; then
    suite 'server, sanitized' env KMSPLUGIN=build/kmsplugin-asan KMSPLUGIN_SANITIZED=1 \
        "$PYTHON" test/run.py
fi

passed=$(count ok) failed=$(count 'not ok') skipped=$(count skip)
if [ "$skipped" -gt 0 ]; then
    echo "$passed passed, $failed failed, $skipped skipped"
else
    echo "$passed passed, $failed failed"
fi
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
