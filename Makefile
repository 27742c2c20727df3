# make demo    train the built-in digits workload four ways and draw the comparison (out/digits/report.html)
# make test    run the tests
# make check   lint, formatting, types, architecture
# Each sets itself up in .venv on a machine with Python and make; a second run skips what is done.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: demo test check clean

demo: .venv/cli
	$(BIN)/gradfold compare digits --out out/digits
	@echo "Open out/digits/report.html in a browser."

test: .venv/dev
	$(BIN)/python -m pytest --numprocesses auto

check: .venv/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py

.venv/python:
	$(PYTHON) -m venv .venv
	@touch $@

.venv/cli: .venv/python pyproject.toml constraints.txt
	$(INSTALL) '.[cli]'
	@touch $@

.venv/dev: .venv/python pyproject.toml constraints.txt
	$(INSTALL) '.[dev]'
	@touch $@ .venv/cli

clean:
	rm -rf .venv out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
