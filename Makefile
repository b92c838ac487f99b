# `make repro`: everything, from photos to the report. `make test`: the tests. Both set up .venv first.
PYTHON ?= $(shell command -v python3.12 || command -v python3.11 || command -v python3)
UV_VERSION := 0.13.8
BIN := .venv/bin
# The stages are commands of this environment, whether or not it is active.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: repro test lint lock clean toybox toybox-check
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
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 12) else f"Python 3.11 or 3.12 is needed, this is {v[0]}.{v[1]}; run make PYTHON=/path/to/python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv==$(UV_VERSION)
	$(BIN)/uv pip sync --quiet --compile-bytecode --python $(BIN)/python --require-hashes requirements.lock
	touch $@

# Pin again after a change of pyproject.toml; hashes, no download addresses.
lock:
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --group dev --generate-hashes --no-emit-index-url \
		--no-annotate --no-header pyproject.toml -o requirements.lock

clean:
	rm -rf data .work

# Train the toybox's small backbones again, from nothing; goes on where it was stopped.
toybox: .venv/installed
	$(BIN)/python -m train.toybox.all

# What the toybox's backbones can do, against targets and chance.
toybox-check: .venv/installed
	$(BIN)/python -m train.toybox.check
