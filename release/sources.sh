#!/bin/sh
# Brings the source archives that the release is linked from into build/src, and prints their SHA-256 and names.
#
#   [OFFLINE=1] [PINS=only|renew] release/sources.sh [PACKAGE...]
#
# release/pins names them, as a list for sha256sum; a .dsc has package and version in its name. What is in build/src has to
# be what is pinned. What is not there comes from the Debian mirrors of this machine's apt, which checks Debian's
# signature. Where a mirror has another version only, this says so and takes that one. PINS=only fails instead; PINS=renew
# takes the newest of all; OFFLINE=1 asks no mirror. PACKAGEs are sources that only tests need, not pinned.
set -eu
export LC_ALL=C
pins=$PWD/release/pins
mkdir -p build/src
cd build/src

die() {
	echo "sources.sh: $*" >&2
	exit 1
}

# The lines of package $1 that are pinned; the version that file names tell.
pinned() {
	grep "  $1_" "$pins" || :
}
version() {
	sed -n 's/.* [^ _]*_\([^ ]*\)\.dsc\( .*\)\{0,1\}$/\1/p'
}

# Whether all that is pinned of package $1 is here. An archive that is not the pinned one ends it all.
is_here() {
	missing=
	pinned "$1" >.pinned
	while read -r sum file; do
		if [ ! -f "$file" ]; then
			missing=$file
		elif ! echo "$sum  $file" | sha256sum --status -c; then
			die "build/src/$file is not the archive that release/pins names: another SHA-256. Nothing was unpacked"
		fi
	done <.pinned
	[ -s .pinned ] && [ -z "$missing" ]
}

# deb-src entries are rarely configured, and the machine's apt is not ours to change: a configuration of our own asks its
# mirrors for the sources of Debian $1.
apt_for() {
	apt=$PWD/apt/$1
	export APT_CONFIG="$apt/conf"
	[ "$1" != "${updated:-}" ] || return 0
	mkdir -p "$apt/lists/partial" "$apt/cache"
	# shellcheck disable=SC2016 # these dollars are apt's
	env -u APT_CONFIG apt-get indextargets --format '$(ORIGIN)|$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' | sort -u |
		sed -n 's,^Debian|,deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] ,p' |
		sed -E "s/ (oldstable|stable|testing|unstable|sid|bullseye|bookworm|trixie)/ $1/" >"$apt/sources.list"
	[ -s "$apt/sources.list" ] || die 'apt knows no Debian suite: run apt-get update'
	cat >"$apt/conf" <<-END
		Dir::Etc::sourcelist "$apt/sources.list";
		Dir::Etc::sourceparts "-";
		Dir::State::lists "$apt/lists";
		Dir::Cache "$apt/cache";
		APT::Update::Error-Mode "any";
		APT::Sandbox::User "root"; // apt's own user may not be able to write here
	END
	apt-get -qq update >&2 || die "no mirror of this machine gives the list of Debian's sources"
	updated=$1
}

# What apt would fetch, in a folder where nothing is yet: a line an archive.
uris() {
	(cd "$apt" && apt-get -qq --print-uris --only-source source "$1")
}

take() {
	package=$2 wanted=$(pinned "$2" | version)
	is_here "$package" && [ "${PINS:-}" != renew ] && { cat .pinned; return; }
	[ -z "${OFFLINE:-}" ] || die "OFFLINE=1, and build/src lacks ${missing:-the archives of $package}"
	apt_for "$1"
	if [ -n "$wanted" ] && [ "${PINS:-}" != renew ] && uris "$package=$wanted" >/dev/null 2>&1; then
		apt-get -qq --download-only --only-source source "$package=$wanted" >&2
		is_here "$package" || die "build/src lacks $missing"
		cat .pinned
		return
	fi
	uris "$package" >.uris || die "no mirror of this machine has the sources of $package"
	newest=$(version <.uris)
	if [ -n "$wanted" ] && [ "${PINS:-}" != renew ]; then
		told="$package $wanted is pinned, and the mirror has $newest"
		[ "${PINS:-}" != only ] || die "$told: make pins renews the pins"
		echo "sources.sh: $told: building with that; make pins renews the pins" >&2
	fi
	apt-get -qq --download-only --only-source source "$package=$newest" >&2
	cut -d ' ' -f 2 .uris | xargs sha256sum
}

trap 'rm -f .pinned .uris .used' EXIT
if [ $# -gt 0 ]; then
	for package; do take bookworm "$package"; done
	exit
fi
{
	take bookworm bearssl
	# Debian 12's musl, 1.2.3, does not relocate pointers that the linker has packed.
	take trixie musl
	take bookworm nghttp2
	take bookworm protobuf-c
} >.used
sort -k 2 .used
