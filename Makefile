# `make run` and `make test` do everything, set-up included. pip's own environment variables pass through.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

run: $(INSTALLED)  ## align, evaluate and register the embedded quickstart
	$(VENV)/bin/sacpo run quickstart

up: $(INSTALLED)  ## MLflow, Prefect, a worker and the deployments, until Ctrl-C
	$(VENV)/bin/sacpo up

test: $(INSTALLED)  ## the whole test suite
	$(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)  ## ruff and mypy, as in pre-commit
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/'

.PHONY: run up test lint help
