# `make train` trains on real digits; `make test` runs the tests that a change needs.
# Both set up a virtual environment first.

VENV ?= .venv
PYTHON ?= python3
INSTALL = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Two processes. A file stays in one process, so that its fixtures are built once.
PYTEST = $(VENV)/bin/python -m pytest -n 2

.PHONY: train test test-all lint setup setup-dev clean

train: setup
	$(VENV)/bin/cl-ray train --preset quick

test: setup-dev
	$(PYTEST) -m "not slow and not cluster and not browser"

# Adds fake clouds, browsers, Prometheus and the slow variants; see CONTRIBUTING.md for what these need.
test-all: setup-dev
	$(PYTEST)

lint: setup-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	MYPYPATH=tests $(VENV)/bin/mypy --cache-dir .mypy_cache/tests tests
	MYPYPATH=benchmarks:tests $(VENV)/bin/mypy --cache-dir .mypy_cache/benchmarks benchmarks

setup: $(VENV)/.ready

setup-dev: $(VENV)/.ready-dev

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable '.[tuning,export,s3]'
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(INSTALL) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
