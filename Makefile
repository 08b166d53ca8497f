# make bench, make test, make lint: each makes .venv and installs what it needs.
PYTHON ?= python3
TORCH ?= torch
VENV := .venv
BIN := $(VENV)/bin
MODES := full preload stream mixed
# Rounds of each mode: as many as a verdict needs.
ROUNDS := 5
# Processes that share the tests. On a machine with a GPU, JOBS=0 runs them one after the other.
JOBS ?= 2

.PHONY: bench test lint clean

# torch comes first and alone, so that the build chosen with TORCH is the one that stays. What setuptools says of every
# editable installation looks like an error, and is none.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -W 'ignore:Editable installation' -m pip install --quiet -e '.[dev]'
	touch $@

bench: $(VENV)/.installed
	set -e; for mode in $(MODES); do \
	  $(BIN)/python bench_infer.py --mode $$mode --repeats $(ROUNDS) --out-json bench_results_$$mode.json; \
	done
	$(BIN)/python bench_infer.py compare --equal-outputs $(MODES:%=bench_results_%.json)

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(JOBS) --dist loadscope

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict llama wsm bench bench_infer.py
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .import_linter_cache .mypy_cache .ruff_cache .hypothesis
