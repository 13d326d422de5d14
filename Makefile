# Everything starts from a machine that has Python (3.10 to 3.12) and a C compiler, and nothing else.
#
#   PYTHON   interpreter that makes the environment        make train PYTHON=python3.11
#   VENV     folder of the environment                     make train VENV=/tmp/venv
#   CONFIG   what `make train` trains                      make train CONFIG=tasks/classification/configs/...
#   JOBS     processes at a time, for tests and smoke    make test JOBS=2

PYTHON ?= python3
VENV   ?= .venv
CONFIG ?= tasks/classification/configs/digits_resnet32_k16_glcan.yaml
SHARED ?= ../shared

BIN    := $(VENV)/bin
RUN    := $(BIN)/torchrun --standalone --nproc-per-node 1
# Processes at a time, of one thread each. A file of tests goes to one process; the longest go first.
JOBS   ?= $(shell $(PYTHON) -c "import os; print(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count())")
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
# One thread a core that is ours: OpenMP threads on shared cores wait for each other.
export OMP_NUM_THREADS ?= $(JOBS)
# Every process that a test starts would otherwise compile all modules again, where the caller forbids bytecode.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help install install-all train test fuzz test-slow test-all missing smoke lint clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1|/' | column -t -s '|'

install: $(VENV)/.core  ## make the environment with what classification needs

install-all: $(VENV)/.all  ## the same with every task's frameworks and the developers' tools

train: install  ## train the default config, then show what it cost in memory and time
	$(RUN) tools/train.py --config $(CONFIG) --output.name last
	$(BIN)/python tools/memory.py measure --config $(CONFIG) --threads $(OMP_NUM_THREADS) --steps 5 --html runs/memory.html

test: install-all missing  ## the tests, but for the fuzz and those that are slow or need a GPU
	$(PYTEST) -m "not slow and not cuda" --ignore tests/fuzz

fuzz: install-all  ## generated mistakes in configs, files and networks: 30 of each kind, or FUZZ_EXAMPLES
	$(PYTEST) -m "not slow" tests/fuzz

test-slow: install-all missing  ## the slow tests
	$(PYTEST) -m "slow and not cuda"

test-all: install-all missing  ## all tests; those that need a GPU are skipped where there is none
	$(PYTEST)

missing:
	@for part in data weights wheels; do \
	  test -d $(SHARED)/$$part || echo "left out: tests that need $(SHARED)/$$part, which is not here"; done

# Each config's output is shown when it has ended, whole.
smoke: install-all  ## a few steps of every task's smoke.yaml, on a GPU where there is one
	@printf '%s\n' tasks/*/*/configs/smoke.yaml tasks/*/configs/smoke.yaml | OMP_NUM_THREADS=1 xargs -P $(JOBS) -n 1 sh -c '\
	  said=$$($(BIN)/python -m tests.smoke --config $$0 2>&1); code=$$?; \
	  printf "== %s\n%s\n" "$$0" "$$said"; exit $$code'

lint: install-all  ## ruff, mypy, and that imports only point downwards
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@test ! -x $(BIN)/lint-imports || $(BIN)/lint-imports  # it needs Python 3.11

clean:  ## remove the environment and caches; runs/ and data/ stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info

$(VENV)/.core: setup.cfg constraints.txt tools/install
	tools/install $(PYTHON) $(VENV) core
	@touch $@

$(VENV)/.all: $(VENV)/.core
	SHARED=$(SHARED) tools/install $(PYTHON) $(VENV) all
	@touch $@
