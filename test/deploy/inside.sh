#!/bin/sh
# What is tested under a real systemd, on cp-1 of three machines (boot.sh): the page of the guide from nothing to encrypted
# Secrets, three control planes, rotation, each row of Restore; then the other blocks, the units, alert rules, textfile,
# OpenRC. A block is run as it stands, alone, in a new shell; blocks are in /test/doc, kubectl and the like in cluster.py.
# Prints `ok`, `not ok` and `skip` lines; `ran NAME` for each block; `end`.
# shellcheck disable=SC2016,SC2029 # for eval, or the machine there
set -u
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mkdir -p /tmp/cwd
cd /tmp/cwd || exit 1
log=/tmp/log
said=/tmp/said
wrapper=''              # goes before PATH: what the guide tells to put there for the blocks below the page
key_id='' old='' new=''

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
says() { grep -qF "$1" "$said" || { cat "$said"; return 1; }; }

# block NAME: of the guide, with what is its reader's to fill in. EDITOR stands for the person in it.
block() {
    sed -e "s/KEY_ID/$key_id/g; s/NEW/$new/g; s/OLD/$old/g" "/test/doc/$1" >/tmp/block
    env -i HOME=/root EDITOR=/tmp/editor PATH="$wrapper$PATH" sh -eu /tmp/block
}
# doc NAME: it succeeds; docfails: it has to fail. What it says is in $said.
doc() {
    echo "ran $1"
    check "guide, $1" block "$1"
    cp "$log" "$said"
}
docfails() {
    echo "ran $1"
    check "guide, $1 says no" not block "$1"
    cp "$log" "$said"
}
# tool ARGUMENT...: kmsplugin-ring as the page's sentences and table have it; refuses: it does not.
tool() {
    check "kmsplugin-ring $*" kmsplugin-ring "$@"
    cp "$log" "$said"
}
refuses() {
    check "refused: kmsplugin-ring $*" not kmsplugin-ring "$@"
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
answers() { kmsplugin probe | sed -n 's/^key_id \([0-9a-f]*\) .*/\1/p'; }
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
put() { /test/test/deploy/cluster.py put "$@"; }
dump() { sh /usr/share/kmsplugin/kubeadm/etcdctl get --prefix /registry/secrets -w protobuf; }
others() { for machine in cp-2 cp-3; do ssh $machine "$@" || return 1; done; }

echo "# $(systemctl --version | head -n 1)"
cp /test/deb/kmsplugin_*.deb .
cat >/tmp/editor <<'X'
#!/bin/sh
sed -n '/^apiServer:/,$p' "$(dirname "$(command -v kmsplugin)")/../share/kmsplugin/kubeadm/cluster-configuration.yaml" >>"$1"
X
chmod 755 /tmp/editor
check 'etcd, an API server without flags, and Secrets' eval '/test/test/deploy/cluster.py etcd && soon kubectl get secrets && put default/example plain && put default/older plain'
kubectl get secrets | grep -q default/older || exit

# ---- the page: one node, from nothing
began=$(date +%s)
doc install
check 'nothing is started' not systemctl is-active kmsplugin.service kmsplugin.socket
refuses new /mnt
check 'no medium is mounted: it says so' says 'is the medium mounted?'
doc new
key_id=$(first)
check 'it shows the KEY_ID' says "$key_id"
cp /var/lib/kubeadm-config /var/lib/kubeadm-config.plain
check 'the medium has the KEK, under that name' eval 'mount /dev/sdX1 /mnt && cmp "/mnt/kek-$key_id" /etc/kmsplugin/kek && umount /mnt'
check 'the KEK is for root alone' same "$(stat -c '%a %u' /etc/kmsplugin/kek)" '600 0'
tool show
doc config
doc edit
doc apiserver
check 'it shows an address that kubeadm has not kept' says '< - --advertise-address=192.0.2.1'
doc encrypt
doc audit
check 'the page: both Secrets are encrypted' says 'values=2 sealing-kek'
echo "# the page: $(cat /test/doc/install /test/doc/new /test/doc/config /test/doc/edit /test/doc/apiserver /test/doc/encrypt /test/doc/audit |
    grep -c '^[a-z]') commands, $(($(date +%s) - began)) s"

# ---- three control planes
check 'the others: step 1' eval 'for to in cp-2 cp-3; do cp kmsplugin_*.deb /peers && ssh $to apt-get install -y /peers/kmsplugin_*.deb || break; done'
doc others
check 'one KEK everywhere, which seals' others sh -c "'kmsplugin-ring show | grep \"^$key_id seals\"'"
doc prepare
doc encrypt
docfails audit
check 'prepared: all is plaintext, and is named' says 'plaintext /registry/secrets/default/example'
doc config
doc encrypt
doc audit

# ---- rotation
old=$key_id
doc rotate
new=$(ids | tail -n 1)
doc rotate-others
check '1: two KEKs, the old one seals' same "$(answers) $(ids | wc -l)" "$old 2"
check '1: the others, too' others sh -c "'kmsplugin-ring show | grep \"^$old seals\" && kmsplugin-ring show | grep \"^$new opens\"'"
tool seal-with "$new"
check '2: on the others' others kmsplugin-ring seal-with "$new"
check '2: the new one seals' same "$(answers) $(ids | tail -n 1)" "$new $old"
docfails retire
check '2: not yet, and it names what is under the old one' says /registry/secrets/default/example
doc encrypt
doc retire
retired() { dump >/tmp/dump && for to in cp-2 cp-3; do ssh $to kmsplugin-ring retire "$old" </tmp/dump || return 1; done; }
check '4: on the others' retired
check 'the new one alone, everywhere' eval 'same "$(answers) $(ids)" "$new $new" && others sh -c "\"kmsplugin-ring show | grep ^$new && kmsplugin-ring show | grep ^$old.retired\""'
doc audit
key_id=$new

# ---- each row of Restore
kek=/etc/kmsplugin/kek
mount /dev/sdX1 /mnt
restored() { check "restored: $1" eval 'same "$(first) $(answers)" "$key_id $key_id" && dump | kmsplugin-ring run audit --strict'; }
rm $kek
refuses show
check 'the file is lost, the plugin runs: DO NOT RESTART' says 'DO NOT RESTART'
sed -n 's/^It is in memory: *//p' "$said" >/tmp/rescue
check 'the command that it prints' sh -eu /tmp/rescue
restored 'from memory'
rm $kek
systemctl stop kmsplugin.service kmsplugin.socket
tool init "/mnt/kek-$key_id"
restored 'the file, from the medium'
rm -r /etc/kmsplugin
systemctl stop kmsplugin.service kmsplugin.socket
check 'ssh cp-2 kmsplugin-ring print | kmsplugin-ring init -' eval 'ssh cp-2 kmsplugin-ring print </dev/null | kmsplugin-ring init -'
restored 'from another control plane'
printf 'x' >$kek
refuses show
check 'the command that it prints' sh -euc "$(sed -n '/^mv /p' "$said")"
tool init "/mnt/kek-$key_id"
restored 'from a damaged file'
systemctl stop kmsplugin.service kmsplugin.socket
mv $kek /root/paper
tr A-Za-z B-ZAb-za </root/paper >"/root/kek-$key_id"
refuses init "/root/kek-$key_id"
mv /root/paper "/root/kek-$key_id"
tool init "/root/kek-$key_id"
restored 'from paper'
systemctl stop kmsplugin.service kmsplugin.socket
rm $kek
wrong=$(kmsplugin genkey)
wrong_id=$(KMS_KEK=$wrong kmsplugin keyid | cut -d ' ' -f 1)
check 'a wrong KEK' eval 'echo "$wrong" | kmsplugin-ring init -'
put default/newer v2
tool add "/mnt/kek-$key_id"
tool seal-with "$key_id"
check 'what is under the wrong KEK is rewritten' eval 'kubectl get secrets | kubectl replace -f -'
old=$wrong_id
doc retire
restored 'after a wrong KEK'
old=$(find /mnt -name 'kek-*' ! -name "kek-$key_id" | sed 's/.*kek-//')
tool add "/mnt/kek-$old"
check 'a backup from before: both open, the new one seals' same "$(ids | tr '\n' ' ')" "$key_id $old "
doc retire
check 'and it is retired again' same "$(ids)" "$key_id"
umount /mnt
mount /dev/sdY1 /mnt
tool copy /mnt
check 'another medium: all KEKs' eval 'ls "/mnt/kek-$key_id" "/mnt/kek-$old" "/mnt/kek-$wrong_id"'

# ---- sealed: no TPM is here
refuses seal /mnt
tool seal /mnt --with-key=host
check 'no KEK is plain any more' eval '! grep -rF "$(cat "/mnt/kek-$key_id")" /etc/kmsplugin'
restored 'sealed to the host'
mv /etc/kmsplugin/kek.cred /etc/kmsplugin/kek.cred.lost
tool init "/mnt/kek-$key_id"
restored 'a new host key, as a new TPM'
tool unseal
restored 'unsealed'

umount /mnt

# ---- rescue, with etcdctl as the guide says
wrapper=/usr/share/kmsplugin/kubeadm:
/test/test/deploy/cluster.py object >/tmp/object
doc rescue
check 'rescued as it was' cmp example.bin /tmp/object
rm example.bin
doc rescue-raw
check 'rescued from the raw value' cmp example.bin /tmp/object
put default/stranger stranger
doc rescue-all
check 'what does not open is named, and gives no file' eval 'says "not opened: /registry/secrets/default/stranger" && [ ! -e objects/_registry_secrets_default_stranger ]'
check 'all others are rescued' eval 'cmp objects/_registry_secrets_default_example /tmp/object && cmp objects/_registry_secrets_default_older /tmp/object'
rm -r objects
PATH="$wrapper$PATH" etcdctl del /registry/secrets/default/stranger >/dev/null
doc putback
check 'put back in plaintext' eval 'dump | kmsplugin-ring run audit | grep "plaintext.*values=1$"'

# ---- the units, as this systemd reads them
check 'systemd-analyze verify' eval 'systemd-analyze verify --man=no kmsplugin.service kmsplugin.socket kmsplugin-textfile.service kmsplugin-textfile.timer 2>&1 | not grep .'
exposure() {
    score=$(systemd-analyze security --offline=true --no-pager "/lib/systemd/system/$1" |
        sed -n 's/.*Overall exposure level for [^:]*: \([0-9.]*\).*/\1/p')
    echo "$1: $score"
    [ -n "$score" ] && awk "BEGIN { exit !($score <= 1.5) }"
}
for unit in kmsplugin.service kmsplugin-textfile.service; do
    check "exposure of $unit is at most 1.5" exposure $unit
    sed 's/^/# /' "$log"
done
check 'no warning in the log' eval '! journalctl --no-pager -u kmsplugin.service | grep level=warn'
credentials=/run/credentials/kmsplugin.service
check 'it has a copy of the KEK' cmp $kek $credentials/kek
check 'which is not swapped' sh -c "grep '^[^ ]* $credentials ' /proc/mounts | grep -e '^ramfs ' -e noswap"
check 'which a stranger does not read' not setpriv --reuid=nobody --regid=nogroup --clear-groups cat $credentials/kek
pid=$(property kmsplugin.service MainPID)
check 'it is not root' not same "$(stat -c %u "/proc/$pid")" 0
check 'it has no capability' same "$(sed -n 's/^Cap\(Prm\|Eff\|Bnd\|Amb\):\t0*$/none/p' "/proc/$pid/status" | wc -l)" 4
check 'it has no key in its environment' not grep -qF "$(cat $kek)" "/proc/$pid/environ"
systemctl show kmsplugin.service >/tmp/shown
check 'nor has the unit' not grep -F "$(cat $kek)" /tmp/shown
# (That it takes effect needs a capability which these namespaces may lack.)
check 'out of memory it comes last' same "$(property kmsplugin.service OOMScoreAdjust)" -900
check 'socket: mode 0600, root' same "$(stat -c '%a %U' /run/kmsplugin/kms.sock)" '600 root'

# ---- restarts: the same socket, and nobody refused
inode=$(stat -c %i /run/kmsplugin/kms.sock)
# Connects all the time during three restarts: what a crash cuts off may fail, but nobody is refused.
restarts() {
    while [ ! -e /tmp/restarted ]; do kmsplugin probe --timeout 5 2>&1 | tail -n 1; done >/tmp/probes &
    systemctl restart kmsplugin.service && crash && sleep 1.5 && systemctl restart kmsplugin.service && kmsplugin probe
    touch /tmp/restarted
    wait
    echo "$(grep -c '^key_id' /tmp/probes) probes, $(grep -c "Connection refused" /tmp/probes) refused"
    [ "$(grep -c '^key_id' /tmp/probes)" -gt 5 ] && ! grep "Connection refused" /tmp/probes
}
check 'no connect is refused during restarts and a crash' restarts
sed 's/^/# /' "$log"
check 'killed, it comes back' soon kmsplugin probe
check 'the socket stays over restarts and a crash' same "$(stat -c %i /run/kmsplugin/kms.sock)" "$inode"
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
bound='mkdir -p /tmp/kms; mount --bind -o ro "$1" /tmp/kms; mount -o remount,bind,ro /tmp/kms
    kmsplugin probe unix:///tmp/kms/kms.sock && systemctl restart "$2"'
check 'a read-only bind mount reaches the plugin after a restart' unshare --mount sh -euc "$bound
    kmsplugin probe unix:///tmp/kms/kms.sock" sh /run/kmsplugin kmsplugin.service
check 'and after systemd-tmpfiles' sh -c 'systemd-tmpfiles --create kmsplugin.conf && kmsplugin probe'

# ---- another user
useradd --system --user-group --no-create-home kube-apiserver
doc nonroot
check 'root may still probe' kmsplugin probe
refused=$(metric kmsplugin_refused_peers_total)
check 'a member of the group that is not allowed is refused' not setpriv --reuid=daemon --regid=kube-apiserver --clear-groups kmsplugin probe --timeout 1
check 'and counted' test "$(metric kmsplugin_refused_peers_total)" -gt "$refused"
check 'and logged' sh -c "journalctl --no-pager -u kmsplugin.service | grep 'msg=refused.* uid=$(id -u daemon)'"
check 'a stranger does not reach the socket' not setpriv --reuid=nobody --regid=nogroup --clear-groups kmsplugin probe --timeout 1
rm -r /etc/systemd/system/kmsplugin.socket.d /etc/systemd/system/kmsplugin.service.d
systemctl daemon-reload
systemctl restart kmsplugin.socket
check 'the drop-ins are gone' kmsplugin probe

# ---- k3s: what is copied is there (kine itself: test/kube/cluster/kine_test.go)
doc k3s-config

# ---- metrics
check 'alert rules: syntax' promtool check rules /test/deploy/metrics/kmsplugin.rules.yaml
check 'alert rules: they fire when they should' promtool test rules /test/test/deploy/alerts.yaml
doc metrics
check 'promtool takes GET /metrics' promtool check metrics <"$said"
names() { grep -o 'kmsplugin_[a-z_]*' /test/deploy/metrics/kmsplugin.rules.yaml | sort -u | grep -v -e '^kmsplugin_up$'; }
for name in $(names); do
    check "the alerts' $name is a metric" grep -q "^${name}[ {]" "$said"
done
check 'traces: the probes of above stand there' eval 'journalctl -u kmsplugin.service | grep "msg=used.* method=Decrypt"'
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
check 'textfile: and has not said one' not grep -qF "$(cat $kek)" /tmp/peeked
systemd-run --quiet --unit=node-exporter-test prometheus-node-exporter --collector.disable-defaults --collector.textfile \
    --collector.textfile.directory=/var/lib/prometheus/node-exporter --web.listen-address=127.0.0.1:9100
scrape() { curl -s --fail http://127.0.0.1:9100/metrics >/tmp/scraped && grep -qx 'kmsplugin_up 1' /tmp/scraped; }
check 'node_exporter serves it' soon scrape
check 'node_exporter: no error of the textfile collector' grep -qx 'node_textfile_scrape_error 0' /tmp/scraped
check 'node_exporter: the label that the alert looks at' grep -q '^node_textfile_mtime_seconds{file=".*kmsplugin.prom"}' /tmp/scraped
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

# ---- the package is upgraded, and removed; the KEKs stay
check 'deb: is upgraded' eval 'inode=$(stat -c %i /run/kmsplugin/kms.sock) process=$(property kmsplugin.service MainPID) && dpkg -i kmsplugin_*.deb && kmsplugin probe'
check 'deb: another process, on the same socket' eval 'not same "$(property kmsplugin.service MainPID)" "$process" && same "$(stat -c %i /run/kmsplugin/kms.sock)" "$inode"'
check 'deb: which runs what is installed' same \
    "$(stat -L -c %i "/proc/$(property kmsplugin.service MainPID)/exe")" "$(stat -c %i /usr/sbin/kmsplugin)"
systemctl stop kmsplugin.service kmsplugin.socket
check 'deb: is upgraded, and not running' eval 'dpkg -i kmsplugin_*.deb && not systemctl is-active kmsplugin.service'
systemctl start kmsplugin.socket kmsplugin.service
doc prepare
doc encrypt
doc audit-off
ls /etc/kmsplugin >/tmp/keys
doc uninstall
check 'uninstalled: the keys stay, and it says so' says 'the keys stay in /etc/kmsplugin'
check 'they do' eval 'ls /etc/kmsplugin | diff - /tmp/keys'
check 'nothing runs, nothing listens' eval 'not pgrep -x kmsplugin && not systemctl is-active kmsplugin.socket kmsplugin-textfile.timer'

# ---- README's USE IT, with the release build
cp -R /test/local/. /
hash -r
rm -rf /etc/kmsplugin /etc/kubernetes/encryption
mount /dev/sdX1 /mnt && rm -f /mnt/kek-* && umount /mnt
wrapper=''
cp /var/lib/kubeadm-config.plain /var/lib/kubeadm-config
systemctl daemon-reload
doc readme
check 'README: the release build runs' cmp "/proc/$(property kmsplugin.service MainPID)/exe" /test/local/usr/local/sbin/kmsplugin
check 'README: all is encrypted, says audit' eval 'says sealing-kek && root=$(stat -c "%a %u" $kek) && same "$root" "600 0"'
systemctl disable --now kmsplugin.service kmsplugin.socket

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
echo end
