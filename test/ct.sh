#!/bin/sh
# Judges what valgrind says of programs built from test/ct.c: no branch and no index of
# kmsplugin.c or BearSSL depends on a secret, but for the lines listed here, where a
# verdict is told that is no secret. The last line tells how many passed.
#
#     ct.sh PROGRAM...
set -eu
cd "$(dirname "$0")/.."

RUN_SECONDS=300
passed=0
failed=0
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# Lines of kmsplugin.c that may: what they tell is known to all.
public_line() {
    case $1 in
    *'return bad ? -1 : (long)total;'*) ;;          # was it base64: the program starts, or not
    *'return !differ '*) ;;                         # is it a weak key: likewise
    *': printable ? "is 32 printable'*) ;;
    *'"0123456789abcdef"[bytes[i] '*) ;; # of a key_id, which is made to be told
    *'!br_gcm_check_tag('*) ;;                       # is the tag right: the answer says so
    *'memcmp(opened.data, probe,'*) ;;               # Status opens zeros, known to all
    *) return 1 ;;
    esac
}

# valgrind's reports as "FILE:LINE" of their innermost frame, each once.
reports() {
    sed -n 's/^==[0-9]*== *at .*(\(.*\))$/\1/p' "$log" | sort -u
}

under_valgrind() {
    timeout "$RUN_SECONDS" valgrind --num-callers=4 --error-limit=no "$@" >"$log" 2>&1
}

verdict() {
    if [ "$1" = ok ]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        cat "$log"
    fi
    echo "$1 $2"
}

for program; do
    for suite in aesni ct64 ct32; do
        result=ok
        under_valgrind "$program" "$suite" all && grep -q "^ok ct\|^skip ct" "$log" || result='not ok'
        for at in $(reports | tr ' ' '_'); do
            case $at in
            kmsplugin.c:*) public_line "$(sed -n "${at#kmsplugin.c:}p" kmsplugin.c)" || result='not ok' ;;
            *) result='not ok' ;;
            esac
        done
        verdict "$result" "ct $program $suite"
    done
    for control in branch index memcmp table-aes; do
        result='not ok'
        under_valgrind "$program" ct64 "$control" && [ -n "$(reports)" ] && result=ok
        verdict "$result" "ct $program: the control '$control' is seen"
    done
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
