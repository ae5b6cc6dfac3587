# make demo   the main job on synthetic data, minutes on two cores
# make test   the tests that guard every change
# make chaos  kills, hangs, full disks: what must be there afterwards
# make lint   formatter, linter, types
# TORCH_INDEX=URL  another index for torch, e.g. https://download.pytorch.org/whl/cpu for a small CPU build

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH_INDEX ?=
VENV := .venv
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := test

export OMP_NUM_THREADS ?= 1

.PHONY: .venv demo test test-slow chaos lint format clean
.venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
	    --constraint constraints.txt --editable '.[cpu,io,remote,dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(VENV)/bin/distseg demo

test: $(STAMP)
	$(VENV)/bin/python -m pytest

test-slow: $(STAMP)
	$(VENV)/bin/python -m pytest -m slow

chaos: $(STAMP)
	$(VENV)/bin/python -m pytest -m chaos

lint: $(STAMP)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

format: $(STAMP)
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:
	rm -rf dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
