# make quickstart   set up .venv, then run the main job on the embedded data set
# make test         set up .venv, then the tests that take minutes
# make test-cluster the tests that start a Ray or a Slurm of their own
# make check        lint, format, types, and both of these
# make test-full    all tests, with the slow ones
# make axe          what the tests of the report look for barriers with, by npm
# make verify-results check the kept sets of docs/reproduction on fresh networks
# make reproduce ROW=NAME run one of its rows from nothing, and compare
# make campaign     plan the long runs that need a GPU, for short periods on one
# make docs         write the tables in docs/ that say what the code declares, the picture of the study, and the notebook
# make cluster-deps install, as root on Debian or Ubuntu, what the tests on a Slurm of their own need

# What tells whether a Python will do. A version manager may offer a name that does not run, so try each.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	"$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1 && \
	echo "$$p" && break; done)
BIN := .venv/bin
# Written last: a set-up that was interrupted is done again.
STAMP := .venv/.installed

# Tests side by side; pytest's summary of all of them comes last. Bytecode of the tests is kept, or every one of
# these processes would compile all of them anew.
PYTEST := env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest --numprocesses

# For tests/cluster: Slurm, its accounting, what makes nodes of namespaces, and what looks at the metrics.
CLUSTER_PACKAGES := slurmd slurmctld slurm-client munge slurmdbd slurm-wlm-mysql-plugin mariadb-server \
	iproute2 procps prometheus chromium

.PHONY: help venv axe quickstart test test-cluster test-full lint format docs check cluster-deps clean verify-results reproduce campaign measures
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

venv: $(STAMP)

# Bytecode is compiled here, once, in parallel: with PYTHONDONTWRITEBYTECODE set, or a read-only
# installation, every start would compile torch and ray anew.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "ddsweep needs Python 3.11, 3.12 or 3.13, and none was found on PATH." \
		"Install one, or name it: make $(or $(MAKECMDGOALS),venv) PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/uv pip install --compile-bytecode -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

# What tests/report/test_report_browser.py looks for barriers with; of the tests alone.
AXE := .npm/node_modules/axe-core/axe.min.js
axe: $(AXE)
$(AXE):
	npm install --silent --no-save --prefix .npm axe-core@4.14

quickstart: $(STAMP)
	$(BIN)/ddsweep run sweeps/quickstart.yaml

test: $(STAMP)
	$(PYTEST) auto -m "not (slow or ray or cluster)"

# Three at a time: what has a Slurm, what shares a Ray, and what starts one of its own. They mostly wait.
test-cluster: $(STAMP)
	$(PYTEST) 3 -m "(ray or cluster) and not slow"

test-full: $(STAMP)
	$(PYTEST) auto

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	$(BIN)/python docs/tables.py
	$(BIN)/python docs/study.py
	$(BIN)/python docs/notebook.py

measures: $(STAMP)
	$(BIN)/python -m ddsweep.core.measure_shipped

# The kept sets of docs/reproduction on fresh networks; ROWS="mnist_random" for some of them.
verify-results: $(STAMP)
	$(BIN)/python bench/verify.py $(ROWS)

# A row of docs/reproduction from nothing: its pool, if it has one, its sweep, and the comparison with what is kept.
# SET="evaluate.networks=32 evaluate.baselines=none" for settings that change no trial; DDSWEEP_RESULTS is for all verbs.
KEPT := docs/reproduction
reproduce: $(STAMP)
	@test -f "$(KEPT)/$(ROW)/sweep.yaml" || { \
		echo "make reproduce ROW=NAME; the rows are: $(notdir $(patsubst %/sweep.yaml,%,$(wildcard $(KEPT)/*/sweep.yaml)))" >&2; \
		exit 1; }
	@test ! -f $(KEPT)/$(ROW)/pool.yaml || $(BIN)/ddsweep pretrain $(KEPT)/$(ROW)/pool.yaml
	$(BIN)/ddsweep run $(KEPT)/$(ROW)/sweep.yaml $(SET)
	$(BIN)/python bench/verify.py $(ROW) --kept $(KEPT) --results $(or $(DDSWEEP_RESULTS),results)/$(ROW)

# Long runs for a GPU that is free for minutes at a time, in their order: bench/README.md. DIR: where they are kept.
# CIFAR-10 is read from its lossless images; CIFAR= for the official files.
CIFAR := dataset=cifar10-exact pool.dataset=cifar10-exact
DIR := campaign
campaign: $(STAMP)
	$(BIN)/python bench/campaign.py plan $(DIR) sweeps/cifar10_fixed.yaml sweeps/cifar10_random.yaml \
		sweeps/attack_cifar10.yaml $(CIFAR)
	$(BIN)/python bench/campaign.py plan $(DIR) sweeps/mnist_random.yaml sweeps/ablation_steps_epochs_ipc.yaml

check: lint test-cluster test

cluster-deps:
	@command -v apt-get >/dev/null && command -v dpkg-query >/dev/null || { echo "cluster-deps needs apt-get, of" \
		"Debian or Ubuntu. Elsewhere, install what these packages are: $(CLUSTER_PACKAGES)" >&2; exit 1; }
	@missing=; for package in $(CLUSTER_PACKAGES); do \
		dpkg-query -W -f='$${db:Status-Status}' "$$package" 2>/dev/null | grep -qx installed || \
			missing="$$missing $$package"; \
	done; \
	test -n "$$missing" || { echo "cluster-deps: everything is there"; exit 0; }; \
	test "$$(id -u)" = 0 || { echo "cluster-deps: root has to install$$missing" >&2; exit 1; }; \
	apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache
