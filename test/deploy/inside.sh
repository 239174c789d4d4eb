#!/bin/sh
# What is tested under a real systemd: the units, the socket, the KEK plain and sealed, the
# alert rules, the textfile timer, OpenRC's script, and the operator's guide, whose blocks lie
# in /test/doc. Prints `ok`, `not ok` and `skip` lines; `ran NAME` for each block; `end`.
set -u
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mkdir -p /tmp/cwd
cd /tmp/cwd || exit 1
log=/tmp/log
said=/tmp/said

# check NAME COMMAND...
check() {
    name=$1
    shift
    if "$@" >"$log" 2>&1; then
        echo "ok $name"
    else
        echo "not ok $name: $*"
        sed 's/^/    /' "$log"
    fi
}

not() { ! "$@"; }

# doc NAME: a block of the guide, as it stands there; docfails: it has to fail.
# What it says is in $said.
doc() {
    echo "ran $1"
    check "guide, $1" sh -eu "/test/doc/$1"
    cp "$log" "$said"
}
docfails() {
    echo "ran $1"
    check "guide, $1 says no" not sh -eu "/test/doc/$1"
    cp "$log" "$said"
}

# soon COMMAND...: within ten seconds.
soon() {
    tries=0
    until "$@" >/dev/null 2>&1; do
        tries=$((tries + 1))
        [ "$tries" -lt 100 ] || return 1
        sleep 0.1
    done
}

property() { systemctl show --property="$2" --value "$1"; }
ids() { kmsplugin-ring run keyid | cut -d ' ' -f 1; }
first() { ids | head -n 1; }
sealing() { journalctl --no-pager -o cat -u kmsplugin.service | sed -n 's/.*msg=ready.* key_id=\([0-9a-f]*\).*/\1/p' | tail -n 1; }
# Never 0, which would be this script itself.
crash() {
    soon systemctl is-active kmsplugin.service
    victim=$(property kmsplugin.service MainPID)
    [ "$victim" -gt 1 ] && kill -KILL "$victim"
}
same() { [ "$1" = "$2" ] || { echo "$1, not $2"; return 1; }; }
metrics() { curl -s --http2-prior-knowledge --unix-socket /run/kmsplugin/kms.sock http://localhost/metrics; }
metric() { metrics | sed -n "s/^$1 //p"; }

# ---- the units, as this systemd reads them
systemd=$(systemctl --version | sed -n '1s/^systemd \([0-9]*\).*/\1/p')
echo "# $(systemctl --version | head -n 1)"
# systemd ignores what it does not know: PrivateIPC= before 248, and nothing else. The verify of 247 looks for the commands
# where it stands.
verify() {
    systemd-analyze verify --man=no kmsplugin.service kmsplugin.socket kmsplugin-textfile.service kmsplugin-textfile.timer >/tmp/verified 2>&1
    if [ "$systemd" -lt 248 ]; then
        grep -c "Unknown key name 'PrivateIPC' in section 'Service', ignoring" /tmp/verified || return 1
        sed -i -e "/'PrivateIPC'/d" -e '/: Command kmsplugin[a-z-]* is not executable: No such file/d' /tmp/verified
    fi
    cat /tmp/verified
    [ ! -s /tmp/verified ]
}
check 'systemd-analyze verify' verify
exposure() {
    score=$(systemd-analyze security --offline=true --no-pager "/usr/local/lib/systemd/system/$1" |
        sed -n 's/.*Overall exposure level for [^:]*: \([0-9.]*\).*/\1/p')
    echo "$1: $score"
    [ -n "$score" ] && awk "BEGIN { exit !($score <= 1.5) }"
}
for unit in kmsplugin.service kmsplugin-textfile.service; do
    if [ "$systemd" -ge 250 ]; then
        check "exposure of $unit is at most 1.5" exposure $unit
        sed 's/^/# /' "$log"
    else
        echo "skip exposure of $unit is at most 1.5: systemd-analyze reads no file before 250"
    fi
done

# ---- what the guide takes for granted: a medium, another control plane, a kubelet
mkdir -p /mnt/offline
ln -s /test/deploy deploy
cat >/usr/local/bin/ssh <<'X'
#!/bin/sh
# the other control plane: this one, with another /etc/kmsplugin
shift
mkdir -p /tmp/cp-2 /etc/kmsplugin
exec unshare --mount sh -euc 'mount --bind /tmp/cp-2 /etc/kmsplugin; exec "$@"' sh "$@"
X
cat >/usr/local/bin/crictl <<'X'
#!/bin/sh
# a container that ends is started again by the kubelet
case "$*" in *'^etcd$'*) echo etcd-container; exit ;; esac
case $1 in
ps)   echo kmsplugin-container ;;
exec) shift 3; exec "$@" ;; # exec -i CONTAINER
stop) [ "$2" = kmsplugin-container ] && systemctl restart pod.service ;;
esac
X
chmod +x /usr/local/bin/ssh /usr/local/bin/crictl
export key_id='' old='' new=''

# made VARIANT: the first KEK, from nothing, on two control planes.
made() {
    variant=$1
    rm -rf /etc/kmsplugin /tmp/cp-2 /mnt/offline/*
    doc kek-offer
    check "$variant: nothing is there before it lies offline" not ls /etc/kmsplugin/kek /etc/kmsplugin/kek.cred
    doc kek-create
    check "$variant: the KEK is for root alone" same "$(stat -c '%a %u' /etc/kmsplugin/kek*)" '600 0'
    key_id=$(first)
    doc kek-others
    check "$variant: two control planes, one KEK" same "$(ssh cp-2 kmsplugin-ring run keyid | cut -d ' ' -f 1)" "$key_id"
}

# rotated VARIANT: old to new, with values in etcd; the pod is restarted.
rotated() {
    variant=$1
    old=$(first)
    check "$variant: values" eval 'values && put example && put older'
    doc rotate-offer
    doc rotate-add
    restarted
    check "$variant, 1: two KEKs, the old one seals" same "$(answers) $(ids | wc -l)" "$old 2"
    check "$variant, 1: the KEKs are for root alone" same "$(stat -c '%a %u' /etc/kmsplugin/kek* | sort -u)" '600 0'
    new=$(ids | tail -n 1)
    doc rotate-others
    doc rotate-seal
    restarted
    check "$variant, 2: the new one seals" same "$(answers) $(ids | tail -n 1)" "$new $old"
    docfails rotate-retire
    check "$variant, 2: it names what is under the old one" grep -q /registry/secrets/default/example "$said"
    check "$variant, 2: rewrite" eval 'values && put example && put older'
    doc rotate-retire
    restarted
    check "$variant, 3: the new one alone" same "$(answers) $(ids)" "$new $new"
    check "$variant, 3: all of it opens" list
    # shellcheck disable=SC2029 # that is what is wanted
    ssh cp-2 kmsplugin-ring seal-with "$new" >/dev/null
    # shellcheck disable=SC2016 # for the sh there
    check "$variant: the other control plane, in its own time" sh -c \
        'etcdctl get --prefix /registry/secrets -w protobuf | ssh cp-2 kmsplugin-ring retire "$old"'
    check "$variant: the same ring there" same "$(ssh cp-2 kmsplugin-ring run keyid)" "$(kmsplugin-ring run keyid)"
}
restarted() { [ "$variant" != pod ] || doc pod-restart; }
answers() { kmsplugin probe | sed -n 's/^key_id \([0-9a-f]*\) .*/\1/p'; }

# ---- README's USE IT, where nothing is yet
doc readme
check 'README: root alone reads the KEK' same "$(stat -c '%a %u' /etc/kmsplugin/kek)" '600 0'
doc uninstall
rm -rf /run/kmsplugin

# ---- the key; the service
useradd --system --user-group --no-create-home kube-apiserver
made 'unit, plain'
doc start
check 'no warning in the log' not sh -c 'journalctl --no-pager -u kmsplugin.service | grep level=warn'
check 'it seals under the KEK' same "$(sealing)" "$(first)"
credentials=/run/credentials/kmsplugin.service
check 'it has a copy of the KEK' cmp /etc/kmsplugin/kek $credentials/kek
check 'which is not swapped' sh -c "grep '^[^ ]* $credentials ' /proc/mounts | grep -e '^ramfs ' -e noswap"
check 'which a stranger does not read' not setpriv --reuid=nobody --regid=nogroup --clear-groups cat $credentials/kek
pid=$(property kmsplugin.service MainPID)
check 'it is not root' not same "$(stat -c %u "/proc/$pid")" 0
check 'it has no capability' same "$(sed -n 's/^Cap\(Prm\|Eff\|Bnd\|Amb\):\t0*$/none/p' "/proc/$pid/status" | wc -l)" 4
check 'it has no key in its environment' not grep -qF "$(cat /etc/kmsplugin/kek)" "/proc/$pid/environ"
systemctl show kmsplugin.service >/tmp/shown
check 'nor has the unit' not grep -F "$(cat /etc/kmsplugin/kek)" /tmp/shown
# (That it takes effect needs a capability which these namespaces may lack.)
check 'out of memory it comes last' same "$(property kmsplugin.service OOMScoreAdjust)" -900
check 'socket: mode 0600, root' same "$(stat -c '%a %U' /run/kmsplugin/kms.sock)" '600 root'
doc look

# ---- restarts: the same socket, and nobody refused
inode=$(stat -c %i /run/kmsplugin/kms.sock)
doc restart
check 'the socket stays over a restart' same "$(stat -c %i /run/kmsplugin/kms.sock)" "$inode"
# Connects all the time during three restarts, and counts what is refused.
cat >/tmp/hammer.py <<'X'
import socket, sys, time
refused = connected = 0
end = time.monotonic() + float(sys.argv[1])
while time.monotonic() < end:
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(5)
        try:
            s.connect('/run/kmsplugin/kms.sock')
            connected += 1
        except ConnectionRefusedError:
            refused += 1
    time.sleep(0.005)
print(f'{connected} connected, {refused} refused')
sys.exit(refused > 0 or connected < 100)
X
restarts() {
    python3 /tmp/hammer.py 4 &
    hammer=$!
    sleep 0.5
    systemctl restart kmsplugin.service && crash &&
        sleep 1.5 && systemctl restart kmsplugin.service
    wait "$hammer"
}
check 'no connect is refused during restarts and a crash' restarts
sed 's/^/# /' "$log"
check 'killed, it comes back' soon kmsplugin probe
check 'the socket stays over a crash' same "$(stat -c %i /run/kmsplugin/kms.sock)" "$inode"
crashes() {
    # systemd's default limit is five starts in ten seconds
    for _ in 1 2 3 4 5 6 7; do
        crash || return 1
        sleep 0.1
    done
    soon kmsplugin probe
}
check 'seven crashes in a row are no limit' crashes

# ---- a bind mount, as a container has it
# shellcheck disable=SC2016 # for the sh below
bound='mkdir -p /mnt/kms; mount --bind -o ro "$1" /mnt/kms; mount -o remount,bind,ro /mnt/kms
    kmsplugin probe unix:///mnt/kms/kms.sock && systemctl restart "$2"'
check 'a read-only bind mount reaches the plugin after a restart' unshare --mount sh -euc "$bound
    kmsplugin probe unix:///mnt/kms/kms.sock" sh /run/kmsplugin kmsplugin.service
check 'and after systemd-tmpfiles' sh -c 'systemd-tmpfiles --create kmsplugin.conf && kmsplugin probe'
cat >/etc/systemd/system/runtimedir.service <<'X'
[Service]
Type=notify
RuntimeDirectory=runtimedir
Environment=KMS_KEK_FILE=/etc/kmsplugin/kek
ExecStart=kmsplugin serve --listen unix:///run/runtimedir/kms.sock
X
systemctl start runtimedir.service
check 'with RuntimeDirectory= it would not (which is why)' unshare --mount sh -euc "$bound
    kmsplugin probe unix:///run/runtimedir/kms.sock
    ! kmsplugin probe --timeout 1 unix:///mnt/kms/kms.sock" sh /run/runtimedir runtimedir.service
systemctl stop runtimedir.service

# ---- the KEK sealed, and plain again
if [ "$systemd" -ge 250 ]; then
    cp /etc/kmsplugin/kek /tmp/kek
    doc sealed
    doc seal
    check 'the plain KEK is gone' same "$(ls /etc/kmsplugin)" kek.cred
    check 'the sealed KEK is not the KEK' not grep -qF "$(cat /tmp/kek)" /etc/kmsplugin/kek.cred
    check 'it seals under the sealed KEK' same "$(sealing) $(first)" "$key_id $key_id"
    check 'the drop-in of the guide is that in deploy' sh -c \
        "grep -v '^#' /test/deploy/systemd/sealed-kek.conf | diff - /etc/systemd/system/kmsplugin.service.d/sealed-kek.conf"
    doc plain
    check 'it seals under the plain KEK' same "$(sealing) $(first)" "$key_id $key_id"
    check 'which is what it was' cmp /tmp/kek /etc/kmsplugin/kek
else
    for block in seal sealed plain; do
        echo "ran $block"
        echo "skip guide, $block: systemd-creds and LoadCredentialEncrypted= came with systemd 250"
    done
fi

# ---- another user
doc nonroot
check 'root may still probe' kmsplugin probe
refused=$(metric kmsplugin_refused_peers_total)
check 'a member of the group that is not allowed is refused' not setpriv --reuid=daemon --regid=kube-apiserver --clear-groups kmsplugin probe --timeout 1
check 'and counted' test "$(metric kmsplugin_refused_peers_total)" -gt "$refused"
check 'and logged' sh -c "journalctl --no-pager -u kmsplugin.service | grep 'msg=refused.* uid=$(id -u daemon) '"
check 'a stranger does not reach the socket' not setpriv --reuid=nobody --regid=nogroup --clear-groups kmsplugin probe --timeout 1
rm -r /etc/systemd/system/kmsplugin.socket.d /etc/systemd/system/kmsplugin.service.d/apiserver.conf
systemctl daemon-reload
systemctl restart kmsplugin.socket
check 'the drop-ins are gone' kmsplugin probe

# ---- etcd
systemd-run --quiet --unit=etcd-test etcd --data-dir /var/lib/etcd-test
export ETCDCTL_API=3
check 'etcd runs' soon etcdctl endpoint health
# values: writes sealed objects to /tmp/values, under the KEK that now seals, and one under a stranger's.
values() {
    kmsplugin-ring print >/tmp/ring
    PYTHONPATH=/test/test python3 - <<'X'
import base64, os, pathlib
import sealed
kek = base64.b64decode(open('/tmp/ring').read().split(',')[0])
to = pathlib.Path('/tmp/values')
to.mkdir(exist_ok=True)
example = b'k8s\0\n\x0c\n\x02v1\x12\x06Secret' + bytes(range(256)) + b'\n'
key = b'/registry/secrets/default/'
(to / 'object').write_bytes(example)
(to / 'example').write_bytes(sealed.etcd_v2(kek, key + b'example', example))
(to / 'older').write_bytes(sealed.etcd_v1(kek, key + b'older', example))
(to / 'stranger').write_bytes(sealed.etcd_v2(os.urandom(32), key + b'stranger', example))
X
}
put() { etcdctl put "/registry/secrets/default/$1" <"/tmp/values/${2:-$1}"; }
list() { etcdctl get --prefix /registry/secrets -w protobuf | kmsplugin-ring run audit --strict --list; }
doc prepare
check 'the folder that the API server mounts is there before it is named' test -d /etc/kubernetes/encryption
doc encrypt
check 'the configuration encrypts' cmp /test/deploy/encryption-v2.yaml /etc/kubernetes/encryption/config.yaml
check 'values' values
check 'put' eval 'put example && put older && put plain object'
docfails audit-strict
check 'the one in plaintext is named' grep -q /registry/secrets/default/plain "$said"
etcdctl del /registry/secrets/default/plain >/dev/null
doc audit-strict

# ---- rotation
rotated 'unit, plain'
doc rotate-back
check 'a backup from before: both open, the new one seals' same "$(ids | tr '\n' ' ')" "$new $old "
doc rotate-retire
check 'and it is retired again' same "$(ids)" "$new"

# ---- rescue
doc rescue
check 'rescued as it was' cmp example.bin /tmp/values/object
rm example.bin
doc rescue-raw
check 'rescued from the raw value' cmp example.bin /tmp/values/object
doc rescue-all
check 'all rescued' cmp objects/registry/secrets/default/example /tmp/values/object
rm -rf objects
doc putback
etcdctl get /registry/secrets/default/example --print-value-only >value
check 'put back in plaintext' cmp -n "$(wc -c </tmp/values/object)" value /tmp/values/object

# ---- k3s' SQLite (kine's table)
mkdir -p /var/lib/rancher/k3s/server/db
blob() { od -An -v -tx1 "/tmp/values/$1" | tr -d ' \n'; }
row() { echo "INSERT INTO kine (name, created, deleted, value) VALUES ('/registry/secrets/default/$1', 1, $2, x'$3');"; }
{
    echo 'CREATE TABLE kine (id INTEGER PRIMARY KEY AUTOINCREMENT, name INTEGER, created INTEGER, deleted INTEGER,'
    echo '  create_revision INTEGER, prev_revision INTEGER, lease INTEGER, value BLOB, old_value BLOB);'
    row example 0 00
    row example 0 "$(blob example)"
    row older 0 "$(blob older)"
    row gone 0 "$(blob object)"
    row gone 1 "$(blob object)"
    row plain 0 "$(blob object)"
    row stranger 0 "$(blob stranger)"
} | sqlite3 /var/lib/rancher/k3s/server/db/state.db
rm -f example.bin
cp /test/deploy/k3s/*.sql .
doc sqlite
check 'opened from SQLite' cmp example.bin /tmp/values/object
docfails sqlite-audit
check 'SQLite: names what does not open' same "$(grep ' /registry' "$said" | sort | tr '\n' ' ')" \
    'missing-kek /registry/secrets/default/stranger plaintext /registry/secrets/default/plain '
docfails sqlite-history
check 'SQLite: plaintext of a row that was deleted' grep -q '^plaintext values=3$' "$said"
docfails sqlite-all
check 'SQLite: all that open' same "$(cd objects && find . -type f | sort | tr '\n' ' ')" \
    './registry/secrets/default/example ./registry/secrets/default/older '
check 'SQLite: as they were' cmp objects/registry/secrets/default/older /tmp/values/object
rm -rf objects
doc sqlite-copy
check 'SQLite: a copy' test "$(sqlite3 -readonly copy.db 'SELECT count(*) FROM kine')" = 7
rm copy.db

# ---- metrics
check 'alert rules: syntax' promtool check rules /test/deploy/metrics/kmsplugin.rules.yaml
check 'alert rules: they fire when they should' promtool test rules /test/test/deploy/alerts.yaml
doc metrics
check 'it has metrics' grep -q '^kmsplugin_build_info' "$said"
check 'promtool takes GET /metrics' promtool check metrics <"$said"
metrics >/tmp/metrics.now
names() { grep -o 'kmsplugin_[a-z_]*' /test/deploy/metrics/kmsplugin.rules.yaml | sort -u | grep -v -e '^kmsplugin_up$'; }
for name in $(names); do
    check "the alerts' $name is a metric" grep -q "^${name}[ {]" /tmp/metrics.now
done
doc traces
check 'traces: the probes of above stand there' grep -q " msg=used pid=[0-9]* uid=0 service=v2 method=Decrypt key_id=$(first) count=1 failed=0" "$said"
doc textfile
prom=/var/lib/prometheus/node-exporter/kmsplugin.prom
check 'textfile: kmsplugin_up is 1' grep -qx 'kmsplugin_up 1' $prom
check 'textfile: promtool takes it' promtool check metrics <$prom
check 'textfile: the timer runs' systemctl is-active kmsplugin-textfile.timer
# The folder is another user's, and so is what lies there (test_textfile.py plays that user). Root itself, in this unit, does
# not reach a KEK.
chown prometheus: /var/lib/prometheus/node-exporter
check 'textfile: runs in a folder of another user' systemctl start kmsplugin-textfile.service
check 'textfile: the file is of that user' same "$(stat -c '%U %a' $prom)" 'prometheus 644'
cat >/usr/local/sbin/peek <<'X'
#!/bin/sh
grep '^CapBnd' /proc/self/status
cat /etc/kmsplugin/kek /run/credentials/kmsplugin.service/kek 2>&1
echo peeked
X
chmod 755 /usr/local/sbin/peek
peek=/run/systemd/system/kmsplugin-textfile.service.d/peek.conf
mkdir -p ${peek%/*}
printf '[Service]\nExecStart=\nExecStart=/usr/local/sbin/peek\n' >$peek
systemctl daemon-reload
check 'textfile: another program runs in its place' systemctl start kmsplugin-textfile.service
rm $peek
systemctl daemon-reload
peeked() { journalctl --no-pager -o cat -u kmsplugin-textfile.service >/tmp/peeked && grep -qx peeked /tmp/peeked; }
check 'textfile: which has had a look' soon peeked
check 'textfile: it could become another user, and nothing else' grep -q '^CapBnd:[[:space:]]*00000000000000c0$' /tmp/peeked
check 'textfile: it reached no KEK' same "$(grep -c '/kek: \(Permission denied\|No such file\)' /tmp/peeked)" 2
check 'textfile: and has not said one' not grep -qF "$(cat /etc/kmsplugin/kek)" /tmp/peeked
systemd-run --quiet --unit=node-exporter-test prometheus-node-exporter --collector.disable-defaults --collector.textfile \
    --collector.textfile.directory=/var/lib/prometheus/node-exporter --web.listen-address=127.0.0.1:9100
scrape() { curl -s --fail http://127.0.0.1:9100/metrics >/tmp/scraped && grep -qx 'kmsplugin_up 1' /tmp/scraped; }
check 'node_exporter serves it' soon scrape
check 'node_exporter: no error of the textfile collector' grep -qx 'node_textfile_scrape_error 0' /tmp/scraped
check 'node_exporter: the label that the alert looks at' grep -q '^node_textfile_mtime_seconds{file=".*kmsplugin.prom"}' /tmp/scraped
started=$(metric process_start_time_seconds)
check 'node_exporter: the start time is there under a name of its own' grep -q '^kmsplugin_process_start_time_seconds ' /tmp/scraped
sed 's/kmsplugin_process_/process_/' $prom >/tmp/unrenamed
cp /tmp/unrenamed $prom
curl -s http://127.0.0.1:9100/metrics >/tmp/scraped
check 'node_exporter does not serve ours as process_* (which is why)' not grep -qx "process_start_time_seconds $started" /tmp/scraped
journalctl --no-pager -o cat -u node-exporter-test | tail -n 3 | sed 's/^/# /'
systemctl stop kmsplugin.service kmsplugin.socket
check 'textfile: runs without the plugin' systemctl start kmsplugin-textfile.service
check 'textfile: kmsplugin_up is 0, and nothing else there' same "$(grep -v '^#' $prom)" 'kmsplugin_up 0'
check 'textfile: no file left over' same "$(find /var/lib/prometheus/node-exporter -type f | wc -l)" 1

# ---- order: a kubelet that is started together with the plugin comes after it
cat >/etc/systemd/system/kubelet.service <<'X'
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=kmsplugin probe
X
for unit in k3s rke2-server k0scontroller; do
    cp /etc/systemd/system/kubelet.service /etc/systemd/system/$unit.service
done
# One transaction, as at boot.
printf '[Unit]\nWants=kubelet.service k3s.service rke2-server.service k0scontroller.service kmsplugin.service\n' >/etc/systemd/system/together.target
systemctl daemon-reload
systemctl start together.target
check 'a kubelet is started together with the plugin' soon systemctl is-active kubelet.service
ready=$(property kmsplugin.service ActiveEnterTimestampMonotonic)
for unit in kubelet k3s rke2-server k0scontroller; do
    check "$unit waits for the plugin" test "$(property $unit.service InactiveExitTimestampMonotonic)" -ge "$ready"
done
check 'an error at start ends in a restart, not in a failed socket' sh -euc '
    mv /etc/kmsplugin/kek /etc/kmsplugin/away
    systemctl restart kmsplugin.service && exit 1
    systemctl status --no-pager kmsplugin.service | grep -F 243/CREDENTIALS
    kmsplugin probe --timeout 1 && exit 1
    sleep 1.5
    mv /etc/kmsplugin/away /etc/kmsplugin/kek
    sleep 2
    kmsplugin probe'

# ---- turned off, and uninstalled
doc prepare-again
check 'all is plaintext again' eval 'put example object && put older object'
doc audit-off
ls /etc/kmsplugin >/tmp/keys
doc uninstall
check 'nothing answers' not kmsplugin probe --timeout 1
for unit in kmsplugin.service kmsplugin.socket kmsplugin-textfile.timer; do
    check "$unit is not enabled" not systemctl is-enabled $unit
done
check 'no drop-in is left' not ls -d /etc/systemd/system/kmsplugin.service.d /etc/systemd/system/kmsplugin.socket.d
check 'the keys are' eval 'ls /etc/kmsplugin | diff - /tmp/keys'

# ---- a whole life with a sealed KEK
if [ "$systemd" -ge 250 ]; then
    rm -rf /etc/kmsplugin
    doc sealed
    made 'unit, sealed'
    check 'unit, sealed: it never lay there in plain' same "$(ls /etc/kmsplugin)" kek.cred
    doc start
    rotated 'unit, sealed'
    check 'unit, sealed: no KEK in plain' not grep -rF -f /mnt/offline/kek-1 -f /mnt/offline/kek-2 /etc/kmsplugin
    doc restart
    doc uninstall
fi

# ---- a whole life as a static pod: root without any capability and with nothing to write, as its manifest has it
made pod
cat >/etc/systemd/system/pod.service <<'X'
[Service]
Type=notify
CapabilityBoundingSet=
NoNewPrivileges=yes
ProtectSystem=strict
ReadWritePaths=/run/kmsplugin
BindReadOnlyPaths=/etc/kmsplugin:/etc/kmsplugin
Environment=KMS_KEK_FILE=/etc/kmsplugin/kek
ExecStart=kmsplugin serve --sandbox require
Restart=always
X
systemctl daemon-reload
{ soon test -e /etc/kubernetes/manifests/kmsplugin.yaml && systemctl start pod.service; } &
doc pod
wait
check 'pod: mode 0600, root' same "$(stat -c '%a %U' /run/kmsplugin/kms.sock)" '600 root'
rotated pod
key_id=$(first)
check 'pod: made again, the ring that it has stays' not kmsplugin-ring create
# for an API server that is not root; without capabilities a socket is not given away
pod_as() {
    printf '[Service]\nGroup=kube-apiserver\nExecStart=\nExecStart=kmsplugin serve --mode 0660 --allow-uid 0,%s%s\n' \
        "$(id -u kube-apiserver)" "$1" >/etc/systemd/system/pod.service.d/group.conf
    systemctl daemon-reload
    systemctl restart pod.service
}

# ---- etcdctl on kubeadm: in etcd's container, with its certificates
mkdir -p /etc/kubernetes/pki/etcd
python3 - <<'X'
import datetime, ipaddress
from cryptography import x509
from cryptography.hazmat.backends import default_backend
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
key = ec.generate_private_key(ec.SECP256R1(), default_backend())
name, now = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, 'etcd')]), datetime.datetime.utcnow()
cert = (x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
        .not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
        .add_extension(x509.BasicConstraints(True, None), True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address('127.0.0.1'))]), False)
        .sign(key, hashes.SHA256(), default_backend()).public_bytes(serialization.Encoding.PEM))
for file, data in ('ca.crt', cert), ('server.crt', cert), ('server.key', key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption())):
    open('/etc/kubernetes/pki/etcd/' + file, 'wb').write(data)
X
systemctl stop etcd-test
pki=/etc/kubernetes/pki/etcd
systemd-run --quiet --unit=etcd-tls etcd --data-dir /var/lib/etcd-test --listen-client-urls https://127.0.0.1:2379 \
    --advertise-client-urls https://127.0.0.1:2379 --client-cert-auth --trusted-ca-file=$pki/ca.crt --cert-file=$pki/server.crt --key-file=$pki/server.key
echo 'ran etcdctl'
in_etcd() { sh -euc '. /test/doc/etcdctl; etcdctl "$@"' sh "$@"; }
check 'guide, etcdctl: reaches etcd' soon in_etcd get /
check 'guide, etcdctl: not without the certificates' not etcdctl get /
check 'guide, etcdctl: audit' eval 'in_etcd get --prefix /registry/secrets -w protobuf | kmsplugin-ring run audit'

mkdir /etc/systemd/system/pod.service.d
check 'pod: runAsGroup' pod_as ''
check 'pod: lets in who is of the group' setpriv --reuid=kube-apiserver --regid=kube-apiserver --clear-groups kmsplugin probe
check 'pod: --group cannot (which is why)' not pod_as ' --group daemon'
systemctl stop pod.service

# ---- OpenRC
rm -rf /run/kmsplugin
# what OpenRC's own boot makes
for dir in exclusive failed inactive options scheduled started starting stopping wasinactive daemons tmp; do
    mkdir -p /run/openrc/$dir
done
echo default >/run/openrc/softlevel
mkdir -p /etc/conf.d
install -m 755 /test/deploy/openrc/kmsplugin /etc/init.d/kmsplugin
printf 'rc_logger=NO\n' >>/etc/rc.conf
echo 'kmsplugin_args="--group kube-apiserver --mode 0660 --allow-uid root,kube-apiserver"' >/etc/conf.d/kmsplugin
check 'OpenRC: starts' rc-service kmsplugin start
check 'OpenRC: answers' soon kmsplugin probe
check 'OpenRC: the arguments of conf.d' same "$(stat -c '%a %G' /run/kmsplugin/kms.sock)" '660 kube-apiserver'
daemon() { pgrep -x kmsplugin; }
before=$(daemon)
[ -n "$before" ] && kill -KILL "$before"
check 'OpenRC: killed, it comes back' soon kmsplugin probe
check 'OpenRC: as another process' not same "$(daemon)" "$before"
check 'OpenRC: stops' rc-service kmsplugin stop
check 'OpenRC: the directory stays' test -d /run/kmsplugin
check 'OpenRC: nothing runs' not daemon
mv /etc/kmsplugin/kek /etc/kmsplugin/away
rc-service kmsplugin start >/dev/null 2>&1
check 'OpenRC: without the KEK it does not answer' not kmsplugin probe --timeout 1
mv /etc/kmsplugin/away /etc/kmsplugin/kek
check 'OpenRC: it tries on, until the KEK is there' soon kmsplugin probe
rc-service kmsplugin stop >/dev/null 2>&1

# ---- the Debian package, on the release that it was built for: installed, upgraded, removed, purged
if grep -q "^VERSION_CODENAME=$(cat /test/deb/codename)\$" /etc/os-release; then
    rm -rf /usr/local/sbin/kmsplugin* /usr/local/lib/systemd/system/kmsplugin* /usr/local/lib/tmpfiles.d/kmsplugin.conf /etc/init.d/kmsplugin /run/kmsplugin
    systemctl daemon-reload
    hash -r
    check 'deb: is installed' dpkg -i /test/deb/kmsplugin_*.deb
    check 'deb: nothing is started' not systemctl is-active kmsplugin.service kmsplugin.socket
    check 'deb: nor enabled' not systemctl is-enabled kmsplugin.service kmsplugin.socket
    doc start
    process=$(property kmsplugin.service MainPID)
    inode=$(stat -c %i /run/kmsplugin/kms.sock)
    check 'deb: is upgraded' dpkg -i /test/deb/kmsplugin_*.deb
    check 'deb: answers still' kmsplugin probe
    check 'deb: another process' not same "$(property kmsplugin.service MainPID)" "$process"
    check 'deb: which runs what is installed' same \
        "$(stat -L -c %i "/proc/$(property kmsplugin.service MainPID)/exe")" "$(stat -c %i /usr/sbin/kmsplugin)"
    check 'deb: the same socket' same "$(stat -c %i /run/kmsplugin/kms.sock)" "$inode"
    systemctl stop kmsplugin.service kmsplugin.socket
    check 'deb: is upgraded, and not running' dpkg -i /test/deb/kmsplugin_*.deb
    systemctl start kmsplugin.socket kmsplugin.service
    check 'deb: is removed' dpkg -r kmsplugin
    check 'deb: nothing runs' not pgrep -x kmsplugin
    check 'deb: nothing listens' not systemctl is-active kmsplugin.service kmsplugin.socket
    ls /etc/kmsplugin >/tmp/keys
    check 'deb: is purged' dpkg --purge kmsplugin
    cp "$log" "$said"
    check 'deb: which says that the keys stay' grep -q 'the keys stay in /etc/kmsplugin' "$said"
    check 'deb: the keys are there' eval '[ -s /etc/kmsplugin/kek ] && ls /etc/kmsplugin | diff - /tmp/keys'
fi
echo end
