# `make demo` and `make test` work in a fresh clone. PYTHON chooses the interpreter, VENV the environment.
# `make test-oldest` proves the oldest torch that pyproject.toml promises; it wants several GB of wheels and Python 3.12.
PYTHON ?= python3
VENV ?= .venv
STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-peers
RUN := PATH="$(abspath $(VENV))/bin:$$PATH"
# Tests run side by side: a thread each, or they starve each other's pools.
PYTEST := OMP_NUM_THREADS=1 pytest --numprocesses auto --maxprocesses 4 --dist worksteal

# Prints the version of an installed torch that satisfies pyproject.toml, nothing otherwise.
define INSTALLED_TORCH
import contextlib, importlib.metadata
with contextlib.suppress(importlib.metadata.PackageNotFoundError):
    version = importlib.metadata.version("torch")
    if tuple(map(int, version.split(".")[:2])) >= (2, 11):
        print(version)
endef
export INSTALLED_TORCH

OLDEST_PYTHON ?= python3.12
OLDEST_VENV ?= .venv-oldest
OLDEST_STAMP := $(OLDEST_VENV)/.installed
# torch 2.11 comes with Triton 3.6, whose interpreter makes numbers of arrays of one element, which NumPy 2.4 forbids.
OLDEST := torch==2.11.0 triton==3.6.0 'numpy<2.4'

.PHONY: demo test test-oldest lint clean

demo: $(STAMP)
	$(RUN) multibeta demo --out demo

test: lint $(TEST_STAMP)
	$(RUN) $(PYTEST)

test-oldest: $(OLDEST_STAMP)
	PATH="$(abspath $(OLDEST_VENV))/bin:$$PATH" $(PYTEST)

lint: $(STAMP)
	$(RUN) ruff check .
	$(RUN) ruff format --check .

# A torch that the environment can already see is kept: every other version comes from constraints.txt.
# pytest and ruff are installed even where the interpreter has them: their commands must belong to the environment.
$(STAMP): pyproject.toml constraints.txt | $(VENV)/bin/python
	@own=$$($(VENV)/bin/python -c "$$INSTALLED_TORCH"); \
	if [ -n "$$own" ]; then \
	    echo "Keeping the installed torch $$own"; \
	    sed "s/^torch==.*/torch===$$own/" constraints.txt > $(VENV)/constraints.txt; \
	else \
	    cp constraints.txt $(VENV)/constraints.txt; \
	fi
	$(VENV)/bin/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable ".[dev,data]"
	@[ -x $(VENV)/bin/pytest ] && [ -x $(VENV)/bin/ruff ] || $(VENV)/bin/python -m pip install --quiet \
	    --constraint $(VENV)/constraints.txt --ignore-installed --no-deps pytest ruff
	@touch $@

# What only the tests compare with: the demo does without, and the tests skip what is not there.
$(TEST_STAMP): $(STAMP)
	@$(VENV)/bin/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable ".[peers,studio]" && touch $@ || \
	    echo "Could not install diffusers, triton, basedpyright, gradio and playwright: the tests that need them are skipped"

# The other versions are those of constraints.txt.
$(OLDEST_STAMP): pyproject.toml constraints.txt
	$(OLDEST_PYTHON) -m venv $(OLDEST_VENV)
	grep -v "^torch==\|^numpy==" constraints.txt > $(OLDEST_VENV)/constraints.txt
	$(OLDEST_VENV)/bin/python -m pip install --quiet --constraint $(OLDEST_VENV)/constraints.txt $(OLDEST) --editable ".[dev,data,peers,studio]"
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || \
	    { echo "multibeta needs Python 3.10 or newer; name one with: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c "import ensurepip, venv" 2> /dev/null || \
	    { echo "$(PYTHON) cannot make environments; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@if [ -n "$$($(PYTHON) -c "$$INSTALLED_TORCH")" ]; then \
	    $(PYTHON) -m venv --system-site-packages $(VENV); \
	else \
	    $(PYTHON) -m venv $(VENV); \
	fi

clean:
	rm -rf build dist demo *.egg-info .pytest_cache .ruff_cache .hypothesis $(STAMP) $(TEST_STAMP) $(OLDEST_STAMP)
	find . \( -path ./$(VENV) -o -path ./$(OLDEST_VENV) \) -prune -o -name __pycache__ -type d -exec rm -rf {} +
