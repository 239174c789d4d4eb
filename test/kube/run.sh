#!/bin/sh
# Runs the tests with Kubernetes' client code against $KMSPLUGIN (../../kmsplugin
# from here). The last line is "N passed, N failed"; to fail is also to run nothing.
set -eu
case ${KMSPLUGIN-} in '' | /*) ;; *) export KMSPLUGIN="$PWD/$KMSPLUGIN" ;; esac
cd "$(dirname "$0")"
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

# POSIX sh knows no pipefail: the status of go passes the pipe in a file.
{ go test -count=1 -timeout 10m -v ./... 2>&1 && status=0 || status=$?; echo "$status" >"$tmp/status"; } | tee "$tmp/log"
read -r status <"$tmp/status"
passed=$(grep -c '^--- PASS: ' "$tmp/log") || true
failed=$(grep -c '^--- FAIL: ' "$tmp/log") || true
# Not built, ended by a panic, or by the time limit: no test says so itself.
if [ "$failed" -eq 0 ] && { [ "$status" -ne 0 ] || [ "$passed" -eq 0 ]; }; then failed=1; fi
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
