#!/bin/sh
# Minimal Debian systems in a folder, to try things where nothing is installed yet. Needs root, and debootstrap to make one.
#
#     root.sh SUITE DIR [PACKAGE,...]    makes one in DIR: bullseye, bookworm, trixie or sid, and these packages
#     root.sh run DIR COMMAND...         runs a command in it, as root, in / and with stdin
#
# Mirror, proxy and apt's other settings are this machine's. A root is kept as build/roots/SUITE.tar and, for a day, taken
# from there. A command has process ids, /proc, /dev/pts, /dev/shm and /tmp of its own, the network of this machine, and
# a fresh environment. When it ends, or root.sh does, however that comes, its processes are dead and all is unmounted.
set -eu
here=$(dirname "$0")

die() {
    echo "root.sh: $*" >&2
    exit 1
}

pid=
ended() {
    [ -z "$pid" ] || kill -KILL "$pid" 2>/dev/null || :
}
trap ended EXIT
trap 'exit 1' HUP INT TERM

# contained COMMAND...: in namespaces of its own. It is not left alone: whoever started it, died, and it dies (unshare
# itself does not hear SIGTERM).
contained() {
    exec 3<&0
    setpriv --pdeathsig KILL unshare --mount --pid --fork --kill-child "$@" <&3 3<&- &
    pid=$!
    exec 3<&-
    status=0
    wait "$pid" || status=$?
    pid=
    return "$status"
}

run() {
    root=$1
    shift
    [ -x "$root/usr/bin/env" ] || die "$root is no root: root.sh SUITE $root makes one"
    # pivot_root and not chroot, in which no user namespace can be made. The shell stays as process 1.
    # shellcheck disable=SC2016 # that is for the inner shell
    contained sh -euc '
        mount --bind "$1" "$1"
        cd "$1"
        shift
        mount -t proc proc proc
        mount -t devpts -o newinstance,ptmxmode=0666,mode=0620,gid=5 devpts dev/pts
        mount -t tmpfs -o mode=1777 tmpfs dev/shm
        mount -t tmpfs -o mode=1777 tmpfs tmp
        pivot_root . mnt
        cd /
        umount -l /mnt
        "$@" || exit $?' sh "$root" env -i \
        HOME=/root LANG=C.UTF-8 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive \
        ${http_proxy:+"http_proxy=$http_proxy"} ${https_proxy:+"https_proxy=$https_proxy"} ${no_proxy:+"no_proxy=$no_proxy"} "$@"
}

# The first package source of this machine whose release matches $1.
source_of() {
    # shellcheck disable=SC2016 # those are apt's variables
    apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Created-By: Packages' 'Component: main' |
        awk -v release="^($1)\$" '$2 ~ release { print $1; exit }'
}

# What apt of this machine is told about its transport, with the certificates that this names.
settings() {
    apt-config dump | grep -E '^Acquire::' | grep -Ev '^Acquire::(IndexTargets|Changelogs|cdrom|GzipIndexes|Languages)\b' >"$1/etc/apt/apt.conf.d/99machine"
    for file in $(sed -n 's/^Acquire::https\?::.*"\(\/[^"]*\)";$/\1/p' "$1/etc/apt/apt.conf.d/99machine") /etc/ssl/certs/ca-certificates.crt; do
        [ ! -f "$file" ] || install -D -m 0644 "$file" "$1$file"
    done
    [ ! -d /usr/local/share/ca-certificates ] || cp -R /usr/local/share/ca-certificates "$1/usr/local/share/"
    for file in /etc/resolv.conf /etc/hosts; do
        [ ! -f "$file" ] || cp -L --remove-destination "$file" "$1$file"
    done
}

create() {
    suite=$1 root=$2 packages=${3:-}
    cache=$here/../build/roots/$suite.tar
    codename=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
    releases="$codename|oldoldstable|oldstable|stable|testing|unstable|sid"
    mirror=$(source_of "$releases")
    security=$(source_of "($releases)-security")
    updates=$(source_of "($releases)-updates")
    [ -n "$mirror" ] || die "this machine's apt knows no Debian mirror"
    ! [ -e "$root" ] || rmdir "$root" 2>/dev/null || die "$root: is already there"
    mkdir -p "$root"
    if [ -n "$(find "$cache" -mmin -1440 2>/dev/null)" ]; then
        tar -xf "$cache" -C "$root" --numeric-owner || die "$cache cannot be unpacked"
    else
        command -v debootstrap >/dev/null || die 'needs debootstrap'
        proxy=${http_proxy:-}
        [ -n "$proxy" ] || eval "$(apt-config shell proxy Acquire::http::Proxy)"
        # --mount-proc: what debootstrap mounts in the root is gone with it.
        contained --mount-proc env ${proxy:+"http_proxy=$proxy"} debootstrap --variant=minbase "$suite" "$root" "$mirror" >"$root.log" 2>&1 || {
            tail -n 20 "$root.log" "$root/debootstrap/debootstrap.log" >&2 || :
            rm -rf "$root" "$root.log"
            die "debootstrap of $suite failed"
        }
        rm "$root.log"
        rm -f "$root"/var/cache/apt/archives/*.deb
        keys=/usr/share/keyrings/debian-archive-keyring.gpg
        {
            echo "deb [signed-by=$keys] $mirror $suite main"
            [ "$suite" = sid ] || [ -z "$updates" ] || echo "deb [signed-by=$keys] $updates $suite-updates main"
            [ "$suite" = sid ] || [ -z "$security" ] || echo "deb [signed-by=$keys] $security $suite-security main"
        } >"$root/etc/apt/sources.list"
        settings "$root"
        mkdir -p "$here/../build/roots"
        tar -cf "$cache.new$$" -C "$root" --numeric-owner . && mv "$cache.new$$" "$cache"
    fi
    settings "$root"
    if [ -n "$packages" ]; then
        # shellcheck disable=SC2046 # each is a word
        run "$root" sh -euc 'apt-get -q update && apt-get -qy upgrade && exec apt-get -qy install --no-install-recommends "$@"' \
            sh $(echo "$packages" | tr ',' ' ') || die "$packages cannot be installed"
    fi
}

[ "$(id -u)" -eq 0 ] || die 'needs root'
case "$#:${1:-}" in
[3-9]*:run | [1-9][0-9]*:run)
    shift
    run "$@" ;;
[23]:bullseye | [23]:bookworm | [23]:trixie | [23]:sid)
    create "$@" ;;
*)  sed -n 's/^#     //p' "$0" >&2
    exit 2 ;;
esac
