# make demo      train the built-in digits workload four ways and draw the comparison (out/digits/report.html)
# make test      the fast tests, under two minutes on two cores
# make test-all  the fast tests, then the slow ones: matrices, real processes, examples, subprocesses, libraries
# make check     lint, formatting, types
# Each sets itself up in .venv on a machine with Python and make; a second run skips what is done.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

# loadgroup: tests that share a group of processes run in one worker, which starts it once.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist loadgroup

.PHONY: demo test test-all check clean

demo: .venv/cli
	$(BIN)/gradfold compare digits --out out/digits
	@echo "Open out/digits/report.html in a browser."

test: .venv/dev
	$(PYTEST) -m "not slow"

test-all: test .venv/libraries
	$(PYTEST) -m slow -rs

check: .venv/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

.venv/python:
	$(PYTHON) -m venv .venv
	@touch $@

.venv/cli: .venv/python pyproject.toml constraints.txt
	$(INSTALL) '.[cli]'
	@touch $@

.venv/dev: .venv/python pyproject.toml constraints.txt
	$(INSTALL) '.[dev]'
	@touch $@ .venv/cli

# Those of the extra, without dependencies: timm asks for torchvision, which brings another torch. What else they need
# the dev extra has.
.venv/libraries: .venv/dev
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps \
		diffusers peft timm torchmetrics
	@touch $@

clean:
	rm -rf .venv out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
