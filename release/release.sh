#!/bin/sh
# A release, in one folder: source, programs, images and bills of materials for each architecture, the Debian package of
# this one, and their sums. All of it is built from the source archive, in a folder of its own, so it is the same wherever
# that is; what is not committed cannot get into it. Prints the digests of the images.
#
#     [ARCHES='x86_64 aarch64'] [SIGN_KEY=FILE.sec] [ALLOW_PLACEHOLDERS=1] release/release.sh FOLDER
#
# Needs what make static, image, sbom and deb need, Debian's cross compilers (release/static-libs.sh), and for a signature
# signify-openbsd. Debian's sources are those that release/pins names, from build/src, or fetched; nothing else will do.
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

case "${MAINTAINER:-} ${HOMEPAGE:-}" in
' ' | *.localdomain* | *.invalid*)
    [ -n "${ALLOW_PLACEHOLDERS:-}" ] || die 'MAINTAINER and HOMEPAGE of the Makefile are placeholders:' \
        'make release MAINTAINER="NAME <ADDRESS>" HOMEPAGE=URL, or ALLOW_PLACEHOLDERS=1' ;;
esac
if [ -n "${SIGN_KEY:-}" ]; then
    [ -f "$SIGN_KEY" ] || die "SIGN_KEY=$SIGN_KEY: there is no such file"
    SIGN_KEY=$(realpath "$SIGN_KEY")
fi
[ -z "$(git status --porcelain)" ] || die 'the tree has changes that are not committed'
PINS=only release/sources.sh >/dev/null
[ ! -e "$1" ] || rmdir "$1" 2>/dev/null || die "$1: is there already, and not empty"
mkdir -p "$1"
out=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

version=$("$MAKE" -s version)
"$MAKE" -s dist
cp "build/kmsplugin-$version.tar.gz" "$out/"
tar -xzf "$out/kmsplugin-$version.tar.gz" -C "$work"
mkdir "$work/kmsplugin-$version/build"
cp -R build/src "$work/kmsplugin-$version/build/src"
cd "$work/kmsplugin-$version"
"$MAKE" -s deb >"$work/log" 2>&1 || { cat "$work/log" >&2; die 'deb: not built'; }
cp "build/deb/kmsplugin_$version"-*.deb "$out/"
for arch in $ARCHES; do
    dir=$arch/
    [ "$arch" != "$(uname -m)" ] || dir=
    OFFLINE=1 "$MAKE" -s static sbom image ARCH="$arch" >"$work/log" 2>&1 || { cat "$work/log" >&2; die "$arch: not built"; }
    cp "build/static/${dir}kmsplugin" "$out/kmsplugin-$version-$arch"
    cp "build/sbom/${dir}kmsplugin-$version.cdx.json" "$out/kmsplugin-$version-$arch.cdx.json"
    cp "build/image/${dir}kmsplugin.tar" "$out/kmsplugin-$version-$arch.oci.tar"
    digest=$(tar -xOf "$out/kmsplugin-$version-$arch.oci.tar" ./index.json | sed 's/.*"digest":"\(sha256:[0-9a-f]*\)".*/\1/')
    echo "$digest  localhost/kmsplugin:$version  $arch" | tee -a "$out/IMAGES"
done

cd "$out"
sha256sum -- * >"$work/SHA256SUMS"
mv "$work/SHA256SUMS" .
cat SHA256SUMS
if [ -n "${SIGN_KEY:-}" ]; then
    signify-openbsd -S -s "$SIGN_KEY" -m SHA256SUMS -x SHA256SUMS.sig
    echo "$out: signed by $SIGN_KEY"
else
    echo "$out is not signed: signify-openbsd -S -s KEY.sec -m $out/SHA256SUMS -x $out/SHA256SUMS.sig signs it" \
        '(signify-openbsd -G -p KEY.pub -s KEY.sec makes a key), or make release SIGN_KEY=KEY.sec'
fi
