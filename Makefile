# make            trains: sets up a virtual environment on first use, then runs main.py
# make test       runs the tests; with MNIST_DIR=folder those on the real MNIST too
# make lint       checks the style
# make benchmark  measures speed and memory
# ARGS='...'      is passed on, as in: make ARGS='--epochs 2 --code-size 2'
# PYTHON=...      is the interpreter, VENV=... the folder of the virtual environment

SHELL := /bin/bash
ARGS :=
PYTHON :=
VENV := .venv$(if $(PYTHON),-$(notdir $(PYTHON)))
# A Python 3.7 where TensorFlow 1.14 has wheels, else the newest that TensorFlow 2.21 has some for.
PYENV := $(shell pyenv root 2>/dev/null)/versions
NEWER := 3.13 3.12 3.11 3.10
PYTHONS := $(if $(filter x86_64,$(shell uname -m)),python3.7 $(wildcard $(PYENV)/3.7*/bin/python)) \
    $(addprefix python,$(NEWER)) python3 \
    $(foreach version,$(NEWER),$(wildcard $(PYENV)/$(version).*/bin/python))
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

# What was cut short is made anew, but no folder that is not a virtual environment.
$(VENV)/installed: requirements.txt
	@if ! $(VENV)/bin/python -m pip --version >/dev/null 2>&1; then \
	    if [ -e $(VENV) ] && [ ! -e $(VENV)/pyvenv.cfg ]; then \
	        echo '$(VENV) is not a virtual environment: name another folder by VENV=' >&2; exit 1; \
	    fi; \
	    for python in $(or $(PYTHON),$(PYTHONS)); do \
	        "$$python" -c '$(SUITS)' 2>/dev/null \
	            && "$$python" -m venv --clear $(VENV) >/dev/null 2>&1 && break; \
	    done || uv venv --quiet --clear --seed $(addprefix --python ,$(or $(PYTHON),3.13)) $(VENV) \
	        2>/dev/null || { rm -rf $(VENV); \
	        echo 'No Python 3.7 or 3.10 to 3.13 that makes virtual environments: install one' \
	            '(on Debian and Ubuntu with python3-venv), or uv' >&2; \
	        exit 1; }; \
	fi
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@echo "Set up $(VENV): $$($(VENV)/bin/python --version)," \
	    "$$($(VENV)/bin/python -m pip freeze | grep -E '^tensorflow([-_]cpu)?==')"
	@touch $@

$(VENV)/installed-tests: $(VENV)/installed tests/requirements.txt
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	@touch $@

clean:
	rm -rf .venv* .pytest_cache .ruff_cache __pycache__ tests/__pycache__
