#!/bin/sh
# release/pins: only what is pinned is built from; what is altered is refused, and what a mirror no longer has is told. Works
# on a copy of the tree. Needs dpkg-dev and the network. A line `ok` or `not ok` for each test.
set -eu
cd "$(dirname "$0")/.."
# shellcheck source=test/lib.sh
. test/lib.sh
label='pins: ' MAKE=${MAKE:-make}
unset MAKEFLAGS MFLAGS MAKELEVEL
arch=$(uname -m)

check 'sources are here, or come' release/sources.sh
mkdir -p "$tmp/tree/build" "$tmp/tree/test"
cp -R Makefile kmsplugin.c kms.pb-c.c kms.pb-c.h release "$tmp/tree/"
cp test/test.mk "$tmp/tree/test/"
cp -R build/src "$tmp/tree/build/"
cd "$tmp/tree"
check 'OFFLINE=1: what is pinned is what is used' sh -c 'OFFLINE=1 release/sources.sh | cmp - release/pins'

archive=$(sed -n 's/.*  \(nghttp2_.*orig.*\)/\1/p' release/pins)
cp "build/src/$archive" "$tmp/good"
printf X | dd of="build/src/$archive" bs=1 seek=1000 conv=notrunc status=none
for how in A=1 OFFLINE=1 PINS=only PINS=renew; do
    check "$how: one octet of an archive altered" says 1 "build/src/$archive is not the archive" env "$how" release/static-libs.sh
done
check 'nothing was unpacked' fails test -e "build/static/$arch/src"
rm "build/src/$archive"
check 'OFFLINE=1: an archive is missing' says 1 "OFFLINE=1.*lacks $archive" env OFFLINE=1 release/sources.sh
cp "$tmp/good" "build/src/$archive"
sed -i "/$archive/s/^..../0000/" release/pins
check 'a pin of another hash' says 1 "$archive is not the archive" release/sources.sh

cp "$OLDPWD/release/pins" release/pins
has=$(sed -n 's/.*  nghttp2_\(.*\)\.dsc/\1/p' release/pins)
other=1.0.0-1
sed -i "s/nghttp2_$has/nghttp2_$other/" release/pins
both="nghttp2 $other is pinned, and the mirror has $has: "
check 'a mirror lacks the version: OFFLINE=1' says 1 "lacks nghttp2_$other" env OFFLINE=1 release/sources.sh
check 'a mirror lacks the version: make release' says 1 "${both}make pins" env PINS=only release/sources.sh
check 'a mirror lacks the version: is told' says 0 "${both}building with that" release/sources.sh
check 'make static, with the one that there is' "$MAKE" -s static sbom
cp "$tmp/output" "$tmp/said"
check 'which says so' grep -q "$both" "$tmp/said"
check 'and is told by --version' sh -c "build/static/kmsplugin --version | grep -qx 'nghttp2 ${has%%-*}'"
check 'and by the bill of materials' sh -c "grep -q '\"version\": \"$has\"' build/sbom/*.json && ! grep -q nghttp2_$other build/sbom/*.json"
check 'what was built from is not what is pinned' fails cmp -s "build/static/$arch/SHA256SUMS" release/pins
check 'PINS=renew: pinned is what Debian has' sh -c "PINS=renew release/sources.sh >release/pins && grep -q nghttp2_$has.dsc release/pins && PINS=only OFFLINE=1 release/sources.sh"
[ "$(count 'not ok')" -eq 0 ]
