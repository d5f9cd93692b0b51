# What to type:  make demo | make test | make lint | make test-long | make test-full | make test-accelerator | make clean
# Needs Python >= 3.11 and make; everything else goes into $(VENV) with pip.
# Another Python:  make test-short PYTHON=python3.13 VENV=.venv313

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO ?= demo
# Two processes; the tests of a file keep to one of them, where its fixtures and programs are made once.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: venv demo test test-long test-full test-short test-accelerator lint format clean

venv: $(STAMP)

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 was found: install one, or say make PYTHON=/path/to/python3." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "distsbi needs Python 3.11 to 3.13; $(PYTHON) is $$($(PYTHON) --version 2>&1)." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[report,dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/distsbi demo --out $(DEMO)

# Under ten minutes on two cores.
test: $(STAMP)
	$(PYTEST) -m "not slow and not long"

# What takes longer: README as it stands, trainings whose result is known, processes that are killed. CI runs this too.
test-long: $(STAMP)
	$(PYTEST) -m "long and not slow"

# Everything, and programs compiled as users compile them.
test-full: $(STAMP)
	DISTSBI_TEST_OPTIMISED=1 $(PYTEST)

# Imports, command line, numerics and files, without long trainings: what a second Python is checked with.
SHORT := $(addprefix tests/test_,cli.py config.py imports.py keys.py mesh.py) tests/methods tests/solvers tests/data tests/store distsbi

test-short: $(STAMP)
	$(PYTEST) -m "not slow" $(SHORT)

# What draws and trains, on this machine's GPUs (PLATFORM=tpu: TPUs, which one process takes whole), with jax's extra for them in $(VENV).
PLATFORM ?= cuda
DRAWING := $(addprefix tests/test_,keys.py pipelines.py) $(addprefix tests/,methods networks solvers data sampling training/test_training.py)

test-accelerator: $(STAMP)
	DISTSBI_TEST_PLATFORMS=$(PLATFORM),cpu $(PYTEST) $(if $(filter tpu,$(PLATFORM)),-n 0) -m "not slow" $(DRAWING)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --cache-dir .cache/import-linter

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Leaves runs and demo output alone.
clean:
	rm -rf .venv .venv3* .cache build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find distsbi tests -name __pycache__ -type d -prune -exec rm -rf {} +
