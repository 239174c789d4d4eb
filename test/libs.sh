#!/bin/sh
# The libraries' own tests, against the objects that the release build links, with its compiler and flags:
#
#   nghttp2      all unit tests (up to 1.59 with CUnit, whose source apt brings; later ones bring munit)
#   protobuf-c   all tests, one of them against what protobuf's own library packs (g++, libprotobuf-dev)
#   BearSSL      testcrypto of what is linked: the rest takes minutes
#
# musl's tests, libc-test, are in no package of Debian; what is used of it, kmsplugin's own tests on the release build use.
# Needs protobuf-c-compiler, g++ and libprotobuf-dev.
#
#     CC=... LINK=... test/libs.sh SOURCES       by make test-libs
set -eu
cd "$(dirname "$0")/.."
# shellcheck source=test/lib.sh
. test/lib.sh
src=$PWD/$1 top=$PWD

# build NAME FLAG...: links $tmp/NAME.
build() {
    out=$tmp/$1
    shift
    # shellcheck disable=SC2086 # LINK is a list
    "$CC" -w -O2 -fPIE "$@" -o "$out" $LINK -lnghttp2 -lprotobuf-c -lbearssl
}

nghttp2() {
    cd "$src/nghttp2/tests" || return 1
    if [ -d munit ]; then
        set -- -Imunit munit/munit.c
    else
        mkdir "$tmp/cunit"
        (cd "$top" && release/sources.sh cunit && dpkg-source --no-check -x build/src/cunit_*.dsc "$tmp/cunit/src") || return 1
        units=$tmp/cunit/src/CUnit
        ln -s "$units/Headers" "$tmp/cunit/CUnit"
        set -- -I"$tmp/cunit" -I"$units/Headers" "$units"/Sources/Framework/*.c "$units"/Sources/Basic/*.c
    fi
    build nghttp2 -DHAVE_CONFIG_H -I../lib "$@" main.c nghttp2_*.c && "$tmp/nghttp2"
}

# protobuf_c NAME FILE...: a test, and the messages that it uses, which protoc-c makes.
protobuf_c() {
    cd "$src/protobuf-c" || return 1
    test=$1
    shift
    build "$test" -I"$tmp" -I. -Iprotobuf-c -It/generated-code2 "$@" && "$tmp/$test"
}

messages() {
    cd "$src/protobuf-c" || return 1
    for proto in t/*.proto t/*/*.proto; do
        protoc-c -I. -Iprotobuf-c --c_out="$tmp" "$proto" || return 1
    done
    protoc -I. -Iprotobuf-c --cpp_out="$tmp" t/test-full.proto protobuf-c/protobuf-c.proto &&
        g++ -w -I"$tmp" -It/generated-code2 -o "$tmp/packed" t/generated-code2/cxx-generate-packed-data.cc \
            "$tmp"/t/test-full.pb.cc "$tmp"/protobuf-c/protobuf-c.pb.cc -lprotobuf &&
        mkdir -p "$tmp/t/generated-code2" && "$tmp/packed" >"$tmp/t/generated-code2/test-full-cxx-output.inc"
}

bearssl() {
    cd "$src/bearssl" || return 1
    build bearssl -Iinc -Isrc test/test_crypto.c && "$tmp/bearssl" "$@"
}

check 'nghttp2' nghttp2
grep -A 9 -i 'run summary\|successful' "$tmp/output" || :
check 'protobuf-c: messages' messages
check 'protobuf-c: generated-code' protobuf_c generated-code t/generated-code/test-generated-code.c "$tmp"/t/test.pb-c.c
check 'protobuf-c: generated-code, proto3' protobuf_c generated-code3 -DPROTO3 t/generated-code/test-generated-code.c "$tmp"/t/test-proto3.pb-c.c
check 'protobuf-c: generated-code2' protobuf_c generated-code2 t/generated-code2/test-generated-code2.c "$tmp"/t/test-full.pb-c.c "$tmp"/t/test-optimized.pb-c.c
check 'protobuf-c: version' protobuf_c version "-DPACKAGE_VERSION=\"$(sed -n 's/^AC_INIT(\[protobuf-c\], *\[\([0-9.]*\)\].*/\1/p; s/^ *\[\([0-9.]*\)\],$/\1/p' "$src/protobuf-c/configure.ac" | head -n 1)\"" t/version/version.c
for issue in issue204 issue220 issue251 issue330 issue375 issue440; do
    check "protobuf-c: $issue" protobuf_c "$issue" "t/$issue/$issue.c" "$tmp/t/$issue/$issue.pb-c.c"
done
check 'BearSSL' bearssl SHA256 HMAC AES_ct AES_ct64 AES_x86ni AES_CTRCBC_ct AES_CTRCBC_ct64 AES_CTRCBC_x86ni \
    GHASH_ctmul GHASH_ctmul32 GHASH_ctmul64 GHASH_pclmul GCM
summary
