# make repro        run the pipeline of the active profile (PROFILE=smoke runs another one) and print the report's path
# make experiment   test the paper's claim on many more tasks, with controls (about an hour); prints the summary's path
# make test         lint, types and tests in reduced sizes
# make test-all     the same with the slow ones
# make toybox-base  train the embedded world's networks again
# make clean        delete what a run leaves unfinished, and caches of tools; never results
#
# Each creates .venv where it is missing and installs the pinned packages.

PYTHON ?= $(shell for python in python3.12 python3.11 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info[:2] not in {(3, 11), (3, 12)})' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
INSTALLED := .venv/.installed
PYTEST := $(BIN)/python -m pytest

.PHONY: repro experiment test test-all lint toybox-base clean

repro: $(INSTALLED)
	@$(BIN)/python -m flows.repro $(PROFILE)

experiment: $(INSTALLED)
	@$(BIN)/python -m flows.experiment

test: lint
	$(PYTEST) -m "not gpu and not slow"

test-all: lint
	$(PYTEST) -m "not gpu"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

toybox-base: $(INSTALLED)
	$(BIN)/python -m mip.toybox.pretrain

clean:
	rm -rf .work .prefect .pytest_cache .ruff_cache .hypothesis

$(INSTALLED): requirements.txt constraints.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 found; install one or say make PYTHON=/path/to/python" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt --constraint constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@
