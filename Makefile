# Two commands are the whole set-up: `make demo` and `make test`. Both install what they need into .venv.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# uv from the PATH, or from PyPI into a small environment of its own.
UV := $(shell command -v uv 2>/dev/null || echo .uv/bin/uv)
RUN := $(UV) run --no-sync
export UV_PYTHON_DOWNLOADS := never
export TOKENIZERS_PARALLELISM := false

.PHONY: help install demo test evidence check format bench test-gpu clean

help: ## Show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | column -ts $$'\t'

.uv/bin/uv:
	python3 -m venv .uv
	.uv/bin/pip install --quiet uv

.venv/.installed: $(if $(findstring .uv,$(UV)),.uv/bin/uv) pyproject.toml uv.lock sdk/pyproject.toml kernels/pyproject.toml
	$(UV) sync --frozen --all-packages
	@touch $@

install: .venv/.installed ## Install everything into .venv

demo: install ## Start the server on the embedded model, ask it two questions, show who drafted what
	$(RUN) whiflash demo

test: install ## All tests with seeded samples (at most 20 minutes on 2 cores)
	$(RUN) pytest

evidence: install ## The full matrices; resumable; results go to docs/evidence/
	$(RUN) pytest --evidence -m evidence

check: install ## Formatting, lint, types: what CI and pre-commit check
	$(RUN) ruff format --check .
	$(RUN) ruff check .
	$(RUN) mypy

format: install ## Format and fix what can be fixed
	$(RUN) ruff format .
	$(RUN) ruff check --fix .

bench: install ## First answer on speed, in under five minutes
	$(RUN) whiflash bench --quick

test-gpu: ## Kernel tests on this machine's GPU; uses the active Python, installs nothing
	python3 -m pytest kernels/tests -m "not aot"

clean: ## Remove environments and caches
	rm -rf .venv .uv .mypy_cache .ruff_cache .pytest_cache .hypothesis
