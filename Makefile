PYTHON ?= python3
ARGS   ?=
BIN    := .venv/bin

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help run test faults check format bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s%s\n", $$1, $$2 }' Makefile
	@echo 'ARGS are handed on: make run ARGS="specs/ageb_gtsrb.toml seed=1"; PYTHON=... picks the interpreter'

run: .venv/.ready ## one experiment from attack to report; no spec: the embedded default, about a minute
	$(BIN)/vitrap run $(ARGS)

# One thread a worker: workers already fill the cores. A worker keeps neighbouring tests, and so the models they share.
test: .venv/.ready-test ## every test; VITRAP_DATA names the data cache
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal $(ARGS)

faults: .venv/.ready-test ## a kill and a full disk at every operation on files, any bytes in every file; hours
	VITRAP_FAULTS=all OMP_NUM_THREADS=1 $(BIN)/pytest tests/faults -n auto --maxprocesses 8 --dist worksteal $(ARGS)

check: .venv/.ready-dev ## format, lint, types, import layers
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright
	$(BIN)/lint-imports

format: .venv/.ready-dev ## format the code and mend what lint can mend
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

bench: .venv/.ready ## speed and memory, next to a plain baseline
	$(BIN)/python -m benchmarks $(ARGS)

clean: ## remove caches and builds; .venv and runs stay
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# Set-up. A stamp is older than pyproject.toml when dependencies may have changed. An extra comes with all of vitrap, so
# that one call of pip does.
define install
	@echo 'installing vitrap into .venv: the first time this fetches torch, up to 6 GB with its CUDA libraries'
	$(BIN)/pip install --quiet --editable '.$(if $*,[$*])'
	@touch .venv/.ready $@
endef

.venv/.ready: pyproject.toml | $(BIN)/pip
	$(install)

.venv/.ready-%: pyproject.toml | $(BIN)/pip
	$(install)

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'vitrap needs Python 3.11 or newer, and $(PYTHON) is not: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	$(PYTHON) -m venv .venv
