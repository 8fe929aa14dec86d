# Every target sets up .venv with the versions of constraints.txt first, and skips that when done.
#   make demo     pictures with and without guidance, on the embedded model
#   make test     the tests          make lint    ruff, mypy, and the floors of imports
#   make fuzz     a million random problems against an fp64 oracle, before a release
#   make compile-check   all kernels for all GPUs, by two versions of Triton, against bench/results
#   make compile-tables  the same, written there and to docs/kernels.md
#   make candidates      what both compilers make of the tuner's candidates, negtome_fast/tuner/compiled
#   make bench    the benchmarks     make format  let ruff lay out the code
#   make pictures the pictures of docs/            make pages   the generated parts of the pages
#   make docs     the site of docs/, in site/; any warning is an error
#   make clean    remove .venv, caches and build products
# Variables: PYTHON (default python3), ARGS (demo, pictures, pages, test, fuzz, bench, candidates), PIP_ARGS, TRITON;
# PIP_ARGS adds options to pip, such as another package index; TRITON is the second compiler.

PYTHON ?= python3
ARGS ?=
PIP_ARGS ?=
TRITON ?= 3.6.0
VENV := .venv
OTHER_TRITON := $(VENV)/triton-$(TRITON)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt $(PIP_ARGS)

.PHONY: demo pictures pages test lint format bench compile-check compile-tables candidates other-triton
.PHONY: docs fuzz clean
.DELETE_ON_ERROR:
.SECONDARY:

demo: $(VENV)/installed-demo
	$(BIN)/negtome-fast demo $(ARGS)

pictures: $(VENV)/installed-demo
	$(BIN)/python -m docs.make_pictures $(ARGS)

pages: $(VENV)/installed-all
	$(BIN)/python -m docs.render $(ARGS)

# One thread in each worker: more would only make the workers wait for each other.
test: $(VENV)/installed-all
	@$(MAKE) -s other-triton || echo "no Triton $(TRITON): the test that compiles with it is skipped"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -p no:benchmark \
		-n auto --maxprocesses 8 --dist worksteal $(ARGS) tests

fuzz: $(VENV)/installed-all
	$(BIN)/python -m tests.fuzz --problems 1000000 $(ARGS)

lint: $(VENV)/installed-all
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy negtome_fast kernels bench docs
	PYTHONPATH=. $(BIN)/lint-imports --no-cache

format: $(VENV)/installed-all
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

compile-check compile-tables: compile-%: $(VENV)/installed-all other-triton
	$(BIN)/python -m negtome_fast.tuner.compile_report --also $(OTHER_TRITON) \
		--$(if $(filter tables,$*),save,check) bench/results/compiled.json
	$(BIN)/python -m docs.render docs/kernels.md $(if $(filter check,$*),--check)

candidates: $(VENV)/installed-all other-triton
	$(BIN)/python -m negtome_fast.tuner.candidates --also $(OTHER_TRITON) $(ARGS)
	$(BIN)/python -m docs.render docs/kernels.md

bench: $(VENV)/installed-all
	$(BIN)/python -m bench $(ARGS)
	$(BIN)/python -m pytest -q bench/suites/pytest_operator.py

docs: $(VENV)/installed-all
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path "./.git/*" -exec rm -rf {} +

# Only to compile with: a folder of its own, which comes first on the path of a process.
other-triton: $(OTHER_TRITON)/complete

$(VENV)/triton-%/complete: | $(VENV)/created
	@rm -rf $(@D)
	$(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) \
		--no-deps --target $(@D) triton==$*
	@touch $@

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
