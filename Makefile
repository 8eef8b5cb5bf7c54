# make quickstart   set up .venv, then run the main job on the embedded data set
# make test         set up .venv, then the tests; `make check` adds lint, format and types

# What tells whether a Python will do. A version manager may offer a name that does not run, so try each.
PYTHON ?= $(shell for p in python3.11 python3 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1 && echo "$$p" && break; done)
BIN := .venv/bin
# Written last: a set-up that was interrupted is done again.
STAMP := .venv/.installed

.PHONY: help venv quickstart test test-full lint format check clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

venv: $(STAMP)

# Bytecode is compiled here, once, in parallel: with PYTHONDONTWRITEBYTECODE set, or a read-only
# installation, every start would compile torch and ray anew.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "ddsweep needs Python 3.11: python3.11 was not found on PATH." \
		"Install it, or name one: make $(or $(MAKECMDGOALS),venv) PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/uv pip install --compile-bytecode -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

quickstart: $(STAMP)
	$(BIN)/ddsweep run sweeps/quickstart.yaml

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow"

test-full: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint test

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache
