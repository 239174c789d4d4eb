#!/bin/sh
# Tests the guide and what lies in deploy/ against the programs that read it in earnest: the systemd of Debian 12 and 13,
# three machines of each booted in namespaces of their own, with that release's promtool, node_exporter, OpenRC and etcd;
# mandoc. Kubernetes' own programs are in test/kube. What is deployed is the Debian package, then the release build.
#
#     deploy.sh [bookworm] [trixie]      both, if none is named
#
# Needs root, cgroup v2 mounted, loop devices, and:
#
#     apt-get install debootstrap mandoc shellcheck debhelper e2fsprogs
#
# and what make static needs. The roots (test/root.sh) are kept in build/deploy for a day. The last line tells how many
# tests passed, failed and were skipped.
set -eu
cd "$(dirname "$0")/.."
MAKE=${MAKE:-make}

# shellcheck source=test/lib.sh
. test/lib.sh

PACKAGES=systemd,openrc,curl,sqlite3,xxd,procps,etcd-server,etcd-client,prometheus,prometheus-node-exporter,\
protobuf-compiler,python3-protobuf,python3-grpcio,python3-cryptography,python3-hpack,libbearssl0,libprotobuf-c1
MEDIUM=16M              # of a medium for copies of KEKs
machines='' loops=''    # pids, devices

clean() {
    # shellcheck disable=SC2086 # a word each
    [ -z "$machines" ] || { kill $machines 2>/dev/null || :; wait; }
    for loop in $loops; do
        losetup -d "$loop" || :
    done
    rm -rf "$tmp"
}

lint_man() {
    # whether the pages that it refers to are installed here is not its fault
    mandoc -Tlint "$1" 2>&1 | grep -v -e 'referenced manual not found' -e 'mandoc.db' >"$tmp/lint" || :
    cat "$tmp/lint"
    [ ! -s "$tmp/lint" ]
}

# Every block of shell in the guide has a name, under which inside.sh, test/kube or pod.sh runs it, or says that it is not
# run. No two have the same.
blocks() {
    mkdir -p "$tmp/stage/test/doc"
    awk -v to="$tmp/stage/test/doc/" '
        /^```sh / { name = $2; if (name in all) { print "twice: " name; bad = 1 } all[name]; inside = 1; next }
        /^```sh$/ { name = ""; inside = 1; first = 1; next }
        /^```/ { inside = 0; next }
        inside && first && $0 !~ /^# not run by the tests/ { print FILENAME ": no name, no mark: " $0; bad = 1 }
        inside { first = 0; if (name != "") print > (to name) }
        END { exit bad }' doc/operate.md doc/k3s.md doc/variants.md &&
        sed -n '/^USE IT/,/^Options:$/s/^    //p' README | sed '/^make/d' >"$tmp/stage/test/doc/readme" &&
        grep 'kmsplugin-ring new' "$tmp/stage/test/doc/readme"
}

# The page is one: its length, and that it destroys nothing.
# shellcheck disable=SC2016 # fences
page() {
    sed '/^# What else/,$d' doc/operate.md >"$tmp/page"
    awk 'END { print NR " lines"; exit NR > 125 }' "$tmp/page" && awk 'END { print NR " lines"; exit NR > 420 }' doc/operate.md &&
        ! LC_ALL=C.UTF-8 grep -nE '^.{101}' doc/operate.md doc/k3s.md doc/variants.md README &&
        ! sed -n '/^```sh/,/^```$/p' "$tmp/page" | grep -nwE 'rm|shred|mv'
}

# What goes onto the machines: the package, what `make install` makes of the release build, and the tests, in /test.
stage() {
    "$MAKE" -s install DESTDIR="$tmp/stage/test/local" PREFIX=/usr/local INSTALL_PROGRAM=build/static/kmsplugin &&
        cmp build/static/kmsplugin "$tmp/stage/test/local/usr/local/sbin/kmsplugin" &&
        mkdir -p "$tmp/stage/test/test" "$tmp/stage/test/deb" &&
        "$MAKE" -s deb >&2 && cp build/deb/kmsplugin_*.deb "$tmp/stage/test/deb/" &&
        cp -R test/*.py test/deploy "$tmp/stage/test/test/" &&
        cp -R deploy kms.proto "$tmp/stage/test/" || return 1
}

root_of() {
    [ -z "$(find "build/deploy/$1" -maxdepth 0 -mmin -1440 2>/dev/null)" ] || return 0
    rm -rf "build/deploy/$1"
    mkdir -p build/deploy
    if test/root.sh "$1" "build/deploy/$1" "$PACKAGES"; then
        touch "build/deploy/$1"
    else
        rm -rf "build/deploy/$1" # not for the next run
        return 1
    fi
}

# medium NAME: an empty one, in $folder.
medium() {
    truncate -s $MEDIUM "$folder/$1.img" && mkfs.ext4 -q "$folder/$1.img" && loop=$(losetup --find --show "$folder/$1.img") || return 1
    loops="$loops $loop"
    ln -s "$loop" "$folder/$1"
}

# boot SUITE: what inside.sh finds out, and whether it ran all that it has to.
boot() {
    require "$1: root" root_of "$1" || return 0
    folder=$tmp/$1
    mkdir "$folder"
    require "$1: media" eval 'medium sdX1 && medium sdY1' || return 0
    : >"$folder/out"
    for machine in cp-2 cp-3 cp-1; do
        sh test/deploy/boot.sh "$PWD/build/deploy/$1" "$tmp/stage" "$folder" $machine >"$folder/$machine.log" 2>&1 &
        machines="$machines $!"
    done
    wait $! || :
    # shellcheck disable=SC2086 # a word each
    kill $machines 2>/dev/null || :
    wait
    machines=''
    sed -n -e "s/^ok /&$1: /p; s/^not ok /&$1: /p; s/^skip /&$1: /p" -e '/^[ #]/p' "$folder/out"
    sed -n -e "s/^ok /&$1: /p; s/^not ok /&$1: /p; s/^skip /&$1: /p" "$folder/out" >>"$tmp/lines"
    require "$1: the tests came to their end" grep -qx end "$folder/out" || { cat "$folder"/*.log; return 0; }
    for block in "$tmp"/stage/test/doc/*; do
        name=${block##*/}
        grep -q -e "\(guide\|operator\|recipe\|answers\)(t, [^\"]*\"$name\"" -e "^check .* block $name\$" test/kube/cluster/*_test.go test/pod.sh ||
            check "$1: guide, $name was run" grep -qx "ran $name" "$folder/out"
    done
}

[ $# -gt 0 ] || set -- bookworm trixie
[ "$(id -u)" -eq 0 ] || { echo 'deploy.sh: needs root'; exit 1; }

echo '== files'
require 'build' "$MAKE" -s kmsplugin static
require 'make install, make deb' stage
cp "$tmp/output" "$tmp/said"
check 'make install: says which program' grep -q '^installed build/static/kmsplugin, ' "$tmp/said"
check 'make install: not over a package' fails "$MAKE" -s install PREFIX="$tmp/prefix" PACKAGED=/bin/sh
check 'make install: nothing is there' fails test -e "$tmp/prefix"
check 'make install: unless told to' "$MAKE" -s install PREFIX="$tmp/prefix" PACKAGED=/bin/sh OVER_PACKAGE=1
check 'make install: the other program' cmp kmsplugin "$tmp/prefix/sbin/kmsplugin"
check 'make uninstall' "$MAKE" -s uninstall PREFIX="$tmp/prefix"
check 'make uninstall: no file is left' silent find "$tmp/prefix" -type f
for file in sbin/kmsplugin sbin/kmsplugin-ring sbin/kmsplugin-textfile share/man/man8/kmsplugin.8 share/man/man8/kmsplugin-ring.8 \
    lib/tmpfiles.d/kmsplugin.conf share/kmsplugin/encryption-v2.yaml share/kmsplugin/kubeadm/etcdctl share/kmsplugin/k3s/history.sql \
    share/kmsplugin/metrics/kmsplugin.rules.yaml share/kmsplugin/openrc/kmsplugin lib/systemd/system/kmsplugin.service \
    lib/systemd/system/kmsplugin.socket lib/systemd/system/kmsplugin-textfile.service lib/systemd/system/kmsplugin-textfile.timer; do
    check "make install: $file" test -f "$tmp/stage/test/local/usr/local/$file"
done
check 'shellcheck' shellcheck -x test/deploy.sh test/deploy/boot.sh test/deploy/inside.sh deploy/openrc/kmsplugin deploy/kmsplugin-ring \
    deploy/metrics/kmsplugin-textfile deploy/kubeadm/etcdctl
for page in kmsplugin kmsplugin-ring; do
    check "man page of $page: lint" lint_man "doc/$page.8"
done
check 'guide: every block is run or says that it is not' blocks
check 'guide: the page and all of it fit, and no block of the page removes a file' page
for suite in "$@"; do
    echo "== three machines with the systemd of $suite"
    boot "$suite"
done
summary
