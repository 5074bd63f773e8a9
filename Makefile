# `make demo` and `make test` work on a fresh clone: they make the environment they need.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
JOBS   ?= 2
# One compute thread per test worker: two busy processes with default threads slow each other down many times over.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: demo test test-fast check evidence docs bench clean

$(VENV)/run: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/dev: $(VENV)/run
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/run
	$(BIN)/tunesmith train --output runs/demo --overwrite

check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

test-fast: $(VENV)/dev
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup -m "not slow and not distributed"

evidence: $(VENV)/dev
	$(BIN)/tunesmith evidence run --all
	$(BIN)/tunesmith evidence table

docs: $(VENV)/dev
	$(BIN)/python -m tunesmith.docs
	$(BIN)/tunesmith evidence table

bench: $(VENV)/dev
	$(BIN)/python benchmarks/train.py

clean:
	rm -rf $(VENV) runs
