# run, test, check, bench, simulate, reliability, clean. Needs Python 3.11 or newer, pip and make; everything else is installed into $(VENV).

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
BENCH_ARGS ?=
SEEDS ?= 10000
FIRST ?= 0
EXAMPLE := examples/temperatures/run.py

BIN := $(VENV)/bin
PACKAGES := actors config engine ops persistence wire
SOURCES := $(sort $(shell find $(PACKAGES) -name '*.py' -o -name 'py.typed' -o -name '*.yaml'))
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
export PIP_ROOT_USER_ACTION := ignore

# Stamps live in the environment they describe, so removing the environment removes them.
# `make run` installs no test tools; where they are there already, the same environment serves.
READY_DEV := $(VENV)/.ready-dev
READY_RUN := $(if $(wildcard $(READY_DEV)),$(READY_DEV),$(VENV)/.ready-run)

.DELETE_ON_ERROR:
.PHONY: run test check bench simulate reliability clean FORCE

run: $(READY_RUN)
	@$(BIN)/python $(EXAMPLE)

test: $(READY_DEV)
	@rm -f .coverage .coverage.*
	$(BIN)/python -m pytest --cov --cov-report=term $(PYTEST_ARGS)

check: $(READY_DEV)
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy -p scopestate
	$(BIN)/mypy benchmarks examples
	$(BIN)/lint-imports --no-logo

bench: $(READY_DEV)
	@$(BIN)/python -m benchmarks $(BENCH_ARGS)

simulate: $(READY_DEV)
	@$(BIN)/python -m tests.simulation --seeds $(SEEDS) --first $(FIRST)

# The tests that record figures, then docs/reliability.md from what they recorded.
reliability: $(READY_DEV)
	$(BIN)/python -m pytest --no-cov -q tests/reliability tests/simulation tests/linearizability tests/load tests/hostile \
		tests/faults tests/persistence tests/redis
	@$(BIN)/python -m tests.reliability.report

clean:
	rm -rf .venv .make build dist bench-results *.egg-info .coverage .coverage.*
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find $(PACKAGES) tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +

# A strict editable install links the files that exist at the time, so a file that came or went installs again.
# Refused: the default editable mode, in which mypy and editors see no `scopestate.actors` at all.
$(READY_DEV): EXTRA := dev
$(VENV)/.ready-run: EXTRA := examples
$(READY_DEV) $(VENV)/.ready-run: pyproject.toml .make/files $(if $(wildcard build/__editable__.*),,FORCE)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing scopestate[$(EXTRA)] into $(VENV)"
	@rm -rf build
	@$(PIP) install --config-settings editable_mode=strict --editable '.[$(EXTRA)]'
	@touch $@

# Rewritten only when the list differs: its time is the time the list last changed.
.make/files: FORCE
	@mkdir -p .make
	@printf '%s\n' $(SOURCES) | cmp -s - $@ || printf '%s\n' $(SOURCES) >$@
