# make            trains: sets up .venv on first use, then runs main.py
# make test       runs the tests; with MNIST_DIR=folder those on the real MNIST too
# make benchmark  measures speed and memory
# ARGS='...'      is passed on, as in: make ARGS='--epochs 2 --code-size 2'

SHELL := /bin/bash
ARGS :=
PYTHON := .venv/bin/python

.PHONY: run test benchmark clean

run: .venv/installed
	@$(PYTHON) main.py $(ARGS)

test: .venv/installed-tests
	@$(PYTHON) -m pytest -q -W ignore::DeprecationWarning $(ARGS) tests

benchmark: .venv/installed
	@$(PYTHON) tests/benchmark.py $(ARGS)

# Python 3.7 of the path, of pyenv or of uv, the first that runs.
.venv/installed: requirements.txt
	@if [ ! -x $(PYTHON) ]; then \
	    for python in python3.7 "$$(pyenv root 2>/dev/null)"/versions/3.7*/bin/python3.7; do \
	        "$$python" -c '' 2>/dev/null && "$$python" -m venv .venv && break; \
	    done || { command -v uv >/dev/null && uv venv --quiet --seed --python 3.7 .venv; } || { \
	        rm -rf .venv; \
	        echo 'Python 3.7 is needed: install it with "pyenv install 3.7" or install uv' >&2; \
	        exit 1; }; \
	fi
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-tests: .venv/installed tests/requirements.txt
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	@touch $@

clean:
	rm -rf .venv .pytest_cache __pycache__ tests/__pycache__
