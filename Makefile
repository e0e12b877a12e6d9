# `make run` and `make test` do everything, set-up included. pip's own environment variables pass through.
# `make TORCH=cpu run` takes torch from PyTorch's own index of CPU builds (not run here).
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
ifeq ($(TORCH),cpu)
BUILD := the CPU build from PyTorch's index; .venv takes about 2.6 GB
FROM := PIP_EXTRA_INDEX_URL="$$PIP_EXTRA_INDEX_URL https://download.pytorch.org/whl/cpu"
else
BUILD := the build that your index offers; .venv takes about 2.6 GB with a CPU build, 6.3 GB with CUDA (make TORCH=cpu takes the CPU build)
FROM :=
endif

run: $(INSTALLED)  ## align, evaluate and register the embedded quickstart
	$(VENV)/bin/sacpo run quickstart

up: $(INSTALLED)  ## MLflow, Prefect, a worker and the deployments, until Ctrl-C
	$(VENV)/bin/sacpo up

test: $(INSTALLED)  ## the test suite, without what takes minutes more (pytest -m slow)
	$(VENV)/bin/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)  ## ruff and mypy, as in pre-commit
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "Installing torch: $(BUILD)."
	$(FROM) $(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@echo "Installed torch $$($(VENV)/bin/pip show torch | sed -n 's/^Version: //p'), $$(du -sh $(VENV) | cut -f1) in $(VENV)."
	touch $@

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/'

.PHONY: run up test lint help
