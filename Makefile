# `make demo` and `make test` work in a fresh clone. PYTHON chooses the interpreter, VENV the environment.
PYTHON ?= python3
VENV ?= .venv
STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-peers
RUN := PATH="$(abspath $(VENV))/bin:$$PATH"

# Prints the version of an installed torch that satisfies pyproject.toml, nothing otherwise.
define INSTALLED_TORCH
import contextlib, importlib.metadata
with contextlib.suppress(importlib.metadata.PackageNotFoundError):
    version = importlib.metadata.version("torch")
    if tuple(map(int, version.split(".")[:2])) >= (2, 10):
        print(version)
endef
export INSTALLED_TORCH

.PHONY: demo test lint clean

demo: $(STAMP)
	$(RUN) multibeta demo --out demo

test: lint $(TEST_STAMP)
	$(RUN) pytest

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
	@$(VENV)/bin/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable ".[peers]" && touch $@ || \
	    echo "Could not install diffusers and triton: the tests that compare with them are skipped"

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
	rm -rf build dist demo *.egg-info .pytest_cache .ruff_cache .hypothesis $(STAMP) $(TEST_STAMP)
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
