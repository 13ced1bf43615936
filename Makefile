# `make train` sets up and trains on real digits; `make test` sets up and runs the tests.

VENV ?= .venv
PYTHON ?= python3
READY := $(VENV)/.ready

.PHONY: train test lint setup clean

train: setup
	$(VENV)/bin/cl-ray train --preset quick

# Two files at once: half of the time a test waits for processes to start or to be missed.
test: setup
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy cl_ray tuning

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV)
