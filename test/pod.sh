#!/bin/sh
# The static pod of deploy/kubeadm/kmsplugin.yaml in podman, from the image of make image: does it run as the manifest has
# it, and is a KEK rotated under it by the guide's own blocks? podman stands for the kubelet, and scripts for crictl and
# the medium. Needs root, podman, crun, catatonit and what make image needs. A line `ok`, `not ok` or `skip` for each test.
set -eu
cd "$(dirname "$0")/.."

# An /etc and a /run of its own, of which nothing is left. With both versions of cgroups mounted (hybrid) podman takes the
# wrong one: hide it, from us alone.
if [ "${1:-}" != inside ]; then
    # shellcheck disable=SC2016 # that is for the inner shell
    exec unshare --mount sh -euc '
        umount /sys/fs/cgroup/unified /sys/fs/cgroup/systemd 2>/dev/null || :
        mount -t tmpfs tmpfs /run
        mkdir /run/etc /run/etc/up /run/etc/work
        mount -t overlay -o lowerdir=/etc,upperdir=/run/etc/up,workdir=/run/etc/work overlay /etc || {
            echo "skip pod: no overlay can be mounted here"; exit; }
        exec "$0" inside' "$0"
fi
MAKE=${MAKE:-make}
# shellcheck source=test/lib.sh
. test/lib.sh
label='pod: '
bin=$tmp/bin

storage() { "$bin/podman" "$@"; }
clean() {
    /bin/umount /mnt 2>/dev/null || :
    storage pod rm --all --force --time 0 >/dev/null 2>&1 || :
    soon rm -rf "$tmp" 2>/dev/null # podman cleans up by a process of its own
}
# podman would take ./kmsplugin for the folder of an image.
in_folder() { (cd "$tmp" && "$@"); }
# block NAME: the guide's; mount and umount stand for the medium, which is a file system of its own already.
block() {
    awk -v name="\`\`\`sh $1" '/^```$/ { inside = 0 } inside { print } $0 == name { inside = 1 }' doc/operate.md doc/variants.md |
        sed "s/OLD/$old/; s/NEW/$new/; s,/usr/share/kmsplugin,$PWD/deploy," >"$tmp/block"
    [ -s "$tmp/block" ] && sh -eu "$tmp/block"
}
ids() { kmsplugin-ring run keyid | cut -d ' ' -f 1; }
answers() { kmsplugin probe --expect-key-id "$1"; }
# What etcdctl will print of two Secrets, under the KEK with this key_id.
values() {
    kmsplugin-ring print "$1" >"$tmp/kek"
    env PYTHONPATH=test /usr/bin/python3 - "$tmp/kek" >"$tmp/values" <<'END'
import base64, sys
import sealed
kek = base64.b64decode(open(sys.argv[1]).read())
keys = b'/registry/secrets/default/a', b'/registry/secrets/default/b'
sys.stdout.buffer.write(sealed.range_response(*((key, sealed.etcd_v2(kek, key, b'k8s\0object')) for key in keys)))
END
}
# What the kernel says of the process in the container.
confined() {
    process=$(storage inspect --format '{{.State.Pid}}' kmsplugin-kmsplugin)
    grep -E '^(Uid|Cap|NoNewPrivs|Seccomp:)' "/proc/$process/status"
    [ "$(grep -c -E '^Cap(Inh|Prm|Eff|Bnd|Amb):	0{16}$' "/proc/$process/status")" -eq 5 ] &&
        grep -q '^Uid:	0	0	0	0$' "/proc/$process/status" && grep -q '^NoNewPrivs:	1$' "/proc/$process/status" &&
        grep -q '^Seccomp:	2$' "/proc/$process/status" && grep -q ' / ro[, ]' "/proc/$process/mountinfo" &&
        grep -q ' /etc/kmsplugin ro[, ]' "/proc/$process/mountinfo"
}

check 'make' "$MAKE" -s image kmsplugin
mkdir "$bin"
ln -s "$PWD/kmsplugin" "$PWD/deploy/kmsplugin-ring" "$bin/"
cat >"$tmp/containers.conf" <<'X'
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
X
podman=$(command -v podman)
cat >"$bin/podman" <<X
#!/bin/sh
CONTAINERS_CONF=$tmp/containers.conf exec $podman --storage-driver vfs --root "$tmp/root" --runroot "$tmp/runroot" --tmpdir "$tmp/tmp" \\
    --cgroup-manager cgroupfs --events-backend file "\$@"
X
sed "s,VALUES,$tmp/values," >"$bin/crictl" <<'X'
#!/bin/sh
# a container that ends is started again by the kubelet
case $* in
exec*)  cat VALUES ;;
*etcd*) echo etcd ;;
ps*)    podman ps --quiet --filter name=kmsplugin-kmsplugin ;;
stop*)  podman stop --time 10 "$2" && podman pod stop kmsplugin && podman pod start kmsplugin ;;
esac
X
truncate -s 16M "$tmp/medium" && mkfs.ext4 -q "$tmp/medium" && mount -o loop "$tmp/medium" /mnt
printf '#!/bin/sh\n' | tee "$bin/mount" >"$bin/umount"
chmod +x "$bin"/*
export PATH="$bin:$PATH"
mkdir -p /run/kmsplugin
old='' new=''

check 'podman load' storage load --quiet --input build/image/kmsplugin.tar
check 'guide: pod-new' block pod-new
old=$(ids)
require 'podman kube play' in_folder storage kube play "$PWD/deploy/kubeadm/kmsplugin.yaml"
check 'guide: pod' block pod
check 'answers' answers "$old"
check 'root without a capability, a read-only root, the KEK read-only' confined
check 'its own liveness probe' storage exec kmsplugin-kmsplugin /kmsplugin probe
check 'guide: rotate' block rotate
check 'guide: pod-restart' block pod-restart
new=$(ids | tail -n 1)
check 'two KEKs' fails test "$old" = "$new"
check 'the container has both' soon sh -c "podman logs kmsplugin-kmsplugin 2>&1 | grep 'key_id=$old keks=2'"
check 'seal-with' kmsplugin-ring seal-with "$new"
check 'guide: pod-restart' block pod-restart
check 'the new one seals' answers "$new"
values "$old"
check 'guide: retire says no' fails block retire
values "$new"
check 'guide: retire' block retire
check 'guide: pod-restart' block pod-restart
check 'the container has the new one alone' soon sh -c "podman logs kmsplugin-kmsplugin 2>&1 | grep 'key_id=$new keks=1'"
check 'the new one seals still' answers "$new"
[ "$(count 'not ok')" -eq 0 ]
