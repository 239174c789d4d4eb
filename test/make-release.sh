#!/bin/sh
# make release: is it the same twice, in another folder, and what does it refuse; and what does make verify say of it, with
# throw-away keys? ARCHES are those to build for (this machine's). Needs what release/release.sh needs, and
# signify-openbsd. A line `ok` or `not ok` for each test.
set -eu
cd "$(dirname "$0")/.."
MAKE=${MAKE:-make}
# shellcheck source=test/lib.sh
. test/lib.sh
label='release: '
arch=$(uname -m)
export ARCHES="${ARCHES:-$arch}"
version=$("$MAKE" -s version)

make_release() { # FOLDER [VARIABLE...], in $tree
    folder=$1
    shift
    "$MAKE" -s -C "$tree" release RELEASE="$folder" "$@"
}

# A clone has no change that is not committed.
tree=$tmp/clone
check 'a clone' git clone --quiet . "$tree"
[ ! -d build/src ] || { mkdir "$tree/build" && cp -R build/src "$tree/build/src"; }
for key in ours other; do
    check 'a key' signify-openbsd -G -n -p "$tmp/$key.pub" -s "$tmp/$key.sec"
done
check 'not with placeholders' says 2 'MAINTAINER and HOMEPAGE.* are placeholders.*ALLOW_PLACEHOLDERS=1' make_release "$tmp/first"
check 'with names, unsigned' says 0 "$tmp/first is not signed: signify-openbsd .* signs it" \
    make_release "$tmp/first" MAINTAINER='A <a@example.org>' HOMEPAGE=https://example.org/
check 'which the package has' sh -c "dpkg-deb -f '$tmp'/first/*.deb Maintainer Homepage | grep -c example.org | grep -qx 2"
rm -r "$tmp/first"
check 'make release' make_release "$tmp/first" SIGN_KEY="$tmp/ours.sec" ALLOW_PLACEHOLDERS=1
cp "$tmp/output" "$tmp/said"
check 'prints the digest of the image' grep "^sha256:.* $arch\$" "$tmp/said"
mv "$tree" "$tmp/elsewhere"
tree=$tmp/elsewhere
check 'make release, in another folder' env TZ=Asia/Tokyo "$MAKE" -s -C "$tree" release RELEASE="$tmp/second" ALLOW_PLACEHOLDERS=1
check 'the same sums' diff "$tmp/first/SHA256SUMS" "$tmp/second/SHA256SUMS"
sed 's/^/# /' "$tmp/first/SHA256SUMS"
(cd "$tmp/first" && find . -type f ! -name 'SHA256SUMS*' | sed 's,./,,' | LC_ALL=C sort) >"$tmp/files"
check 'the sums name every file' sh -c "sed 's/.*  //' '$tmp/first/SHA256SUMS' | diff - '$tmp/files'"
for file in "kmsplugin-$version.tar.gz" "kmsplugin-$version-$arch" "kmsplugin-$version-$arch.oci.tar" "kmsplugin-$version-$arch.cdx.json" \
    "kmsplugin_$version-1_$(dpkg --print-architecture).deb" IMAGES; do
    check "has $file" grep -qx "$file" "$tmp/files"
done
echo x >>"$tree/README"
check 'not from a tree with changes' says 2 'changes that are not committed' make_release "$tmp/third" ALLOW_PLACEHOLDERS=1
git -C "$tree" checkout -q README
sed -i 's/musl_[0-9.]*-/musl_1.0-/' "$tree/release/pins"
git -C "$tree" -c user.name=t -c user.email=t@example.org commit -qam 'another pin'
check 'not from other sources than the pinned' says 2 'musl 1.0-.* is pinned, and the mirror has .*: make pins' \
    make_release "$tmp/third" ALLOW_PLACEHOLDERS=1

# What a user runs: verify STATUS SENTENCE NAME. Each is of a folder with one thing wrong, which is mended again.
verify() {
    check "verify: $3" says "$1" "$2" release/verify.sh "$tmp/first" "${4-$tmp/ours.pub}"
}
all=$(wc -l <"$tmp/files")
verify 0 "is as the key .*ours.pub has signed it: $all files of $all" 'a good folder'
check 'make verify' "$MAKE" -s verify RELEASE="$tmp/first" KEY="$tmp/ours.pub"
verify 1 'SHA256SUMS is not what the key .*other.pub has signed' 'the wrong key' "$tmp/other.pub"
verify 2 'there is no such key' 'no key' "$tmp/none.pub"
verify 2 'whose key' 'no word of a key' ''
cp -R "$tmp/first" "$tmp/good"
for change in "rm SHA256SUMS.sig:has no signature" "rm SHA256SUMS:has no SHA256SUMS" \
    "printf x >>kmsplugin-$version-$arch:kmsplugin-$version-$arch was changed" \
    "printf x >>kmsplugin-$version-$arch; sha256sum * >SHA256SUMS:SHA256SUMS is not what the key" "echo >more:more is not in SHA256SUMS" \
    "rm -f kms* IMAGES:has no file"; do
    (cd "$tmp/first" && sh -c "${change%:*}")
    verify 1 "${change##*:}" "${change%:*}"
    rm -r "$tmp/first"
    cp -R "$tmp/good" "$tmp/first"
done
rm "$tmp/first/kmsplugin-$version-$arch.cdx.json"
verify 0 "$((all - 1)) files of $all" 'a part of it'
[ "$(count 'not ok')" -eq 0 ]
