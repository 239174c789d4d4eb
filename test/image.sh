#!/bin/sh
# The image of make image: is it the same twice, and only the program; and does it run in podman as a cluster would run
# it, read-only, without capabilities, network or root? Needs root, buildah, podman and crun. A line `ok` or `not ok`
# for each test.
set -eu
cd "$(dirname "$0")/.."

# With both versions of cgroups mounted (hybrid) podman takes the wrong one: hide it, from us alone.
if [ -d /sys/fs/cgroup/unified ] && [ "${1:-}" != inside ]; then
    # shellcheck disable=SC2016 # that is for the inner shell
    exec unshare --mount sh -c 'umount /sys/fs/cgroup/unified /sys/fs/cgroup/systemd 2>/dev/null; exec "$0" inside' "$0"
fi

IMAGE=localhost/kmsplugin:test
EPOCH=1700000000        # the time that it is to bear
BYTES_MAX=140000        # of all blobs of the archive
USER_ID=65521           # as release/Dockerfile has it
STRANGER=12345
MAKE=${MAKE:-make}

# shellcheck source=test/lib.sh
. test/lib.sh
label='image: '

storage() {
    podman --storage-driver vfs --root "$tmp/root" --runroot "$tmp/run" --tmpdir "$tmp/tmp" --cgroup-manager cgroupfs \
        --events-backend file "$@"
}
clean() {
    storage rm --all --force --time 0 >/dev/null 2>&1 || :
    soon rm -rf "$tmp" 2>/dev/null  # podman cleans up by a process of its own
}

# What is in the archive: one layer of one file, for one numeric user, and nothing that tells when or where it was made.
contents() {
    python3 - "$1" "$BYTES_MAX" "$EPOCH" <<'X'
import gzip, hashlib, io, json, sys, tarfile
archive = tarfile.open(sys.argv[1])
blobs = {m.name.rsplit('/')[-1]: archive.extractfile(m).read() for m in archive if '/blobs/' in m.name and m.isfile()}
assert all(hashlib.sha256(data).hexdigest() == name for name, data in blobs.items())
assert all((m.uid, m.gid, m.uname) == (0, 0, '') for m in archive)
get = lambda ref: blobs[ref['digest'].removeprefix('sha256:')]
index = json.load(archive.extractfile('./index.json'))
manifest = json.loads(get(index['manifests'][0]))
config = json.loads(get(manifest['config']))
assert len(index['manifests']) == 1 and len(manifest['layers']) == 1 and len(blobs) == 3
assert len(config['rootfs']['diff_ids']) == 1, 'it has a base'
assert config['config'] == {'User': '65521:65521', 'Entrypoint': ['/kmsplugin'], 'Env': config['config']['Env']}, config
assert [e for e in config['config']['Env'] if not e.startswith('PATH=')] == []
layer = tarfile.open(fileobj=io.BytesIO(gzip.decompress(get(manifest['layers'][0]))))
(file,) = layer.getmembers()
assert file.name == 'kmsplugin' and file.isreg(), file.get_info()
assert (file.mode & 0o7777, file.uid, file.gid, file.mtime) == (0o755, 0, 0, int(sys.argv[3])), file.get_info()
assert layer.extractfile(file).read() == open('build/static/kmsplugin', 'rb').read()
size = sum(map(len, blobs.values()))
print(f'{size} bytes in all, the layer {len(get(manifest["layers"][0]))}; at most {sys.argv[2]}')
assert size <= int(sys.argv[2])
X
}

# run NAME OPTION...: a container as locked as can be. The limits are lower than a container's default, for machines
# that have lower ones themselves.
run() {
    container=$1
    shift
    mkdir "$tmp/$container"
    chown $USER_ID:$USER_ID "$tmp/$container"
    storage run --detach --name "$container" --read-only --read-only-tmpfs=false --cap-drop all --network none \
        --security-opt no-new-privileges --ulimit nofile=1024:1024 --ulimit nproc=1024:1024 \
        --volume "$tmp/$container:/run/kmsplugin" "$@"
}

# What the kernel says of the process in the container.
confined() {
    process=$(storage inspect --format '{{.State.Pid}}' "$1")
    grep -E '^(Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp:)' "/proc/$process/status" &&
        grep -q "^Uid:	$USER_ID	$USER_ID	$USER_ID	$USER_ID\$" "/proc/$process/status" &&
        grep -q "^Gid:	$USER_ID	" "/proc/$process/status" &&
        [ "$(grep -c -E '^Cap(Inh|Prm|Eff|Bnd|Amb):	0{16}$' "/proc/$process/status")" -eq 5 ] &&
        grep -q '^NoNewPrivs:	1$' "/proc/$process/status" &&
        grep -q '^Seccomp:	2$' "/proc/$process/status" &&
        [ "$(grep -c : "/proc/$process/net/dev")" -eq 1 ] &&    # lo alone
        grep -q ' / ro[, ]' "/proc/$process/mountinfo"
}

as() {
    setpriv --reuid="$1" --regid="$1" --clear-groups "$tmp/kmsplugin" probe "unix://$2"
}

stops() {
    storage stop --time 10 "$1" &&
        [ "$(storage inspect --format '{{.State.ExitCode}}' "$1")" -eq 0 ] &&
        [ ! -e "$tmp/$1/kms.sock" ]
}

logged() {
    storage logs "$1" 2>&1 | tee "$tmp/log"
    grep -q "$2" "$tmp/log"
}

check 'no stage has a base image' sh -c "grep '^FROM' release/Dockerfile | grep -vqx 'FROM scratch' && exit 1 || grep -qx 'FROM scratch' release/Dockerfile"
check 'make' "$MAKE" -s image kmsplugin
export SOURCE_DATE_EPOCH="$EPOCH"
check 'the first' release/image.sh build/static/kmsplugin "$tmp/first.tar" "$IMAGE"
tail -n 1 "$tmp/output"
sleep 1.1
check 'the second, elsewhere and later' sh -c "umask 077; cp build/static/kmsplugin '$tmp/other';
    TZ=Asia/Tokyo TMPDIR=/var/tmp release/image.sh '$tmp/other' '$tmp/second.tar' '$IMAGE'"
check 'the same bytes twice' cmp "$tmp/first.tar" "$tmp/second.tar"
check 'holds the program alone' contents "$tmp/first.tar"
tail -n 1 "$tmp/output"

cp kmsplugin "$tmp/kmsplugin"
chmod 755 "$tmp/kmsplugin"
(umask 077 && build/static/kmsplugin genkey >"$tmp/kek" && sed 's/^/KMS_KEK=/' "$tmp/kek" >"$tmp/kek.env")
chown root:$USER_ID "$tmp/kek"
chmod 440 "$tmp/kek"

check 'podman load' storage load --quiet --input "$tmp/first.tar"
check 'starts, with the KEK in a file' run file --volume "$tmp/kek:/kek:ro" --env KMS_KEK_FILE=/kek "$IMAGE"
check 'is ready' soon logged file msg=ready
grep -v msg=ready "$tmp/log" || :
check 'no root, no capability, no network, nothing to write to' confined file
check 'answers root outside' as 0 "$tmp/file/kms.sock"
check 'answers its own user outside' as "$USER_ID" "$tmp/file/kms.sock"
check 'does not answer a stranger' fails as "$STRANGER" "$tmp/file/kms.sock"
check 'answers inside: what HEALTHCHECK and livenessProbe run' storage exec file /kmsplugin probe
check 'holds no shell' fails storage exec file sh -c :
check 'SIGTERM ends it well' stops file
check 'probe fails when it is gone' fails as 0 "$tmp/file/kms.sock"

check 'docker format' env FORMAT=docker release/image.sh build/static/kmsplugin "$tmp/docker.tar" "$IMAGE-docker"
check 'podman load, docker format' storage load --quiet --input "$tmp/docker.tar"
check 'starts, with the KEK in the environment' run docker --health-interval disable --env-file "$tmp/kek.env" "$IMAGE-docker"
key_id=$(KMS_KEK_FILE=$tmp/kek build/static/kmsplugin keyid | cut -d ' ' -f 1)
check 'is ready, with the same KEK' soon logged docker "msg=ready.*key_id=$key_id"
check 'its own HEALTHCHECK is well' storage healthcheck run docker
mv "$tmp/docker/kms.sock" "$tmp/docker/away"
check 'and without its socket it is not' fails storage healthcheck run docker
