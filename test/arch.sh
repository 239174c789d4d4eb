#!/bin/sh
# The release build on the architectures that it is made for: the shape of the program, which AES code it chooses, the
# unit tests, and the tests of the running server over a real socket; those of another processor under qemu-user. Then the
# program on a real kernel, by test/kernel.sh. Needs what test.sh and kernel.sh need, dpkg-dev, qemu-user-static, and for
# each the cross compiler and kernel headers:
#
#     apt-get install gcc-aarch64-linux-gnu gcc-arm-linux-gnueabihf gcc-riscv64-linux-gnu gcc-s390x-linux-gnu
#     apt-get install linux-libc-dev-arm64-cross linux-libc-dev-armhf-cross linux-libc-dev-riscv64-cross
#     apt-get install linux-libc-dev-s390x-cross
#
#     test/arch.sh [ARCH...]    x86_64 aarch64 armhf riscv64 s390x, or some of them
#
# The last line tells how many tests passed and failed. What an emulator cannot show is skipped, and says so: memory and
# environment in /proc are qemu's own, and qemu-user has no seccomp.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-/usr/bin/python3}
MAKE=${MAKE:-make}
# shellcheck source=test/lib.sh
. test/lib.sh
SUITE_SECONDS=1800      # an emulator is slow

# suite NAME COMMAND...: as in lib.sh, but of the tests that pass only their number is shown.
suite() {
    run_suite "$@"
    sed -n "s/^\(ok\|not ok\|skip\) /&$label$name: /p" "$tmp/output" >>"$tmp/lines"
    grep -av '^ok ' "$tmp/output" | cut -c 1-300 || :
    echo "# $label$name: $(grep -ac '^ok ' "$tmp/output") ok"
}

# shape MACHINE CLASS DATA: the program is of that kind; is one file that needs no other; has no relocation by name
# (musl's start does none); is hardened: no page is both written and executed, what is relocated is read-only then; and
# keeps to 256 KiB on x86_64, to 272 elsewhere.
shape() {
    readelf -W -h -l -d -r "$program" >"$tmp/elf"
    grep -E 'Machine:|Class:|Data:|Type:|LOAD|GNU_|NEEDED|FLAGS' "$tmp/elf" || :
    grep -q "Machine: .*$1" "$tmp/elf" || return 1
    grep -q "Class: .*$2" "$tmp/elf" || return 1
    grep -q "Data: .*$3 endian" "$tmp/elf" || return 1
    grep -q 'Type: .*DYN' "$tmp/elf" || return 1
    grep -q -e INTERP -e '(NEEDED)' "$tmp/elf" && return 1
    grep -E '^[0-9a-f]{8,} ' "$tmp/elf" | grep -v '_RELATIVE' && return 1
    grep -qE '^[0-9a-f]{8,} .*_RELATIVE|\.relr\.dyn' "$tmp/elf" || return 1
    grep -qE 'GNU_STACK .* RW ' "$tmp/elf" || return 1
    grep -q GNU_RELRO "$tmp/elf" || return 1
    grep -q 'FLAGS_1.*NOW' "$tmp/elf" || return 1
    grep -E 'LOAD .* RWE ' "$tmp/elf" && return 1
    wc -c <"$program"
    [ "$(wc -c <"$program")" -le $((most * 1024)) ]
}

# What a server says of the AES code that it has chosen for this machine.
chooses() {
    KMSPLUGIN=$1 PYTHONPATH=test "$PYTHON" - "$2" <<'X'
import re, sys, plugin
server = plugin.Server()
chosen = re.search(r'msg=ready .*\bcipher=(\S+)', server.log())[1]
server.stop()
print('chosen:', chosen)
sys.exit(chosen != sys.argv[1])
X
}

# on_kernel: the program on Debian's kernel; the lines of these tests bear the architecture already.
on_kernel() {
    run_suite "${label}kernel" test/kernel.sh "$arch"
    sed -n '/^\(ok\|not ok\|skip\) /p' "$tmp/output" >>"$tmp/lines"
    grep -av '^ok ' "$tmp/output" || :
    echo "# ${label}kernel: $(grep -ac '^ok ' "$tmp/output") ok"
}

# emulate FILE QEMU [OPTION...]: makes FILE, which runs the program in an emulator.
emulate() {
    file=$1
    shift
    # qemu by its path, and no binfmt_misc: the machine need not be set up for it
    printf '#!/bin/sh\nexec %s -0 kmsplugin %s "$@"\n' "$*" "$tmp/$arch/program" >"$file"
    chmod 755 "$file"
}

[ $# -gt 0 ] || set -- x86_64 aarch64 armhf riscv64 s390x
for arch; do
    echo "== $arch"
    label="$arch: "
    qemu=$arch gcc=$arch-linux-gnu-gcc cipher=ct64 class=ELF64 data=little most=272
    case $arch in
    x86_64)  machine=X86-64 most=256 ;;
    aarch64) machine=AArch64 ;;
    armhf)   machine=ARM qemu=arm gcc=arm-linux-gnueabihf-gcc cipher=ct32 class=ELF32 ;;
    riscv64) machine=RISC-V ;;
    s390x)   machine=S/390 data=big ;;
    *)       line "not ok ${label}unknown"; continue ;;
    esac
    qemu=$(command -v "qemu-$qemu-static") || qemu=
    if ! command -v "$gcc" >/dev/null || { [ -z "$qemu" ] && [ "$arch" != "$(uname -m)" ]; }; then
        line "skip ${label}there is no $gcc, or no qemu-user-static"
        continue
    fi
    dir=build/static/$arch
    [ "$arch" != "$(uname -m)" ] || dir=build/static
    program=$dir/kmsplugin
    require 'builds' "$MAKE" -s ARCH="$arch" "$program" "$dir/unit" "$dir/sandbox" "$dir/without" || continue
    check "is static-pie, hardened, $class, $data endian" shape "$machine" "$class" "$data"
    mkdir "$tmp/$arch"
    cp "$program" "$tmp/$arch/program"
    chmod 755 "$tmp/$arch" "$tmp/$arch/program"

    if [ "$arch" = "$(uname -m)" ]; then
        if [ "$arch" = x86_64 ] && grep -qw aes /proc/cpuinfo && grep -qw pclmulqdq /proc/cpuinfo; then
            check 'chooses aesni' chooses "$program" aesni
        fi
        suite unit "$dir/unit"
        suite sandbox "$dir/sandbox"
        suite server env KMSPLUGIN="$program" KMSPLUGIN_WITHOUT="$dir/without" "$PYTHON" test/run.py
        on_kernel
        if [ "$arch" != x86_64 ] || [ -z "$qemu" ]; then continue; fi
        emulate "$tmp/$arch/without-aes" "$qemu" -cpu qemu64,-aes,-pclmulqdq
        check 'chooses ct64 on a processor without AES' chooses "$tmp/$arch/without-aes" ct64
        emulate "$tmp/$arch/without-clmul" "$qemu" -cpu max,-pclmulqdq
        check 'chooses ct64 on a processor that has but one of the two' chooses "$tmp/$arch/without-clmul" ct64
        continue
    fi
    emulate "$tmp/$arch/kmsplugin" "$qemu"
    check "chooses $cipher" chooses "$tmp/$arch/kmsplugin" "$cipher"
    suite unit "$qemu" "$dir/unit"
    suite server env KMSPLUGIN="$tmp/$arch/kmsplugin" KMSPLUGIN_EMULATED=1 "$PYTHON" test/run.py
    on_kernel
done

for arch; do
    echo "$arch: $(count "ok $arch:") passed, $(count "not ok $arch:") failed, $(count "skip $arch:") skipped"
done
summary
