# The one entry: `make help` lists the targets. Real-node tests and the demo need root; lint and build do not.

PREFIX ?= /usr/local
CARGO ?= cargo
# Each need listed here fails a test that lacks it; elsewhere such a test is skipped with its reason.
comma := ,
export REQUIRE ?= $(if $(filter true,$(CI)),root$(comma)node)

SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
PACKAGES := btrfs-progs buildah build-essential ca-certificates iproute2 libarchive-tools mmdebstrap protobuf-compiler umoci util-linux
# Besides, for `make test-vm`.
PACKAGES_VM := e2fsprogs qemu-system-x86
BINARIES := transship transship-snapshotter transship-runc transship-hook
# Linked without shared libraries, the front, which stands before every call of the OCI runtime, starts with
# 80 page faults less, and the snapshotter, which stays, takes 1 MB less.
STATIC := -C target-feature=+crt-static
# $(call release,MORE): builds what is installed, and the binaries MORE.
release = $(CARGO) build --release --workspace --bin transship --bin transship-hook $(addprefix --bin ,$(1)) \
	&& $(CARGO) rustc --release -p transship-hook --bin transship-runc -- $(STATIC) \
	&& $(CARGO) rustc --release -p transship-snapshotter --bin transship-snapshotter -- $(STATIC)
# Tools in the versions that are known to work with the pinned toolchain.
TOOLS := cargo-nextest@0.9.143 cargo-deny@0.20.2 cargo-machete@0.9.2

# $(call ensure,PACKAGES): installs those that are not there.
ensure = @missing=$$(for p in $(1); do dpkg -s $$p >/dev/null 2>&1 || echo $$p; done); \
	if [ -n "$$missing" ]; then $(SUDO) apt-get -q update && $(SUDO) apt-get -qy install --no-install-recommends $$missing; fi

.PHONY: help setup setup-vm build test test-long test-vm lint demo bench install install-built clean
.DEFAULT_GOAL := help

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

setup: ## Install what building and testing need (Debian)
	$(call ensure,$(PACKAGES))
	@for tool in $(TOOLS); do \
	  command -v $${tool%@*} >/dev/null || $(CARGO) install --locked --debug $$tool; \
	done

setup-vm: ## Install what building and the machine of test-vm need (Debian)
	$(call ensure,$(PACKAGES) $(PACKAGES_VM))

build: ## Build all binaries (debug; the tests use these)
	$(CARGO) build --workspace --bins

test: setup build ## Run all tests, those on real nodes too
	$(CARGO) nextest run --workspace

test-long: setup build ## Run all tests with many more generated cases, and those that take long
	PROPTEST_CASES=10000 $(CARGO) nextest run --workspace --profile long --run-ignored all

test-vm: setup-vm build ## Run tests in a machine with systemd and cgroup v2; ONLY=part of their names
	rm -rf target/vm/root
	$(MAKE) install-built BUILT=target/debug DESTDIR=target/vm/root PREFIX=/usr/local
	@$(SUDO) env PATH="$$PATH" HOME="$$HOME" target/debug/transship-vm $(or $(ONLY),vm_)

lint: ## Check format, lints, documentation, dependencies
	$(CARGO) fmt --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS=-Dwarnings $(CARGO) doc --quiet --workspace --no-deps
	$(CARGO) deny --log-level error check bans licenses sources
	$(CARGO) machete

demo: setup build ## Watch a running container move between two nodes
	@$(SUDO) env PATH="$$PATH" HOME="$$HOME" target/debug/transship-demo

bench: setup ## Measure beside stock tools; ONLY=snapshots|layers|migration|restore|front for a part
	$(call release,transship-bench testbed)
	@$(SUDO) env PATH="$$PATH" HOME="$$HOME" target/release/transship-bench $(if $(ONLY),--only $(ONLY))

install: ## Install the built release binaries, units and sample configurations to PREFIX
	$(call release)
	$(MAKE) install-built

install-built: BUILT ?= target/release
install-built:
	install -d $(DESTDIR)$(PREFIX)/bin
	install -m 0755 $(BINARIES:%=$(BUILT)/%) $(DESTDIR)$(PREFIX)/bin/
	install -d $(DESTDIR)$(PREFIX)/lib/systemd/system $(DESTDIR)$(PREFIX)/share/transship
	for unit in config/*.service config/*.socket; do \
	  sed 's,/usr/local/,$(PREFIX)/,' $$unit >$(DESTDIR)$(PREFIX)/lib/systemd/system/$${unit##*/}; \
	done
	install -m 0644 config/*.toml $(DESTDIR)$(PREFIX)/share/transship/
	install -d $(DESTDIR)/etc/transship
	@test -e $(DESTDIR)/etc/transship/snapshotter.toml || install -m 0644 config/snapshotter.toml $(DESTDIR)/etc/transship/

clean: ## Remove what was built; cached node trees stay in /var/cache/transship-testbed
	$(CARGO) clean
