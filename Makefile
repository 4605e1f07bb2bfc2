# The vocabulary of this project; `make help` lists it. Every target works from a fresh clone.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PYTHON311 ?= python3.11
BIN := .venv/bin
STAMP := .venv/.setup-stamp
# The installer lives in a folder of its own, so that the lock alone decides what is in .venv.
UV := $(or $(shell command -v uv 2>/dev/null),.cache/uv-venv/bin/uv)
NEED_PYTHON := Python 3.11 is needed: install it with its venv module (on Debian or Ubuntu: \
apt install python3.11-venv), or name it: make setup PYTHON311=/path/to/python3.11
COMPILE = $(UV) pip compile pyproject.toml --python-version 3.11 --generate-hashes --no-header \
	--no-annotate --no-emit-index-url --no-emit-find-links --quiet

.PHONY: help setup demo up down status logs env reset test lint format lock docs clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## Make .venv with everything that the lock names

$(STAMP): requirements.txt pyproject.toml
	@test -x $(UV) || $(MAKE) --no-print-directory $(UV)
	test -x $(BIN)/python || $(UV) venv --quiet --python $(PYTHON311) .venv
# Compiled now, as those who run it may be told to write no bytecode, or not be allowed to: they
# would compile everything that they import each time they start, PyTorch and Airflow among it.
	$(UV) pip install --python $(BIN)/python --compile-bytecode --require-hashes \
		--requirement requirements.txt
	$(UV) pip install --python $(BIN)/python --no-deps --editable . \
		--build-constraints docker/requirements-build.txt
	$(BIN)/python -m compileall -q gun_detection embedded dags plugins
	@touch $@

.cache/uv-venv/bin/uv:
	@command -v $(PYTHON311) > /dev/null && $(PYTHON311) -m venv .cache/uv-venv \
		|| { echo "$(NEED_PYTHON)" >&2; exit 1; }
	.cache/uv-venv/bin/python -m pip install --quiet uv

demo: $(STAMP) ## Start the platform and run the whole loop on it
	$(BIN)/python -m embedded demo

up: $(STAMP) ## Start the platform, or what does not run of it
	@$(BIN)/python -m embedded up

down: $(STAMP) ## Stop the platform; the data stays
	@$(BIN)/python -m embedded down

status: $(STAMP) ## Show every component
	@$(BIN)/python -m embedded status

logs: $(STAMP) ## Show the last lines of the logs, and follow them (C=scheduler for one component)
	@$(BIN)/python -m embedded logs -f $(C)

env: $(STAMP) ## Print the platform's environment: eval "$(make -s env)"
	@$(BIN)/python -m embedded env

reset: $(STAMP) ## Stop the platform and delete its data and credentials
	@$(BIN)/python -m embedded down --purge

test: $(STAMP) ## Run the tests (ARGS="-m 'not airflow'" leaves out the slow ones)
# Two processes on as many cores: threads of each would only wait for those of the other.
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile $(ARGS)

lint: $(STAMP) ## Check style and types, and that every DAG parses
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_dags.py::test_the_dags_are_complete

format: $(STAMP) ## Rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(STAMP) $(UV) ## Resolve the dependencies of pyproject.toml again (UPGRADE=1 takes newer versions)
	$(COMPILE) $(if $(UPGRADE),--upgrade) --all-extras --output-file requirements.txt
	$(COMPILE) --extra airflow --constraint requirements.txt \
		--output-file docker/requirements-airflow.txt
	$(COMPILE) --extra airflow --extra detector --constraint requirements.txt \
		--output-file docker/requirements-worker.txt
	$(COMPILE) --extra detector --extra serving --constraint requirements.txt \
		--output-file docker/requirements-serving.txt

docs: $(STAMP) ## Write the pages of docs/ that follow from the code
	$(BIN)/python -m gun_detection.settings > docs/settings.md
	$(BIN)/python -m gun_detection.training.config > docs/recipes.md
	$(BIN)/python -m tests.bad_pictures > docs/bad-pictures.md

clean: ## Delete caches and build results; neither .venv nor the platform's data
	rm -rf .mypy_cache .pytest_cache .ruff_cache dist .cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
