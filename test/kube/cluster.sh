#!/bin/sh
# All tests with Kubernetes' own code: the client halves of API servers from 1.28 on
# (compat/), and a real kube-apiserver with a real etcd, or with kine on SQLite
# (cluster/). The last line is "N passed, N failed", with "N skipped" if some were
# (they need root); to fail is also to run nothing.
#
#     cluster.sh          all of it
#     cluster.sh short    fewer Secrets, shorter outages: under 10 minutes when all is built
#
# KMSPLUGIN is the plugin under test (../../kmsplugin from here), KUBE_RUN a
# regular expression that chooses tests of cluster/. What is built for this stays
# in build/kube/, which git ignores.
set -eu
case ${KMSPLUGIN-} in '' | /*) ;; *) KMSPLUGIN="$PWD/$KMSPLUGIN" ;; esac
cd "$(dirname "$0")"
root=$(cd ../.. && pwd)
export KMSPLUGIN="${KMSPLUGIN:-$root/kmsplugin}" KUBE_PROGRAMS="$root/build/kube"
case ${1-} in
'') short='' limit=45m ;;
short) short=-short limit=15m ;;
*)
    echo "usage: $0 [short]" >&2
    exit 2
    ;;
esac

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' HUP INT TERM
: >"$tmp/log"
broken=0

# tests NAME COMMAND...: shows what go test says, and keeps it. Not built, ended by a
# panic or by the time limit: no test says so itself, so it counts as a failure here.
tests() {
    name=$1
    shift
    echo "== $name"
    # POSIX sh knows no pipefail: the status passes the pipe in a file.
    { "$@" 2>&1 && status=0 || status=$?; echo "$status" >"$tmp/status"; } | tee "$tmp/part"
    read -r status <"$tmp/status"
    if [ "$status" -ne 0 ] && ! grep -q '^--- FAIL: ' "$tmp/part"; then
        broken=$((broken + 1))
    elif [ "$status" -eq 0 ] && ! grep -q '^--- PASS: ' "$tmp/part"; then
        broken=$((broken + 1))
    fi
    cat "$tmp/part" >>"$tmp/log"
}

module_version() {
    go list -m -f '{{.Version}}' "$@"
}

# The programs are built anew when a version changes, or Go's, or this list (MODULE[=NAME]).
build() {
    cd cluster
    kubernetes=$(module_version k8s.io/kubernetes)
    list='k8s.io/kubernetes/cmd/kube-apiserver k8s.io/kubernetes/cmd/kubeadm k8s.io/kubernetes/cmd/kubectl
        go.etcd.io/etcd/server/v3=etcd go.etcd.io/etcd/etcdctl/v3=etcdctl go.etcd.io/etcd/etcdutl/v3=etcdutl'
    kine=v0.17.5    # by its own versions, which are others than the tools': Go's checksum database vouches for them
    stamp="$kubernetes $(module_version go.etcd.io/etcd/server/v3) kine $kine $(go version) $list"
    [ "$(cat "$KUBE_PROGRAMS/stamp" 2>/dev/null)" != "$stamp" ] || return 0
    echo "== building kube-apiserver $kubernetes, etcd, kine $kine and others (minutes, once)"
    mkdir -p "$KUBE_PROGRAMS"
    rm -f "$KUBE_PROGRAMS/stamp"
    for program in $list; do
        name=${program##*[/=]}
        go build -trimpath -ldflags="-s -w -X k8s.io/component-base/version.gitVersion=$kubernetes" \
            -o "$KUBE_PROGRAMS/$name" "${program%=*}" || return
    done
    GOBIN="$KUBE_PROGRAMS" go install -trimpath -ldflags='-s -w' "github.com/k3s-io/kine@$kine" || return
    echo "$stamp" >"$KUBE_PROGRAMS/stamp"
}

# Generations from old to new, since each reads what the earlier ones stored. Go completes a copy of the module's file.
compat() {
    cd compat
    cp "$1" "${1%.mod}.sum" "$tmp/"
    export GOFLAGS="-mod=mod -modfile=$tmp/$1"
    KMS_COMPAT_APISERVER=$(module_version k8s.io/apiserver)
    KMS_COMPAT_GRPC=$(module_version google.golang.org/grpc)
    export KMS_COMPAT_APISERVER KMS_COMPAT_GRPC KMS_COMPAT_DIR="$tmp/compat"
    go test -count=1 -timeout 10m -v . && cmp "${1%.mod}.sum" "$tmp/${1%.mod}.sum"
}

cluster() {
    cd cluster
    # shellcheck disable=SC2086 # $short is one word or none
    go test -count=1 -timeout "$limit" $short -run "${KUBE_RUN:-.}" -v .
}

mkdir "$tmp/compat"
for file in compat/v*.mod; do
    tests "${file#compat/}" compat "${file#compat/}"
done
if (build); then
    tests cluster cluster
else
    broken=$((broken + 1))
fi

passed=$(grep -c '^--- PASS: ' "$tmp/log") || true
failed=$(grep -c '^--- FAIL: ' "$tmp/log") || true
failed=$((failed + broken))
skipped=$(grep -c '^--- SKIP: ' "$tmp/log") || true
echo '== figures'
sed -n 's/^ *[a-z_]*\.go:[0-9]*: figures //p' "$tmp/log"
if [ "$skipped" -gt 0 ]; then
    echo "$passed passed, $failed failed, $skipped skipped"
else
    echo "$passed passed, $failed failed"
fi
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
