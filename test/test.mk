# What only tests need. Included by the Makefile, whose variables it uses; paths are those of the top level.

help::
	@echo
	@echo 'Tests:'
	@echo 'make test           quick tests, with Debian packages only'
	@echo 'make test-kube      with Kubernetes'\'' clients, kube-apiserver and etcd (Go, some 7 minutes)'
	@echo 'make test-cluster   the same at length: more Secrets, longer outages (some 20 minutes)'
	@echo 'make test-hostile   peers that mean harm, and what others notice of it (root)'
	@echo 'make test-inject    every call that can fail does, one at a time'
	@echo 'make test-ct        nothing depends on a secret but what may; needs valgrind'
	@echo 'make test-deploy    the files of deploy/ and the guide, under the systemd of Debian 12 and 13 (root)'
	@echo 'make test-distros   what README says, on minimal Debian 12, 13 and sid, or DISTROS=... (root, debootstrap)'
	@echo 'make test-arch      the release build on five architectures, under qemu-user and on Debian'\''s kernels'
	@echo 'make test-kernel    the latter alone, under qemu-system (some 15 minutes)'
	@echo 'make test-libs      the libraries'\'' own tests, on the objects that make static links'
	@echo 'make test-browser   doc/tour.html in a browser; needs chromium-driver, tidy and python3-html5lib'
	@echo 'make test-release   image, tarball, reproducibility, SBOM, Debian package (root)'
	@echo 'make test-custody   that the test of the key tool notices a tool with one safeguard less (two minutes)'
	@echo 'make test-tpm       the KEK sealed to a software TPM, on Debian'\''s kernel under qemu-system (root, debootstrap, swtpm)'
	@echo 'make soak           half an hour of load, restarts and hostile peers, an hour of the key tool, or SOAK_SECONDS= each (root)'
	@echo 'make fuzz           fuzzers, FUZZ_SECONDS=60 each; needs clang'
	@echo 'make prove          no undefined behaviour in the byte parsers; needs Frama-C'
	@echo 'make lint           static analysis of C and shell'
	@echo 'make tour           doc/tour.html, its octets captured anew'
	@echo
	@echo 'Measurements of the release build:'
	@echo 'make gate           instructions an Encrypt takes, against a limit (valgrind)'
	@echo 'make bench          beside a Go and a Rust plugin (Go, valgrind; Rust: cargo, protoc; QUICK=1: short)'
	@echo 'make bench-memory   bytes, memory and start time'
	@echo 'make bench-doc      what make bench found, into doc/'

# Without noreturn, as an attribute or found out by the compiler: AddressSanitizer makes the stack readable before a call
# that does not return, and sees no over-read in the arguments of die(). test/unit.c: die_over_read_is_seen.
POISON = -include sanitizer/asan_interface.h -D_GNU_SOURCE= -D_FILE_OFFSET_BITS=64 -D_TIME_BITS=64 # kmsplugin.c's macros come later
SANITIZE = -O1 -g $(POISON) -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer \
	-Dnoreturn= -fno-ipa-pure-const -Wno-return-type -Wno-maybe-uninitialized
TESTED = $(SOURCES) $(HEADERS) Makefile test/test.mk

# What includes kmsplugin.c is built as it is.
build/unit build/sandbox build/without: build/%: test/%.c test/responses.h $(TESTED)
	@mkdir -p build
	$(CC) $(STD) $(WARN) -I. $(CPPFLAGS) $(CFLAGS) -o $@ $< kms.pb-c.c $(LDFLAGS) $(LIBS)

build/unit-asan: test/unit.c test/responses.h $(TESTED)
	@mkdir -p build
	$(CC) $(STD) $(WARN) -I. $(CPPFLAGS) $(SANITIZE) -o $@ test/unit.c kms.pb-c.c $(LDFLAGS) $(LIBS)

# The unit tests and those of the sandbox as the release build would have them.
STATIC_TESTS = $(addprefix build/static/$(ARCH_DIR),unit sandbox without)
$(STATIC_TESTS): build/static/$(ARCH_DIR)%: test/%.c test/responses.h $(TESTED) $(STATIC_NEEDS)
	$(STATIC_CC) $(STD) $(WARN) -I. $(STATIC_FLAGS) -o $@ $< kms.pb-c.c $(STATIC_STRING) $(STATIC_LD) $(LIBS)

# The tour, doc/tour.html: its octets are captured from a build whose random bytes and version are fixed and whose calls are logged.
build/tour/program: test/tour/fixed.c $(TESTED)
	@mkdir -p build/tour
	$(CC) $(STD) -UVERSION -DVERSION='"X.Y.Z"' $(WARN) -I. $(CPPFLAGS) -O0 -g -finstrument-functions -o $@ test/tour/fixed.c kms.pb-c.c $(LDFLAGS) $(LIBS)

.PHONY: tour tour-record test-browser
tour: kmsplugin build/tour/program
	/usr/bin/python3 -B test/tour/page.py write

# What the client says in it, recorded anew: grpc-go as kube-apiserver uses it.
tour-record: build/tour/program
	cp test/kube/go.mod test/kube/go.sum build/tour/
	cd test/kube && go build -mod=mod -modfile=$(CURDIR)/build/tour/go.mod -o $(CURDIR)/build/tour/client ../tour/client.go
	/usr/bin/python3 -B test/tour/talk.py record build/tour/client

test-browser:
	/usr/bin/python3 -B test/tour/browser.py

build/kmsplugin-asan: $(TESTED)
	@mkdir -p build
	$(CC) $(STD) $(WARN) $(CPPFLAGS) $(SANITIZE) -o $@ $(SOURCES) $(LDFLAGS) $(LIBS)

# Failures on demand: test/inject.c stands between the program, its libraries included, and libc. inject.py compares what
# kmsplugin.c calls (called.o) with what can fail.
build/kmsplugin-inject build/kmsplugin-inject-plain: test/inject.c $(TESTED)
	@mkdir -p build/inject
	$(CC) $(STD) $(CPPFLAGS) -O1 -c -o build/inject/called.o kmsplugin.c
	$(CC) $(STD) $(WARN) -Wno-missing-prototypes -O1 -c -o build/inject/inject.o test/inject.c
	$(CC) $(STD) $(WARN) $(CPPFLAGS) $(if $(findstring plain,$@),-O1,$(SANITIZE)) -o $@ $(SOURCES) build/inject/inject.o \
		$$(nm build/inject/inject.o | sed -n 's/.* T __wrap_/-Wl,--wrap=/p') $(LDFLAGS) -Wl,-Bstatic $(LIBS) -Wl,-Bdynamic

test-inject: build/kmsplugin-inject build/kmsplugin-inject-plain
	/usr/bin/python3 test/inject.py

# Constant time: the code as the two builds make it, under valgrind.
build/ct: test/ct.c $(TESTED)
	@mkdir -p build
	$(CC) $(STD) $(WARN) $(HARDEN_CC) -I. $(CPPFLAGS) $(CFLAGS) -o $@ test/ct.c kms.pb-c.c $(HARDEN_LD) $(LDFLAGS) $(LIBS)

build/ct-static: test/ct.c $(TESTED) $(STATIC_NEEDS)
	$(STATIC_CC) $(STD) $(STATIC_FLAGS) -g -I. -idirafter /usr/include -o $@ test/ct.c kms.pb-c.c $(STATIC_STRING) \
		$(filter-out -s,$(STATIC_LD)) $(LIBS)

test-ct: build/ct $(if $(wildcard build/static/kmsplugin),build/ct-static)
	test/ct.sh $^

# Fuzzers, for clang's libFuzzer: FUZZ_SECONDS each. They include kmsplugin.c, too.
FUZZERS = session kms parse rescue
FUZZ_SECONDS ?= 60
build/fuzz/%: test/fuzz/%.c test/fuzz/fuzz.h test/responses.h $(TESTED)
	@mkdir -p build/fuzz
	clang $(STD) $(WARN) -I. $(CPPFLAGS) -O1 -g $(POISON) -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \
		-Dnoreturn= -Wno-return-type \
		-o $@ $< kms.pb-c.c $(LDFLAGS) $(LIBS)

fuzz: $(FUZZERS:%=build/fuzz/%)
	FUZZ_SECONDS=$(FUZZ_SECONDS) test/fuzz/run.sh $(FUZZERS)

# Adds what fuzzing has found to the committed seeds.
fuzz-seeds: $(FUZZERS:%=build/fuzz/%)
	/usr/bin/python3 test/fuzz/seeds.py $(FUZZERS)

# No undefined behaviour in the byte parsers, for all inputs up to a length: Frama-C.
prove:
	test/prove/run.sh

test: kmsplugin
	./test.sh

test-kube: kmsplugin
	test/kube/cluster.sh short

test-cluster: kmsplugin
	test/kube/cluster.sh

# Hostile peers: the static build, where there is one, gives memory back; root, for /proc.
HOSTILE = ./kmsplugin $(wildcard build/static/kmsplugin)
test-hostile: kmsplugin
	for p in $(HOSTILE); do \
		KMSPLUGIN=$$p /usr/bin/python3 test/hostile.py || exit 1; done
	/usr/bin/python3 test/hostile.py --broken

# Half an hour of mixed load, restarts and hostile peers.
SOAK_SECONDS ?= 1800
soak: kmsplugin
	/usr/bin/python3 test/soak.py $(SOAK_SECONDS)
	/usr/bin/python3 test/custody.py $(or $(SOAK_SECONDS),3600)

test-custody: kmsplugin
	/usr/bin/python3 test/custody.py mutants

test-tpm:
	test/tpm.sh

test-deploy: kmsplugin
	test/deploy.sh

bench-memory: $(STATIC) build/bench/load
	/usr/bin/python3 test/bench/run.py memory $(sort $(STATIC) $(wildcard build/static/*/kmsplugin))

test-distros:
	test/distros.sh $(DISTROS)

test-arch:
	test/arch.sh

test-kernel:
	test/kernel.sh

test-release: kmsplugin
	test/release.sh

test-libs: $(STATIC_NEEDS)
	CC=$(CURDIR)/$(STATIC_CC) LINK='$(STATIC_STRING:%=$(CURDIR)/%) $(STATIC_FLAGS) $(STATIC_LD)' test/libs.sh build/static/$(ARCH)/src

# Measurements, of the release build unless KMSPLUGIN=./kmsplugin or another asks for it.
KMSPLUGIN ?= build/static/kmsplugin

gate: $(KMSPLUGIN) build/bench/load
	test/bench/gate.sh $(KMSPLUGIN)

build/bench/%: test/bench/%.c test/test.mk
	@mkdir -p build/bench
	$(CC) -std=c11 $(WARN) -O2 -o $@ $< -lnghttp2

RUST = test/bench/rust
bench: $(KMSPLUGIN) build/bench/load
	cd test/bench/go && go build -trimpath -ldflags='-s -w' -o $(CURDIR)/build/bench/ ./peer ./client
	rm -f build/bench/rust/release/peer
	! command -v cargo >/dev/null || cargo build --release --locked --manifest-path $(RUST)/Cargo.toml --target-dir build/bench/rust
	/usr/bin/python3 test/bench/run.py $(KMSPLUGIN) build/bench

bench-doc:
	sed -n '/^## Size and memory/,$$p' doc/bench.md >build/bench/size.md
	{ cat build/bench/bench.md; echo; cat build/bench/size.md; } >doc/bench.md && cp build/bench/bench.svg doc/

lint:
	clang-tidy --quiet kmsplugin.c -- $(STD)
	cppcheck --quiet --enable=warning,performance,portability --suppress=preprocessorErrorDirective --error-exitcode=1 $(subst -std=,--std=,$(STD)) kmsplugin.c
	gcc $(STD) -O2 -fanalyzer -Werror -c -o /dev/null kmsplugin.c
	scan-build --status-bugs -o build/scan clang $(STD) -c -o /dev/null kmsplugin.c >/dev/null
	shellcheck -x $(wildcard *.sh test/*.sh test/*/*.sh release/*.sh) deploy/openrc/kmsplugin deploy/kmsplugin-ring deploy/metrics/kmsplugin-textfile .ci/run

.PHONY: test test-kube test-cluster test-hostile test-inject test-ct test-custody test-tpm test-deploy test-distros test-arch test-kernel test-libs test-release soak fuzz fuzz-seeds \
	prove lint gate bench bench-memory bench-doc
