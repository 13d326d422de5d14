# Everything starts from a machine that has Python (3.10 to 3.12) and a C compiler, and nothing else.
#
#   PYTHON   interpreter that makes the environment        make train PYTHON=python3.11
#   VENV     folder of the environment                     make train VENV=/tmp/venv
#   CONFIG   what `make train` trains                      make train CONFIG=tasks/classification/configs/...

PYTHON ?= python3
VENV   ?= .venv
CONFIG ?= tasks/classification/configs/digits_resnet32_k16_glcan.yaml
SHARED ?= ../shared

BIN    := $(VENV)/bin
RUN    := $(BIN)/torchrun --standalone --nproc-per-node 1
# One thread a core that is ours: OpenMP threads on shared cores wait for each other.
export OMP_NUM_THREADS ?= $(shell $(PYTHON) -c "import os; print(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count())")

.DEFAULT_GOAL := help
.PHONY: help install install-all train test smoke lint clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1|/' | column -t -s '|'

install: $(VENV)/.core  ## make the environment with what classification needs

install-all: $(VENV)/.all  ## the same with every task's frameworks and the developers' tools

train: install  ## train the default config, then show what it cost in memory and time
	$(RUN) tools/train.py --config $(CONFIG) --output.name last
	$(BIN)/python tools/memory.py measure --config $(CONFIG) --threads $(OMP_NUM_THREADS) --steps 5 --html runs/memory.html

test: install-all  ## the whole test suite
	@for part in data weights wheels; do \
	  test -d $(SHARED)/$$part || echo "left out: tests that need $(SHARED)/$$part, which is not here"; done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

smoke: install-all  ## a few steps of every task's smoke.yaml, on a GPU where there is one
	@for config in tasks/*/configs/smoke.yaml tasks/*/*/configs/smoke.yaml; do \
	  test -f $$config || continue; \
	  echo "== $$config"; $(BIN)/python -m tests.smoke --config $$config || exit 1; done

lint: install-all  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove the environment and caches; runs/ and data/ stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info

$(VENV)/.core: setup.cfg constraints.txt tools/install
	tools/install $(PYTHON) $(VENV) core
	@touch $@

$(VENV)/.all: $(VENV)/.core
	SHARED=$(SHARED) tools/install $(PYTHON) $(VENV) all
	@touch $@
