# kmsplugin: make builds ./kmsplugin, make help lists the rest.

VERSION = 0.1.0
# Placeholders, for who publishes a package to fill in: nowhere else is either named.
MAINTAINER = The kmsplugin authors <kmsplugin@localhost.localdomain>
HOMEPAGE = https://kmsplugin.invalid/
BEARSSL_VERSION ?= 0.6
# The time that release files bear: the day of the last entry in release/debian/changelog.
SOURCE_DATE_EPOCH ?= $(shell date -ud "$$(sed -n 's/^ -- .*@  //p' release/debian/changelog | head -n 1)" +%s)

PREFIX ?= /usr/local
SBINDIR ?= $(PREFIX)/sbin
MANDIR ?= $(PREFIX)/share/man
UNITDIR ?= $(PREFIX)/lib/systemd/system
TMPFILESDIR ?= $(PREFIX)/lib/tmpfiles.d
DESTDIR ?=

CC = cc
CFLAGS ?= -O2 -g
LIBS ?= -lnghttp2 -lprotobuf-c -lbearssl
PROTOC_C ?= protoc-c

# Flags of the project, kept apart from the user's CFLAGS and LDFLAGS. (The libraries give callbacks more than each one needs.)
STD = -std=c11 -DVERSION='"$(VERSION)"' -DBEARSSL_VERSION='"$(BEARSSL_VERSION)"'
WARN = -Wall -Wextra -Wpedantic -Wshadow -Wpointer-arith -Wstrict-prototypes -Wmissing-prototypes -Wwrite-strings -Wvla -Wno-unused-parameter
HARDEN_CC = -fPIE \
	-fstack-protector-strong \
	-fstack-clash-protection \
	-D_FORTIFY_SOURCE=2
HARDEN_LD = -pie -Wl,-z,relro,-z,now -Wl,-z,noexecstack -Wl,--as-needed
# CET (indirect jumps land only where they may) exists on x86 alone.
ifneq (,$(filter x86_64% i686%,$(shell $(CC) -dumpmachine)))
HARDEN_CC += -fcf-protection
endif

SOURCES = kmsplugin.c kms.pb-c.c
HEADERS = kms.pb-c.h Makefile
UNITS = $(wildcard deploy/systemd/*.service deploy/systemd/*.socket deploy/systemd/*.timer)

all: kmsplugin

# Grouped; test/test.mk adds its own targets.
help::
	@echo 'make                build ./kmsplugin'
	@echo 'make run            build it and serve on a socket under /tmp'
	@echo 'make install        PREFIX=$(PREFIX), DESTDIR=$(DESTDIR)'
	@echo 'make uninstall, make clean'
	@echo 'make proto          generate kms.pb-c.[ch] from kms.proto'
	@echo
	@echo 'Release:'
	@echo 'make static         build/static/kmsplugin, on musl; needs dpkg-dev, and the network but for OFFLINE=1 (from the second time on)'
	@echo 'make image          build/image/kmsplugin.tar, an OCI image of it; needs buildah and zopfli'
	@echo 'make dist           build/$(DIST).tar.gz'
	@echo 'make sbom           build/sbom/, a CycloneDX document'
	@echo 'make release        all of these for all architectures, and their sums, in RELEASE=$(RELEASE); SIGN_KEY= signs them'
	@echo 'make deb            build/deb/, a Debian package on Debian'\''s libraries; needs debhelper'

kmsplugin: $(SOURCES) $(HEADERS)
	$(CC) $(STD) $(WARN) $(HARDEN_CC) $(CPPFLAGS) $(CFLAGS) -o $@ $(SOURCES) $(HARDEN_LD) $(LDFLAGS) $(LIBS)

# A server to try out. KMS_KEK or KMS_KEK_FILE, if set, is used; else a throw-away KEK.
RUN_DIR = /tmp/kmsplugin-$(shell id -u)
run: kmsplugin
	@mkdir -p -m 0700 $(RUN_DIR)
	@echo 'probe it:  ./kmsplugin probe unix://$(RUN_DIR)/kms.sock'
	@if [ -z "$$KMS_KEK$$KMS_KEK_FILE" ]; then KMS_KEK=$$(./kmsplugin genkey) && export KMS_KEK; \
		echo 'no KMS_KEK is set: this KEK is made up, and gone when the server stops' >&2; fi; \
		exec ./kmsplugin serve --listen unix://$(RUN_DIR)/kms.sock

# The release build: one static-pie binary on musl, with libraries built from Debian's sources (release/static-libs.sh,
# which makes the compiler bin/cc for it, too). Another ARCH (see there) has its program, and what is made of it, in a
# folder of its own.
MACHINE := $(shell uname -m)
ARCH ?= $(MACHINE)
ARCH_DIR = $(addsuffix /,$(filter-out $(MACHINE),$(ARCH)))
STATIC = build/static/$(ARCH_DIR)kmsplugin
STATIC_CC = build/static/$(ARCH)/bin/cc
# LTO leaves out what is never called; in one piece, for 1 % of the instructions. -O2 on x86_64; elsewhere -Os, for aarch64,
# whose segments are padded to pages of 64 KiB. Nothing unwinds, so there are no tables for it. No padding
# in front of loops: 2 KB, and no slower.
STATIC_FLAGS = $(if $(filter x86_64,$(ARCH)),-O2,-Os) -flto -fPIE -fno-asynchronous-unwind-tables -fno-unwind-tables \
	-fstack-protector-strong -fno-inline-small-functions -falign-loops=1 -falign-jumps=1
# gc-sections: without what musl has more. exclude-libs: s390x' linker else leaves relocations by name, which a static-pie's
# start does not do. noseparate-code, the default but on x86: 4 to 8 KB less of padding between pages. pack-relative-relocs,
# which Debian 12's linker has for x86 alone: 8 KB less.
# -static-pie is not known to gcc 12's specs for ARM and RISC-V: so -static, no-dynamic-linker and text say what it means.
STATIC_LD = -static-pie -Wl,-static,--no-dynamic-linker,-z,text -flto-partition=one -Wl,--gc-sections \
	-Wl,--exclude-libs,ALL -Wl,-z,relro,-z,now -Wl,-z,noexecstack -Wl,-z,noseparate-code $(STATIC_LD_$(ARCH)) \
	-Wl,--build-id=none -s
STATIC_LD_x86_64 = -Wl,-z,pack-relative-relocs
# memcpy and the like on x86_64 that are not musl's; release/string.c says why.
STATIC_STRING = $(if $(filter x86_64,$(ARCH)),build/static/$(ARCH)/string.o)
STATIC_NEEDS = build/static/$(ARCH)/SHA256SUMS $(STATIC_STRING)
static: $(STATIC)
$(STATIC): $(SOURCES) $(HEADERS) $(STATIC_NEEDS)
	$(STATIC_CC) $(STD) $(WARN) $(STATIC_FLAGS) -o $@ $(SOURCES) $(STATIC_STRING) $(STATIC_LD) -Wl,-Map=$@.map $(LIBS)
build/static/$(ARCH)/SHA256SUMS: release/static-libs.sh
	ARCH=$(ARCH) CC= AR= CFLAGS='$(STATIC_FLAGS)' release/static-libs.sh
build/static/$(ARCH)/string.o: release/string.c build/static/$(ARCH)/SHA256SUMS
	$(STATIC_CC) -std=c11 -O2 -fPIE -ffreestanding -fno-tree-loop-distribute-patterns -fno-asynchronous-unwind-tables -c -o $@ $<

# What a release is made of: an OCI image, a tarball, a bill of materials, a Debian package.
image: build/image/$(ARCH_DIR)kmsplugin.tar
build/image/$(ARCH_DIR)kmsplugin.tar: $(STATIC) release/Dockerfile release/image.sh
	ARCH=$(ARCH) SOURCE_DATE_EPOCH=$(SOURCE_DATE_EPOCH) \
		release/image.sh $(STATIC) $@ localhost/kmsplugin:$(VERSION)

DIST = kmsplugin-$(VERSION)
dist:
	@mkdir -p build
	{ git ls-files | grep . || find * .[a-z]* -path build -prune -o -type f ! -path kmsplugin -print; } | LC_ALL=C sort | \
		tar -c --files-from=- --transform='s,^,$(DIST)/,' --mtime=@$(SOURCE_DATE_EPOCH) \
		--owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX --format=ustar | gzip -9n >build/$(DIST).tar.gz

sbom: build/sbom/$(ARCH_DIR)kmsplugin-$(VERSION).cdx.json
build/sbom/$(ARCH_DIR)kmsplugin-$(VERSION).cdx.json: $(STATIC) release/sbom.py
	@mkdir -p $(@D)
	SOURCE_DATE_EPOCH=$(SOURCE_DATE_EPOCH) release/sbom.py $(VERSION) $(ARCH) $(STATIC) >$@

# Built where it does not touch the tree; the .deb is left in build/deb.
deb: dist
	rm -rf build/deb
	mkdir -p build/deb
	cp build/$(DIST).tar.gz build/deb/kmsplugin_$(VERSION).orig.tar.gz
	tar -xzf build/$(DIST).tar.gz -C build/deb
	cp -R release/debian build/deb/$(DIST)/debian
	cd build/deb/$(DIST)/debian && sed -i 's|@MAINTAINER@|$(MAINTAINER)|; s|@HOMEPAGE@|$(HOMEPAGE)|' control changelog
	cd build/deb/$(DIST) && env -u MAKEFLAGS -u MFLAGS -u MAKELEVEL dpkg-buildpackage -us -uc

# All of it, for all architectures, in one folder: release/release.sh.
RELEASE ?= build/release
release:
	SIGN_KEY=$(SIGN_KEY) release/release.sh $(RELEASE)

proto:
	$(PROTOC_C) --c_out=. kms.proto

# The release build, where there is one. A package's program is not to be hidden behind this one unnoticed.
PACKAGED = /usr/sbin/kmsplugin
INSTALL_PROGRAM ?= $(firstword $(wildcard build/static/kmsplugin) kmsplugin)
install: $(filter kmsplugin,$(INSTALL_PROGRAM))
	@[ -n '$(DESTDIR)$(OVER_PACKAGE)' ] || [ ! -e $(PACKAGED) ] || { echo '$(PACKAGED) is there, of a package:' \
		'remove that, or make install OVER_PACKAGE=1' >&2; exit 1; }
	@[ kmsplugin = $(INSTALL_PROGRAM) ] || [ -z "$$(find $(SOURCES) -newer $(INSTALL_PROGRAM))" ] || { \
		echo '$(INSTALL_PROGRAM) is older than its sources: make static, or INSTALL_PROGRAM=kmsplugin' >&2; exit 1; }
	@echo 'installing $(INSTALL_PROGRAM)$(if $(filter kmsplugin,$(INSTALL_PROGRAM)),: on the libraries of this system; make static makes the release build)'
	install -D -m 0755 $(INSTALL_PROGRAM) $(DESTDIR)$(SBINDIR)/kmsplugin
	install -D -m 0755 deploy/kmsplugin-ring $(DESTDIR)$(SBINDIR)/kmsplugin-ring
	install -D -m 0755 deploy/metrics/kmsplugin-textfile $(DESTDIR)$(SBINDIR)/kmsplugin-textfile
	install -D -m 0644 doc/kmsplugin.8 $(DESTDIR)$(MANDIR)/man8/kmsplugin.8
	install -D -m 0644 deploy/systemd/kmsplugin.tmpfiles $(DESTDIR)$(TMPFILESDIR)/kmsplugin.conf
	install -d $(DESTDIR)$(UNITDIR)
	install -m 0644 $(UNITS) $(DESTDIR)$(UNITDIR)

uninstall:
	rm -f $(addprefix $(DESTDIR)$(SBINDIR)/,kmsplugin kmsplugin-ring kmsplugin-textfile)
	rm -f $(DESTDIR)$(MANDIR)/man8/kmsplugin.8 $(DESTDIR)$(TMPFILESDIR)/kmsplugin.conf
	rm -f $(addprefix $(DESTDIR)$(UNITDIR)/,$(notdir $(UNITS)))

clean:
	rm -rf kmsplugin build

.DELETE_ON_ERROR:
.PHONY: all help run static image dist sbom deb release proto install uninstall clean

include test/test.mk
