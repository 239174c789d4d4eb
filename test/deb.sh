#!/bin/sh
# The Debian package of make deb: is lintian content; is it installed, does it run, does it notice make install and the
# reverse, and is it purged without a trace but the key? That happens on an overlay over this machine's own Debian, of which
# nothing stays. Needs root, dpkg-dev, debhelper, lintian, and the libraries. A line `ok`, `not ok` or `skip` for each test.
set -eu
here=$(dirname "$0")
# shellcheck source=test/lib.sh
. "$here/lib.sh"
cd "$here/.."
MAKE=${MAKE:-make}
label='deb: '

# Inside, chrooted into the overlay: $1 is the .deb, alone in /tmp/deb, beside the sources.
inside() {
    export DEBIAN_FRONTEND=noninteractive
    # shellcheck disable=SC2317 # called by check
    install() { "$MAKE" -s -C /tmp/deb/sources install INSTALL_PROGRAM=/bin/true; }
    check 'is not here yet' fails dpkg -s kmsplugin
    check 'make install, before it' install
    check 'installs, and says what hides it' says 0 '/usr/local/sbin/kmsplugin, of make install, hides this' dpkg -i "$1"
    check 'make uninstall' "$MAKE" -s -C /tmp/deb/sources uninstall
    check 'leaves nothing of make install' silent find /usr/local -name '*kmsplugin*'
    check 'has what it depends on' dpkg --configure --pending
    check 'make install over it is refused' says 2 '/usr/sbin/kmsplugin is there, of a package' install
    check 'and has installed nothing' silent find /usr/local -name '*kmsplugin*'
    check 'files as packed' dpkg --verify kmsplugin
    for so in libnghttp2.so.14 libprotobuf-c.so.1 libbearssl.so.0; do
        check "runs on Debian's $so" sh -c "ldd /usr/sbin/kmsplugin | grep '$so => /'"
    done
    for unit in kmsplugin.service kmsplugin.socket kmsplugin-textfile.timer; do
        check "$unit waits to be enabled" test "$(systemctl is-enabled $unit 2>&1)" = disabled
    done
    check 'units: systemd-analyze verify' silent systemd-analyze verify --man=no kmsplugin.service kmsplugin.socket
    check 'the socket'\''s directory is root'\''s' test "$(stat -c '%a %u' /run/kmsplugin)" = '755 0'
    check 'man finds its page' man --where kmsplugin
    check 'makes a key' sh -c 'umask 077; kmsplugin genkey >/etc/kmsplugin/kek'
    KMS_KEK_FILE=/etc/kmsplugin/kek setsid kmsplugin serve --sandbox require >/tmp/deb/log 2>&1 &
    server=$!
    check 'answers' soon kmsplugin probe
    check 'is installed again, as by an upgrade, and hides nothing' fails says 0 'make install' dpkg -i "$1"
    check 'answers still' kmsplugin probe
    kill "$server"
    check 'ends well' wait "$server"
    check 'is purged' dpkg --purge kmsplugin
    check 'the key is still there' test -s /etc/kmsplugin/kek
    rm -r /etc/kmsplugin
    check 'dpkg has forgotten it' fails dpkg -s kmsplugin
}
if [ "${1:-}" = inside ]; then
    inside "$2"
    exit
fi

# Not of use here: who maintains it has no address, and it does not go to Debian.
lint() {
    lintian --allow-root --fail-on error,warning --suppress-tags \
        bogus-mail-host,bogus-mail-host-in-debian-changelog,initial-upload-closes-no-bugs build/deb/*.changes
}

mkdir "$tmp/none"
for tool in make sh sed date head git tar gzip sort grep find mkdir cut uname dirname id cc; do
    ln -s "$(command -v "$tool")" "$tmp/none/"
done
check 'make deb says what it lacks' says 2 '^make deb needs packages: apt-get install build-essential' env PATH="$tmp/none" "$MAKE" -s deb
check 'make deb' "$MAKE" -s deb
cp "$tmp/output" "$tmp/log"
check 'its build has passed the unit tests' grep '^ok sealing_self_test' "$tmp/log"
check 'lintian' lint
deb=$(echo build/deb/kmsplugin_*.deb)
check 'unpacks' dpkg-deb -x "$deb" "$tmp/x"
check 'hardened' sh -c "readelf -W -d '$tmp/x/usr/sbin/kmsplugin' | grep 'FLAGS_1.*NOW.*PIE'"
check 'has what the guide copies' test -f "$tmp/x/usr/share/kmsplugin/kubeadm/kmsplugin.yaml" -a -f "$tmp/x/usr/share/kmsplugin/encryption-v2.yaml"
cp "$deb" "$tmp/first.deb"
check 'make deb, again' "$MAKE" -s deb
check 'the same bytes twice' cmp "$deb" "$tmp/first.deb"

mkdir -p "$tmp/deb"
cp "$deb" test/deb.sh test/lib.sh "$tmp/deb/"
cp -R "build/deb/kmsplugin-$("$MAKE" -s version)" "$tmp/deb/sources"
deb=/tmp/deb/$(basename "$deb")
# shellcheck disable=SC2016 # that is for the inner shell
unshare --mount --pid --fork --kill-child --net --ipc --uts sh -euc '
    tmp=$1
    mkdir "$tmp/overlay"
    mount -t tmpfs tmpfs "$tmp/overlay"
    cd "$tmp/overlay"
    mkdir upper work root
    mount -t overlay -o lowerdir=/,upperdir="$PWD/upper",workdir="$PWD/work" overlay root || exit 77
    mount -t proc proc root/proc
    mount --bind /dev root/dev
    mount -t tmpfs -o mode=755 tmpfs root/run
    mount -t tmpfs tmpfs root/tmp
    cp -R "$tmp/deb" root/tmp/deb
    ip link set lo up 2>/dev/null || :
    chroot root sh /tmp/deb/deb.sh inside "$2"
    find upper -name "*kmsplugin*" ! -type c >"$tmp/left" # a character device stands for what is gone' sh "$tmp" "$deb" && status=0 || status=$?
case $status in
0)  check 'and nothing else is' sh -c "cat '$tmp/left' && [ ! -s '$tmp/left' ]" ;;
77) echo 'skip deb: install, run, purge: no overlay can be mounted here' ;;
*)  echo "not ok deb: install, run, purge: status $status" ;;
esac
