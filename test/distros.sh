#!/bin/sh
# What a new user does, on a new machine: in minimal roots of Debian with nothing else in them, the two commands of the
# README as they stand there, make test once more as an ordinary user, make deb, and the package in a root of its own.
# Needs root, debootstrap and the network.
#
#     distros.sh [SUITE...]    bookworm, trixie and sid, or some of them
#
# The last line tells how many tests passed and failed, those of make test among them.
set -eu
cd "$(dirname "$0")/.."
MAKE=${MAKE:-make}
unset MAKEFLAGS MFLAGS MAKELEVEL    # of a make that calls this

if [ "${1:-}" != inside ]; then
    [ "$(id -u)" -eq 0 ] || { echo 'distros.sh: needs root' >&2; exit 1; }
    mkdir -p build/roots
    export TMPDIR="$PWD/build/roots" # /tmp may be too small for a root, or give it no devices
fi
# shellcheck source=test/lib.sh
. test/lib.sh
SUITE_SECONDS=1800

# Inside: starts command $1, which serves, until what it says is ready, or has ended.
serving() {
    { sh -c "$1" && status=0 || status=$?; echo "ended $status"; } >"$tmp/log" 2>&1 &
    job=$!
    until grep -q -e ' msg=ready ' -e '^ended ' "$tmp/log"; do
        sleep 0.2
    done
    check 'serves' said ' msg=ready '
    server=
    for exe in /proc/[0-9]*/exe; do
        case $(readlink "$exe") in */kmsplugin) server=${exe%/exe} ;; esac
    done
}

# It is stopped by its pid, and so ends what started it.
stopping() {
    [ -z "$server" ] || kill "${server#/proc/}" || :
    wait "$job"
    check 'ends well' said '^ended 0$'
}

said() {
    grep -e "$1" "$tmp/log" || { tail -n 20 "$tmp/log"; return 1; }
}

# probe COMMAND: it prints that all six steps went well, and ends well.
probe() {
    status=0
    sh -c "$1" >"$tmp/steps" 2>&1 || status=$?
    cat "$tmp/steps"
    [ "$status" -eq 0 ] && [ "$(grep -c '^v[12] .* ok ' "$tmp/steps")" -eq 6 ]
}

# Inside, the README's first command: from another terminal, the program is probed as it says.
inside_run() {
    serving "$1"
    check 'probe, as it says, has six steps' probe "$(sed -n 's/^probe it: *//p' "$tmp/log")"
    stopping
}

# Inside a root of its own, the package in /root.
inside_installed() {
    check 'apt-get update' apt-get -q update
    require 'the package is installed' apt-get -qy install /root/*.deb || return 0
    check 'kmsplugin --version' kmsplugin --version
    (umask 077 && kmsplugin genkey >/root/kek)
    endpoint=unix:///run/kms.sock
    serving "KMS_KEK_FILE=/root/kek exec kmsplugin serve --listen $endpoint"
    check 'probe has six steps' probe "kmsplugin probe $endpoint"
    stopping
    check 'the package is purged' dpkg --purge kmsplugin
    check 'and gone' fails test -e /usr/sbin/kmsplugin
}

if [ "${1:-}" = inside ]; then
    "inside_$2" "${3:-}"
    exit
fi

# part NAME ROOT COMMAND...: runs it in a root, shows its tests, all that it printed if one fails, and how many there were.
part() {
    name=$1
    root=$2
    shift 2
    echo "== $name"
    run_suite "$name" test/root.sh run "$root" "$@"
    if grep -aq '^not ok ' "$tmp/output"; then
        cat "$tmp/output"
    else
        grep -aE '^(ok|skip) ' "$tmp/output" || :
    fi
    cat "$tmp/output" >>"$tmp/lines"
    echo "# $name: $(grep -ac '^ok ' "$tmp/output" || :) passed," \
        "$(grep -ac '^not ok ' "$tmp/output" || :) failed, $(grep -ac '^skip ' "$tmp/output" || :) skipped"
}

readme() {
    sed -e ':more' -e '/\\$/{N; s/\\\n *//; b more' -e '}' README | sed -n "s/^    \(apt-get update && .* && $1\)\$/\1/p"
}

release=kmsplugin-$("$MAKE" -s version)
# shellcheck disable=SC2016 # that is for a shell inside
in_sources='cd "$1" && eval "$2"'
as_user='setpriv --reuid=user --regid=user --init-groups --reset-env'

distro() {
    root=$tmp/$1
    label="$1: "
    require 'a minimal root' test/root.sh "$1" "$root" || return 0
    tar -xzf "build/$release.tar.gz" -C "$root/root"
    part "$1, root: README, make run" "$root" sh -c "cd /root/$release && test/distros.sh inside run \"\$1\"" sh "$(readme 'make run')"
    part "$1, root: README, make test" "$root" sh -c "$in_sources" sh "/root/$release" "$(readme 'make test')"

    cp "build/$release.tar.gz" "$root/srv/"
    check 'a user, and what make deb needs' test/root.sh run "$root" sh -c \
        'useradd --create-home --shell /bin/sh user && apt-get -qy install debhelper'
    # shellcheck disable=SC2086 # words
    check 'user: sources' test/root.sh run "$root" $as_user tar -xzf "/srv/$release.tar.gz" -C /home/user
    # shellcheck disable=SC2086 # words
    part "$1, user: make test" "$root" $as_user sh -c "$in_sources" sh "/home/user/$release" 'make test'
    # shellcheck disable=SC2086 # words
    check 'user: make deb' test/root.sh run "$root" $as_user sh -c "$in_sources" sh "/home/user/$release" 'make deb'

    fresh=$tmp/$1-fresh
    require 'another minimal root' test/root.sh "$1" "$fresh" || return 0
    tar -xzf "build/$release.tar.gz" -C "$fresh/root"
    cp "$root/home/user/$release"/build/deb/kmsplugin_*.deb "$fresh/root/" || :
    part "$1, root: the package" "$fresh" sh -c "cd /root/$release && test/distros.sh inside installed"
    rm -rf "$root" "$fresh"
}

check 'make dist' "$MAKE" -s dist
check 'README has both commands' test -n "$(readme 'make run')" -a -n "$(readme 'make test')"
[ $# -gt 0 ] || set -- bookworm trixie sid
for suite; do
    distro "$suite"
done
label=
check 'nothing is left mounted or running' fails grep -l "$(basename "$tmp")/" /proc/[0-9]*/mountinfo
summary
