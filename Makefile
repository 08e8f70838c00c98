# run, test, check, docs, bench, simulate, reliability, clean. Needs Python 3.11 or newer, pip and make; everything else is installed into $(VENV).

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
BENCH_ARGS ?=
SEEDS ?= 10000
FIRST ?= 0
SIMULATE_ARGS ?=
EXAMPLE := examples/temperatures/run.py

BIN := $(VENV)/bin
PACKAGES := actors config console engine integrations ops persistence wire
SOURCES := $(sort $(shell find $(PACKAGES) -name '*.py' -o -name 'py.typed' -o -name '*.yaml' -o -name '*.html' -o -name '*.css' -o -name '*.js'))
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
export PIP_ROOT_USER_ACTION := ignore
# Without compiled modules, each of the hundreds of processes that the tests start compiles scopestate again, for 0.4 s.
unexport PYTHONDONTWRITEBYTECODE

# Stamps live in the environment they describe, so removing the environment removes them.
# `make run` installs no test tools; where they are there already, the same environment serves.
READY_DEV := $(VENV)/.ready-dev
READY_RUN := $(if $(wildcard $(READY_DEV)),$(READY_DEV),$(VENV)/.ready-run)

PYTHON_FITS := "import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))"

# The environment is made again if its Python does not start (it was removed, or the making was interrupted), is another
# one than PYTHON was set to, or if it was made elsewhere: its scripts name the folder of that time.
UNSOUND := $(shell \
	if ! $(BIN)/python -c "import pip, sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null; then \
		echo "its Python or its pip does not work"; \
	elif ! grep -qF "$(abspath $(VENV))" $(VENV)/pyvenv.cfg; then \
		echo "it was made in another folder"; \
	elif test "$(origin PYTHON)" != file && ! $(PYTHON) -c "import os, sys; sys.exit(os.path.realpath(sys.base_prefix) != sys.argv[1])" \
		"$$($(BIN)/python -c 'import os, sys; print(os.path.realpath(sys.base_prefix))')"; then \
		echo "it was made by another Python"; \
	fi)
SOUND := $(if $(UNSOUND),,yes)

.DELETE_ON_ERROR:
.PHONY: run test check docs bench simulate reliability clean FORCE

run: $(READY_RUN)
	@$(BIN)/python $(EXAMPLE)

# The whole suite runs in two processes: most tests wait more than they compute.
test: $(READY_DEV)
	@rm -f .coverage .coverage.*
	$(BIN)/python -m pytest --cov --cov-report=term $(or $(PYTEST_ARGS),-n 2 --dist worksteal)

check: $(READY_DEV)
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy -p scopestate
	$(BIN)/mypy benchmarks examples
	$(BIN)/lint-imports --no-logo

# The documentation site, in .cache/docs/site. A warning is an error; nothing is fetched.
docs: $(READY_DEV)
	@$(BIN)/python docs/build.py

bench: $(READY_DEV)
	@$(BIN)/python -m benchmarks $(BENCH_ARGS)

simulate: $(READY_DEV)
	@$(BIN)/python -m tests.simulation --seeds $(SEEDS) --first $(FIRST) $(SIMULATE_ARGS)

# The proofs in their full sizes, then docs/explanation/reliability.md from the figures that they recorded.
reliability: $(READY_DEV)
	SCOPESTATE_PROOF=full $(BIN)/python -m pytest --no-cov -q tests/reliability tests/simulation tests/linearizability tests/load \
		tests/hostile tests/faults tests/ops tests/actors tests/persistence tests/redis tests/properties tests/wire tests/config tests/sharing
	@$(BIN)/python -m tests.reliability.report

clean:
	rm -rf .venv .make build dist bench-results *.egg-info .coverage .coverage.*
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find $(PACKAGES) tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +

# A strict editable install links the files that exist at the time, so a file that came or went installs again.
# Refused: the default editable mode, in which mypy and editors see no `scopestate.actors` at all.
$(READY_DEV): EXTRA := dev
$(VENV)/.ready-run: EXTRA := examples
$(READY_DEV) $(VENV)/.ready-run: pyproject.toml .make/files $(if $(wildcard build/__editable__.*),,FORCE) $(if $(SOUND),,FORCE)
	@$(if $(SOUND),:,test ! -e $(VENV)/pyvenv.cfg || { echo "making $(VENV) again: $(UNSOUND)"; rm -rf $(VENV); })
	@test -x $(BIN)/python || $(PYTHON) -c $(PYTHON_FITS) || \
		{ echo "$(PYTHON) cannot make the environment: scopestate needs Python 3.11 or newer with venv (Debian, Ubuntu: apt install python3-venv); another one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing scopestate[$(EXTRA)] into $(VENV)"
	@rm -rf build
	@$(PIP) install --config-settings editable_mode=strict --editable '.[$(EXTRA)]'
	@touch $@

# Rewritten only when the list differs: its time is the time the list last changed.
.make/files: FORCE
	@mkdir -p .make
	@printf '%s\n' $(SOURCES) | cmp -s - $@ || printf '%s\n' $(SOURCES) >$@
