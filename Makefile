# kmsplugin: make builds ./kmsplugin, make help lists the rest.

VERSION = 0.1.0
BEARSSL_VERSION ?= 0.6

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
SANITIZE = -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer

SOURCES = kmsplugin.c kms.pb-c.c
HEADERS = kms.pb-c.h Makefile
UNITS = $(wildcard deploy/systemd/*.service deploy/systemd/*.socket deploy/systemd/*.timer)

all: kmsplugin

help:
	@echo 'make                build ./kmsplugin'
	@echo 'make run            build it and serve on a socket under /tmp'
	@echo 'make static         build/static/kmsplugin, on musl; needs dpkg-dev'
	@echo 'make test           quick tests, with Debian packages only'
	@echo 'make test-kube      tests with Kubernetes'\'' own client code (Go)'
	@echo 'make test-cluster   tests with a real kube-apiserver and etcd (Go, some 15 minutes)'
	@echo 'make test-hostile   peers that mean harm, and what others notice of it (root)'
	@echo 'make soak           SOAK_SECONDS=1800 of load, restarts and hostile peers (root)'
	@echo 'make test-deploy    the files of deploy/ and the guide, under a real systemd (root)'
	@echo 'make test-inject    every call that can fail does, one at a time'
	@echo 'make test-ct        nothing depends on a secret but what may; needs valgrind'
	@echo 'make fuzz           fuzzers, FUZZ_SECONDS=60 each; needs clang'
	@echo 'make prove          no undefined behaviour in the byte parsers; needs Frama-C'
	@echo 'make lint           static analysis of C and shell'
	@echo 'make install        PREFIX=$(PREFIX), DESTDIR=$(DESTDIR)'
	@echo 'make uninstall, make clean'
	@echo 'make proto          generate kms.pb-c.[ch] from kms.proto'

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
# sources (deploy/static-libs.sh, which makes the compiler bin/cc for it, too).
ARCH ?= $(shell uname -m)
STATIC_FLAGS = -O2 -flto -fPIE \
	-ffunction-sections -fdata-sections \
	-fno-asynchronous-unwind-tables -fno-unwind-tables \
	-fstack-protector-strong
STATIC_LD = -flto-partition=one -static-pie -Wl,--gc-sections -Wl,-z,relro,-z,now -Wl,-z,noexecstack -Wl,--build-id=none -s
static: build/static/kmsplugin
build/static/kmsplugin: $(SOURCES) $(HEADERS) build/static/$(ARCH)/lib/libbearssl.a
	build/static/$(ARCH)/bin/cc $(STD) $(WARN) $(STATIC_FLAGS) -ffile-prefix-map="$(CURDIR)=." -o $@ $(SOURCES) $(STATIC_LD) $(LIBS)
build/static/$(ARCH)/lib/libbearssl.a: deploy/static-libs.sh
	ARCH=$(ARCH) CC= AR= CFLAGS='$(STATIC_FLAGS)' deploy/static-libs.sh

proto:
	$(PROTOC_C) --c_out=. kms.proto

# Tests. Unit tests include kmsplugin.c, so they are built as it is.
build/unit: test/unit.c $(SOURCES) $(HEADERS)
	@mkdir -p build
	$(CC) $(STD) $(WARN) -I. $(CPPFLAGS) $(CFLAGS) -o $@ test/unit.c kms.pb-c.c $(LDFLAGS) $(LIBS)

build/unit-asan: test/unit.c $(SOURCES) $(HEADERS)
	@mkdir -p build
	$(CC) $(STD) $(WARN) -I. $(CPPFLAGS) $(SANITIZE) -o $@ test/unit.c kms.pb-c.c $(LDFLAGS) $(LIBS)

build/sandbox: test/sandbox.c $(SOURCES) $(HEADERS)
	@mkdir -p build
	$(CC) $(STD) $(WARN) -I. $(CPPFLAGS) $(CFLAGS) -o $@ test/sandbox.c kms.pb-c.c $(LDFLAGS) $(LIBS)

build/kmsplugin-asan: $(SOURCES) $(HEADERS)
	@mkdir -p build
	$(CC) $(STD) $(WARN) $(CPPFLAGS) $(SANITIZE) -o $@ $(SOURCES) $(LDFLAGS) $(LIBS)

# Failures on demand: test/inject.c stands between the program, its libraries included, and libc.
INJECTED = malloc calloc realloc mmap epoll_ctl getsockopt pread read write getrandom accept4 epoll_pwait poll
build/kmsplugin-inject: test/inject.c $(SOURCES) $(HEADERS)
	@mkdir -p build
	$(CC) $(STD) $(WARN) $(CPPFLAGS) $(SANITIZE) -o $@ $(SOURCES) -Wno-missing-prototypes test/inject.c \
		$(INJECTED:%=-Wl,--wrap=%) $(LDFLAGS) -Wl,-Bstatic $(LIBS) -Wl,-Bdynamic

test-inject: build/kmsplugin-inject
	/usr/bin/python3 test/inject.py

# Constant time: the code as the two builds make it, under valgrind.
build/ct: test/ct.c $(SOURCES) $(HEADERS)
	@mkdir -p build
	$(CC) $(STD) $(WARN) $(HARDEN_CC) -I. $(CPPFLAGS) $(CFLAGS) -o $@ test/ct.c kms.pb-c.c $(HARDEN_LD) $(LDFLAGS) $(LIBS)

build/ct-static: test/ct.c $(SOURCES) $(HEADERS)
	build/static/$(ARCH)/bin/cc $(STD) $(STATIC_FLAGS) -g -I. -idirafter /usr/include -o $@ test/ct.c kms.pb-c.c \
		$(filter-out -s,$(STATIC_LD)) $(LIBS)

test-ct: build/ct $(if $(wildcard build/static/kmsplugin),build/ct-static)
	test/ct.sh $^

# Fuzzers, for clang's libFuzzer: FUZZ_SECONDS each. They include kmsplugin.c, too.
FUZZERS = session kms parse rescue
FUZZ_SECONDS ?= 60
build/fuzz/%: test/fuzz/%.c test/fuzz/fuzz.h $(SOURCES) $(HEADERS)
	@mkdir -p build/fuzz
	clang $(STD) $(WARN) -I. $(CPPFLAGS) -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \
		-o $@ $< kms.pb-c.c $(LDFLAGS) $(LIBS)

fuzz: $(FUZZERS:%=build/fuzz/%)
	FUZZ_SECONDS=$(FUZZ_SECONDS) test/fuzz/run.sh $(FUZZERS)

# The committed seeds anew: what clients say, and what fuzzing has found so far.
fuzz-seeds: kmsplugin $(FUZZERS:%=build/fuzz/%)
	rm -rf build/fuzz/seeds && /usr/bin/python3 test/fuzz/seeds.py build/fuzz/seeds
	for f in $(FUZZERS); do rm -rf build/fuzz/merged && mkdir -p build/fuzz/merged build/fuzz/corpus/$$f && \
		build/fuzz/$$f -set_cover_merge=1 -max_len=700 build/fuzz/merged build/fuzz/seeds/$$f build/fuzz/corpus/$$f && \
		rm -rf test/fuzz/corpus/$$f && mkdir -p test/fuzz/corpus && mv build/fuzz/merged test/fuzz/corpus/$$f; done

# No undefined behaviour in the byte parsers, for all inputs up to a length: Frama-C.
prove:
	test/prove/run.sh

test: kmsplugin
	./test.sh

test-kube: kmsplugin
	test/kube/run.sh

test-cluster: kmsplugin
	test/kube/cluster.sh

# Hostile peers: the static build, where there is one, gives memory back; root, for /proc.
test-hostile: kmsplugin
	for p in ./kmsplugin $(wildcard build/static/kmsplugin); do \
		KMSPLUGIN=$$p /usr/bin/python3 test/hostile.py || exit 1; done

# Half an hour of mixed load, restarts and hostile peers.
SOAK_SECONDS ?= 1800
soak: kmsplugin
	/usr/bin/python3 test/soak.py $(SOAK_SECONDS)

test-deploy: kmsplugin
	test/deploy.sh

lint:
	clang-tidy --quiet kmsplugin.c -- $(STD)
	cppcheck --quiet --enable=warning,performance,portability --suppress=preprocessorErrorDirective --error-exitcode=1 $(subst -std=,--std=,$(STD)) kmsplugin.c
	gcc $(STD) -O2 -fanalyzer -Werror -c -o /dev/null kmsplugin.c
	scan-build --status-bugs -o build/scan clang $(STD) -c -o /dev/null kmsplugin.c >/dev/null
	shellcheck test.sh test/kube/run.sh test/kube/cluster.sh test/deploy.sh test/deploy/boot.sh test/deploy/inside.sh \
		test/fuzz/run.sh test/prove/run.sh test/ct.sh \
		deploy/static-libs.sh deploy/openrc/kmsplugin deploy/metrics/kmsplugin-textfile .ci/run

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


.PHONY: all help run static proto prove fuzz fuzz-seeds test test-kube test-cluster test-deploy test-hostile soak test-inject test-ct lint install uninstall clean
