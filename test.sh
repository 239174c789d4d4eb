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
# shellcheck source=test/lib.sh
. test/lib.sh

# The committed kms.pb-c.[ch] are what protoc-c makes of kms.proto.
same_messages() {
    protoc-c --c_out="$tmp" kms.proto
    cmp "$tmp/kms.pb-c.c" kms.pb-c.c && cmp "$tmp/kms.pb-c.h" kms.pb-c.h
}

# with a real instruction to the sanitizers: stop at the first report, leaks included
ASAN_OPTIONS=${ASAN_OPTIONS:-detect_stack_use_after_return=1:strict_string_checks=1}
UBSAN_OPTIONS=${UBSAN_OPTIONS:-print_stacktrace=1}
export ASAN_OPTIONS UBSAN_OPTIONS

check messages same_messages
check build make -s kmsplugin
if require build/unit make -s build/unit; then
    suite unit build/unit
fi
if require build/unit-asan make -s build/unit-asan; then
    suite 'unit, sanitized' build/unit-asan
fi
if require build/sandbox make -s build/sandbox; then
    suite sandbox build/sandbox
fi
suite server env KMSPLUGIN="$KMSPLUGIN" "$PYTHON" test/run.py
if require build/kmsplugin-asan make -s build/kmsplugin-asan; then
    suite 'server, sanitized' env KMSPLUGIN=build/kmsplugin-asan KMSPLUGIN_SANITIZED=1 \
        "$PYTHON" test/run.py
fi

summary
