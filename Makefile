# Two commands are the whole set-up: `make demo` and `make test`. Both install what they need into .venv.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# uv from the PATH, or from PyPI into a small environment of its own.
UV := $(shell command -v uv 2>/dev/null || echo .uv/bin/uv)
RUN := $(UV) run --no-sync
PYTHON := $(shell command -v python3.11 || command -v python3)
export UV_PYTHON_DOWNLOADS := never
export TOKENIZERS_PARALLELISM := false
# Where it is set every process compiles what it imports: SGLang takes 24 s of a core then, and 14 s compiled.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install demo test fast evidence golden golden-record mutation upstream-kits canary audit check format docs prometheus site wheels dist sbom bare bench host gpu gpu-kit gpu-page clean

help: ## Show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | column -ts $$'\t'

.uv/bin/uv:
	$(PYTHON) -m venv .uv
	.uv/bin/pip install --quiet uv

# With CPU_ONLY=1: without packages that a server on a CPU never imports.
LEAVE_OUT := $(addprefix --no-install-package ,$(shell cat docs/cpu-leaves-out.txt))
DISTRIBUTIONS := $(if $(findstring .uv,$(UV)),.uv/bin/uv) pyproject.toml uv.lock $(addsuffix /pyproject.toml,cpu kernels lab sdk train)

.venv/.installed: $(DISTRIBUTIONS)
	$(UV) sync --frozen --all-packages $(if $(CPU_ONLY),$(LEAVE_OUT))
	@touch $@

# Of SGLang's dependencies those of 480 MB that the demo never imports, and what training needs.
DEMO_LEAVES_OUT := $(addprefix --no-install-package ,pyarrow llvmlite numba pandas modelscope modelscope-hub datasets grpcio humming-kernels cuda-tile airportsdata accelerate)

# Enough for the demo: no development tools, and without a card nothing that only a card needs; all of it stays if it is there.
.venv/.for-demo: $(DISTRIBUTIONS)
	@began=$$SECONDS; $(UV) sync --frozen --all-packages $(if $(wildcard .venv/.installed),,--no-default-groups $(DEMO_LEAVES_OUT) $(if $(shell command -v nvidia-smi),,$(LEAVE_OUT))); \
	echo "installed: $$(du -sh .venv | cut -f1) in $$((SECONDS - began)) seconds"
	@touch $@

install: .venv/.installed ## Install everything into .venv

demo: .venv/.for-demo ## Start the server on the embedded model, ask it two questions, show who drafted what
	$(RUN) whiflash demo

# Two processes, each of which runs whole files: what a file starts (a server, an engine) it starts once.
test: install ## All tests with seeded samples (some 20 minutes on 2 cores), or those of PART (cpu, kernels, lab, sdk, train); PAGE=results/suite.md keeps each file's seconds
	$(RUN) pytest -n 2 --dist loadfile --no-loadscope-reorder $(addprefix --seconds=,$(PAGE)) $(addsuffix /tests,$(PART))

fast: install ## Tests that need neither SGLang nor a server
	$(RUN) pytest -n 2 --dist loadfile --fast -q

evidence: install ## The full matrices, or those of FILES; resumable; results go to results/evidence/
	$(RUN) pytest --evidence -m evidence $(FILES)

golden: install ## Answers, p-values and names, bit for bit with results/golden.json (5 minutes)
	$(RUN) python tests/golden.py

golden-record: install ## Write results/golden.json, after a change that is meant
	$(RUN) python tests/golden.py --record

mutation: install ## Plant faults and ask the tests whether they notice; goes on where it was ended
	$(UV) sync --frozen --all-packages --group mutation
	$(RUN) python tests/mutation/run.py --most 20 --out mutation.jsonl

canary: install ## What another SGLang changes for us (VERSION=0.5.24): names, sources, flags; the short suite with it, or all tests (SUITE=whole)
	$(RUN) python scripts/upstream.py $(VERSION) --import --test $(or $(SUITE),short)

upstream-kits: install ## SGLang's own server tests against a plain server and ours; outcomes in results/upstream-kits.md
	$(RUN) python scripts/upstream_kits.py --json results/upstream-kits.json --markdown results/upstream-kits.md

audit: install ## Known weaknesses of what uv.lock pins; asks an advisory database over the network
	$(UV) export --frozen --all-packages --no-emit-workspace --no-hashes --quiet --output-file .audit.txt
	$(UV) tool run pip-audit --no-deps --disable-pip --requirement .audit.txt

check: install ## Formatting, lint, layers, types, words, budgets: what CI and pre-commit check
	$(RUN) ruff format --check .
	$(RUN) ruff check .
	$(RUN) lint-imports
	$(RUN) python scripts/words.py
	$(RUN) python scripts/budgets.py
	$(RUN) mypy

format: install ## Format and fix what can be fixed
	$(RUN) ruff format .
	$(RUN) ruff check --fix .

docs: install ## Write the tables of the documentation that come from code
	$(RUN) python scripts/reference.py

# Debian's package, unpacked: needs apt's lists, no root.
.tools/usr/bin/promtool:
	mkdir -p .tools
	cd .tools && apt-get download prometheus && dpkg -x prometheus_*.deb . && rm prometheus_*.deb

prometheus: ## Put Prometheus into .tools, for the tests of dashboard and alerts; without it these are skipped
	@command -v promtool > /dev/null || $(MAKE) .tools/usr/bin/promtool

site: install ## Build the documentation into site/, strictly
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict

wheels: $(filter .uv/%,$(DISTRIBUTIONS)) ## Wheels of the six packages in dist/, for `pip install dist/*.whl`; installs nothing
	rm -rf dist
	$(UV) build --all-packages --wheel -o dist

dist: install ## Wheels and source distributions of the six packages, checked, in dist/
	rm -rf dist
	$(UV) build --all-packages -o dist
	$(RUN) twine check --strict dist/*.whl dist/*.tar.gz

sbom: install ## What the wheels install, by name, version and hash, as CycloneDX, in whiflash.cdx.json
	$(UV) export --quiet --frozen --all-packages --no-default-groups --format cyclonedx1.5 -o whiflash.cdx.json

bare: dist ## Install from dist/ into a bare environment, .bare, as a user does, and check what came and that it runs
	rm -rf .bare && $(UV) venv --python $(PYTHON) .bare
	@began=$$SECONDS; $(UV) pip install --python .bare --prerelease allow dist/*.whl; \
	echo "installed: $$(du -sh .bare | cut -f1) in $$((SECONDS - began)) seconds"
	@for tool in ruff mypy mkdocs twine pytest hadolint; do test ! -e .bare/bin/$$tool || { echo "$$tool came with the wheels"; exit 1; }; done
	cd / && $(CURDIR)/.bare/bin/whiflash check && $(CURDIR)/.bare/bin/whiflash serve --print-command --model-path OWNER/MODEL

host: install ## Shortest forward at which a card never waits for its host, into results/host.md (5 minutes)
	$(RUN) python tests/host_pace.py

bench: install ## First answer on speed, in under five minutes
	$(RUN) whiflash bench --per-category 1 --repetitions 1 --max-tokens 64

gpu: ## What only a GPU can show, in parts of ten minutes; goes on where it was ended; the active Python, installs nothing
	python3 tests/gpu/run.py

gpu-kit: install ## All of `make gpu` in one archive, dist/gpu-kit.tar.xz, for a GPU machine without a network
	mkdir -p dist
	$(RUN) python tests/gpu/kit.py dist/gpu-kit.tar.xz

gpu-page: ## Keep what came back from a card, RECORDS=records.tgz, and its page, in results/gpu/
	python3 tests/gpu/run.py --keep $(RECORDS)
	$(MAKE) docs

clean: ## Remove environments, caches and the built site
	rm -rf .venv .uv .bare .tools site .mypy_cache .ruff_cache .pytest_cache .hypothesis
