# Every target works on a fresh clone: it first builds .venv from requirements/, and rebuilds it only when those change.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
REQUIREMENTS := requirements/cpu.txt requirements/check.txt
# The stamp's name carries a hash of what was installed, so that checking out another version reinstalls.
STAMP := $(VENV)/.lsmc-$(shell cat $(REQUIREMENTS) pyproject.toml 2>/dev/null | cksum | cut -d' ' -f1)
ARGS ?=

# Threads that wait for work spin otherwise, which takes the cores from those that have some when others use them too.
demo test: export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help venv demo test check bench golden clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 18

venv: $(STAMP)  ## create or update .venv

$(STAMP):
	@python="$$(bash requirements/find-python.sh)"; \
	if ! [ -x $(BIN)/python ] || ! $(BIN)/python -c 'import pip' 2>/dev/null; then \
	    echo "creating $(VENV) with $$python"; \
	    "$$python" -m venv --clear $(VENV) || { echo "error: $$python cannot create a virtual environment; on Debian: apt-get install python3-venv" >&2; exit 1; }; \
	fi
	@echo "installing pinned requirements (CPU)"
	@$(PIP) install --quiet --retries 0 --no-deps $(addprefix -r ,$(REQUIREMENTS))
	@$(PIP) install --quiet --retries 0 --no-deps --no-build-isolation --editable .
	@rm -f $(VENV)/.lsmc-*; touch $@

demo: $(STAMP)  ## compile a method, train a small hybrid on real text, write a report (about 5 minutes)
	@$(BIN)/python -m lsmc.runtime.demo $(ARGS)

test: $(STAMP)  ## run the tests, a process per core (ARGS="-k name" selects, ARGS=--slow adds the slow ones, ARGS=-n0 runs one process)
	@$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

check: $(STAMP)  ## ruff, mypy (strict on lsmc/), import order
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

bench: $(STAMP)  ## time what this machine can run (ARGS="--out file.json")
	@$(BIN)/python -m lsmc.runtime.bench $(ARGS)

golden: $(STAMP)  ## accept the present IR and kernel text as the goldens; then read the diff
	@$(BIN)/python -m pytest tests/golden --accept-goldens $(ARGS)
	@git --no-pager diff --stat -- tests/golden

clean:  ## remove .venv, caches and build leftovers (not runs/)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
