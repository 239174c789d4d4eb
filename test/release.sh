#!/bin/sh
# Tests what a release is made of: the sources that it is built from, the image, the tarball, that builds are reproducible,
# the bill of materials, the Debian package, all of it as one release. Needs root (it runs containers, and installs a package
# where nothing of it stays), the network for Debian's sources, what test.sh needs, and:
#
#     apt-get install buildah zopfli podman crun catatonit dpkg-dev debhelper lintian mandoc signify-openbsd
#
#     test/release.sh [PART...]    all parts, or some of: pins image pod dist sbom deb make-release
#
# The last line tells how many tests passed and failed.
set -eu
cd "$(dirname "$0")/.."
# shellcheck source=test/lib.sh
. test/lib.sh

[ $# -gt 0 ] || set -- pins image pod dist sbom deb make-release
for part; do
    suite "$part" "test/$part.sh"
done
summary
