#!/bin/sh
# Tests what lies in deploy/ and doc/ against the programs that read it in earnest:
# systemd (booted in namespaces of its own), promtool, node_exporter, OpenRC, etcd,
# mandoc; Kubernetes' own readers are in test/kube/deploy_test.go. Needs root, and:
#
#     apt-get install systemd mandoc shellcheck curl sqlite3 xxd python3-yaml
#
# and what test.sh needs. Prometheus, node_exporter, OpenRC and etcd are fetched as
# Debian packages into build/deploy and not installed. The last line tells how many
# tests passed and failed.
set -eu
cd "$(dirname "$0")/.."
MAKE=${MAKE:-make}

# shellcheck source=test/lib.sh
. test/lib.sh

# Debian packages, unpacked into build/deploy/root once.
fetch() {
    for package in "$@"; do
        [ ! -e "build/deploy/$package" ] || continue
        mkdir -p build/deploy/root
        (cd build/deploy && apt-get download "$package" && dpkg-deb -x "$package"_*.deb root && rm "$package"_*.deb && touch "$package") || return 1
    done
}

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

exposure() {
    score=$(systemd-analyze security --offline=true --no-pager "$1" | sed -n 's/.*Overall exposure level for [^:]*: \([0-9.]*\).*/\1/p')
    echo "$1: exposure $score" | tee -a "$tmp/scores"
    [ -n "$score" ] && awk "BEGIN { exit !($score <= 1.5) }"
}

# The units verified where they belong, in a mount namespace: nothing of it stays.
verify_units() {
    # shellcheck disable=SC2016
    unshare --mount sh -euc '
        stage=$1
        for dir in /usr/local/sbin /usr/local/lib; do
            mkdir -p "$dir"
            mount -t tmpfs tmpfs "$dir"
        done
        cp -R "$stage/usr/local/sbin/." /usr/local/sbin/
        cp -R "$stage/usr/local/lib/." /usr/local/lib/
        systemd-analyze verify --man=no kmsplugin.service kmsplugin.socket kmsplugin-textfile.service kmsplugin-textfile.timer' sh "$tmp/stage"
}

# One command that kmsplugin would refuse if an example had a wrong option.
takes_pod_command() {
    python3 - <<'X'
import sys, yaml
pod = yaml.safe_load(open('deploy/kubeadm/kmsplugin.yaml'))['spec']['containers'][0]
assert pod['command'] == ['/kmsplugin', 'serve'], pod['command']
X
}

# Every block of shell in the guide has a name, under which inside.sh runs it (or
# test/kube/cluster/, which asks the same of its own), or says that it is not run.
blocks() {
    mkdir -p "$tmp/stage/test/doc"
    awk -v to="$tmp/stage/test/doc/" '
        /^<!-- run: .* -->$/ { name = $3; next }
        /^<!-- cluster: .* -->$/ { name = "/cluster"; next }
        /^```sh$/ { inside = 1; first = 1; next }
        /^```$/ { inside = 0; name = ""; next }
        inside && first && name == "" && $0 !~ /^# not run by the tests/ { print "no name, no mark: " $0; bad = 1 }
        inside { first = 0 }
        inside && name != "" && name != "/cluster" { print > (to name) }
        END { exit bad }' doc/operate.md
}

echo '== files'
check 'packages' fetch prometheus prometheus-node-exporter openrc librc1 libeinfo1 etcd-server etcd-client
check 'build' "$MAKE" -s kmsplugin
check 'make install' "$MAKE" -s install DESTDIR="$tmp/stage" PREFIX=/usr/local
for file in sbin/kmsplugin sbin/kmsplugin-textfile share/man/man8/kmsplugin.8 lib/tmpfiles.d/kmsplugin.conf \
    lib/systemd/system/kmsplugin.service lib/systemd/system/kmsplugin.socket \
    lib/systemd/system/kmsplugin-textfile.service lib/systemd/system/kmsplugin-textfile.timer; do
    check "make install: $file" test -f "$tmp/stage/usr/local/$file"
done
check 'shellcheck' shellcheck -x test/deploy.sh test/deploy/boot.sh test/deploy/inside.sh deploy/openrc/kmsplugin deploy/metrics/kmsplugin-textfile
check 'man page: lint' lint_man doc/kmsplugin.8
check 'man page: the options of --help' same "$(man_options)" "$(help_options)"
check 'man page: the verbs of --help' same "$(man_verbs)" "$(help_verbs)"
check 'static pod: the command' takes_pod_command
check 'systemd-analyze verify' silent verify_units
check 'exposure of kmsplugin.service is at most 1.5' exposure deploy/systemd/kmsplugin.service
check 'exposure of kmsplugin-textfile.service is at most 1.5' exposure deploy/systemd/kmsplugin-textfile.service
cat "$tmp/scores"
promtool=$PWD/build/deploy/root/usr/bin/promtool
check 'alert rules: syntax' "$promtool" check rules deploy/metrics/kmsplugin.rules.yaml
check 'alert rules: they fire when they should' sh -c "cd test/deploy && '$promtool' test rules alerts.yaml"
check 'guide: every block is run or says that it is not' blocks
check 'guide: plain-kek.conf is the file in deploy' sh -c "sed -n \"/^cat .*plain-kek/,/^X/p\" doc/operate.md | sed '1d;\$d' >'$tmp/plain' && grep -v '^#' deploy/systemd/plain-kek.conf | diff - '$tmp/plain'"

echo '== under systemd'
stage=$tmp/stage
cp -R build/deploy/root/. "$stage/"
for dir in bin sbin lib; do # links into /usr on this machine
    if [ -d "$stage/$dir" ]; then
        mkdir -p "$stage/usr/$dir"
        cp -R "$stage/$dir/." "$stage/usr/$dir/"
        rm -r "${stage:?}/$dir"
    fi
done
mkdir -p "$stage/test/test" "$stage/var/lib/prometheus/node-exporter"
cp test/*.py "$stage/test/test/"
cp kms.proto "$stage/test/"
cp test/deploy/inside.sh "$stage/test/"
cp deploy/openrc/kmsplugin "$stage/test/openrc"
cp deploy/metrics/kmsplugin.rules.yaml "$stage/test/rules.yaml"
: >"$tmp/inside"
timeout --signal=KILL 300 unshare --mount --pid --fork --kill-child --net --uts --ipc --cgroup \
    sh test/deploy/boot.sh "$stage" "$tmp/inside" >"$tmp/boot" 2>&1 || :
grep -v -e '^ran ' -e '^end$' "$tmp/inside" || :
grep -e '^ok ' -e '^not ok ' "$tmp/inside" >>"$tmp/lines" || :
check 'the tests under systemd came to their end' grep -qx end "$tmp/inside"
tail -n 1 "$tmp/lines" | grep -q '^ok' || cat "$tmp/boot"
for block in "$stage"/test/doc/*; do
    check "guide, ${block##*/} was run" grep -qx "ran ${block##*/}" "$tmp/inside"
done

summary
