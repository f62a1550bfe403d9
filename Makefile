# make setup | demo | test | check | docs | notebooks | bench; each works alone on a fresh clone with nothing but Python >= 3.11.
PYTHON ?= python3
BIN := .venv/bin
TORCH := torch==2.13.0

.PHONY: setup demo test test-all lint types arrows check docs notebooks bench clean
.DELETE_ON_ERROR:

setup: .venv/.ready

# A machine without a GPU takes the CPU build of torch first: a plain `torch` brings gigabytes of CUDA packages.
.venv/.ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1 || $(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[dev,server,mcp]'
	$(BIN)/l2m models pull
	touch $@

demo: .venv/.ready
	$(BIN)/l2m demo

test: .venv/.ready
	$(BIN)/python -m pytest -n 2

test-all: .venv/.ready
	$(BIN)/python -m pytest -n 2 -m "not gpu"

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.ready
	$(BIN)/mypy

arrows: .venv/.ready
	$(BIN)/lint-imports

check: lint types arrows test

notebooks: .venv/.ready
	$(BIN)/python -m pip install --quiet --editable '.[notebooks]'
	cd notebooks && ../$(BIN)/jupytext --to ipynb --execute *.py

docs: .venv/.ready
	$(BIN)/typer l2m_rag.cli.main utils docs --name l2m --output docs/cli-reference.md

bench: .venv/.ready
	$(BIN)/l2m bench ingest
	$(BIN)/l2m bench search
	$(BIN)/l2m bench ask

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache
