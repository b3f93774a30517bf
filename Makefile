# make demo   the whole path on real text, on a laptop without a GPU, then a report to look at
# make test   all tests that need no GPU, as CI runs them
# make docs   the pages of docs/ as a site, in site/
# make test-slurm  jobs of slurm/ in a real SLURM that it starts on this machine (apt-get install slurm-wlm munge)
# make check  lint, types and the fast tests, for the working day
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed$(if $(GPU),-gpu)

.PHONY: install demo demo-smollm2 test test-slurm docs check lint lint-shell types format

install: $(INSTALLED)

# make install GPU=1 [TORCH_INDEX=URL]: torch from the index that fits the driver (docs/quickstart.md), then the kernels,
# which need torch to be built. torch comes first and by itself: the lock has the same pin.
$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11; use make PYTHON=python3.11"; exit 2; }
	@$(PYTHON) -c 'import ensurepip' || { echo "error: $(PYTHON) has no venv; apt-get install python3-venv"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet -r requirements.lock
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	$(if $(GPU),$(BIN)/pip install --quiet ninja packaging wheel)
	$(if $(GPU),$(BIN)/pip install --quiet --no-build-isolation liger-kernel==0.8.5)
	$(if $(GPU),$(BIN)/pip install --quiet --no-build-isolation flash-attn==2.8.3.post2 || echo "warning: flash-attn was not built; torch's own kernel is used")
	@touch $(VENV)/.installed $(INSTALLED)

demo: $(INSTALLED)
	@PATH="$(CURDIR)/$(BIN):$$PATH" recipes/demo/run.sh

demo-smollm2: $(INSTALLED)
	@PATH="$(CURDIR)/$(BIN):$$PATH" recipes/smollm2_135m_cpu/run.sh

# Two processes, one thread each: small models gain nothing from more threads.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# A venv of its own: MkDocs reads the sources and imports none of them.
.venv-docs/.installed: requirements-docs.lock
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet -r requirements-docs.lock
	@touch $@

docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

test-slurm: $(INSTALLED)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m slurm tests/slurm

check: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not slurm"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

lint-shell:
	@git ls-files '*.sh' .ci/run | while read -r script; do bash -n "$$script" || exit 1; done
	git ls-files '*.sh' .ci/run | xargs shellcheck

types: $(INSTALLED)
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
