# kmsplugin: make builds ./kmsplugin, make help lists the rest.

VERSION = 0.1.0
BEARSSL_VERSION ?= 0.6
# The time that release files bear: the day of the last entry in deploy/debian/changelog.
SOURCE_DATE_EPOCH ?= $(shell date -ud "$$(sed -n 's/^ -- .*>  //p' deploy/debian/changelog | head -n 1)" +%s)

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

# Flags of the project, kept apart from the user's CFLAGS and LDFLAGS.
STD = -std=c11 -DVERSION='"$(VERSION)"' -DBEARSSL_VERSION='"$(BEARSSL_VERSION)"'
WARN = -Wall -Wextra -Wpedantic -Wshadow -Wpointer-arith -Wstrict-prototypes -Wmissing-prototypes -Wwrite-strings -Wvla
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
	@echo 'make static         build/static/kmsplugin, on musl; needs dpkg-dev'
	@echo 'make profile        deploy/profile, which make static builds by: after a change of what is hot; needs h2load'
	@echo 'make image          build/image/kmsplugin.tar, an OCI image of it; needs buildah and zopfli'
	@echo 'make dist           build/$(DIST).tar.gz'
	@echo 'make sbom           build/sbom/, a CycloneDX document'
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

# The release build: one static-pie binary on musl, with libraries built from Debian's
# sources (deploy/static-libs.sh, which makes the compiler bin/cc for it, too). Another
# ARCH (see there) has its program, and what is made of it, in a folder of its own.
MACHINE := $(shell uname -m)
ARCH ?= $(MACHINE)
ARCH_DIR = $(addsuffix /,$(filter-out $(MACHINE),$(ARCH)))
STATIC = build/static/$(ARCH_DIR)kmsplugin
# Nothing is aligned but, on x86_64, functions: 1.5 KB that fit in, for 2 % of CPU.
# -O2 where that keeps it within 192 KiB, else -Os. aarch64 has room to inline functions of some 12 instructions, which
# gives the speed back. s390x has none: no tables to jump by (8 bytes an entry), and of the instructions of z196, which
# Debian builds for, the choice that suits z13, the oldest machine that Go, so Kubernetes, runs on.
SMALL_aarch64 = -Os --param=max-inline-insns-size=12
SMALL_s390x = -Os -fno-jump-tables -mtune=z13
STATIC_FLAGS = $(or $(SMALL_$(ARCH)),-O2) -flto -fPIE \
	-ffunction-sections -fdata-sections \
	-fno-asynchronous-unwind-tables -fno-unwind-tables \
	-fstack-protector-strong \
	-falign-functions=$(if $(filter x86_64,$(ARCH)),16,1) -falign-jumps=1 -falign-loops=1 -falign-labels=1
# exclude-libs: s390x' linker else leaves relocations by name, which musl's static-pie start does not do.
STATIC_LD = -flto-partition=one -static-pie -Wl,--gc-sections -Wl,--exclude-libs,ALL -Wl,-z,relro,-z,now -Wl,-z,noexecstack -Wl,--build-id=none -s \
	-T $(if $(filter x86_64,$(ARCH)),deploy/x86_64.ld,build/static/$(ARCH)/lib/packed.ld)
# What runs often, as `make profile` recorded it: the compiler makes that fast and the rest small. The record is committed,
# so that the same bytes come out anywhere. A function changed since is built as if there were none; make gate notices.
# The -fno-... leave out what a profile turns on and copies loops and ends of functions for, and code-hoisting, which is a
# loss here; max-inline-insns-auto (15) lets a little more be inlined where that pays, and libcall leaves out what the
# compiler makes of short copies: rep movs, which is slow to start.
PROFILE = $(if $(wildcard deploy/profile/$(ARCH)),-fprofile-use=$(CURDIR)/deploy/profile/$(ARCH) \
	-fprofile-prefix-path=$(CURDIR) -Wno-missing-profile -Wno-coverage-mismatch \
	$(if $(filter x86_64,$(ARCH)),-mstringop-strategy=libcall) \
	--param=max-inline-insns-auto=20 -fno-tracer -fno-code-hoisting -fno-unroll-loops -fno-peel-loops \
	-fno-unswitch-loops -fno-tree-loop-vectorize -fno-tree-slp-vectorize -fno-reorder-blocks-and-partition)
static: $(STATIC)
$(STATIC): $(SOURCES) $(HEADERS) deploy/x86_64.ld build/static/$(ARCH)/lib/libbearssl.a
	build/static/$(ARCH)/bin/cc $(STD) $(WARN) $(STATIC_FLAGS) $(PROFILE) -o $@ $(SOURCES) $(STATIC_LD) -Wl,-Map=$@.map $(LIBS)
build/static/$(ARCH)/lib/libbearssl.a: deploy/static-libs.sh deploy/string.c $(wildcard deploy/*.patch) deploy/nghttp2-fixed.sed $(wildcard deploy/profile/$(ARCH))
	ARCH=$(ARCH) CC= AR= CFLAGS='$(STATIC_FLAGS) $(PROFILE)' deploy/static-libs.sh

profile:
	deploy/profile.sh deploy/profile/$(ARCH)

# What a release is made of: an OCI image, a tarball, a bill of materials, a Debian package.
image: build/image/$(ARCH_DIR)kmsplugin.tar
build/image/$(ARCH_DIR)kmsplugin.tar: $(STATIC) deploy/Dockerfile deploy/image.sh
	ARCH=$(ARCH) SOURCE_DATE_EPOCH=$(SOURCE_DATE_EPOCH) \
		deploy/image.sh $(STATIC) $@ localhost/kmsplugin:$(VERSION)

DIST = kmsplugin-$(VERSION)
dist:
	@mkdir -p build
	{ git ls-files | grep . || find * .[a-z]* -path build -prune -o -type f ! -path kmsplugin -print; } | LC_ALL=C sort | \
		tar -c --files-from=- --transform='s,^,$(DIST)/,' --mtime=@$(SOURCE_DATE_EPOCH) \
		--owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX --format=ustar | gzip -9n >build/$(DIST).tar.gz

sbom: build/sbom/$(ARCH_DIR)kmsplugin-$(VERSION).cdx.json
build/sbom/$(ARCH_DIR)kmsplugin-$(VERSION).cdx.json: $(STATIC) deploy/sbom.py
	@mkdir -p $(@D)
	SOURCE_DATE_EPOCH=$(SOURCE_DATE_EPOCH) deploy/sbom.py $(VERSION) $(ARCH) $(STATIC) >$@

# Built where it does not touch the tree; the .deb is left in build/deb.
deb: dist
	rm -rf build/deb
	mkdir -p build/deb
	cp build/$(DIST).tar.gz build/deb/kmsplugin_$(VERSION).orig.tar.gz
	tar -xzf build/$(DIST).tar.gz -C build/deb
	cp -R deploy/debian build/deb/$(DIST)/debian
	cd build/deb/$(DIST) && env -u MAKEFLAGS -u MFLAGS -u MAKELEVEL dpkg-buildpackage -us -uc

proto:
	$(PROTOC_C) --c_out=. kms.proto

install: kmsplugin
	install -D -m 0755 kmsplugin $(DESTDIR)$(SBINDIR)/kmsplugin
	install -D -m 0755 deploy/metrics/kmsplugin-textfile $(DESTDIR)$(SBINDIR)/kmsplugin-textfile
	install -D -m 0644 doc/kmsplugin.8 $(DESTDIR)$(MANDIR)/man8/kmsplugin.8
	install -D -m 0644 deploy/systemd/kmsplugin.tmpfiles $(DESTDIR)$(TMPFILESDIR)/kmsplugin.conf
	install -d $(DESTDIR)$(UNITDIR)
	install -m 0644 $(UNITS) $(DESTDIR)$(UNITDIR)

uninstall:
	rm -f $(DESTDIR)$(SBINDIR)/kmsplugin $(DESTDIR)$(SBINDIR)/kmsplugin-textfile
	rm -f $(DESTDIR)$(MANDIR)/man8/kmsplugin.8 $(DESTDIR)$(TMPFILESDIR)/kmsplugin.conf
	rm -f $(addprefix $(DESTDIR)$(UNITDIR)/,$(notdir $(UNITS)))

clean:
	rm -rf kmsplugin build

.DELETE_ON_ERROR:
.PHONY: all help run static profile image dist sbom deb proto install uninstall clean

include test/test.mk
