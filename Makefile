# `make repro` runs everything, from photos to the report; `make test` runs the tests. Both first set up .venv with the
# command `customcontrast`.
# The first interpreter found that is 3.11 or 3.12.
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
UV_VERSION := 0.13.8
TESTS_AT_ONCE ?= 3
BIN := .venv/bin
# Stages run this environment's commands, whether or not it is activated.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: repro without-git docs test test-fast lint lock clean toybox toybox-check facebox facebox-check world adapter rivals cards showcase bench-data bench-model bench-train bench-eval \
	ablation ablation-search ablation-check
.DEFAULT_GOAL := repro

repro: without-git
	@$(BIN)/customcontrast repro

# DVC needs to be told that there is no git repository, as in an unpacked source archive.
without-git: .venv/installed
	@git rev-parse --git-dir >/dev/null 2>&1 || $(BIN)/dvc config --quiet --local core.no_scm true

# All tests, in parallel.
test: .venv/installed
	$(BIN)/python -m pytest -n $(TESTS_AT_ONCE) --dist loadgroup

# Only tests that start no Ray, ranks or other processes.
test-fast: .venv/installed
	$(BIN)/python -m pytest -n $(TESTS_AT_ONCE) --dist loadgroup -m "not slow"

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Installs exactly what requirements.lock pins; reruns when the lock changes.
.venv/installed: requirements.lock
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 was not found; install one or run make PYTHON=/path/to/python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv==$(UV_VERSION)
	$(BIN)/uv pip sync --quiet --compile-bytecode --python $(BIN)/python --require-hashes requirements.lock
	printf '#!/bin/sh\nexec "%s" "%s" "$$@"\n' '$(CURDIR)/$(BIN)/python' '$(CURDIR)/customcontrast.py' > $(BIN)/customcontrast
	chmod +x $(BIN)/customcontrast
	touch $@

# Update requirements.lock after a change to pyproject.toml; with hashes, without download URLs.
lock:
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --group dev --generate-hashes --no-emit-index-url \
		--no-annotate --no-header pyproject.toml -o requirements.lock

clean:
	rm -rf data .work

# Retrain the toybox's small backbones from scratch; resumes if interrupted.
toybox: .venv/installed
	$(BIN)/python -m train.toybox.all
	$(MAKE) cards

# Train the backbones of the world of faces, from renders and the toybox's weights; resumes if interrupted.
facebox: .venv/installed
	$(BIN)/python -m train.toybox.all --world faces
	$(MAKE) cards

# A larger world than `make repro`'s, drawn and encoded in five minutes on two cores.
LARGE := --params configs/toybox_large.yaml --data .work/large/data
world: .venv/installed
	for stage in toybox curate mask similarity pairs encode; do $(BIN)/customcontrast $$stage $(LARGE) || exit; done

# Train the toybox's ready adapter on that world; resumes if interrupted.
adapter: world
	$(BIN)/customcontrast train --params configs/toybox_adapter.yaml $(LARGE)
	cp .work/large/data/train/adapter/* weights/toybox/adapter/
	$(MAKE) cards

# Likewise those of the other methods.
rivals: world
	$(BIN)/customcontrast rivals --params configs/toybox_rivals.yaml $(LARGE)
	for method in realcustom realcustom_pp; do mkdir -p weights/toybox/$$method && \
		cp .work/large/data/rivals/adapters/$$method/* weights/toybox/$$method/ || exit; done
	$(MAKE) cards

# Write the model cards of weights/toybox again, after a training or a change of train/toybox/model_cards.py.
cards: .venv/installed
	$(BIN)/python -m train.toybox.model_cards

# docs/showcase.png: photos of the toybox and what the ready adapter makes of them.
showcase: .venv/installed
	$(BIN)/python -m experiments.showcase

# Measure the toybox's backbones against targets and chance.
toybox-check: .venv/installed
	$(BIN)/python -m train.toybox.check

# Likewise those of the world of faces.
facebox-check: .venv/installed
	$(BIN)/python -m train.toybox.check --world faces

# Overhead of the data stages over the work itself, against goals; for less, PARTS="decode tile" or
# OPTIONS="--repeats 3".
bench-data: .venv/installed
	$(BIN)/customcontrast bench data $(PARTS) $(OPTIONS)

# Cost of the adapter over diffusers' IP-Adapter-plus and the plain model, against goals; PARTS and OPTIONS likewise.
bench-model: .venv/installed
	$(BIN)/customcontrast bench model $(PARTS) $(OPTIONS)

# Overhead of scoring over the models' own forward passes, against goals; PARTS and OPTIONS likewise.
bench-eval: .venv/installed
	$(BIN)/customcontrast bench eval $(PARTS) $(OPTIONS)

# The paper's ablation on the toybox: trains and measures missing runs and writes docs/ablation.md; RUNS="both macl" or
# OPTIONS="--seeds 1 --jobs 4" for fewer runs or more in parallel. Killed, it goes on where it was.
ablation: world
	$(BIN)/python -m experiments.ablation $(LARGE) $(RUNS) $(OPTIONS)

# The hyperparameters of the ablation: the same small search for every method, on other held-out subjects.
ablation-search: world
	$(BIN)/python -m experiments.ablation --matrix experiments/ablation/search.yaml $(LARGE) $(RUNS) $(OPTIONS)

# A line for each claim of the paper, from the results of the ablation: name, value, goal, ok or short.
ablation-check: .venv/installed
	$(BIN)/python -m experiments.ablation.claims

# Overhead of the trainer over the model's own step, on the existing tables; PARTS and OPTIONS likewise.
bench-train: .venv/installed
	$(BIN)/customcontrast bench train $(PARTS) $(OPTIONS)

# The site, from docs/ and the docstrings: opens from .work/site/index.html.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "site: $(CURDIR)/.work/site/index.html"
