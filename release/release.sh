#!/bin/sh
# A release, in one folder: source, programs, images and bills of materials for each architecture, the Debian package of
# this one, and their sums. All of it is built from the source archive, in a folder of its own, so it is the same wherever
# that is; what is not committed cannot get into it. Prints the digests of the images.
#
#     [ARCHES='x86_64 aarch64'] [SIGN_KEY=FILE.sec] release/release.sh FOLDER
#
# Needs what make static, image, sbom and deb need, Debian's cross compilers (release/static-libs.sh), and for a signature
# signify-openbsd. Debian's sources are taken from build/src, or fetched.
set -eu
: "${ARCHES:=x86_64 aarch64 armhf riscv64 s390x}"
MAKE=${MAKE:-make}
unset MAKEFLAGS MFLAGS MAKELEVEL
export LC_ALL=C
[ $# -eq 1 ] || { sed -n 's/^#     //p' "$0" >&2; exit 2; }

die() {
    echo "release.sh: $*" >&2
    exit 1
}

[ -z "$(git status --porcelain)" ] || die 'the tree has changes that are not committed'
[ ! -e "$1" ] || rmdir "$1" 2>/dev/null || die "$1: is there already, and not empty"
mkdir -p "$1"
out=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

version=$(sed -n 's/^VERSION = //p' Makefile)
"$MAKE" -s dist
cp "build/kmsplugin-$version.tar.gz" "$out/"
tar -xzf "$out/kmsplugin-$version.tar.gz" -C "$work"
if [ -d build/src ]; then
    mkdir "$work/kmsplugin-$version/build"
    cp -R build/src "$work/kmsplugin-$version/build/src"
fi
cd "$work/kmsplugin-$version"
for arch in $ARCHES; do
    dir=$arch/
    [ "$arch" != "$(uname -m)" ] || dir=
    "$MAKE" -s static sbom image ARCH="$arch" >"$work/log" 2>&1 || { cat "$work/log" >&2; die "$arch: not built"; }
    cp "build/static/${dir}kmsplugin" "$out/kmsplugin-$version-$arch"
    cp "build/sbom/${dir}kmsplugin-$version.cdx.json" "$out/kmsplugin-$version-$arch.cdx.json"
    cp "build/image/${dir}kmsplugin.tar" "$out/kmsplugin-$version-$arch.oci.tar"
    digest=$(tar -xOf "$out/kmsplugin-$version-$arch.oci.tar" ./index.json | sed 's/.*"digest":"\(sha256:[0-9a-f]*\)".*/\1/')
    echo "$digest  localhost/kmsplugin:$version  $arch" | tee -a "$out/IMAGES"
done
"$MAKE" -s deb >"$work/log" 2>&1 || { cat "$work/log" >&2; die 'deb: not built'; }
cp "build/deb/kmsplugin_$version"-*.deb "$out/"

cd "$out"
sha256sum -- * >"$work/SHA256SUMS"
mv "$work/SHA256SUMS" .
[ -z "${SIGN_KEY:-}" ] || signify-openbsd -S -s "$SIGN_KEY" -m SHA256SUMS -x SHA256SUMS.sig
cat SHA256SUMS
