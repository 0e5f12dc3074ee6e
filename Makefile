# A fresh machine needs Python 3.10 or newer and make; everything else is installed into .venv, once.
# It is installed again when pyproject.toml or constraints.txt changes.

PYTHON      ?= python3
VENV        ?= .venv
PIP_ARGS    ?=
DEMO_ARGS   ?= --out demo-output --overwrite
PYTEST_ARGS ?=

BIN        := $(VENV)/bin
# --use-pep517: the pip of Python 3.10 would else run a setup.py without what it needs (seqeval)
INSTALL     = $(BIN)/python -m pip install --disable-pip-version-check --use-pep517 $(PIP_ARGS) -c constraints.txt
# What is in the environment: enough to run, enough to develop.
RUN        := $(VENV)/.installed
DEV        := $(VENV)/.installed-dev

# What `make gpu` can use, by import name.
GPU_USES   := torch triton transformers peft accelerate datasets safetensors yaml numpy tqdm bitsandbytes pytest

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint format gpu clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  Variables: PYTHON=python3.12 (which one), PIP_ARGS=... (for example an extra index that has torch"
	@echo "  without CUDA: README.md), DEMO_ARGS=... and PYTEST_ARGS=... (passed on)."

demo: $(RUN) ## install, then train, evaluate and compare on the built-in corpus; no GPU needed
	$(BIN)/python -m fastalign demo $(DEMO_ARGS)

test: lint $(DEV) ## install, then lint, types and the fast tests
	$(BIN)/python -m pytest tests --durations=10 $(PYTEST_ARGS)

test-slow: $(DEV) ## the tests marked slow: kills, fuzzing, many launches
	@$(BIN)/python -m pytest tests -m "slow and not gpu" --timeout=1200 --durations=10 $(PYTEST_ARGS) || { \
	  status=$$?; \
	  [ $$status -ne 5 ] || echo "make test-slow: no test was selected, so nothing was tested" >&2; \
	  exit $$status; }

lint: $(DEV) ## ruff (lint and format) and pyright, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(DEV) ## let ruff mend and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

gpu: ## on a GPU: tests marked gpu, then the benchmark of a step; uses $(PYTHON), installs nothing
	@$(PYTHON) -c 'import sys; from importlib.util import find_spec as f; \
	m = [p for p in sys.argv[1:] if not f(p)]; \
	m and print("make gpu:", sys.executable, "lacks", *m, "- what needs them will fail, the rest runs", file=sys.stderr)' $(GPU_USES)
	@export PYTHONPATH="$(CURDIR):$(CURDIR)/kernels$${PYTHONPATH:+:$$PYTHONPATH}"; status=0; \
	$(PYTHON) -m pytest tests -m gpu --continue-on-collection-errors --durations=10 $(PYTEST_ARGS) || status=$$?; \
	$(PYTHON) benchmarks/bench_alignment_step.py || status=$$?; \
	exit $$status

clean: ## remove caches, builds and the demo's output, but not .venv
	rm -rf build dist demo-output *.egg-info .pytest_cache .ruff_cache
	find fastalign kernels tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +

# bin/pip is the last thing venv makes, so a half-made environment is made again.
$(BIN)/pip:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: there is no '$(PYTHON)'; install Python 3.10 or newer, or say which: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make: $$($(PYTHON) --version 2>&1) is too old; 3.10 or newer is needed, say which: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "make: $(PYTHON) comes without venv; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(RUN): pyproject.toml constraints.txt | $(BIN)/pip
	$(INSTALL) -e ".[report]"
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/pip
	$(INSTALL) -e ".[dev]"
	@touch $(RUN) $@
