# A fresh machine needs Python 3.10 or newer and make; everything else is installed into .venv, once.
# It is installed again when pyproject.toml or constraints.txt changes.

PYTHON      ?= python3
VENV        ?= .venv
PIP_ARGS    ?=
DEMO_ARGS   ?= --out demo-output --overwrite
PYTEST_ARGS ?=
COMPILE_ARGS ?=

BIN        := $(VENV)/bin
# --use-pep517: the pip of Python 3.10 would else run a setup.py without what it needs (seqeval)
INSTALL     = $(BIN)/python -m pip install --disable-pip-version-check --use-pep517 $(PIP_ARGS) -c constraints.txt
# What is in the environment: enough to run, enough to develop.
RUN        := $(VENV)/.installed
DEV        := $(VENV)/.installed-dev

# Every version of Triton that the kernels must compile with; `newest` is whatever the index has today.
TRITONS    := 3.6.0 3.7.1 newest

# Seconds that `make gpu` plans for: a benchmark begins no case later than its share of what is left.
GPU_SECONDS ?= 500
# What `make gpu` can use, by import name.
GPU_USES   := torch triton transformers peft accelerate datasets safetensors yaml numpy tqdm bitsandbytes pytest

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint format docs compile compile-all gpu clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  Variables: PYTHON=python3.12 (which one), PIP_ARGS=... (for example an extra index that has torch"
	@echo "  without CUDA: README.md), DEMO_ARGS=..., PYTEST_ARGS=... and COMPILE_ARGS=... (passed on)."

demo: $(RUN) ## install, then train, evaluate and compare on the built-in corpus; no GPU needed
	$(BIN)/python -m fastalign demo $(DEMO_ARGS)

test: lint $(DEV) ## install, then lint, types and the fast tests
	$(BIN)/python -m pytest tests -n 2 --dist loadfile --durations=10 $(PYTEST_ARGS)

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

docs: $(RUN) ## write docs/configuration.md and examples/all_keys.yaml anew from fastalign/config/keys.py
	$(BIN)/python -c 'from pathlib import Path; from fastalign.config.reference import write; write(Path("."))'

compile: $(DEV) ## every kernel for every GPU: registers, shared memory, spills, matrix instructions; no GPU needed
	env -u TRITON_INTERPRET $(BIN)/python -m fastalign_kernels.compile $(COMPILE_ARGS)

compile-all: $(addprefix build/triton-,$(TRITONS)) ## the same under Triton 3.6, 3.7 and the newest there is
	@status=0; for version in $(TRITONS); do \
	  env -u TRITON_INTERPRET PYTHONPATH="build/triton-$$version$${PYTHONPATH:+:$$PYTHONPATH}" \
	    $(BIN)/python -m fastalign_kernels.compile $(COMPILE_ARGS) >build/compile-$$version.txt || status=1; \
	  grep -e WRONG -e '^Triton' build/compile-$$version.txt | tail -n 20; \
	done; echo "make compile-all: the tables are in build/compile-*.txt"; exit $$status

# Only Triton, in a folder of its own: torch stays the environment's. Not `newest` if it is there: make clean fetches
# it again.
build/triton-%: | $(DEV)
	@rm -rf $@.part
	$(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) --no-deps --target $@.part \
	  triton$(if $(filter newest,$*),,==$*)
	@mv $@.part $@

gpu: ## on a GPU: tests marked gpu, then every benchmark and the plots; uses $(PYTHON), installs nothing
	@$(PYTHON) -c 'import sys; from importlib.util import find_spec as f; \
	m = [p for p in sys.argv[1:] if not f(p)]; \
	m and print("make gpu:", sys.executable, "lacks", *m, "- what needs them will fail, the rest runs", file=sys.stderr)' $(GPU_USES)
	@export TRITON_INTERPRET=0 PYTHONPATH="$(CURDIR):$(CURDIR)/kernels$${PYTHONPATH:+:$$PYTHONPATH}"; status=0; begun=$$(date +%s); \
	bench() { \
	  seconds=$$((($(GPU_SECONDS) - $$(date +%s) + begun) * $$1 / 100)); shift; echo; echo "== bench_$$*"; name=$$1; shift; \
	  [ $$seconds -ge 20 ] || seconds=20; \
	  $(PYTHON) benchmarks/bench_$$name.py --seconds $$seconds "$$@" || status=$$?; }; \
	$(PYTHON) -m pytest tests -m gpu --continue-on-collection-errors --durations=10 $(PYTEST_ARGS) || status=$$?; \
	bench 25 masked_mean_pool; \
	bench 45 info_nce; \
	bench 50 info_nce --regimes; \
	bench 70 pooled_info_nce; \
	bench 25 cross_entropy; \
	for name in alignment_step cached_negatives memory; do \
	  echo; echo "== bench_$$name"; $(PYTHON) benchmarks/bench_$$name.py || status=$$?; \
	done; \
	$(PYTHON) benchmarks/plots.py || status=$$?; \
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
