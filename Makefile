# The commands of this project. `make` alone lists them.
VENV ?= .venv
PYTHON ?= python3
# Where a build of torch without CUDA is looked for; empty on a machine with an NVIDIA GPU. Other indexes stay in use.
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi),,https://download.pytorch.org/whl/cpu)
TRITONS = 3.6.0 3.7.1
PYTEST = pytest -n 2 -p no:benchmark
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export OMP_NUM_THREADS = 1
CONFIG = $(if $(XDG_CONFIG_HOME),$(XDG_CONFIG_HOME),$(HOME)/.config)/snakemake

.PHONY: help install quickstart studies test test-slow gpu lint format profiles clean

help: ## list these commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(VENV)/.installed ## install into .venv, with the versions of constraints.txt

# torch comes first and alone, from one try at TORCH_INDEX: out of reach it is skipped with a warning. A build for CUDA
# pins a triton of its own, which then goes before that of constraints.txt.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	pip install -q --no-deps --retries 0 $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt torch
	grep -v "$$(pip show torch | grep '^Requires:.*triton' >/dev/null && echo '^triton=' || echo '^$$')" constraints.txt > $(VENV)/constraints.txt
	pip install -q -c $(VENV)/constraints.txt -e ".[test]"
	@touch $@

quickstart: install ## FedAvg and FeDepth under four memory budgets, on embedded images
	snakemake --profile profiles/local --config study=workflows/studies/quickstart.yaml
	@echo "report: results/quickstart/report.html"

studies: install ## the small studies of the papers (STUDY=paper/name for one); tables in benchmarks/results/studies
	python benchmarks/studies/run.py $(STUDY)

test: install lint ## every check that needs neither a GPU nor patience
	$(PYTEST) -m "not slow and not gpu"
	@python benchmarks/studies/run.py --check

# The tritons that builds of torch for CUDA pin, for compiling the kernels by them, too.
$(VENV)/tritons/%:
	pip install -q --no-deps --target $@ triton==$*

test-slow: install $(if $(filter Linux,$(shell uname)),$(TRITONS:%=$(VENV)/tritons/%)) ## real data, kills, whole studies; reads FEDPIPE_DATA where it is set
	$(PYTEST) -m "slow and not gpu"

gpu: install ## kernels and training on a CUDA device; writes benchmarks/results/<gpu>-kernels.json
	pytest -m gpu
	pytest -q benchmarks/kernels --benchmark-only --benchmark-columns=median,rounds \
	    --benchmark-json "benchmarks/results/$$(python -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-"))')-kernels.json"

lint: install ## style, types, workflow
	ruff check .
	ruff format --check .
	mypy
	snakefmt --check Snakefile workflows/rules
	pytest -q -m "not slow" tests/test_workflow.py -k lint

format: install ## rewrite in the project's style; export the study files' schema
	ruff check --fix .
	ruff format .
	snakefmt Snakefile workflows/rules
	fedpipe schema > workflows/schemas/study.schema.json

# Snakemake looks names up in the working directory and the user's configuration only.
profiles: ## let `snakemake --profile slurm` find profiles/slurm by its name (links in ~/.config/snakemake)
	@mkdir -p "$(CONFIG)"
	@for name in local slurm; do \
	    if [ -e "$(CONFIG)/$$name" ] && [ ! "$(CONFIG)/$$name" -ef "profiles/$$name" ]; then \
	        echo "$(CONFIG)/$$name: another profile of this name is there; remove it, or use --profile profiles/$$name"; exit 1; fi; \
	    ln -sfn "$(CURDIR)/profiles/$$name" "$(CONFIG)/$$name"; done

clean: ## remove caches and build outputs; results/ and .venv stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print | xargs rm -rf
