#!/bin/sh
# The tarball of make dist: is it the same twice, does what is in it build and pass its own tests; and are two release
# builds of it, libraries included, the same bytes wherever, whenever and by whom they are made? A line `ok` or `not ok`
# for each test, those of the tarball's own test.sh among them as one.
set -eu
cd "$(dirname "$0")/.."
MAKE=${MAKE:-make}
unset MAKEFLAGS MFLAGS MAKELEVEL    # of a make that calls this

# shellcheck source=test/lib.sh
. test/lib.sh
label='dist: '

version=$("$MAKE" -s version)
release=kmsplugin-$version
tarball=build/$release.tar.gz

# Sorted, one owner, one time, nothing that git does not know, under a folder that names the version.
contents() {
    python3 - "$tarball" "$release" <<'X'
import gzip, os, subprocess, sys, tarfile
path, name = sys.argv[1:]
raw = open(path, 'rb').read(10)
assert raw[3] == 0 and raw[4:8] == bytes(4), 'gzip tells a name or a time'
members = tarfile.open(path).getmembers()
names = [m.name for m in members]
assert names == sorted(names) and all(n.startswith(name + '/') for n in names)
assert {(m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, '', '')}
assert len({m.mtime for m in members}) == 1 and {m.mode for m in members} <= {0o644, 0o755}
tracked = subprocess.run(['git', 'ls-files'], capture_output=True, text=True).stdout.split('\n')[:-1]
assert not tracked or sorted(n.removeprefix(name + '/') for n in names) == sorted(tracked), 'other files than git has'
print(len(names), 'files,', os.path.getsize(path), 'bytes')
X
}

check 'make dist' "$MAKE" -s dist
check 'the version is one' sh -c "./kmsplugin --version | grep -qx 'kmsplugin $version' && dpkg-parsechangelog -l release/debian/changelog -S Version | grep -q '^$version-' &&
    grep -q 'image: localhost/kmsplugin:$version\$' deploy/kubeadm/kmsplugin.yaml"
cp "$tarball" "$tmp/first.tar.gz"
check 'make dist, later' env TZ=Asia/Tokyo sh -c "umask 077; sleep 1.1; touch README; '$MAKE' -s dist"
check 'the same bytes twice' cmp "$tmp/first.tar.gz" "$tarball"
check 'names, owners, times' contents
tail -n 1 "$tmp/output"

# Two folders, of other names and lengths. (Not with a space: musl's configure cannot bear one.)
one=$tmp/one/$release two=$tmp/another-folder/with-a-longer-name/$release
mkdir -p "${one%/*}" "${two%/*}"
tar -xzf "$tarball" -C "${one%/*}"
tar -xzf "$tarball" -C "${two%/*}"
check 'make dist, in the tarball' "$MAKE" -s -C "$one" dist
check 'the same bytes again' cmp "$one/$tarball" "$tmp/first.tar.gz"
check 'make, in the tarball' "$MAKE" -s -C "$one"
tests() {
    "$MAKE" -s -C "$one" test >"$tmp/tests" 2>&1 || { grep '^not ok' "$tmp/tests"; return 1; }
}
check 'make test, in the tarball' tests
tail -n 1 "$tmp/tests"

# The sources are fetched once; all else is made twice: the second time with another time zone, locale and umask, and one
# processor.
mkdir -p "$one/build" "$two/build"
check 'sources' release/sources.sh
cp -R build/src "$one/build/"
cp -R build/src "$two/build/"
check 'make static, in one folder' env OFFLINE=1 "$MAKE" -s -C "$one" static
check 'make static, in another' sh -c "umask 077; OFFLINE=1 TZ=Asia/Tokyo LC_ALL=C.UTF-8 taskset -c 0 '$MAKE' -s -C '$two' static"
check 'the program is the same, byte for byte' cmp "$one/build/static/kmsplugin" "$two/build/static/kmsplugin"
sha256sum "$one/build/static/kmsplugin" | cut -d ' ' -f 1
check 'and it names no folder' sh -c "! grep -aq -e '$one' -e /build/ '$one/build/static/kmsplugin'"
