#!/bin/sh
# Records what runs often in the release build, for -fprofile-use: builds it instrumented in a copy of the tree, gives it load
# (Encrypts, and probe for the other calls) and leaves the counts of all objects in FOLDER.
#
#     profile.sh FOLDER
set -eu
requests=100000
folder=$1
copy=build/profile

rm -rf "$copy"
mkdir -p "$copy/build" "$copy/deploy" "$copy/counts" "$folder"
cp -R Makefile kmsplugin.c kms.pb-c.c kms.pb-c.h "$copy"
mkdir "$copy/test" && cp test/test.mk "$copy/test"
cp deploy/static-libs.sh deploy/string.c deploy/*.patch deploy/nghttp2-fixed.sed deploy/x86_64.ld "$copy/deploy"
[ ! -d build/src ] || cp -R build/src "$copy/build"
copy=$(cd "$copy" && pwd)
make -s -C "$copy" static PROFILE="-fprofile-generate -fprofile-update=single -fprofile-dir=$copy/counts -fprofile-prefix-path=$copy" LIBS='-lnghttp2 -lprotobuf-c -lbearssl -lgcov'

plugin=$copy/build/static/kmsplugin
socket=$copy/kms.sock
KMS_KEK=$("$plugin" genkey)
export KMS_KEK
"$plugin" serve --sandbox off --listen "unix://$socket" &
pid=$!
trap 'kill "$pid" 2>/dev/null || true' EXIT
tries=50
until "$plugin" probe "unix://$socket" >/dev/null 2>&1; do
	tries=$((tries - 1))
	[ "$tries" -gt 0 ] || { echo 'profile.sh: no server' >&2; exit 1; }
	sleep 0.1
done
rm -rf "$copy"/counts/*    # what the verbs left

test/bench/encrypt.sh "$socket" "$requests" 8 32
for _ in 1 2 3 4 5 6 7 8 9 10; do
	"$plugin" probe "unix://$socket" >/dev/null
done
kill "$pid"
wait "$pid"
trap - EXIT
rm -f "$folder"/*
cp "$copy"/counts/* "$folder"
