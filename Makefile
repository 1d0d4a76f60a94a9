# Each target makes the environment it needs. PYTHON is any Python >= 3.11; everything lives in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Python compiles what it imports; to compile all that is installed takes a core most of a minute.
PIP := $(BIN)/python -m pip install --quiet --no-compile -c constraints.txt
# Processes that share the tests. Each has the threads of all cores, so a waiting thread must not spin.
WORKERS ?= auto
# A folder of the checkout on sys.path would make `kernels/` importable under another package's name.
export PYTHONSAFEPATH := 1

.PHONY: env demo test lint bench compile docs clean
.DEFAULT_GOAL := test

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(PIP) torch numpy scikit-build-core pybind11 cmake ninja setuptools
	$(PIP) --no-build-isolation -e '.[test,triton,world]'
	touch $@

demo: env
	$(BIN)/mmfast quickstart

test: env compile
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 8 --dist worksteal

compile: env
	$(BIN)/python scripts/compile_kernels.py

lint: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: env
	$(BIN)/mmfast bench --device cpu --rounds 7 --out benchmarks/results/cpu
	$(BIN)/mmfast bench plot

docs: env
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build site dist *.egg-info
