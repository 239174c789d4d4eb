#!/bin/sh
# Boots the systemd of ROOT as process 1 of new namespaces, on a copy-on-write view of ROOT in which STAGE lies, too. ROOT
# and this machine stay as they are. Needs root.
#
#     boot.sh ROOT STAGE FOLDER NAME
#
# The machine NAME, cp-1, runs /test/test/deploy/inside.sh, which writes its lines to FOLDER/out, and ends. The others run
# what cp-1 asks for by ssh (cluster.py), until they are killed. FOLDER/sdX1 and sdY1 are links to the media's devices.
set -eu
root=$1 stage=$2 folder=$3 name=$4

# A cgroup of its own first: in it the cgroup namespace has its root. All of cgroup v2, whatever this machine has mounted
# besides: systemd 256 and later refuse v1.
if [ $$ -ne 1 ]; then
    cgroup=$(awk '$3 == "cgroup2" { print $2; exit }' /proc/mounts)
    [ -n "$cgroup" ] || { echo 'boot.sh: no cgroup2 is mounted'; exit 1; }
    cgroup=$cgroup/kmsplugin-test-$$
    pid=
    # shellcheck disable=SC2317 # a trap calls it
    clean() {
        if [ -n "$pid" ]; then
            kill -KILL "$pid" 2>/dev/null || :
            wait "$pid" || :
        fi
        for _ in $(seq 100); do # the last of them may still be dying
            grep -q '^populated 1' "$cgroup/cgroup.events" || break
            sleep 0.1
        done
        find "$cgroup" -depth -type d -exec rmdir {} \;
    }
    mkdir "$cgroup"
    trap clean EXIT
    trap 'exit 1' HUP INT TERM
    # shellcheck disable=SC2016 # for the sh in between
    setpriv --pdeathsig KILL sh -euc 'echo 0 >"$1"; shift; exec "$@"' sh "$cgroup/cgroup.procs" \
        unshare --mount --pid --fork --kill-child --net --uts --ipc --cgroup sh "$0" "$@" &
    pid=$!
    status=0
    wait "$pid" || status=$?
    pid=
    exit "$status"
fi

mount --make-rprivate /
hostname "$name"
top=$folder/$name
mkdir "$top"
mount -t tmpfs tmpfs "$top"
mkdir "$top/upper" "$top/work" "$top/root"
mount -t overlay -o "lowerdir=$root,upperdir=$top/upper,workdir=$top/work" overlay "$top/root"
root=$top/root
cp -R "$stage/." "$root/"
mkdir "$root/peers"
mount --bind "$folder" "$root/peers"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
ln -s fd/0 "$root/dev/stdin"
for node in null:3 zero:5 full:7 random:8 urandom:9; do
    mknod -m 666 "$root/dev/${node%:*}" c 1 "${node#*:}"
done
mknod -m 666 "$root/dev/tty" c 5 0
for medium in "$folder"/sd?1; do
    mknod "$root/dev/${medium##*/}" b "$((0x$(stat -L -c %t "$medium")))" "$((0x$(stat -L -c %T "$medium")))"
done
tr -d - </proc/sys/kernel/random/uuid >"$root/etc/machine-id" # no first boot, which asks questions
echo "127.0.0.1 localhost $name" >"$root/etc/hosts"
for program in kubectl kubeadm crictl ssh; do
    ln -sf /test/test/deploy/cluster.py "$root/usr/local/bin/$program"
done
units=$root/etc/systemd/system
cat >"$units/test.target" <<'X'
[Unit]
Requires=sysinit.target
Wants=inside.service ssh-test.socket
After=sysinit.target
X
cat >"$units/ssh-test.socket" <<X
[Socket]
ListenStream=/peers/$name.sock
Accept=yes
X
cat >"$units/ssh-test@.service" <<'X'
[Service]
ExecStart=/bin/sh -c 'read -r line; sh -c "$$line" 2>&1; printf "\n%%s" $$?'
StandardInput=socket
StandardOutput=socket
X
[ "$name" != cp-1 ] || cat >"$units/inside.service" <<'X'
[Unit]
After=sysinit.target
SuccessAction=exit-force
FailureAction=exit-force
[Service]
Type=oneshot
ExecStart=/bin/sh /test/test/deploy/inside.sh
StandardOutput=append:/peers/out
StandardError=append:/peers/out
TimeoutStartSec=500
X
# systemd hands credentials over by mount propagation.
mount --make-rshared "$root"
exec env -i container=test "PATH=$PATH" chroot "$root" /bin/sh -c \
    'exec /lib/systemd/systemd --unit=test.target --show-status=no --log-target=journal'
