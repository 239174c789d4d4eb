# kmsplugin: make builds ./kmsplugin, make help lists the rest.

# The first entry of the changelog has the version, and the time that the files of a release bear.
CHANGELOG = release/debian/changelog
VERSION := $(shell sed -n '1s/^kmsplugin .\([0-9.]*\)-.*/\1/p' $(CHANGELOG))
SOURCE_DATE_EPOCH ?= $(shell date -ud "$$(sed -n 's/^ -- .*  //p' $(CHANGELOG) | head -n 1)" +%s)
# Placeholders, for who publishes a package to fill in: nowhere else is either named.
MAINTAINER ?= The kmsplugin authors <kmsplugin@localhost.localdomain>
HOMEPAGE ?= https://kmsplugin.invalid/
export MAINTAINER HOMEPAGE
# BearSSL cannot be asked: this is Debian's. The release build takes it from what it was built from.
BEARSSL_VERSION ?= 0.6

PREFIX ?= /usr/local
SBINDIR ?= $(PREFIX)/sbin
MANDIR ?= $(PREFIX)/share/man
EXAMPLEDIR ?= $(PREFIX)/share/kmsplugin
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
	-U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=2
HARDEN_LD = -pie -Wl,-z,relro,-z,now -Wl,-z,noexecstack -Wl,--as-needed
# CET (indirect jumps land only where they may) exists on x86 alone.
ifneq (,$(filter x86_64% i686%,$(shell $(CC) -dumpmachine)))
HARDEN_CC += -fcf-protection
endif

SOURCES = kmsplugin.c kms.pb-c.c
HEADERS = kms.pb-c.h

all: kmsplugin

# Grouped; test/test.mk adds its own targets.
help::
	@echo 'make                build ./kmsplugin'
	@echo 'make run            build it and serve on a socket under /tmp'
	@echo 'make install        installs it; PREFIX=$(PREFIX), DESTDIR=$(DESTDIR), INSTALL_PROGRAM=$(INSTALL_PROGRAM)'
	@echo 'make uninstall, make clean'
	@echo 'make proto          generate kms.pb-c.[ch] from kms.proto'
	@echo
	@echo 'Release:'
	@echo 'make static         build/static/kmsplugin, on musl; needs dpkg-dev, and the network the first time'
	@echo 'make image          build/image/kmsplugin.tar, an OCI image of it; needs buildah and zopfli'
	@echo 'make dist           build/$(DIST).tar.gz'
	@echo 'make sbom           build/sbom/, a CycloneDX document'
	@echo 'make deb            build/deb/, a Debian package on Debian'\''s libraries; needs debhelper'
	@echo 'make release        all of these for all architectures, and their sums, in RELEASE=$(RELEASE); SIGN_KEY= signs them'
	@echo 'make verify         is the folder RELEASE= as it was signed by the key KEY=; needs signify-openbsd'
	@echo 'make pins           release/pins anew: the sources that Debian has today, for make static'

kmsplugin: $(SOURCES) $(HEADERS) Makefile $(CHANGELOG)
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
# Each flag is here for its share of an Encrypt's CPU or of the program's bytes (doc/contributing.md, The release build), or for
# the hardening that make has, too. -O2 is for x86_64, which is what is measured.
STATIC_FLAGS = $(if $(filter x86_64,$(ARCH)),-O2,-Os) -flto -fPIE -fno-asynchronous-unwind-tables -fno-unwind-tables \
	-fstack-protector-strong --param=max-inline-insns-auto=4
# exclude-libs: s390x' linker else leaves relocations by name, which a static-pie's start does not do. noseparate-code is the
# default but on x86. Debian 12's linker has pack-relative-relocs for x86 alone. partition=one: else gcc warns that it could
# use more processors. -static-pie is not known to gcc 12's specs for ARM and RISC-V: so -static, no-dynamic-linker and text
# say what it means.
STATIC_LD = -static-pie -Wl,-static,--no-dynamic-linker,-z,text -flto-partition=one -Wl,--gc-sections \
	-Wl,--exclude-libs,ALL -Wl,-z,relro,-z,now -Wl,-z,noexecstack -Wl,-z,noseparate-code $(STATIC_LD_$(ARCH)) \
	-Wl,--build-id=none -s
STATIC_LD_x86_64 = -Wl,-z,pack-relative-relocs
# What is linked in place of musl's on x86_64; release/string.c says why.
STATIC_STRING = $(if $(filter x86_64,$(ARCH)),build/static/$(ARCH)/string.o)
STATIC_SUMS = build/static/$(ARCH)/SHA256SUMS
STATIC_NEEDS = $(STATIC_SUMS) $(STATIC_STRING)
static: $(STATIC)
$(STATIC): BEARSSL_VERSION = $(shell sed -n 's/.* bearssl_\([0-9.]*\).*\.dsc$$/\1/p' $(STATIC_SUMS))
$(STATIC): $(SOURCES) $(HEADERS) Makefile $(CHANGELOG) $(STATIC_NEEDS)
	$(STATIC_CC) $(STD) $(WARN) $(STATIC_FLAGS) -o $@ $(SOURCES) $(STATIC_STRING) $(STATIC_LD) -Wl,-Map=$@.map $(LIBS)
$(STATIC_SUMS): release/pins release/sources.sh release/static-libs.sh
	ARCH=$(ARCH) CC= AR= CFLAGS='$(STATIC_FLAGS)' release/static-libs.sh
build/static/$(ARCH)/string.o: release/string.c $(STATIC_SUMS)
	$(STATIC_CC) -std=c11 -O2 -fPIE -ffreestanding -fno-tree-loop-distribute-patterns -fno-asynchronous-unwind-tables -c -o $@ $<

# What Debian has today, pinned: once the libraries' own tests have passed on it. A person commits it.
pins:
	PINS=renew $(MAKE) -B $(STATIC_SUMS)
	$(MAKE) test-libs
	cp $(STATIC_SUMS) release/pins
	@git --no-pager diff --stat --patch release/pins
	@echo 'release/pins: as above, to be committed; doc/contributing.md, From advisory to release, has the rest'

# What a release is made of: an OCI image, a tarball, a bill of materials, a Debian package.
image: build/image/$(ARCH_DIR)kmsplugin.tar
build/image/$(ARCH_DIR)kmsplugin.tar: $(STATIC) release/Dockerfile release/image.sh
	ARCH=$(ARCH) SOURCE_DATE_EPOCH=$(SOURCE_DATE_EPOCH) \
		release/image.sh $(STATIC) $@ localhost/kmsplugin:$(VERSION)

DIST = kmsplugin-$(VERSION)
dist:
	@mkdir -p build
	{ git ls-files 2>/dev/null | grep . || find * .[a-z]* -path build -prune -o -type f ! -path kmsplugin -print; } | LC_ALL=C sort | \
		tar -c --files-from=- --transform='s,^,$(DIST)/,' --mtime=@$(SOURCE_DATE_EPOCH) \
		--owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX --format=ustar | gzip -9n >build/$(DIST).tar.gz

sbom: build/sbom/$(ARCH_DIR)kmsplugin-$(VERSION).cdx.json
build/sbom/$(ARCH_DIR)kmsplugin-$(VERSION).cdx.json: $(STATIC) release/sbom.py
	@mkdir -p $(@D)
	SOURCE_DATE_EPOCH=$(SOURCE_DATE_EPOCH) release/sbom.py $(VERSION) $(ARCH) $(STATIC) >$@

# Built where it does not touch the tree; the .deb is left in build/deb.
deb: dist
	@dpkg-checkbuilddeps release/debian/control 2>/dev/null && command -v dh >/dev/null || { echo 'make deb needs packages:' \
		'apt-get install build-essential debhelper libnghttp2-dev libprotobuf-c-dev libbearssl-dev' >&2; exit 1; }
	rm -rf build/deb
	mkdir -p build/deb
	cp build/$(DIST).tar.gz build/deb/kmsplugin_$(VERSION).orig.tar.gz
	tar -xzf build/$(DIST).tar.gz -C build/deb
	cp -R release/debian build/deb/$(DIST)/debian
	cd build/deb/$(DIST)/debian && sed -i "s|@MAINTAINER@|$$MAINTAINER|; s|@HOMEPAGE@|$$HOMEPAGE|" control changelog
	cd build/deb/$(DIST) && env -u MAKEFLAGS -u MFLAGS -u MAKELEVEL dpkg-buildpackage -us -uc

# All of it, for all architectures, in one folder: release/release.sh. What a user checks of it: release/verify.sh.
RELEASE ?= build/release
release:
	SIGN_KEY='$(SIGN_KEY)' release/release.sh $(RELEASE)

verify:
	@release/verify.sh '$(RELEASE)' '$(KEY)'

version:
	@echo $(VERSION)

proto:
	$(PROTOC_C) --c_out=. kms.proto

# What make has built; the release build only by its name: make install INSTALL_PROGRAM=build/static/kmsplugin.
INSTALL_PROGRAM ?= kmsplugin
# A package's program is not to be hidden behind this one unnoticed: updates would no longer reach what runs.
PACKAGED = /usr/sbin/kmsplugin
UNITS = $(wildcard deploy/systemd/*.service deploy/systemd/*.socket deploy/systemd/*.timer)
PAGES = $(wildcard doc/*.8)
# What an operator copies from, in the folders of deploy/.
EXAMPLES = $(wildcard deploy/*.yaml deploy/k3s/* deploy/kubeadm/*.yaml deploy/kubeadm/patches/* deploy/metrics/*.yaml deploy/systemd/*.conf)
install: $(filter kmsplugin,$(INSTALL_PROGRAM))
	@[ -n '$(DESTDIR)$(OVER_PACKAGE)' ] || [ ! -e $(PACKAGED) ] || { echo '$(PACKAGED) is there, of a package, whose' \
		'security updates would not reach this one: remove the package, or make install OVER_PACKAGE=1' >&2; exit 1; }
	install -D -m 0755 $(INSTALL_PROGRAM) $(DESTDIR)$(SBINDIR)/kmsplugin
	install -D -m 0755 deploy/kmsplugin-ring $(DESTDIR)$(SBINDIR)/kmsplugin-ring
	install -D -m 0755 deploy/metrics/kmsplugin-textfile $(DESTDIR)$(SBINDIR)/kmsplugin-textfile
	install -D -m 0755 deploy/openrc/kmsplugin $(DESTDIR)$(EXAMPLEDIR)/openrc/kmsplugin
	install -D -m 0755 deploy/kubeadm/etcdctl $(DESTDIR)$(EXAMPLEDIR)/kubeadm/etcdctl
	install -D -m 0644 deploy/systemd/kmsplugin.tmpfiles $(DESTDIR)$(TMPFILESDIR)/kmsplugin.conf
	install -d $(DESTDIR)$(MANDIR)/man8 $(DESTDIR)$(UNITDIR)
	install -m 0644 $(PAGES) $(DESTDIR)$(MANDIR)/man8
	install -m 0644 $(UNITS) $(DESTDIR)$(UNITDIR)
	for file in $(EXAMPLES:deploy/%=%); do install -D -m 0644 deploy/$$file $(DESTDIR)$(EXAMPLEDIR)/$$file || exit; done
	@echo 'installed $(INSTALL_PROGRAM), $(if $(filter kmsplugin,$(INSTALL_PROGRAM)),on the shared libraries of this system,as it is), as $(DESTDIR)$(SBINDIR)/kmsplugin'

uninstall:
	rm -f $(addprefix $(DESTDIR)$(SBINDIR)/,kmsplugin kmsplugin-ring kmsplugin-textfile)
	rm -f $(addprefix $(DESTDIR)$(MANDIR)/man8/,$(notdir $(PAGES))) $(DESTDIR)$(TMPFILESDIR)/kmsplugin.conf
	rm -f $(addprefix $(DESTDIR)$(UNITDIR)/,$(notdir $(UNITS)))
	rm -f $(addprefix $(DESTDIR)$(EXAMPLEDIR)/,$(EXAMPLES:deploy/%=%) openrc/kmsplugin kubeadm/etcdctl)
	[ ! -d $(DESTDIR)$(EXAMPLEDIR) ] || find $(DESTDIR)$(EXAMPLEDIR) -type d -empty -delete

clean:
	rm -rf kmsplugin build

.DELETE_ON_ERROR:
.PHONY: all help run static pins image dist sbom deb release verify version proto install uninstall clean

include test/test.mk
