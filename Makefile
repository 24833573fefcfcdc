# Every target prepares what it needs itself: host packages, the virtual environment, the guest agent.

ARGS ?= vm run --rm -- sh -c 'uname -a; head -n 1 /etc/os-release'
BINDIR ?= $(HOME)/.local/bin
UV ?= uv
# what `make run` takes on a machine where nothing is prepared
FIRST_RUN := about a minute and 1 GB of disk
export ARGS_FROM ?= $(origin ARGS)

# The first Python that is new enough, as the real file behind any shim.
PYTHON := $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.version_info >= (3, 11) or sys.exit(1); print(sys.executable)' 2>/dev/null && break; \
	done)

VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
QUIETLY := $(PYTHON) scripts/quietly.py
AGENT_SOURCES := $(wildcard agent/*.c agent/*.h) scripts/build_agent.py
BENCHMARKS := $(wildcard bench/*.py)
# mypy refuses a directory without Python in it
TYPED := src tests hatch_build.py $(wildcard scripts/*.py) $(BENCHMARKS)

# Nothing from the caller's Python set-up may leak in; where packages come from stays the caller's choice.
unexport PYTHONPATH PYTHONHOME
export PIP_USER := 0
export PIP_REQUIRE_VIRTUALENV := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_PROGRESS_BAR := off

.PHONY: run test test-kvm test-distros soak lint bench install uninstall lock agent wheels deb clean python test-host
.PHONY: prepared first-run first-image first-kernel again
.PHONY: debian-kernel void-kernel alpine-kernel generic-kernel
.DELETE_ON_ERROR:
# only the first run does things side by side
ifneq ($(MAKECMDGOALS),first-run)
.NOTPARALLEL:
endif

run: $(if $(wildcard $(VENV)/installed),$(VENV)/installed,prepared)
	@$(BIN)/banger $(ARGS)

# Once: the image is built while the environment is made, and the kernel comes in while the image is built.
prepared: python
	@echo "preparing banger, which takes $(FIRST_RUN); its output goes to build/log:" >&2
	@$(MAKE) --no-print-directory -j first-run

first-run: $(VENV)/installed $(if $(filter file,$(ARGS_FROM)),first-image first-kernel)

first-image: build/host
	@$(QUIETLY) "image" $(PYTHON) scripts/first.py image

first-kernel: $(VENV)/installed
	@$(QUIETLY) "kernel" $(BIN)/python scripts/first.py kernel

# Unit, process and guest tests, in this order, in one pytest with one summary.
test: test-host lint
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

# Guests on Firecracker alone; a part of `make test` too, which runs them inside of an emulated guest that has KVM
# where this host's KVM runs none.
test-kvm: test-host $(VENV)/dev
	$(BIN)/pytest -m "kvm and not soak"

# From a fresh installation of each distribution to a guest; the shortest of it is a part of `make test`.
test-distros: test-host $(VENV)/dev
	$(BIN)/pytest -m "" tests/distros

soak: test-host $(VENV)/dev
	@seed=$${BANGER_SOAK_SEED:-$$(od -An -N4 -tu4 /dev/urandom | tr -d ' ')}; \
	echo "repeat this run with: make soak BANGER_SOAK_SEED=$$seed"; \
	BANGER_SOAK_SEED=$$seed $(BIN)/pytest -m soak

lint: $(VENV)/dev
	$(BIN)/python scripts/build_agent.py --lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(TYPED)
	$(BIN)/mypy --scripts-are-modules scripts/setup-host scripts/build-golden-image \
		$(wildcard scripts/publish-* scripts/make-*-kernel scripts/make-wheels scripts/make-deb \
		scripts/register-*-image)

bench: $(VENV)/installed
	@for benchmark in $(BENCHMARKS); do echo "== $$benchmark"; $(BIN)/python $$benchmark || exit 1; done

# Kernels for `banger kernel import --from build/manual/<name>-kernel`; options in STAGE, --help lists them.
STAGE ?=
debian-kernel void-kernel alpine-kernel generic-kernel: $(VENV)/installed
	@$(BIN)/python scripts/make-$@ $(STAGE)

install: $(VENV)/installed
	@if [ -e $(BINDIR)/banger ] && [ ! -L $(BINDIR)/banger ]; then \
		echo "$(BINDIR)/banger is a file that this did not install; remove it first" >&2; exit 1; fi
	@mkdir -p $(BINDIR)
	@ln -sfn $(BIN)/banger $(BINDIR)/banger
	@echo "installed $(BINDIR)/banger; it runs from $(CURDIR), so keep that directory"
	@case ":$$PATH:" in *":$(BINDIR):"*) ;; *) \
		echo "$(BINDIR) is not on your PATH; add it: export PATH=\"$(BINDIR):\$$PATH\"";; esac

uninstall:
	@if [ "$$(readlink $(BINDIR)/banger)" = $(BIN)/banger ]; then \
		rm $(BINDIR)/banger; echo "removed $(BINDIR)/banger"; \
	else echo "$(BINDIR)/banger is not installed from here"; fi
	@echo "your data stays; remove it by hand if you want it gone:"
	@echo "  $${XDG_STATE_HOME:-$$HOME/.local/state}/banger   kernels, images and virtual machines"
	@echo "  $${XDG_CACHE_HOME:-$$HOME/.cache}/banger   downloads"
	@echo "  $${XDG_CONFIG_HOME:-$$HOME/.config}/banger   configuration"

COMPILE = $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
	--no-emit-index-url --no-emit-find-links
# Pins what pyproject.toml asks for and leaves every pin that still fits; to move them all, delete the files first. What
# banger runs with, what an installation from source takes besides, and what checks and tests do.
lock:
	$(COMPILE) --output-file requirements.lock pyproject.toml
	$(COMPILE) --constraint requirements.lock --group build --output-file requirements-build.lock
	$(COMPILE) --constraint requirements.lock --constraint requirements-build.lock --group dev \
		--output-file requirements-dev.lock

# Wheels and a source distribution, and Debian packages, into dist/: for both architectures, or ARCH=amd64.
wheels: $(VENV)/dev
	@$(BIN)/python scripts/make-wheels $(ARCH)

deb: $(VENV)/dev
	@$(BIN)/python scripts/make-deb $(ARCH)

agent: python
	@$(PYTHON) scripts/build_agent.py

clean:
	rm -rf $(VENV) dist build __pycache__ src/banger/_agent .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(wildcard src tests scripts bench) -name __pycache__ -prune -exec rm -rf {} +

python:
	@[ -n "$(PYTHON)" ] || { echo "banger needs Python 3.11 or newer, and this host has $$(python3 --version 2>&1 \
		|| echo none). Install it: apt-get install python3 python3-venv (Debian 12, Ubuntu 24.04 or newer)," \
		"dnf install python3.11 (Fedora), pacman -S python (Arch)" >&2; exit 1; }

test-host: python
	@$(PYTHON) scripts/setup-host --test

# looked at again with every new environment
build/host: src/banger/hostpackages.toml scripts/setup-host $(if $(wildcard $(VENV)/installed),,again) | python
	@$(PYTHON) scripts/setup-host
	@mkdir -p build && touch $@

build/agent: $(AGENT_SOURCES) | build/host
	@$(QUIETLY) "guest agent" $(PYTHON) scripts/build_agent.py
	@touch $@

# These stamps lie inside the environment, so that removing it removes them.
$(VENV)/requirements: requirements.lock requirements-build.lock | build/host
	@$(QUIETLY) "Python environment" $(PYTHON) -m venv --clear $(VENV)
	@$(QUIETLY) "Python packages" $(BIN)/pip install --require-hashes -r requirements.lock -r requirements-build.lock
	@touch $@

# compiled too: pip does not, and where bytecode is not cached every command pays 30 ms
$(VENV)/installed: $(VENV)/requirements build/agent pyproject.toml hatch_build.py
	@$(QUIETLY) "banger" sh -c '$(BIN)/pip install --no-deps --no-build-isolation -e . \
		&& $(BIN)/python -m compileall -q src'
	@touch $@

again:

# What checks and tests need besides.
$(VENV)/dev: requirements-dev.lock $(VENV)/installed
	@$(QUIETLY) "development tools" $(BIN)/pip install --require-hashes -r requirements-dev.lock
	@touch $@
