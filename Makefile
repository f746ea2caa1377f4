# make            trains; the first time, it sets up a virtual environment
# make test       runs the tests; with MNIST_DIR=folder also reads the .gz files of MNIST
# make lint       checks the style
# make benchmark  measures speed and memory
# ARGS='...'      is passed on, as in: make ARGS='--epochs 2 --code-size 2'
# PYTHON=...      is the interpreter, with a virtual environment of its own

SHELL := /bin/bash
VENV := .venv$(if $(PYTHON),-$(notdir $(PYTHON)))
# TensorFlow 1.14 exists for Python 3.7 on x86_64, 2.21 for Python 3.10 to 3.13.
PYENV := $(wildcard $(shell pyenv root 2>/dev/null)/versions/3.7*/bin/python)
PYTHONS := $(or $(PYTHON),$(if $(filter x86_64,$(shell uname -m)),python3.7 $(PYENV)) \
    python3.13 python3.12 python3.11 python3.10 python3)
SUITS := import sys; sys.exit(sys.version_info[:2] not in [(3, 7)] + [(3, n) for n in range(10, 14)])

.PHONY: run test lint benchmark clean

run: $(VENV)/installed
	@$(VENV)/bin/python main.py $(ARGS)

test: $(VENV)/installed-tests
	@$(VENV)/bin/python -m pytest -q -W ignore::DeprecationWarning $(ARGS) tests

lint: $(VENV)/installed-tests
	@$(VENV)/bin/ruff check .

benchmark: $(VENV)/installed
	@$(VENV)/bin/python tests/benchmark.py $(ARGS)

$(VENV)/installed: requirements.txt constraints.txt
	@for python in $(PYTHONS); do \
	    $$python -c '$(SUITS)' 2>/dev/null && $$python -m venv --clear $(VENV) >/dev/null && break; \
	done || uv venv --quiet --clear --seed --python $(or $(PYTHON),3.13) $(VENV) || \
	    { echo 'Install Python 3.7 or 3.10 to 3.13 with its venv module, or uv' >&2; exit 1; }
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/installed-tests: $(VENV)/installed tests/requirements.txt
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	@touch $@

clean:
	rm -rf .venv* .pytest_cache .ruff_cache __pycache__ tests/__pycache__
