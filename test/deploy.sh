#!/bin/sh
# Tests what lies in deploy/ and doc/ against the programs that read it in earnest: the systemd of Debian 11, 12 and 13,
# each booted in namespaces of its own, with that release's promtool, node_exporter, OpenRC and etcd; mandoc; Kubernetes'
# own readers are in test/kube/deploy_test.go. What is deployed is the release build, which runs on all of them.
#
#     deploy.sh [bullseye] [bookworm] [trixie]      all three, if none is named
#
# Needs root, cgroup v2 mounted, and:
#
#     apt-get install debootstrap mandoc shellcheck python3-yaml debhelper
#
# and what make static needs. The roots (test/root.sh) are kept in build/deploy for a day. The last line tells how many
# tests passed, failed and were skipped.
set -eu
cd "$(dirname "$0")/.."
MAKE=${MAKE:-make}

# shellcheck source=test/lib.sh
. test/lib.sh

PACKAGES=systemd,openrc,curl,sqlite3,xxd,procps,etcd-server,etcd-client,prometheus,prometheus-node-exporter,\
protobuf-compiler,python3-protobuf,python3-grpcio,python3-cryptography
DEB_PACKAGES=libbearssl0,libprotobuf-c1 # what our .deb depends on; Debian 11 has not all of it

# The options, by verb, that --help has and the man page has.
help_options() { ./kmsplugin --help | sed -n 's/^ *\(-h, \)\{0,1\}\(--[a-z-]*\).*/\2/p' | sort; }
man_options() { sed -n 's/^\.It Fl \(h , \)\{0,1\}-\([a-z-]*\).*/--\2/p' doc/kmsplugin.8 | sort; }
help_verbs() { ./kmsplugin --help | sed -n '/^Verbs:/,/^Options/s/^  \([a-z][a-z]*\) .*/\1/p' | sort; }
man_verbs() { sed -n 's/^\.It Cm \([a-z]*\)$/\1/p' doc/kmsplugin.8 | sort; }
same() {
    printf '%s\n-- and\n%s\n' "$1" "$2"
    [ -n "$1" ] && [ "$1" = "$2" ]
}

lint_man() {
    # whether the pages that it refers to are installed here is not its fault
    mandoc -Tlint "$1" 2>&1 | grep -v -e 'referenced manual not found' -e 'mandoc.db' >"$tmp/lint" || :
    cat "$tmp/lint"
    [ ! -s "$tmp/lint" ]
}

# One command that kmsplugin would refuse if an example had a wrong option.
takes_pod_command() {
    python3 - <<'X'
import sys, yaml
pod = yaml.safe_load(open('deploy/kubeadm/kmsplugin.yaml'))['spec']['containers'][0]
assert pod['command'] == ['/kmsplugin', 'serve', '--sandbox', 'require'], pod['command']
X
}

# Every block of shell in the guide has a name, under which inside.sh runs it (or
# test/kube/cluster/, which asks the same of its own, or test/make-release.sh), or says that it is not run.
blocks() {
    mkdir -p "$tmp/stage/test/doc"
    awk -v to="$tmp/stage/test/doc/" '
        /^<!-- run: .* -->$/ { name = $3; next }
        /^<!-- (cluster|release): .* -->$/ { name = "/other"; next }
        /^```sh$/ { inside = 1; first = 1; next }
        /^```$/ { inside = 0; name = ""; next }
        inside && first && name == "" && $0 !~ /^# not run by the tests/ { print "no name, no mark: " $0; bad = 1 }
        inside { first = 0 }
        inside && name != "" && name != "/other" { print > (to name) }
        END { exit bad }' doc/operate.md &&
        sed -n '/^USE IT$/,/^    kmsplugin probe$/s/^    //p' README >"$tmp/stage/test/doc/readme" && grep -q create "$tmp/stage/test/doc/readme"
}

# What goes onto the machines: what `make install` does, with the release build, and the tests in /test. The Debian
# package is for the release that it is built on.
stage() {
    "$MAKE" -s install INSTALL_PROGRAM=build/static/kmsplugin DESTDIR="$tmp/stage" PREFIX=/usr/local &&
        cmp build/static/kmsplugin "$tmp/stage/usr/local/sbin/kmsplugin" &&
        mkdir -p "$tmp/stage/test/test" "$tmp/stage/test/deb" &&
        "$MAKE" -s deb >&2 && cp build/deb/kmsplugin_*.deb "$tmp/stage/test/deb/" &&
        sed -n 's/^VERSION_CODENAME=//p' /etc/os-release >"$tmp/stage/test/deb/codename" &&
        cp -R test/*.py test/deploy "$tmp/stage/test/test/" &&
        ln -s /usr/local/share/kmsplugin "$tmp/stage/test/deploy" && # what is copied from there is what was installed
        cp kms.proto "$tmp/stage/test/" || return 1
}

root_of() {
    [ -z "$(find "build/deploy/$1" -maxdepth 0 -mmin -1440 2>/dev/null)" ] || return 0
    rm -rf "build/deploy/$1"
    mkdir -p build/deploy
    packages=$PACKAGES
    [ "$1" = bullseye ] || packages=$packages,$DEB_PACKAGES
    if test/root.sh "$1" "build/deploy/$1" "$packages"; then
        touch "build/deploy/$1"
    else
        rm -rf "build/deploy/$1" # not for the next run
        return 1
    fi
}

# boot SUITE: what inside.sh finds out, and whether it ran all that it has to.
boot() {
    require "$1: root" root_of "$1" || return 0
    : >"$tmp/inside"
    sh test/deploy/boot.sh "$PWD/build/deploy/$1" "$tmp/stage" "$tmp/inside" >"$tmp/boot" 2>&1 &
    pid=$!
    wait "$pid" || :
    pid=
    sed -n -e "s/^ok /&$1: /p; s/^not ok /&$1: /p; s/^skip /&$1: /p" -e '/^[ #]/p' "$tmp/inside"
    sed -n -e "s/^ok /&$1: /p; s/^not ok /&$1: /p; s/^skip /&$1: /p" "$tmp/inside" >>"$tmp/lines"
    require "$1: the tests came to their end" grep -qx end "$tmp/inside" || { cat "$tmp/boot"; return 0; }
    for block in "$tmp"/stage/test/doc/*; do
        check "$1: guide, ${block##*/} was run" grep -qx "ran ${block##*/}" "$tmp/inside"
    done
}

[ $# -gt 0 ] || set -- bullseye bookworm trixie
[ "$(id -u)" -eq 0 ] || { echo 'deploy.sh: needs root'; exit 1; }

echo '== files'
require 'build' "$MAKE" -s kmsplugin static
require 'make install' stage
cp "$tmp/output" "$tmp/said"
check 'make install: says which program' grep -q '^installed build/static/kmsplugin, ' "$tmp/said"
check 'make install: not over a package' fails "$MAKE" -s install PREFIX="$tmp/prefix" PACKAGED=/bin/sh
check 'make install: nothing is there' fails test -e "$tmp/prefix"
check 'make install: unless told to' "$MAKE" -s install PREFIX="$tmp/prefix" PACKAGED=/bin/sh OVER_PACKAGE=1
check 'make install: the other program' cmp kmsplugin "$tmp/prefix/sbin/kmsplugin"
check 'make uninstall' "$MAKE" -s uninstall PREFIX="$tmp/prefix"
check 'make uninstall: no file is left' silent find "$tmp/prefix" -type f
for file in sbin/kmsplugin sbin/kmsplugin-ring sbin/kmsplugin-textfile share/man/man8/kmsplugin.8 lib/tmpfiles.d/kmsplugin.conf \
    lib/systemd/system/kmsplugin.service lib/systemd/system/kmsplugin.socket \
    lib/systemd/system/kmsplugin-textfile.service lib/systemd/system/kmsplugin-textfile.timer; do
    check "make install: $file" test -f "$tmp/stage/usr/local/$file"
done
check 'shellcheck' shellcheck -x test/deploy.sh test/deploy/boot.sh test/deploy/inside.sh deploy/openrc/kmsplugin deploy/kmsplugin-ring deploy/metrics/kmsplugin-textfile
check 'man page: lint' lint_man doc/kmsplugin.8
check 'man page: the options of --help' same "$(man_options)" "$(help_options)"
check 'man page: the verbs of --help' same "$(man_verbs)" "$(help_verbs)"
check 'static pod: the command' takes_pod_command
check 'guide: every block is run or says that it is not' blocks
for suite in "$@"; do
    echo "== the systemd of $suite"
    boot "$suite"
done
summary
