# `make demo` and `make test` set up a local .venv themselves.
PYTHON ?= python3
BIN := .venv/bin
CONSTRAINTS ?= constraints.txt

.venv/ready: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) torch
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $@

.PHONY: demo test format bench results

demo: .venv/ready
	$(BIN)/python examples/demo.py

test: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python examples/assets.py .cache --tests
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist worksteal

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/python -m surgery.cli.reference > surgery/data/cli.md

bench: .venv/ready
	$(BIN)/python examples/assets.py .cache
	$(BIN)/python tests/benchmarks/streamed.py

# Tables of two models in results/; with MODELS="--model qwen2.5-coder-1.5b" of another, in hours.
results: .venv/ready
	$(BIN)/python examples/results.py results $(MODELS)
