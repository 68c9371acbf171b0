# Every target does its own set-up from a fresh clone; python3 and make are enough.
PYTHON ?= python3
VENV   ?= .venv
MODEL  := .cache/SmolLM2-135M-Instruct
# Of the whole file; the dense model has 269 MB. Below 80 MB the recipe needs smaller levels.
SIZE   ?= 90MB
OUT    ?= demo/smol-$(SIZE)
# Text for calibration, search and test; any plain-text file will do: make demo DATA=my.txt
DATA   ?= .cache/demo.txt
# Another text for the final table; by default windows of DATA that nothing else has seen.
TEST   ?=
JOBS   ?= 2
LOWEST ?= .venv-lowest
LOWEST_TORCH ?= 2.11.0+cpu
LOWEST_TESTS ?= tests
NEWEST ?= .venv-newest
NEWEST_TORCH ?= torch
# Used for torch alone: elsewhere than on Linux, and offline, pip falls back to its usual index.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

PY  := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
# One thread per test process: two processes with two threads each are slower on two cores. A file
# goes to one process, which makes its fixtures once; tests/conftest.py puts the slow ones first.
PARALLEL := -n $(JOBS) --dist loadfile --no-loadscope-reorder
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(PY) -m pytest

# What mypy leaves be in the benchmarks: there it is to find names that are gone.
LOOSE := arg-type assignment index operator return-value union-attr

# Tests start many processes, each of which would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo-model demo test test-fast test-lowest test-newest test-clients lint format clean

help:
	@echo "make demo       compress SmolLM2-135M to a file of $(SIZE) and measure it"
	@echo "make test       all tests, with those on the real model"
	@echo "make test-fast  without the real model, under three minutes"
	@echo "make test-lowest  the same in the lowest versions of all requirements"
	@echo "make test-newest  the same in the newest ones, where deprecated calls of ours are errors"
	@echo "make test-clients lm-eval, TRL, serve and others, each in an environment of its own"
	@echo "make lint       ruff and mypy"
	@echo "make clean      remove what the above made, but not $(VENV) and .cache"

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -c 'import torch' 2>/dev/null || \
	    $(PIP) install -q -c constraints.txt --no-deps --extra-index-url $(TORCH_INDEX) torch
	$(PIP) install -q -c constraints.txt -e '.[dev,gguf]'
	touch $@

demo-model: $(MODEL)/config.json .cache/demo.txt

$(MODEL)/config.json: | venv
	$(PY) tests/fetch_demo.py model $(MODEL)

.cache/demo.txt: tests/fetch_demo.py tests/data/botchan.txt | venv
	$(PY) tests/fetch_demo.py text $@

demo: venv $(MODEL)/config.json $(DATA)
	$(VENV)/bin/hf-evopress run recipes/smollm2-135m-90mb.yaml model=$(MODEL) budget.size=$(SIZE) \
	    data.sources=$(DATA) $(if $(TEST),--test $(TEST)) out=$(OUT)
	$(VENV)/bin/hf-evopress show $(OUT) --plot $(OUT).png > /dev/null
	@echo "checkpoint: $(OUT)  heat map: $(OUT).png"

test: venv demo-model
	$(PYTEST) $(PARALLEL) --durations=25

test-fast: venv
	$(PYTEST) $(PARALLEL) -m 'not model and not slow'

# In the lowest versions that pyproject.toml allows, in an environment of its own.
test-lowest: $(LOWEST)/.installed
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(LOWEST)/bin/python -m pytest $(PARALLEL) \
	    -m 'not model and not slow' $(LOWEST_TESTS)

$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install -q --retries 1 --no-deps \
	    --extra-index-url $(TORCH_INDEX) torch==$(LOWEST_TORCH) || \
	    $(LOWEST)/bin/python -m pip install -q -c constraints.txt --no-deps torch
	$(LOWEST)/bin/python -m pip install -q -c constraints-lowest.txt -e '.[dev,gguf]'
	touch $@

# In the newest versions that there are, so without constraints, in an environment made anew.
# NEWEST_TORCH: where no index has CPU builds of torch, take that of constraints.txt instead.
test-newest:
	rm -rf $(NEWEST)
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install -q --no-deps --extra-index-url $(TORCH_INDEX) $(NEWEST_TORCH)
	$(NEWEST)/bin/python -m pip install -q -e '.[dev,gguf]'
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(NEWEST)/bin/python -m pytest $(PARALLEL) \
	    -m 'not model and not slow' -W 'error::FutureWarning:hf_evopress' \
	    -W 'error::DeprecationWarning:hf_evopress'

test-clients: venv demo-model
	$(PY) tests/clients/run

lint: venv
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	MYPYPATH=tests/benchmarks $(PY) -m mypy --allow-untyped-defs $(LOOSE:%=--disable-error-code=%) tests/benchmarks

format: venv
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf demo build dist .ci-venv .ci-venv-lowest $(NEWEST) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find hf_evopress tests -name __pycache__ -type d -prune -exec rm -rf {} +
