# make demo   the whole path on real text, on a laptop without a GPU, then a report to look at
# make test   all tests that need no GPU, as CI runs them
# make wheels  what a GPU machine without a network needs to be checked, in .whl/
# make docs   the pages of docs/ as a site, in site/
# make test-slurm  jobs of slurm/ in a real SLURM that it starts on this machine (apt-get install slurm-wlm munge)
# make check  lint, types and the fast tests, for the working day
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Of a GPU: fa4 (Hopper, Blackwell; CUDA 13), fa3 (Hopper; from TORCH_INDEX), fa2 (built here, an hour) or torch.
ATTENTION ?= $(if $(TORCH_INDEX),fa3,fa4)
KERNEL_fa4 = --editable '.[fa4]'
KERNEL_fa3 = --no-deps --index-url $(or $(TORCH_INDEX),$(error ATTENTION=fa3 is in the index of TORCH_INDEX=URL)) flash-attn-3
KERNEL_fa2 = --editable '.[fa2]'
INSTALLED := $(VENV)/.installed$(if $(GPU),-gpu-$(ATTENTION))

.PHONY: install demo demo-smollm2 wheels test test-slurm docs check lint lint-shell types format

install: $(INSTALLED)

# make install GPU=1 [TORCH_INDEX=URL] [ATTENTION=KERNEL]: torch from the index that fits the driver (docs/quickstart.md),
# then the kernels, which need torch to be built. torch comes first and by itself: the lock leaves it out. flash-attn
# and flash-attn-4 write over each other's files.
$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11; use make PYTHON=python3.11"; exit 2; }
	@$(PYTHON) -c 'import ensurepip' || { echo "error: $(PYTHON) has no venv; apt-get install python3-venv"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet -r requirements.lock
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	$(if $(GPU),$(BIN)/pip install --quiet ninja packaging wheel)
	$(if $(GPU),$(BIN)/pip uninstall --quiet --yes flash-attn flash-attn-4)
	$(if $(GPU),DS_BUILD_OPS=0 $(BIN)/pip install --quiet --no-build-isolation --editable '.[gpu]')
	$(if $(GPU),$(if $(KERNEL_$(ATTENTION)),DS_BUILD_OPS=0 $(BIN)/pip install --quiet --no-build-isolation $(KERNEL_$(ATTENTION)) || echo "warning: $(ATTENTION) was not installed; torch's own kernel is used"))
	@touch $(VENV)/.installed $(INSTALLED)

# make wheels [WHEELS_PYTHON=3.12] [MORE_WHEELS="PACKAGE==VERSION ..."]: into .whl/, what scripts/gpu_check.py needs on a GPU
# machine without a network that has a torch of its own (docs/performance.md). Two have no wheels and are built here.
WHEELS_PYTHON ?= 3.12
WHEELS := annotated-types anyio blake3 dill einops gguf hjson httpcore2 httpx2 huggingface_hub hydra-core msgpack omegaconf \
  pydantic pydantic_core regex sniffio tokenizers transformers truststore typing-inspection zstandard
BUILT := antlr4-python3-runtime deepspeed
pins = $(foreach name,$(1),$(shell grep -E '^$(name)==' requirements.lock))
wheels: $(INSTALLED)
	rm -rf .whl
	$(BIN)/pip download --quiet --no-deps --dest .whl --only-binary :all: --python-version $(WHEELS_PYTHON) $(call pins,$(WHEELS)) $(shell grep -o 'liger-kernel==[0-9.]*' pyproject.toml) $(MORE_WHEELS)
	DS_BUILD_OPS=0 $(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir .whl $(call pins,$(BUILT))
	@du -sh .whl

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
