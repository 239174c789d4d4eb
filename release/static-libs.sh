#!/bin/sh
# Builds what the release build links, for one architecture: musl, nghttp2, protobuf-c and BearSSL, as Debian's source
# packages have them. release/sources.sh brings the archives, and says which: its variables OFFLINE and PINS hold here.
#
#   [ARCH=aarch64] [CFLAGS=...] release/static-libs.sh
#
# Needs dpkg-dev, make and gcc; another ARCH (aarch64, armhf, riscv64, s390x) Debian's gcc-TRIPLET, and for <linux/...>
# linux-libc-dev-DEBARCH-cross. It leaves a sysroot and a compiler for it, which finds -lnghttp2 -lprotobuf-c -lbearssl:
#
#   build/static/ARCH/bin/cc        include/ and lib/ beside it
#   build/static/ARCH/src           what was compiled
#   build/static/ARCH/SHA256SUMS    the archives that it came from: release/pins, if those were to be had
#
# A sysroot of our own: Debian's musl-tools bring a musl that is not built from the pinned source, for the machine's own
# architecture alone, and in Debian 12 one that does not relocate packed pointers (8 KB).
set -eu
unset MAKEFLAGS MFLAGS MAKELEVEL    # of a Makefile that calls this: its command-line variables are not meant for musl's
export LC_ALL=C                     # the order of *.c and *.o, hence of the bytes, must not depend on the locale

ARCH=${ARCH:-$(uname -m)}
branches='' big_endian=''
case $ARCH in
x86_64)       triplet=x86_64-linux-gnu branches=-fcf-protection ;;               # CET: endbr64 at branch targets
aarch64)      triplet=aarch64-linux-gnu branches=-mbranch-protection=standard ;; # BTI, signed return addresses
armhf|armv7l) triplet=arm-linux-gnueabihf ;;
s390x)        triplet=s390x-linux-gnu big_endian=-DWORDS_BIGENDIAN ;;
*)            triplet=$ARCH-linux-gnu ;;
esac
CC=${CC:-$triplet-gcc}       # a plain gcc, not musl-gcc: the sysroot is made here
AR=${AR:-$triplet-gcc-ar}    # not ar, which cannot index LTO objects
CFLAGS=${CFLAGS:--O2 -flto -fPIE -fno-asynchronous-unwind-tables -fno-unwind-tables -fstack-protector-strong}

die() {
	echo "static-libs.sh: $*" >&2
	exit 1
}

mkdir -p "build/static/$ARCH"
OUT=$(cd "build/static/$ARCH" && pwd)
archives=$(release/sources.sh)
SRC=$PWD/build/src

rm -rf "$OUT"
mkdir -p "$OUT/bin" "$OUT/include/nghttp2" "$OUT/include/protobuf-c" "$OUT/lib" "$OUT/src"
cd "$OUT/src"
echo "$archives" | sed -n 's/.*  \(.*\.dsc\)$/\1/p' | while read -r dsc; do
	dpkg-source --no-check -x "$SRC/$dsc" "${dsc%%_*}" >"$OUT/log" 2>&1 || { cat "$OUT/log" >&2; exit 1; }
done

grep -q DT_RELR musl/ldso/dlstart.c || die 'this musl is older than 1.2.4'
cd musl
CC="$CC" AR="$AR" RANLIB=true CFLAGS="-fstack-protector-strong $branches" ./configure \
	--prefix="$OUT" --host="$triplet" --disable-shared --disable-wrapper >"$OUT/log"
make -j"$(nproc)" install >"$OUT/log" 2>&1 || { cat "$OUT/log" >&2; exit 1; }

# The compiler: gcc, but with musl's headers, start files and libc, and the kernel's headers that gcc itself would find.
cat >"$OUT/bin/cc" <<-END
	#!/bin/sh
	exec $CC $branches -nostdinc -isystem "$OUT/include" -isystem "$($CC -print-file-name=include)" -B"$OUT/lib" -L"$OUT/lib" "\$@"
END
chmod +x "$OUT/bin/cc"
for dir in linux asm asm-generic; do
	header=$(echo "#include <$dir/types.h>" | $CC -E - | sed -n "s,^# 1 \"\(.*/$dir\)/types.h\".*,\1,p")
	ln -s "${header:?no <$dir/types.h>: install linux-libc-dev, or linux-libc-dev-DEBARCH-cross}" "$OUT/include/$dir"
done

# library NAME FLAGS SOURCE...: compiles SOURCE, as named from here, into libNAME.a.
library() {
	name=$1 flags=$2
	shift 2
	# shellcheck disable=SC2086 # lists
	printf '%s\n' "$@" | xargs -n 8 -P "$(nproc)" "$OUT/bin/cc" $CFLAGS $flags -c
	$AR rcsD "$OUT/lib/lib$name.a" ./*.o
}

# nghttp2 and protobuf-c: Debian's archives do not all bring a configure. What it would find of musl:
cd "$OUT/src/nghttp2/lib"
cat >config.h <<-END
	#define HAVE_ARPA_INET_H 1
	#define HAVE_NETINET_IN_H 1
	#define HAVE_TIME_H 1
	#define HAVE_CLOCK_GETTIME 1
	#define HAVE_DECL_CLOCK_MONOTONIC 1
END
version=$(sed -n 's/^AC_INIT(\[nghttp2\], \[\([0-9.]*\)\].*/\1/p' ../configure.ac)
number=$(echo "$version" | tr . ' ' | xargs printf '0x%02x%02x%02x')
sed "s/@PACKAGE_VERSION@/$version/; s/@PACKAGE_VERSION_NUM@/$number/" includes/nghttp2/nghttp2ver.h.in >includes/nghttp2/nghttp2ver.h
cp includes/nghttp2/*.h "$OUT/include/nghttp2"
library nghttp2 '-DBUILDING_NGHTTP2 -DHAVE_CONFIG_H -I.' ./*.c
cd "$OUT/src/protobuf-c/protobuf-c"
cp protobuf-c.h "$OUT/include/protobuf-c"
library protobuf-c "$big_endian" protobuf-c.c

# BearSSL: by its own Makefile, and small (-Os), as that has it. Without LTO: constant-time code relies on a compiler that
# does not see across files. What AES-NI and PCLMUL run in is -O2: 2 KB for 5 % of the instructions of an Encrypt.
bearssl() {
	flags="$CFLAGS -fno-lto $1"
	shift
	make -j"$(nproc)" CC="$OUT/bin/cc" AR="$AR" CFLAGS="$flags" "$@" >"$OUT/log" 2>&1 || { cat "$OUT/log" >&2; exit 1; }
}
cd "$OUT/src/bearssl"
cp inc/*.h "$OUT/include"
mkdir -p build/obj
if [ "$ARCH" = x86_64 ]; then bearssl -O2 build/obj/aes_x86ni.o build/obj/aes_x86ni_ctr.o build/obj/aes_x86ni_ctrcbc.o build/obj/ghash_pclmul.o; fi
bearssl -Os lib
cp build/libbearssl.a "$OUT/lib"

rm "$OUT/log"
echo "$archives" >"$OUT/SHA256SUMS"
