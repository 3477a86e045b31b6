# The first call makes .venv. torch comes first and pinned: alone it is the CPU build where the machine's index has one,
# and what depends on torch then takes it as it is.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow lint models bench

demo: $(VENV)/ready
	$(BIN)/python -m bench.demo

# A file's tests on one process: what they build once is built once.
test: $(VENV)/ready
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

test-slow: $(VENV)/ready
	$(BIN)/python -m pytest -q -m slow

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(shell git ls-files '*.cpp' '*.cu' '*.h' '*.inc')

# Minutes of both cores: on a machine that does nothing else. The raw file has every round's statistics.
bench: $(VENV)/ready
	mkdir -p .benchmarks
	$(BIN)/python -m pytest bench/test_guided_step.py -q --benchmark-quiet --benchmark-json=.benchmarks/guided_step.json
	$(BIN)/python -m bench.report .benchmarks/guided_step.json
	$(BIN)/python -m pytest bench/test_decoder.py -q

models: $(VENV)/ready
	$(BIN)/python -m genarm.bundled

$(VENV)/ready: pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/cpu/* csrc/cuda/* csrc/common/* csrc/include/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@
