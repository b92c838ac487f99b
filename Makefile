# `make repro`: everything, from photos to the report. `make test`: the tests. Both set up .venv first, with the command
# `customcontrast` in it.
# The first that runs and is 3.11 or 3.12.
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
UV_VERSION := 0.13.8
BIN := .venv/bin
# The stages are commands of this environment, whether or not it is active.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: repro test test-fast lint lock clean toybox toybox-check bench-data bench-model bench-train ablation bench-eval
.DEFAULT_GOAL := repro

repro: .venv/installed
	$(BIN)/dvc repro
	@echo "report: $(CURDIR)/data/report/index.html"

test: .venv/installed
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What requirements.lock pins, and nothing else; done again when the lock changes.
.venv/installed: requirements.lock
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 was not found; install one or run make PYTHON=/path/to/python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv==$(UV_VERSION)
	$(BIN)/uv pip sync --quiet --compile-bytecode --python $(BIN)/python --require-hashes requirements.lock
	printf '#!/bin/sh\nexec "%s" "%s" "$$@"\n' '$(CURDIR)/$(BIN)/python' '$(CURDIR)/customcontrast.py' > $(BIN)/customcontrast
	chmod +x $(BIN)/customcontrast
	touch $@

# Pin again after a change of pyproject.toml; hashes, no download addresses.
lock:
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --group dev --generate-hashes --no-emit-index-url \
		--no-annotate --no-header pyproject.toml -o requirements.lock

clean:
	rm -rf data .work

# Train the toybox's small backbones again, from nothing; resumes where it was stopped.
toybox: .venv/installed
	$(BIN)/python -m train.toybox.all

# What the toybox's backbones can do, against targets and chance.
toybox-check: .venv/installed
	$(BIN)/python -m train.toybox.check

# What the data stages cost beside the work itself, against goals; PARTS="decode tile" or OPTIONS="--repeats 3" for less.
bench-data: .venv/installed
	$(BIN)/customcontrast bench data $(PARTS) $(OPTIONS)

# What the adapter costs beside diffusers' IP-Adapter-plus and the bare model, against goals; PARTS and OPTIONS likewise.
bench-model: .venv/installed
	$(BIN)/customcontrast bench model $(PARTS) $(OPTIONS)

# What scoring costs beside the models' own forward passes, against goals; PARTS and OPTIONS likewise.
bench-eval: .venv/installed
	$(BIN)/customcontrast bench eval $(PARTS) $(OPTIONS)

# The paper's ablation on the toybox: trains and measures what is missing, and writes docs/ablation.md; RUNS="both macl" or
# OPTIONS="--seeds 1 --jobs 4" for less or more at once.
ablation: .venv/installed
	$(BIN)/dvc repro encode
	$(BIN)/python -m experiments.ablation $(RUNS) $(OPTIONS)

# What the trainer costs beside the model's own step, on the tables that are there; PARTS and OPTIONS likewise.
bench-train: .venv/installed
	$(BIN)/customcontrast bench train $(PARTS) $(OPTIONS)
