#!/bin/sh
# Tests what a release is made of: the image, the tarball, that builds are reproducible, the bill of materials, the
# Debian package. Needs root (it runs containers, and installs a package where nothing of it stays), the network for
# Debian's sources, what test.sh needs, and:
#
#     apt-get install buildah podman crun dpkg-dev debhelper lintian mandoc
#
#     test/release.sh [PART...]    all parts, or some of: image dist sbom deb
#
# The last line tells how many tests passed and failed.
set -eu
cd "$(dirname "$0")/.."
PART_SECONDS=900        # of one part, should it hang

tmp=$(mktemp -d)
pid=
clean() {
    if [ -n "$pid" ]; then
        kill "$pid" 2>/dev/null || :
        wait "$pid" || :
    fi
    rm -rf "$tmp"
}
trap clean EXIT
trap 'exit 1' HUP INT TERM

: >"$tmp/lines"
[ $# -gt 0 ] || set -- image dist sbom deb
for part; do
    echo "== $part"
    timeout "$PART_SECONDS" "test/$part.sh" >"$tmp/output" 2>&1 &
    pid=$!
    status=0
    wait "$pid" || status=$?
    pid=
    if [ "$status" -ne 0 ] || ! grep -q '^ok ' "$tmp/output"; then
        echo "not ok $part: came to no end, status $status" >>"$tmp/output"
    fi
    tee -a "$tmp/lines" <"$tmp/output"
done

count() {
    grep -c "^$1 " "$tmp/lines" || :
}
passed=$(count ok) failed=$(count 'not ok') skipped=$(count skip)
if [ "$skipped" -gt 0 ]; then
    echo "$passed passed, $failed failed, $skipped skipped"
else
    echo "$passed passed, $failed failed"
fi
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
