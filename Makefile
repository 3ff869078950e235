# Everything runs in a local .venv that the first target makes; the steps are those of README and Dockerfile.
# make PYTHON=python3.12 ... picks the interpreter; WORKERS=1 runs the tests in one process.

PYTHON ?= python3
WORKERS ?= 2
MINUTES ?= 60
VENV := .venv
RUN := $(VENV)/bin

.PHONY: setup demo test coverage fuzz mutants check lint types imports docs release bench bench-gpu bench-size clean

setup: $(VENV)/.kdcache

$(VENV)/.kdcache: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kdcache needs Python 3.11 or newer; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install -c constraints.txt pip
	$(RUN)/python -m pip install -c constraints.txt torch
	$(RUN)/python -m pip install -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.kdcache
	$(RUN)/python -m pip install -c constraints.txt -e '.[hub]' --group dev
	@touch $@

$(VENV)/.docs: $(VENV)/.kdcache
	$(RUN)/python -m pip install -c constraints.txt --group docs
	@touch $@

# The whole pipeline on real text with two real teachers: nine to ten minutes on two cores, downloads about 120 MB.
demo: setup
	$(RUN)/kdcache pipelines prepare quickstart
	$(RUN)/kdcache run quickstart/quickstart.toml

lint: $(VENV)/.dev
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .

types: $(VENV)/.dev
	$(RUN)/mypy

imports: $(VENV)/.dev
	$(RUN)/lint-imports --no-cache

# One thread per worker: the models are tiny. Coverage costs half as much again, so it is a target of its own.
TESTS := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(RUN)/python -m pytest -q -n $(WORKERS) --dist loadfile
test: $(VENV)/.dev
	$(TESTS)
	if $(RUN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then $(RUN)/python -m pytest -q -m cuda; fi

coverage: $(VENV)/.dev
	$(TESTS) --cov --cov-report=term:skip-covered

check: lint types imports test

# Files and answers of a remote that are damaged or forged; findings, with what shows them again, go to fuzz-findings/.
fuzz: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(RUN)/python -m kdcache.testing.fuzz --minutes $(MINUTES)

# How many changed lines the tests notice, per module (docs/mutation.md). MODULES=kdcache/files.py takes one alone.
mutants: $(VENV)/.mutants
	$(RUN)/python tests/mutation.py $(MODULES)

$(VENV)/.mutants: $(VENV)/.dev
	$(RUN)/python -m pip install -c constraints.txt --group mutants
	@touch $@

docs: $(VENV)/.docs
	$(RUN)/sphinx-build -W --keep-going -b html docs docs/_build/html

# Wheel and sdist in dist/. The wheel is made from the sdist, and must work in an environment that holds nothing else.
release: $(VENV)-release/.tools
	rm -rf dist $(VENV)-wheel
	$(VENV)-release/bin/python -m build
	$(VENV)-release/bin/python -m twine check --strict dist/*
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/python -m pip install -c constraints.txt pip
	$(VENV)-wheel/bin/python -m pip install -c constraints.txt torch
	$(VENV)-wheel/bin/python -m pip install -c constraints.txt dist/*.whl
	cd / && $(abspath $(VENV)-wheel)/bin/python $(abspath tests/installed.py)

$(VENV)-release/.tools: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)-release
	$(VENV)-release/bin/python -m pip install -c constraints.txt pip
	$(VENV)-release/bin/python -m pip install -c constraints.txt --group release
	@touch $@

# Under an hour on two cores. The loader's rivals have an environment of their own, because they ask for older libraries.
bench: $(VENV)/.dev $(VENV)-bench/.rivals
	$(RUN)/python benchmarks/all.py --rivals-python $(VENV)-bench/bin/python

# On a machine with a GPU, in pieces of ten minutes: run it until it says that nothing is left.
bench-gpu: $(VENV)/.dev
	$(RUN)/python benchmarks/gpu.py

# Students from ten forms of the same hidden states, three seeds each: hours on two cores. Continues where it was stopped.
bench-size: $(VENV)/.dev
	$(RUN)/python benchmarks/size.py run
	$(RUN)/python benchmarks/size.py collect quickstart --to benchmarks/measured

$(VENV)-bench/.rivals: benchmarks/requirements.txt
	$(PYTHON) -m venv $(VENV)-bench
	$(VENV)-bench/bin/python -m pip install -r benchmarks/requirements.txt
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-bench $(VENV)-release $(VENV)-wheel dist docs/_build docs/reference docs/methods-list.md quickstart .coverage .mypy_cache .ruff_cache .pytest_cache
