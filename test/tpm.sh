#!/bin/sh
# kmsplugin-ring seal with a TPM and without, under booted systemd: a machine of qemu-system with a software TPM (swtpm).
# Refused without a TPM, or without systemd's libraries for it, and then --with-key=host; sealed to the TPM, rebooted,
# served; the TPM replaced: what show says, done as it says. Needs root, what make static needs, and
#
#     apt-get install debootstrap qemu-system-x86 swtpm
#
#     test/tpm.sh [bookworm|trixie]       bookworm, if none is named
#
# Where something is missing it is skipped, with the reason. The last line tells how many tests passed and failed.
set -eu
cd "$(dirname "$0")/.."
MAKE=${MAKE:-make}
BOOT_SECONDS=1200       # of one boot, should it hang: an emulator is slow
suite=${1:-bookworm}
# shellcheck source=test/lib.sh
. test/lib.sh
label="tpm, $suite: "
skip() {
    line "skip $label$*"
    echo '0 passed, 0 failed, 1 skipped'
    exit
}
[ "$(id -u)" -eq 0 ] || skip 'needs root'
for tool in debootstrap qemu-system-x86_64 swtpm mkfs.ext4; do
    command -v "$tool" >/dev/null || skip "$tool is not installed"
done

$MAKE -s static
case $suite in
bookworm) tss=libtss2-esys-3.0.2-0,libtss2-mu0,libtss2-rc0,libtss2-tcti-device0 ;;
*)        tss=libtss2-esys-3.0.2-0t64,libtss2-mu-4.0.1-0t64,libtss2-rc0t64,libtss2-tcti-device0t64 ;;
esac
test/root.sh "$suite" "$tmp/root" "systemd-sysv,udev,dbus,linux-image-amd64,$tss" \
    >"$tmp/said" 2>&1 || { tail -n 3 "$tmp/said"; skip 'no root can be made'; }
$MAKE -s install DESTDIR="$tmp/root" PREFIX=/usr INSTALL_PROGRAM=build/static/kmsplugin >/dev/null
cp "$tmp"/root/boot/vmlinuz-* "$tmp/vmlinuz"
cp "$tmp"/root/boot/initrd.img-* "$tmp/initrd"

# What each boot runs, on the console; a line `ok` or `not ok` for each test.
cat >"$tmp/root/walk" <<'END'
exec >/dev/ttyS0 2>&1 </dev/null
stage=$(sed -n 's/.*walk=\([a-z]*\).*/\1/p' /proc/cmdline)
check() {
    name="$stage: $1"
    shift
    echo # what the kernel or systemd has begun
    if "$@" >/tmp/said 2>&1; then echo "ok $name"; else sed 's/^/    /' /tmp/said; echo "not ok $name"; fi
}
says() { # PATTERN COMMAND...: fails, and says so
    pattern=$1
    shift
    if "$@" >/tmp/words 2>&1; then return 1; fi
    cat /tmp/words
    grep -q -- "$pattern" /tmp/words
}
id() { ls /mnt | sed -n 's/^kek-//p'; }
seals() { [ "$(kmsplugin-ring show | sed -n 's/ seals$//p')" = "$(id)" ] && kmsplugin probe --expect-key-id "$(id)"; }
files() { [ "$(echo $(ls /etc/kmsplugin))" = "$*" ] || { ls /etc/kmsplugin; return 1; }; }
libraries() { for file in /usr/lib/*/libtss2-*.so.*; do mv "$file" "${file%.gone}$1"; done; }
mount /dev/vdb /mnt
case $stage in
without)
    check 'new' kmsplugin-ring new /mnt
    check 'it serves' seals
    chmod 644 /etc/kmsplugin/kek
    check 'a wrong mode: the unit does not start' says . systemctl restart kmsplugin.service
    check 'and says why' sh -c 'journalctl -u kmsplugin.service | grep "mode 0644 lets others read it"'
    chmod 600 /etc/kmsplugin/kek
    systemctl restart kmsplugin.service
    check 'seal is refused' says 'cannot be sealed (--with-key=tpm2' kmsplugin-ring seal /mnt
    check 'nothing is changed' files kek
    check 'seal --with-key=host' kmsplugin-ring seal /mnt --with-key=host
    check 'the plain file is gone' files kek.cred
    check 'it serves, sealed' seals
    check 'and after a restart' sh -c 'systemctl restart kmsplugin.service && kmsplugin-ring show'
    check 'a change is sealed so, too' sh -c 'kmsplugin genkey | kmsplugin-ring add -'
    check 'it serves still' seals
    rm /etc/kmsplugin/kek.cred
    check 'the file is lost: show says DO NOT RESTART' says 'DO NOT RESTART' kmsplugin-ring show
    eval "$(sed -n 's/^It is in memory: *//p' /tmp/words)" >/dev/null
    check 'from memory, as it says' seals
    check 'seal asks for a copy of each' says 'is no file. A copy is' kmsplugin-ring seal /mnt --with-key=host
    check 'unseal' kmsplugin-ring unseal
    check 'the sealed file is gone' files kek
    umount /mnt; mount /dev/vdb /mnt
    systemctl stop kmsplugin.socket kmsplugin.service
    rm /etc/kmsplugin/kek
    check 'restored from the medium' kmsplugin-ring init "/mnt/kek-$(id)"
    check 'it serves' seals ;;
with)
    check 'there is a TPM' test -e /dev/tpmrm0
    libraries .gone
    check 'without its libraries seal is refused' says 'cannot be sealed (--with-key=tpm2' kmsplugin-ring seal /mnt
    check 'nothing is changed' files kek
    libraries ''
    check 'seal' kmsplugin-ring seal /mnt
    check 'the plain file is gone' files kek.cred
    check 'it is sealed to the TPM' grep -q -- '^# sealed: --with-key=tpm2' /etc/systemd/system/kmsplugin.service.d/sealed-kek.conf
    check 'it serves' seals ;;
again)
    check 'after a reboot it serves' seals
    check 'sealed' files kek.cred ;;
another)
    check 'the unit does not start' says . systemctl is-active kmsplugin.service
    check 'new is refused' says 'no ring can be read' kmsplugin-ring new /mnt
    check 'show says the way back' says '^rm .*sealed-kek.conf && systemctl daemon-reload' kmsplugin-ring show
    sed 's/^/# /' /tmp/words
    eval "$(grep '^rm .*&& systemctl daemon-reload$' /tmp/words)"
    check 'init' kmsplugin-ring init "/mnt/kek-$(id)"
    check 'it serves' seals
    check 'seal: what cannot be read is not replaced' says 'kek.cred: is there, and cannot be read: move it away' kmsplugin-ring seal /mnt
    mv /etc/kmsplugin/kek.cred /root
    check 'seal to the new TPM' kmsplugin-ring seal /mnt
    check 'it serves, sealed' seals
    check 'no plain file' files kek.cred ;;
esac
umount /mnt
printf '\nthe end of %s\n' "$stage"
systemctl poweroff
END
cat >"$tmp/root/etc/systemd/system/walk.service" <<'END'
[Unit]
After=multi-user.target
[Service]
Type=oneshot
ExecStart=/bin/sh /walk
StandardOutput=null
[Install]
WantedBy=multi-user.target
END
ln -s ../walk.service "$tmp/root/etc/systemd/system/multi-user.target.wants/"
ln -s /dev/null "$tmp/root/etc/systemd/system/serial-getty@ttyS0.service" # it would hang up the console
systemd-machine-id-setup --root="$tmp/root" >/dev/null 2>&1 || :
mkfs.ext4 -q -d "$tmp/root" "$tmp/disk" 3G >"$tmp/said"
rm -rf "$tmp/root"
mkdir "$tmp/empty"
mkfs.ext4 -q -d "$tmp/empty" "$tmp/medium" 16M >"$tmp/said"

# boot STAGE [TPM]: with that TPM, whose state is a folder
boot() {
    tpm=
    if [ $# -eq 2 ]; then
        mkdir -p "$tmp/$2"
        swtpm socket --tpm2 --tpmstate "dir=$tmp/$2" --ctrl "type=unixio,path=$tmp/tpm.sock" --terminate &
        soon test -S "$tmp/tpm.sock"
        tpm="-chardev socket,id=tpm,path=$tmp/tpm.sock -tpmdev emulator,id=tpm,chardev=tpm -device tpm-tis,tpmdev=tpm"
    fi
    # shellcheck disable=SC2086 # options
    run_suite "$1" timeout "$BOOT_SECONDS" qemu-system-x86_64 -accel tcg -cpu max -m 1024 -nodefaults -display none -no-reboot -net none \
        -kernel "$tmp/vmlinuz" -initrd "$tmp/initrd" -append "root=/dev/vda rw console=ttyS0 quiet loglevel=0 systemd.show_status=no walk=$1" \
        -drive "file=$tmp/disk,if=virtio,format=raw" -drive "file=$tmp/medium,if=virtio,format=raw" -serial stdio $tpm </dev/null
    wait
    tr -d '\r' <"$tmp/output" | grep -aE '^(ok|not ok|    |# |the end)' >"$tmp/told" || :
    grep -q "^the end of $1" "$tmp/told" || { tail -n 20 "$tmp/output"; echo "not ok $1: it did not come to its end" >>"$tmp/told"; }
    sed "s/^\(ok\|not ok\) /&$label/" "$tmp/told" | tee -a "$tmp/lines"
}
boot without
boot with tpm-1
boot again tpm-1
boot another tpm-2
summary
