#!/bin/sh
# Boots a systemd of its own, as process 1 of new namespaces, on a copy-on-write view
# of this machine's root; runs inside.sh there, which writes its lines to OUT. Nothing
# is changed outside.
#
#     unshare --mount --pid --fork --kill-child --net --uts --ipc --cgroup boot.sh STAGE OUT
#
# STAGE is laid over the root: what `make install` has made, and the tests in /test.
set -eu
stage=$1 out=$2
top=$(mktemp -d)
mount --make-rprivate /
mount -t tmpfs tmpfs "$top"
mkdir "$top/upper" "$top/work" "$top/root"
mount -t overlay -o "lowerdir=/,upperdir=$top/upper,workdir=$top/work" overlay "$top/root"
root=$top/root
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount --rbind /dev "$root/dev"
if [ "$(stat -fc %T /sys/fs/cgroup)" = cgroup2fs ]; then
    mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
else
    mount -t tmpfs tmpfs "$root/sys/fs/cgroup"
    for controller in name=systemd pids memory; do
        mkdir "$root/sys/fs/cgroup/${controller#name=}"
        mount -t cgroup -o "none,$controller" cgroup "$root/sys/fs/cgroup/${controller#name=}" 2>/dev/null ||
            mount -t cgroup -o "$controller" cgroup "$root/sys/fs/cgroup/${controller#name=}"
    done
    mkdir "$root/sys/fs/cgroup/unified"
    mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup/unified"
fi
cp -R "$stage/." "$root/"
touch "$root/out"
mount --bind "$out" "$root/out"
units=$root/etc/systemd/system
cat >"$units/test.target" <<'X'
[Unit]
Requires=sysinit.target
Wants=inside.service
After=sysinit.target
X
cat >"$units/inside.service" <<'X'
[Unit]
After=sysinit.target
SuccessAction=exit-force
FailureAction=exit-force
[Service]
Type=oneshot
ExecStart=/bin/sh /test/inside.sh
StandardOutput=append:/out
StandardError=append:/out
TimeoutStartSec=240
X
# systemd hands credentials over by mount propagation.
mount --make-rshared "$root"
exec env -i container=test "PATH=$PATH" chroot "$root" /bin/sh -c \
    'exec /lib/systemd/systemd --unit=test.target --show-status=no --log-target=null'
