#!/bin/sh
# Builds what a static kmsplugin links, from source, for one architecture: musl, nghttp2, protobuf-c and BearSSL.
#
#   [ARCH=aarch64] deploy/static-libs.sh [debian|upstream]
#
# debian, the default: the source packages of the Debian release that this machine runs, with Debian's security fixes;
#   apt checks the signature and every hash. Needs dpkg-dev.
# upstream: the authors' own tarballs, pinned by SHA-256 below. Needs curl, unless build/src/upstream holds them already.
# Both need make and gcc; another ARCH (aarch64, armhf, riscv64, s390x) needs Debian's gcc-TRIPLET, and for <linux/...>
# linux-libc-dev-DEBARCH-cross.
#
# It leaves a sysroot and a compiler for it, which makes static-pie executables and finds -lnghttp2 -lprotobuf-c -lbearssl:
#
#   build/static/ARCH/bin/cc        include/ and lib/ beside it
#   build/static/ARCH/SHA256SUMS    the archives that all of it came from
set -eu
unset MAKEFLAGS MFLAGS MAKELEVEL    # of a Makefile that calls this: its command-line variables are not meant for musl's
export LC_ALL=C                     # the order of *.c and *.o, hence of the bytes, must not depend on the locale

way=${1:-debian}
ARCH=${ARCH:-$(uname -m)}
case $ARCH in
x86_64)       triplet=x86_64-linux-gnu    branches=-fcf-protection ;;              # CET: endbr64 at branch targets
aarch64)      triplet=aarch64-linux-gnu   branches=-mbranch-protection=standard ;; # the same: BTI, signed return addresses
armhf|armv7l) triplet=arm-linux-gnueabihf branches= ;;
*)            triplet=$ARCH-linux-gnu     branches= ;;
esac
CC=${CC:-$triplet-gcc}       # a plain gcc, not musl-gcc: the sysroot is made here
AR=${AR:-$triplet-gcc-ar}    # not ar, which cannot index LTO objects

# For the three libraries. Sections let --gc-sections drop what is never called; C that never unwinds needs no tables.
CFLAGS=${CFLAGS:--O2 -flto -fPIE -ffunction-sections -fdata-sections -fno-asynchronous-unwind-tables -fno-unwind-tables -fstack-protector-strong}

SRC=${SRC:-build/src/$way}
OUT=${OUT:-build/static/$ARCH}

die() {
	echo "static-libs.sh: $*" >&2
	exit 1
}

# fetch_debian: deb-src entries are rarely configured, and the machine's apt is not ours to change. A configuration of our
# own asks for the sources of just those Debian suites that the machine takes its packages from, wherever it gets them.
fetch_debian() {
	mkdir -p apt/lists/partial apt/cache
	# shellcheck disable=SC2016 # these dollars are apt's
	apt-get indextargets --format '$(ORIGIN)|$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' | sort -u |
		sed -n 's,^Debian|,deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] ,p' >apt/sources.list
	[ -s apt/sources.list ] || die "apt knows no Debian suite: run apt-get update, or if this is no Debian: $0 upstream"
	cat >apt/conf <<-END
		Dir::Etc::sourcelist "$SRC/apt/sources.list";
		Dir::Etc::sourceparts "-";
		Dir::State::lists "$SRC/apt/lists";
		Dir::Cache "$SRC/apt/cache";
		APT::Sandbox::User "root"; // apt's own user may not be able to write here
	END
	APT_CONFIG=apt/conf apt-get -qq update
	APT_CONFIG=apt/conf apt-get -qq source musl nghttp2 protobuf-c bearssl    # unpacks too: dpkg-source -x, patches applied
	rm -rf apt
	sha256sum ./*.dsc ./*.tar.* >SHA256SUMS
}

# fetch_upstream: the first three sums are also those of the same tarballs in Debian's signed index of unstable. BearSSL
# publishes none and Debian repacks it: that sum is the one that several packagers recorded, not checked from here. Nor
# was the download run here; building what these tarballs hold was.
fetch_upstream() {
	while read -r sum url; do
		file=${url##*/}
		[ -f "$file" ] || curl -fsSL --proto '=https' -o "$file" "$url"
		echo "$sum  $file" | sha256sum -c - >&2 || die "$file is not the pinned one"
		tar -xzf "$file"
		echo "$sum  $file"
	done >SHA256SUMS.new <<-END
		d585fd3b613c66151fc3249e8ed44f77020cb5e6c1e635a616d3f9f82460512a https://musl.libc.org/releases/musl-1.2.6.tar.gz
		aa317e2cf9dca6afa0aed68f8fad6ff303ec6982e25a78c75c0b65e2b9b3ded5 https://github.com/nghttp2/nghttp2/releases/download/v1.70.0/nghttp2-1.70.0.tar.gz
		20d1dc257da96f8ddff8be4dd9779215bbd0a6069ed53bbe9de38fa7629be06b https://github.com/protobuf-c/protobuf-c/releases/download/v1.5.1/protobuf-c-1.5.1.tar.gz
		6705bba1714961b41a728dfc5debbe348d2966c117649392f8c8139efc83ff14 https://bearssl.org/bearssl-0.6.tar.gz
	END
	mv SHA256SUMS.new SHA256SUMS
}

# build_musl: Debian's musl-tools serves only the machine's own architecture, and its wrapper links a dynamic program when
# asked for -static-pie. Built here it is the same for all, smaller, and has the stack protector and CET too.
build_musl() {
	mkdir -p "$OUT/bin" "$OUT/obj/musl"
	cd "$OUT/obj/musl"
	cp -R "$musl" src
	grep -q DT_RELR src/ldso/dlstart.c || patch -s -p1 -d src <"$deploy/musl-relr.patch"
	patch -s -p1 -d src <"$deploy/musl-relro.patch"
	# musl keeps a last group of blocks of each size that came and went often: some 150 KiB after a flood, for good. What is
	# worth keeping the program's own heap keeps, until the load is over.
	grep -q 'if (!is_bouncing(sc)) return 1;' src/src/malloc/mallocng/free.c || die "musl's malloc is not as it was"
	sed -i 's/if (!is_bouncing(sc)) return 1;/return 1;/' src/src/malloc/mallocng/free.c
	# musl is made small, but for src/string: of what musl makes fast by default, only that runs often.
	CC="$CC" AR="$AR" RANLIB=true CFLAGS="-fstack-protector-strong $branches" sh src/configure \
		--prefix="$OUT" --host="$triplet" --disable-shared --disable-wrapper --enable-optimize=string >configure.log
	make -j"$(nproc)" install >make.log

	# musl's own specs link a dynamic PIE. A static one starts in rcrt1.o, which relocates it, and names no loader. Where the
	# linker can, relocations are packed: a bit a pointer, not 24 bytes, or 15 KB less.
	static='-static -pie --no-dynamic-linker -z text'
	if $CC -Wl,--help | grep pack-relative-relocs >/dev/null; then static="$static -z pack-relative-relocs"; fi
	sh "$musl/tools/musl-gcc.specs.sh" "$OUT/include" "$OUT/lib" LOADER |
		sed "s/Scrt1/rcrt1/; s/-dynamic-linker LOADER/$static/" >"$OUT/lib/static-pie.specs"

	# packed.ld: the linker's own script, but nothing in the file pads it to a page, which is 64 KiB on aarch64. What is
	# constant once relocated (RELRO) is a segment that fills its last page in memory alone; variables go on in the next.
	"$($CC -print-prog-name=ld)" -pie -z relro -z now --verbose | sed '
		1,/^=====/d
		/^=====/,$d
		s,^{,{ /DISCARD/ : { *(.eh_frame) *(.comment) },
		s,^ *\. = DATA_SEGMENT_ALIGN .*,. = ALIGN(PAGE) + (. \& (PAGE - 1)); . = DATA_SEGMENT_ALIGN(8\, 8);,
		s,^ *\. = DATA_SEGMENT_RELRO_END .*,.relro_padding (NOLOAD) : { . = ALIGN(PAGE); }\
			. = DATA_SEGMENT_RELRO_END(0\, .); . = . + (ADDR(.relro_padding) \& (PAGE - 1));,
		s,PAGE\>,CONSTANT(MAXPAGESIZE),g' >"$OUT/lib/packed.ld"
	grep -q '^\.relro_padding' "$OUT/lib/packed.ld" || die "the linker's script is not as it was"
	printf '#!/bin/sh\nexec %s %s "$@" -specs "%s"\n' "$CC" "$branches" "$OUT/lib/static-pie.specs" >"$OUT/bin/cc"
	chmod +x "$OUT/bin/cc"

	# The kernel's headers (landlock, seccomp), which musl does not bring: those that gcc itself would find.
	for dir in linux asm asm-generic; do
		header=$(echo "#include <$dir/types.h>" | $CC -E - | sed -n "s,^# 1 \"\(.*/$dir\)/types.h\".*,\1,p")
		ln -sfn "${header:?no <$dir/types.h>: install linux-libc-dev, or linux-libc-dev-DEBARCH-cross}" "$OUT/include/$dir"
	done

	# A failed assert traps. musl's would print first, and bring in stdio for it; NDEBUG would go on as if nothing were.
	cat >"$OUT/include/assert.h" <<-'END'
		#undef assert
		#ifdef NDEBUG
		#define assert(x) ((void)0)
		#else
		#define assert(x) ((x) ? (void)0 : __builtin_trap())
		#endif
		#undef static_assert
		#define static_assert _Static_assert
	END
}

# build_string: on x86_64 our own memcpy and the like in place of musl's; string.c says why.
build_string() {
	cd "$OUT/obj"
	$CC $branches -std=c11 -O2 -ffreestanding -fno-tree-loop-distribute-patterns -fPIE -fno-asynchronous-unwind-tables \
		-c "$deploy/string.c" -o string.o
	for name in memcpy memmove memset memcmp; do $AR d "$OUT/lib/libc.a" $name.lo $name.o; done
	$AR rD "$OUT/lib/libc.a" string.o
}

# build_library NAME FLAG...: compiles the sources listed on stdin, as seen from $FROM or $SRC, into libNAME.a. That the
# folder's own name is nowhere in what the compiler reads makes the bytes the same anywhere, and lets a recorded profile fit.
build_library() {
	name=$1
	shift
	mkdir -p "$OUT/obj/$name"
	cd "$OUT/obj/$name"
	ln -sfn "${FROM:-$SRC}" src
	# shellcheck disable=SC2086 # CFLAGS is a list
	sed 's,^,src/,' | xargs -n 8 -P "$(nproc)" "$OUT/bin/cc" $CFLAGS "$@" -c
	rm -f "$OUT/lib/lib$name.a"
	$AR rcsD "$OUT/lib/lib$name.a" ./*.o    # a second call for the same library adds to it
}

case $way in debian|upstream) ;; *) die "usage: $0 [debian|upstream]" ;; esac
deploy=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$SRC" "$OUT"
SRC=$(cd "$SRC" && pwd)
OUT=$(cd "$OUT" && pwd)

cd "$SRC"
if [ ! -f SHA256SUMS ]; then "fetch_$way"; fi    # not "||", which would switch set -e off inside
musl=$(echo "$SRC"/musl-*[0-9]) nghttp2=$(echo "$SRC"/nghttp2-*[0-9])
protobuf_c=$(echo "$SRC"/protobuf-c-*[0-9]) bearssl=$(echo "$SRC"/bearssl-*[0-9])

rm -rf "$OUT/obj"
mkdir "$OUT/obj"
if ! cmp -s SHA256SUMS "$OUT/SHA256SUMS" ||
	[ "$(find "$deploy"/static-libs.sh "$deploy"/*.patch -newer "$OUT/bin/cc")" ]; then
	build_musl
fi
if [ "$ARCH" = x86_64 ]; then build_string; fi
cd "$SRC"

# nghttp2: what ./configure would find out. And as it formats text only for an error callback, which kmsplugin does not
# set, no vsnprintf: that keeps 8 KB of stdio out. musl's htonl is a function.
cat >"$OUT/obj/config.h" <<-'END'
	#define HAVE_ARPA_INET_H 1
	#define HAVE_TIME_H 1
	#define HAVE_CLOCK_GETTIME 1
	#define HAVE_DECL_CLOCK_MONOTONIC 1
	#include <stdio.h>
	#define vsnprintf(...) (-1)
	#include <arpa/inet.h>
	#include <endian.h>
	#define htonl(n) htobe32(n)
	#define ntohl(n) be32toh(n)
END
version=$(sed -n 's/^AC_INIT(\[nghttp2\], \[\([0-9.]*\)\].*/\1/p' "$nghttp2/configure.ac")
number=$(echo "$version" | tr . ' ' | xargs printf '0x%02x%02x%02x')
mkdir -p "$OUT/include/nghttp2" "$OUT/include/protobuf-c"
cp "$nghttp2/lib/includes/nghttp2/nghttp2.h" "$OUT/include/nghttp2"
sed "s/@PACKAGE_VERSION@/$version/; s/@PACKAGE_VERSION_NUM@/$number/" \
	"$nghttp2/lib/includes/nghttp2/nghttp2ver.h.in" >"$OUT/include/nghttp2/nghttp2ver.h"
mkdir "$OUT/obj/fixed"
cp -R "$nghttp2" "$OUT/obj/fixed"
fixed=$OUT/obj/fixed/${nghttp2##*/}/lib
sed -i -f "$deploy/nghttp2-fixed.sed" "$fixed/nghttp2_session.c" "$fixed/nghttp2_stream.c"
grep -q '"PUSH_PROMISE")' "$fixed/nghttp2_session.c" || die "nghttp2 is not as it was"
(cd "$SRC" && printf '%s\n' nghttp2-*/lib/*.c) |
	FROM=$OUT/obj/fixed build_library nghttp2 -DBUILDING_NGHTTP2 -DHAVE_CONFIG_H -I..

cp "$protobuf_c/protobuf-c/protobuf-c.h" "$OUT/include/protobuf-c"
(cd "$SRC" && echo protobuf-c-*/protobuf-c/protobuf-c.c) | build_library protobuf-c

# BearSSL: all but public keys and TLS, without the two halves of CTR+CBC-MAC that only EAX and CCM call (3.5 KB), and
# small, as its authors build it, but for AES-NI's code, which expands and loads three keys a message. Without LTO:
# constant-time code relies on a compiler that does not see across files; nor with a profile, for the same reason. Without
# calls of memcpy where AES-NI's code copies round keys into registers.
cp "$bearssl"/inc/*.h "$OUT/include"
cp -R "$bearssl" "$OUT/obj/fixed"
fixed=$OUT/obj/fixed/${bearssl##*/}/src/symcipher
sed -i 's/&br_aes_[a-z0-9]*_ctrcbc_\(en\|de\)crypt/0/' "$fixed"/aes_*_ctrcbc.c
if grep -q '&br_aes_.*_ctrcbc_..crypt' "$fixed"/*.c; then die "BearSSL is not as it was"; fi
build_bearssl() {
	FROM=$OUT/obj/fixed build_library bearssl "$@" -fno-lto -fno-profile-generate -fno-profile-use \
		-fno-tree-loop-distribute-patterns -Isrc/"${bearssl##*/}"/src
}
(cd "$SRC" && find bearssl-*/src -name '*.c') | grep -Ev '/(ec|int|rsa|ssl|x509)/' | sort >"$OUT/obj/bearssl.list"
grep -v '/aes_x86ni\(_ctrcbc\)\?\.c$' "$OUT/obj/bearssl.list" | build_bearssl -Os
grep '/aes_x86ni\(_ctrcbc\)\?\.c$' "$OUT/obj/bearssl.list" | build_bearssl -O3

rm -rf "$OUT/obj"
cp "$SRC/SHA256SUMS" "$OUT/SHA256SUMS"
