# Every target makes what it needs: a virtual environment of its own, then the packages, then the work.

VENV   ?= .venv
PYTHON ?=
EXTRAS ?= dev
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

DEMO   = generate "The capital of France is" "Once upon a time" "Water boils at" "def fibonacci(n):" \
         --no-chat --max-new-tokens 48 --show-pages
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder
BENCH_ARGS  ?=
CASES       ?=
GPU_PYTHON  ?=

.DEFAULT_GOAL := help
.PHONY: help demo test check bench gpu assemble docs notebooks mutants clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(STAMP)  ## Continue four prompts in one batch and show who owns which page
	$(BIN)/paxattn $(DEMO)

test: $(STAMP)  ## Run the test suite
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(STAMP)  ## Lint, formatting, types, direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -q tests/test_architecture.py

bench: $(STAMP)  ## Compare with Hugging Face transformers on this CPU (needs room for PyTorch, about 1 GB)
	$(BIN)/python benchmarks/cpu_decode.py $(BENCH_ARGS)

assemble: $(VENV)/.installed-assembler  ## Compile the kernels for an H100 without one: registers, spills
	PYTHONPATH=$(VENV)/cuda $(BIN)/python -m pallas_kernels.assemble $(CASES)

docs: $(STAMP)  ## Build the documentation site into docs/_build/html; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -q -c docs . docs/_build/html

notebooks: $(VENV)/.installed-notebooks  ## Run every notebook in a kernel and keep what it shows
	$(BIN)/jupyter nbconvert --log-level=WARN --to notebook --execute --inplace notebooks/*.ipynb

mutants: $(STAMP)  ## Test the tests: break the code on purpose, see that a test notices
	$(BIN)/python -m tests.mutants

# On a machine whose Python already has JAX for its GPU: make gpu GPU_PYTHON=python3
GPU_RUN = $(or $(GPU_PYTHON),$(BIN)/python)
gpu: $(if $(GPU_PYTHON),,$(VENV)/.installed-cuda)  ## Run the tests and the benchmarks on an NVIDIA GPU
	@$(GPU_RUN) -c 'import jax; raise SystemExit(0 if jax.default_backend() == "gpu" else "JAX sees no GPU here: " + str(jax.devices()))'
	XLA_PYTHON_CLIENT_PREALLOCATE=false $(GPU_RUN) -m pytest
	set -e; for script in $(wildcard benchmarks/gpu_*.py); do $(GPU_RUN) $$script --save $(BENCH_ARGS); done

clean:  ## Remove the environment and every cache
	if [ -e $(VENV)/pyvenv.cfg ]; then rm -rf $(VENV); fi
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis docs/_build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A candidate counts only if it runs: a version manager leaves commands on the PATH that exist and fail.
# A Python asked for by name (PYTHON=...) is used or refused, never replaced.
FITS = import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))

$(STAMP): pyproject.toml
	@set -e; \
	if ! $(BIN)/python -c '$(FITS)' 2>/dev/null; then \
	  found=; \
	  if [ -n "$(PYTHON)" ]; then set -- "$(PYTHON)"; \
	  else set -- python3.12 python3.13 python3.14 python3 python \
	    "$$(uv python find '>=3.12' 2>/dev/null || :)" "$$HOME"/.pyenv/versions/*/bin/python3; fi; \
	  for candidate; do \
	    if [ -n "$$candidate" ] && "$$candidate" -c '$(FITS)' >/dev/null 2>&1; then found=$$candidate; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "paxattn needs Python 3.12 or newer, with its venv module; none of these runs: $$*" >&2; \
	    echo "Install one (https://www.python.org/downloads/) or name it: make PYTHON=/path/to/python3.12" >&2; \
	    exit 1; \
	  fi; \
	  echo "making $(VENV) from $$("$$found" --version) ($$found)"; \
	  if [ -e $(VENV)/pyvenv.cfg ]; then "$$found" -m venv --clear $(VENV); else "$$found" -m venv $(VENV); fi; \
	fi; \
	echo "installing .[$(EXTRAS)] into $(VENV)"; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'; \
	touch $@

$(VENV)/.installed-cuda: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS),cuda13]'
	@touch $@

# Beside the packages, not among them: with the plugin installed, each start of JAX looks for a GPU and says there is none.
$(VENV)/.installed-assembler: $(STAMP)
	version=$$($(BIN)/python -c 'import jaxlib; print(jaxlib.__version__)') && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/cuda \
	  jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version
	@touch $@

$(VENV)/.installed-notebooks: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS),notebooks]'
	@touch $@
