# One command each: `make demo | test | lint | bench | clean`. Each makes .venv once if it is missing.
PYTHON ?= python3
BIN    := .venv/bin
READY  := .venv/ready
export PYTHONSAFEPATH := 1

.PHONY: demo test lint bench clean

$(READY): pyproject.toml setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet setuptools wheel ninja pybind11
	$(BIN)/pip install --quiet --no-build-isolation -e '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/bertfast demo

test: $(READY)
	$(BIN)/pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(READY)
	$(BIN)/python bench/end_to_end/pretraining_step.py

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .benchmarks
