#!/bin/sh
# The release program on real kernels: each architecture's is booted under qemu-system with Debian's own kernel for it,
# and test/arch/init.c as its only other file, which makes the tests there. qemu-user, which test/arch.sh uses, has no
# seccomp. Needs what make static needs for these architectures, apt with access to a Debian mirror, and
#
#     apt-get install cpio qemu-system-arm qemu-system-misc qemu-system-x86 opensbi
#
#     test/kernel.sh [ARCH...]    x86_64 aarch64 armhf riscv64 s390x, or some of them
#
# CALLS=1000 tells how often each RPC is called (a tenth of that where an older kernel is imitated). Kernels are kept in build/kernel; remove that to have today's.
set -eu
cd "$(dirname "$0")/.."
MAKE=${MAKE:-make}
CALLS=${CALLS:-1000}
# shellcheck source=test/lib.sh
. test/lib.sh
BOOT_SECONDS=1800       # of one machine, should it hang: an emulator is slow

# suites: what the machine takes its own packages from, for deb lines; then the releases of the same mirror, since not all
# architectures are in all of them.
suites() {
    # shellcheck disable=SC2016 # these dollars are apt's
    apt-get indextargets --format '$(ORIGIN)|$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' | sort -u |
        sed -n 's,^Debian|,,p' >"$tmp/own"
    cat "$tmp/own"
    sed 's, .*,,' "$tmp/own" | sort -u | while read -r uri; do
        for suite in stable testing sid; do echo "$uri $suite main"; done
    done
}

# fetch DIR DEBARCH FLAVOUR: Debian's kernel for that architecture, into DIR/vmlinuz: from the first suite that has it. The
# machine's apt is not ours to change: a configuration of our own, with keys and mirrors of the machine's. apt checks the
# signature and every hash.
fetch() {
    [ ! -f "$1/vmlinuz" ] || return 0
    rm -rf "$1"
    mkdir -p "$1/lists/partial" "$1/cache" "$1/root"
    cat >"$1/conf" <<-END
		Dir::Etc::sourcelist "$PWD/$1/sources.list";
		Dir::Etc::sourceparts "-";
		Dir::State::lists "$PWD/$1/lists";
		Dir::State::status "/dev/null";
		Dir::Cache "$PWD/$1/cache";
		APT::Architecture "$2";
		APT::Architectures { "$2"; };
		APT::Sandbox::User "root"; // apt's own user may not be able to write here
		Acquire::Languages "none";
	END
    suites >"$tmp/suites"
    while read -r suite; do
        echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $suite" >"$1/sources.list"
        APT_CONFIG=$1/conf apt-get -qq update || continue
        # the package of this name only depends on one with a version in its name, or on what that is made of
        packages=$(APT_CONFIG=$1/conf apt-cache depends --recurse --important "linux-image-$3" |
            grep -E '^linux-(image|binary)-[0-9]') || continue
        # shellcheck disable=SC2086 # a list
        (cd "$1" && APT_CONFIG=conf apt-get -qq download $packages) || continue
        for package in "$1"/linux-*.deb; do dpkg-deb -x "$package" "$1/root"; done
        mv "$1"/root/boot/vmlinu[xz]-* "$1/vmlinuz"
        rm -rf "$1/root" "$1/lists" "$1/cache" "$1"/linux-*.deb
        return
    done <"$tmp/suites"
    return 1
}

# boot COMMAND...: qemu, the kernel and our two files. What the console said goes to $tmp/console.
boot() {
    timeout "$BOOT_SECONDS" "$@" -m 512 -nographic -nodefaults -no-reboot -serial stdio -monitor none \
        -kernel "$kernel/vmlinuz" -initrd "$tmp/$arch.cpio" \
        -append "console=$console loglevel=1 panic=-1 random.trust_cpu=off random.trust_bootloader=off -- $CALLS" </dev/null >"$tmp/console" 2>&1
}

# initramfs: init and the program, in a form that the kernel unpacks.
initramfs() {
    mkdir -p "$tmp/root"
    # libgcc, which is linked last, has a division by zero that raises a signal
    "build/static/$arch/bin/cc" -std=c11 -Wall -Wextra -O2 -static -Wl,-u,raise -o "$tmp/root/init" test/arch/init.c &&
        cp "$program" "$tmp/root/kmsplugin" &&
        printf '%s\n' init kmsplugin | (cd "$tmp/root" && cpio -o -H newc --quiet) >"$tmp/$arch.cpio"
}

[ $# -gt 0 ] || set -- x86_64 aarch64 armhf riscv64 s390x
for arch; do
    echo "== $arch on its kernel"
    label="$arch: kernel: "
    # Never KVM: it would be another machine each time, and emulated ones boot in seconds. x86_64 without RDRAND, so that
    # random bytes are late; aarch64 with a signing of addresses that is not slow to emulate.
    console=ttyS0 cpu=max machine=virt,dtb-randomness=off
    case $arch in
    x86_64)  debarch=amd64 flavour=amd64 qemu=x86_64 machine=q35 cpu=max,-rdrand,-rdseed ;;
    aarch64) debarch=arm64 flavour=arm64 qemu=aarch64 console=ttyAMA0 cpu=max,pauth-impdef=on ;;
    armhf)   debarch=armhf flavour=armmp qemu=arm console=ttyAMA0 cpu=cortex-a15 ;;
    riscv64) debarch=riscv64 flavour=riscv64 qemu=riscv64 cpu=rv64 machine=virt ;;
    s390x)   debarch=s390x flavour=s390x qemu=s390x console=ttysclp0 machine=s390-ccw-virtio ;;
    *)       line "not ok ${label}unknown"; continue ;;
    esac
    if ! command -v "qemu-system-$qemu" >/dev/null; then
        line "skip ${label}there is no qemu-system-$qemu"
        continue
    fi
    kernel=build/kernel/$arch
    if ! fetch "$kernel" "$debarch" "$flavour" >"$tmp/output" 2>&1; then
        sed 's/^/    /' "$tmp/output"
        line "skip ${label}no Debian suite here has linux-image-$flavour for $debarch"
        continue
    fi
    program=build/static/$arch/kmsplugin
    [ "$arch" != "$(uname -m)" ] || program=build/static/kmsplugin
    require 'builds' "$MAKE" -s ARCH="$arch" "$program" || continue
    require 'is packed with its init' initramfs || continue

    began=$(date +%s)
    status=0
    boot "qemu-system-$qemu" -machine "$machine,accel=tcg" -cpu "$cpu" &
    pid=$!
    wait "$pid" || status=$?
    pid=
    tr -d '\r\000' <"$tmp/console" >"$tmp/said"
    sed 's/^/# /; s/^# \(ok\|not ok\|skip\) /\1 '"$label"'/' "$tmp/said" | cut -c 1-300 >"$tmp/output"
    sed -n '/^\(ok\|not ok\|skip\) /p' "$tmp/output" >>"$tmp/lines"
    sed -n '/^# kernel /,$p' "$tmp/output"
    check 'comes to an end' grep -x end "$tmp/said"
    echo "# $arch: $(($(date +%s) - began)) seconds in all, qemu's exit status $status"
done
summary
