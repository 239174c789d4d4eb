#!/bin/sh
# Builds what the release build links, for one architecture: musl, nghttp2, protobuf-c and BearSSL, as Debian's source
# packages have them.
#
#   [ARCH=aarch64] [CFLAGS=...] [OFFLINE=1] release/static-libs.sh
#
# apt checks signatures and hashes, whatever mirror it has; so Debian's security fixes are in. Archives are kept in
# build/src, and unpacked afresh each time. OFFLINE=1 takes those that are there, after a check of their SHA-256.
#
# Needs dpkg-dev, make and gcc; another ARCH (aarch64, armhf, riscv64, s390x) Debian's gcc-TRIPLET, and for <linux/...>
# linux-libc-dev-DEBARCH-cross. It leaves a sysroot and a compiler for it, which finds -lnghttp2 -lprotobuf-c -lbearssl:
#
#   build/static/ARCH/bin/cc        include/ and lib/ beside it
#   build/static/ARCH/src           what was compiled
#   build/static/ARCH/SHA256SUMS    the archives that it came from
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

mkdir -p build/src "build/static/$ARCH"
SRC=$(cd build/src && pwd)
OUT=$(cd "build/static/$ARCH" && pwd)

# fetch SUITES PACKAGE...: the newest archives of the source packages, verified, into $SRC; prints their SHA-256. deb-src
# entries are rarely configured, and the machine's apt is not ours to change: a configuration of our own asks the mirrors
# that the machine takes its packages from. SUITES is a sed command on the lines that name them.
fetch() {
	suites=$1
	shift
	apt=$SRC/apt/$1
	mkdir -p "$apt/lists/partial" "$apt/cache"
	# shellcheck disable=SC2016 # these dollars are apt's
	apt-get indextargets --format '$(ORIGIN)|$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' | sort -u |
		sed -n "s,^Debian|,deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] ,p" | sed "$suites" >"$apt/sources.list"
	[ -s "$apt/sources.list" ] || die 'apt knows no Debian suite: run apt-get update'
	cat >"$apt/conf" <<-END
		Dir::Etc::sourcelist "$apt/sources.list";
		Dir::Etc::sourceparts "-";
		Dir::State::lists "$apt/lists";
		Dir::Cache "$apt/cache";
		APT::Sandbox::User "root"; // apt's own user may not be able to write here
	END
	export APT_CONFIG="$apt/conf"
	apt-get -qq update
	apt-get -qq --download-only source "$@" >&2
	(cd "$apt" && apt-get -qq --print-uris source "$@") >"$apt/uris"    # where no archive is: it names what is missing
	cut -d ' ' -f 2 "$apt/uris" | sort | xargs sha256sum
	unset APT_CONFIG
}

cd "$SRC"
if [ -z "${OFFLINE:-}" ]; then
	rm -f SHA256SUMS
	{
		fetch '' nghttp2 protobuf-c bearssl
		# Debian 12's musl, 1.2.3, does not relocate pointers that the linker has packed, for 8 KB: there it is Debian 13's.
		fetch 's/\<bookworm/trixie/' musl
	} >SHA256SUMS.new
	mv SHA256SUMS.new SHA256SUMS
fi
sha256sum --quiet -c SHA256SUMS >&2 || die 'build/src does not hold what it should: build without OFFLINE'

rm -rf "$OUT"
mkdir -p "$OUT/bin" "$OUT/include/nghttp2" "$OUT/include/protobuf-c" "$OUT/lib" "$OUT/src"
cd "$OUT/src"
cut -d ' ' -f 3 "$SRC/SHA256SUMS" | grep '\.dsc$' | while read -r dsc; do
	dpkg-source --no-check -x "$SRC/$dsc" "${dsc%%_*}" >"$OUT/log" 2>&1 || { cat "$OUT/log" >&2; exit 1; }
done

# musl: Debian's musl-tools serves only the machine's own architecture, and links a dynamic program when asked for
# -static-pie.
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
cp "$SRC/SHA256SUMS" "$OUT/SHA256SUMS"
