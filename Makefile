# The one entry: `make help` lists the targets. Real-node tests and the demo need root; lint and build do not.

PREFIX ?= /usr/local
CARGO ?= cargo
# Each need listed here fails a test that lacks it; elsewhere such a test is skipped with its reason.
comma := ,
export REQUIRE ?= $(if $(filter true,$(CI)),root$(comma)node)

SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
# As root, with the cargo of who calls.
AS_ROOT := $(SUDO) env PATH="$$PATH" HOME="$$HOME"
# What building needs, and one node; what the tests need; what `make test-vm` needs besides.
PACKAGES_BUILD := ca-certificates gcc libc6-dev protobuf-compiler
PACKAGES_DEMO := $(PACKAGES_BUILD) iproute2 mmdebstrap util-linux
PACKAGES := $(PACKAGES_DEMO) btrfs-progs buildah busybox-static docker-registry libarchive-tools podman skopeo strace umoci
PACKAGES_FUZZ := g++
PACKAGES_VM := e2fsprogs qemu-system-x86
# Tools in the versions that are known to work with the pinned toolchain.
RUNNER := cargo-nextest@0.9.143
LINTERS := cargo-deny@0.20.2 cargo-machete@0.9.2

BINARIES := transship transship-snapshotter transship-runc transship-hook
# One call of cargo, for all packages: with fewer of them their dependencies have other features, and are built again.
DEMO := $(CARGO) build --workspace --profile demo
# Linked without shared libraries, the front, which stands before every call of the OCI runtime, starts with
# 80 page faults less, and the snapshotter, which stays, takes 1 MB less. With --target build scripts and
# procedural macros, which are shared libraries, are built as usual.
HOST = $(shell rustc -vV | sed -n 's/^host: //p')
RELEASE = RUSTFLAGS="-C target-feature=+crt-static" $(CARGO) build --workspace --release --target $(HOST)
RELEASE_DIR = target/$(HOST)/release

# What libFuzzer wants of a compiler: counters of edges, and the operands of comparisons. They are flags of the
# stable compiler; those of cargo-fuzz are the same, with a sanitizer besides, which safe code has no use for.
FUZZ_FLAGS := --cfg fuzzing -Ccodegen-units=4 -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
	-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
	-Cllvm-args=-sanitizer-coverage-trace-compares -Clink-dead-code
FUZZ_TARGETS := $(notdir $(wildcard fuzz/corpus/*))
FUZZ_OPTIONS = -max_total_time=$(or $(TIME),60) -timeout=20 -rss_limit_mb=1024 -max_len=65536 -print_final_stats=1

# $(call ensure,PACKAGES): installs those that are not there.
ensure = @missing=$$(for p in $(1); do dpkg -s $$p >/dev/null 2>&1 || echo $$p; done); \
	if [ -n "$$missing" ]; then $(SUDO) apt-get -q update && $(SUDO) apt-get -qy install --no-install-recommends $$missing; fi

# $(call ensure_tools,NAME@VERSION...): installs those that are not there, from source, compiled quickly.
ensure_tools = @for tool in $(1); do \
	  command -v $${tool%@*} >/dev/null \
	  || CARGO_PROFILE_DEV_DEBUG=false $(CARGO) install --locked --debug --target-dir target/tools $$tool || exit; \
	done

.PHONY: help setup setup-test setup-lint setup-vm build trees test test-quick test-long test-programs test-kubernetes test-vm fuzz lint demo bench install install-built clean
.DEFAULT_GOAL := help

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

setup: ## Install what building and testing need (Debian)
	$(call ensure,$(PACKAGES))

setup-test: setup
	$(call ensure_tools,$(RUNNER))

setup-lint: setup
	$(call ensure_tools,$(LINTERS))

setup-vm: setup
	$(call ensure,$(PACKAGES_VM))

# The tests with them: their dependencies have other features, and everything would be compiled twice.
build: ## Build all binaries and tests (debug)
	$(CARGO) build --workspace --bins --tests

trees: build ## Build the Debian trees of the tests' nodes, once
	@$(AS_ROOT) target/debug/testbed prepare bookworm trixie forky servers

# The examples of the documentation, which the test runner does not know.
EXAMPLES = $(if $(ONLY),,$(CARGO) test --quiet --workspace --doc)

test: setup-test build ## Run all tests, those on real nodes too; ONLY=part of their names, a regular expression
	$(EXAMPLES)
	$(CARGO) nextest run --workspace $(if $(ONLY),-E 'test(/$(ONLY)/)')

test-quick: setup-test build ## Run the tests that need no node
	$(EXAMPLES)
	$(CARGO) nextest run --workspace -E 'not test(/(^|::)(node|vm)_/)'

test-long: setup-test build ## Run all tests with many more generated cases, and those that take long
	PROPTEST_CASES=10000 $(CARGO) nextest run --workspace --profile long --run-ignored all -E 'not test(/_long_(program|kubernetes)_/)'

test-programs: setup-test build ## Move Debian's servers between nodes, and write the table of docs/programs.md; ONLY=a part
	TRANSSHIP_WRITE_TABLE=1 $(CARGO) nextest run --workspace --test node --profile long --run-ignored only \
	  -E 'test(/_program_$(ONLY)/)'

test-kubernetes: setup-test build ## Move pods between two kubelets under a control plane; ONLY=a part. Its first run builds them: an hour
	$(CARGO) nextest run --workspace --test node --profile long --run-ignored only \
	  -E 'test(/_kubernetes_$(ONLY)/)'

test-vm: setup-vm build ## Run tests in a machine with systemd and cgroup v2; ONLY=part of their names
	rm -rf target/vm/root
	$(MAKE) install-built BUILT=target/debug DESTDIR=target/vm/root PREFIX=/usr/local
	@$(AS_ROOT) target/debug/transship-vm $(or $(ONLY),vm_)

fuzz: setup ## Mutate what fuzz/ has of hostile input, TIME=60 seconds for each target; ONLY=one of them
	$(call ensure,$(PACKAGES_FUZZ))
	RUSTFLAGS="$(FUZZ_FLAGS)" $(CARGO) build --release --manifest-path fuzz/libfuzzer/Cargo.toml --target-dir target/fuzz \
	  --target $(HOST)
	@# What is new in target/fuzz/corpus stays there; what fails is a file in target/fuzz/found.
	@mkdir -p target/fuzz/found
	@failed=0; for target in $(or $(ONLY),$(FUZZ_TARGETS)); do \
	  echo "fuzz: $$target"; mkdir -p target/fuzz/corpus/$$target; \
	  $(AS_ROOT) env TARGET=$$target target/fuzz/$(HOST)/release/transship-libfuzzer $(FUZZ_OPTIONS) \
	    -artifact_prefix=target/fuzz/found/$$target- target/fuzz/corpus/$$target fuzz/corpus/$$target || failed=1; \
	done; exit $$failed

lint: setup-lint ## Check format, lints, documentation, dependencies
	$(CARGO) fmt --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS=-Dwarnings $(CARGO) doc --quiet --workspace --no-deps
	$(CARGO) deny --log-level error check bans licenses sources
	$(CARGO) machete

demo: ## Watch a running container move between two nodes
	$(call ensure,$(PACKAGES_DEMO))
	$(DEMO) --bin testbed
	@# The node's Debian tree comes over the network while the rest is compiled.
	@$(AS_ROOT) target/demo/testbed prepare forky & tree=$$!; \
	$(DEMO) $(addprefix --bin ,$(BINARIES) transship-demo); built=$$?; \
	wait $$tree && [ $$built = 0 ]
	@$(AS_ROOT) target/demo/transship-demo

bench: setup ## Measure beside stock tools; ONLY=snapshots|layers|migration|restore|front|package for a part
	$(RELEASE) $(addprefix --bin ,$(BINARIES) transship-bench testbed)
	@$(AS_ROOT) $(RELEASE_DIR)/transship-bench $(if $(ONLY),--only $(ONLY))

install: ## Build a release, and install binaries, units and sample configurations to PREFIX
	$(call ensure,$(PACKAGES_BUILD))
	$(RELEASE) $(addprefix --bin ,$(BINARIES))
	$(MAKE) install-built BUILT=$(RELEASE_DIR)

# The binaries without their symbols, and the symbols in files that gdb finds (`set debug-file-directory`, or PREFIX=/usr).
install-built: BUILT ?= $(RELEASE_DIR)
install-built:
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/lib/debug$(PREFIX)/bin
	for binary in $(BINARIES); do \
	  symbols=$(DESTDIR)$(PREFIX)/lib/debug$(PREFIX)/bin/$$binary.debug; \
	  objcopy --only-keep-debug $(BUILT)/$$binary $$symbols \
	  && objcopy --strip-all --add-gnu-debuglink=$$symbols $(BUILT)/$$binary $(DESTDIR)$(PREFIX)/bin/$$binary.new \
	  && chmod 0755 $(DESTDIR)$(PREFIX)/bin/$$binary.new \
	  && mv $(DESTDIR)$(PREFIX)/bin/$$binary.new $(DESTDIR)$(PREFIX)/bin/$$binary || exit; \
	done
	install -d $(DESTDIR)$(PREFIX)/lib/systemd/system $(DESTDIR)$(PREFIX)/share/transship
	for unit in config/*.service config/*.socket; do \
	  sed 's,/usr/local/,$(PREFIX)/,' $$unit >$(DESTDIR)$(PREFIX)/lib/systemd/system/$${unit##*/}; \
	done
	install -m 0644 config/*.toml $(DESTDIR)$(PREFIX)/share/transship/
	install -d $(DESTDIR)/etc/transship
	@test -e $(DESTDIR)/etc/transship/snapshotter.toml || install -m 0644 config/snapshotter.toml $(DESTDIR)/etc/transship/

clean: ## Remove what was built; cached node trees stay in /var/cache/transship-testbed
	$(CARGO) clean
