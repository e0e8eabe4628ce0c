# make quickstart   fine-tune a small real model on this machine, see that it got better
# make test         all tests
# make lint         ruff
# make bench        benchmarks
# make serve-check  a finished run (RUN=runs/quickstart) in real engines, which it installs: vLLM, llama.cpp, mlx-lm
# make docs         what is generated: docs/recipe.md, docs/coming-from.md, docs/memory.md's table
# make clean        remove build output and caches; .venv, models and runs stay
#
# Each target sets .venv up first, with the exact versions of constraints.txt. VENV=... puts it elsewhere.

VENV ?= .venv
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$python; break; }; done)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: install quickstart test test-work test-rest lint bench serve-check docs clean

install: $(VENV)/.installed

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "linchain needs Python 3.11 or newer; none was found" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) has no venv module, which some systems \
	package apart. On Debian and Ubuntu: apt install $(notdir $(PYTHON))-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -f $(BIN)/python; exit 1; }

# setuptools comes first: with it the package is built in this environment, and nothing outside constraints.txt is fetched.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing linchain and what it needs into $(VENV) (a minute or two, once)"
	$(PIP) setuptools
	$(PIP) --no-build-isolation -e '.[test]'
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(PIP) --no-build-isolation -e '.[test,bench]'
	@touch $@

quickstart: $(VENV)/.installed
	$(BIN)/python scripts/quickstart.py

# Much of the tests' time goes to processes that are started and waited for: two halves at once take half as long.
WORK := tests/training tests/chain tests/model tests/recipe

test: $(VENV)/.installed
ifeq ($(strip $(PYTEST_OPTIONS)),)
	@$(MAKE) --no-print-directory --keep-going --jobs 2 test-work test-rest
else
	$(BIN)/python -m pytest $(PYTEST_OPTIONS)
endif

test-work test-rest: export OMP_NUM_THREADS = 1
test-work: $(VENV)/.installed
	$(BIN)/python -m pytest -q -p no:cacheprovider $(WORK)
test-rest: $(VENV)/.installed
	$(BIN)/python -m pytest -q -p no:cacheprovider tests $(WORK:%=--ignore=%)

lint: $(VENV)/.installed
	$(BIN)/ruff check linchain_cli tests scripts

bench: $(VENV)/.installed-bench
	$(BIN)/python -m scripts.bench train

RUN ?= runs/quickstart
serve-check: $(VENV)/.installed
	$(BIN)/python scripts/serve_check.py $(RUN)

docs: $(VENV)/.installed
	$(BIN)/python scripts/generate_reference.py
	$(BIN)/python scripts/memory_table.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .ruff_cache
	find linchain_cli tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
