#!/bin/sh
# Makes an OCI archive of a release build, by release/Dockerfile: the same bytes for the same program.
# Needs buildah, zopfli and Python, and neither a registry nor a daemon.
#
#   [ARCH=aarch64] [FORMAT=docker] release/image.sh PROGRAM ARCHIVE NAME:TAG
#
# FORMAT=docker makes a docker archive instead, whose configuration has the HEALTHCHECK too. SOURCE_DATE_EPOCH is the
# time that image and file bear (0).
#
#   podman load -i ARCHIVE    ctr -n k8s.io images import ARCHIVE    docker load takes FORMAT=docker
set -eu

program=$1 archive=$2 name=$3
epoch=${SOURCE_DATE_EPOCH:-0}
case ${ARCH:=$(uname -m)} in
x86_64)       platform='--arch amd64' ;;
aarch64)      platform='--arch arm64 --variant v8' ;;
armhf|armv7l) platform='--arch arm --variant v7' ;;
*)            platform="--arch $ARCH" ;;
esac

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' HUP INT TERM

# A storage of its own, without layers on layers (vfs), and no namespace that a container might lack: nothing is run.
storage() {
	buildah --log-level error --storage-driver vfs --root "$tmp/root" --runroot "$tmp/run" "$@"
}
mkdir -p "$tmp/context" "$tmp/layout"
cp "$program" "$tmp/context/kmsplugin"
# shellcheck disable=SC2086 # platform is a list
storage build --quiet --isolation chroot --format "${FORMAT:-oci}" --timestamp "$epoch" --identity-label=false \
	$platform -f "$(dirname "$0")/Dockerfile" -t "$name" "$tmp/context" >/dev/null

mkdir -p "$(dirname "$archive")"
rm -f "$archive"
if [ "${FORMAT:-oci}" = docker ]; then
	storage push --quiet "$name" "docker-archive:$archive:$name"
	exit
fi
storage push --quiet --compression-format gzip "$name" "oci:$tmp/layout:$name"

# The layer again as zopfli packs it, which is gzip too, and 17 KB less than buildah's (9 KB less than gzip -9). Blobs go by the name of their digest: layer,
# manifest and index are written anew; the configuration knows the layer unpacked, and stays.
python3 - "$tmp/layout" >"$tmp/digest" <<'END'
import gzip, hashlib, json, pathlib, subprocess, sys
layout = pathlib.Path(sys.argv[1])


def take(entry):
    path = layout / 'blobs/sha256' / entry['digest'].removeprefix('sha256:')
    data = path.read_bytes()
    path.unlink()
    return data


def put(entry, data):
    digest = hashlib.sha256(data).hexdigest()
    (layout / 'blobs/sha256' / digest).write_bytes(data)
    entry.update(digest='sha256:' + digest, size=len(data))


index = json.loads((layout / 'index.json').read_text())
manifest = json.loads(take(index['manifests'][0]))
layer = manifest['layers'][0]
unpacked = layout / 'layer.tar'
unpacked.write_bytes(gzip.decompress(take(layer)))
put(layer, subprocess.run(['zopfli', '-c', unpacked], check=True, stdout=subprocess.PIPE).stdout)
unpacked.unlink()
put(index['manifests'][0], json.dumps(manifest, separators=(',', ':')).encode())
(layout / 'index.json').write_text(json.dumps(index, separators=(',', ':')))
print(index['manifests'][0]['digest'])
END
tar --sort=name --mtime="@$epoch" --owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX \
	-C "$tmp/layout" -cf "$archive" .
echo "$(cat "$tmp/digest")  $archive, $(wc -c <"$archive") bytes"
