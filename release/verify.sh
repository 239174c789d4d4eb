#!/bin/sh
# Is a release as it was signed? Prints one sentence; exit 0 if it is, 1 if not, 2 if that cannot be told.
#
#     release/verify.sh FOLDER KEY.pub
#
# Files that are not there were not fetched; all that are there have to be named by SHA256SUMS, which is what is signed.
set -eu
say() {
	status=$1
	shift
	[ "$status" -eq 0 ] || exec >&2
	echo "verify: $*"
	exit "$status"
}

[ -n "${1:-}" ] || say 2 'which release? make verify RELEASE=FOLDER KEY=FILE.pub'
[ -n "${2:-}" ] || say 2 'whose key? make verify RELEASE=FOLDER KEY=FILE.pub'
signify=${SIGNIFY:-signify-openbsd}
command -v "$signify" >/dev/null || say 2 "needs $signify: apt-get install signify-openbsd"
[ -f "$2" ] || say 2 "$2: there is no such key"
key=$(realpath "$2")
cd "$1" 2>/dev/null || say 2 "$1: there is no such folder"
[ -f SHA256SUMS ] || say 1 "$1 has no SHA256SUMS"
[ -f SHA256SUMS.sig ] || say 1 "$1 has no signature (SHA256SUMS.sig): nobody answers for it"
"$signify" -V -q -p "$key" -m SHA256SUMS -x SHA256SUMS.sig 2>/dev/null ||
	say 1 "$1/SHA256SUMS is not what the key $2 has signed: another key, or it was changed"
count=0
for file in * .[!.]*; do
	case $file in SHA256SUMS | SHA256SUMS.sig | '.[!.]*') continue ;; esac
	line=$(awk -v file="$file" '$2 == file' SHA256SUMS | grep .) || say 1 "$1/$file is not in SHA256SUMS: not of this release"
	echo "$line" | sha256sum --status -c || say 1 "$1/$file was changed: its SHA-256 is not the signed one"
	count=$((count + 1))
done
[ "$count" -gt 0 ] || say 1 "$1 has no file of the release"
say 0 "$1 is as the key $2 has signed it: $count files of $(grep -c . SHA256SUMS)"
