# Every target sets up .venv with the versions of constraints.txt first, and skips that when done.
#   make demo     pictures with and without guidance, on the embedded model
#   make test     the tests          make lint    ruff and mypy
#   make bench    the benchmarks     make format  let ruff lay out the code
#   make pictures the pictures of docs/applications.md
#   make clean    remove .venv, caches and build products
# Variables: PYTHON (default python3), ARGS (for demo, pictures, test, bench), PIP_ARGS;
# PIP_ARGS adds options to pip, such as another package index.

PYTHON ?= python3
ARGS ?=
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt $(PIP_ARGS)

.PHONY: demo pictures test lint format bench clean
.DELETE_ON_ERROR:
.SECONDARY:

demo: $(VENV)/installed-demo
	$(BIN)/negtome-fast demo $(ARGS)

pictures: $(VENV)/installed-demo
	$(BIN)/python docs/make_pictures.py $(ARGS)

# One thread in each worker: more would only make the workers wait for each other.
test: $(VENV)/installed-all
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -p no:benchmark \
		-n auto --maxprocesses 8 --dist worksteal $(ARGS) tests

lint: $(VENV)/installed-all
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy negtome_fast kernels bench

format: $(VENV)/installed-all
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed-all
	$(BIN)/python -m bench $(ARGS)
	$(BIN)/python -m pytest -q bench/bench_operator.py

clean:
	rm -rf $(VENV) build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path "./.git/*" -exec rm -rf {} +

$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch comes first, on its own: what follows then finds it installed and does not replace it.
$(VENV)/installed-%: setup.py constraints.txt | $(VENV)/created
	@echo "Setting up $(VENV) for '$*' (the first time downloads torch and takes minutes)"
	$(PIP) setuptools torch
	$(PIP) --no-build-isolation -e '.[$*]'
	@touch $@
