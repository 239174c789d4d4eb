#!/bin/sh
# make release: is it the same twice, in another folder, and is what the guide says of checking it so, with a throw-away
# key? ARCHES are those to build for (this machine's). Needs what release/release.sh needs, and signify-openbsd. A line
# `ok` or `not ok` for each test.
set -eu
cd "$(dirname "$0")/.."
MAKE=${MAKE:-make}
# shellcheck source=test/lib.sh
. test/lib.sh
label='release: '
arch=$(uname -m)
export ARCHES="${ARCHES:-$arch}"
version=$(sed -n 's/^VERSION = //p' Makefile)

# A clone has no change that is not committed.
check 'a clone' git clone --quiet . "$tmp/clone"
[ ! -d build/src ] || { mkdir "$tmp/clone/build" && cp -R build/src "$tmp/clone/build/src"; }
check 'a key' signify-openbsd -G -n -p "$tmp/kmsplugin.pub" -s "$tmp/kmsplugin.sec"
check 'make release' "$MAKE" -s -C "$tmp/clone" release RELEASE="$tmp/first" SIGN_KEY="$tmp/kmsplugin.sec"
grep '^sha256:' "$tmp/output" || :
cp "$tmp/output" "$tmp/said"
check 'prints the digest of the image' grep -q "^sha256:.* $arch\$" "$tmp/said"
mv "$tmp/clone" "$tmp/elsewhere"
check 'make release, in another folder' env TZ=Asia/Tokyo "$MAKE" -s -C "$tmp/elsewhere" release RELEASE="$tmp/second"
check 'the same sums' diff "$tmp/first/SHA256SUMS" "$tmp/second/SHA256SUMS"
sed 's/^/# /' "$tmp/first/SHA256SUMS"
for file in "kmsplugin-$version.tar.gz" "kmsplugin-$version-$arch" "kmsplugin-$version-$arch.oci.tar" "kmsplugin-$version-$arch.cdx.json" \
    "kmsplugin_$version-1_$(dpkg --print-architecture).deb" IMAGES; do
    check "sums: $file" grep -q "  $file\$" "$tmp/first/SHA256SUMS"
done
echo x >>"$tmp/elsewhere/README"
check 'not from a tree with changes' fails "$MAKE" -s -C "$tmp/elsewhere" release RELEASE="$tmp/third"

# The guide's own words.
awk '/^<!-- release: check -->$/ { named = 1 } named && /^```$/ { exit } named && inside { print } named && /^```sh$/ { inside = 1 }' \
    doc/operate.md >"$tmp/block"
cp "$tmp/kmsplugin.pub" "$tmp/first/"
checked() { (cd "$tmp/first" && sh -eu "$tmp/block"); }
check 'guide: a block' test -s "$tmp/block"
check 'guide: it is as signed' checked
rm "$tmp/first/kmsplugin-$version-$arch.cdx.json"
check 'guide: of a part, too' checked
printf x >>"$tmp/first/kmsplugin-$version-$arch"
check 'guide: a program that was altered' fails checked
(cd "$tmp/first" && sha256sum "kmsplugin-$version-$arch" >SHA256SUMS)
check 'guide: sums that were altered' fails checked
[ "$(count 'not ok')" -eq 0 ]
