# Set-up and work in two commands: `make quickstart` and `make test`, each on a machine with nothing but Python.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test check fast-tests slow-tests clean

quickstart: $(VENV)/run.stamp
	$(BIN)/python pipelines/shear.py

test: check fast-tests

check: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest tests/test_architecture.py

fast-tests: $(VENV)/dev.stamp
	$(BIN)/pytest

slow-tests: $(VENV)/dev.stamp
	$(BIN)/pytest -m slow

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

# Bytecode is compiled at installation: without it every worker would start two to three times slower.
$(VENV)/run.stamp: pyproject.toml $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/dev.stamp: pyproject.toml $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
