# The first call makes .venv from requirements/venv.txt, which `make lock` writes: the same versions on any day.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VENVS := $(VENV) $(VENV)-oldest $(VENV)-newest
# A file's tests on one process: what they build once is built once.
TEST := bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
# uv leaves it to Python to compile what it installs; where that is not kept, each process that a test starts does it anew.
unexport PYTHONDONTWRITEBYTECODE

# Rebuilds what an edit concerns, without network; every target below does so first.
build: $(VENV)/ready

.PHONY: build demo test test-slow test-oldest test-newest lint docs models bench lock

demo: $(VENV)/ready
	$(BIN)/python -m bench.demo

test: $(VENV)/ready
	$(VENV)/$(TEST)

# What versions could break, on the lowest that pyproject.toml allows and the newest there were at the last `make lock`.
test-oldest test-newest: test-%: $(VENV)-%/ready
	$(VENV)-$*/$(TEST) -m 'versions and not slow and not gpu'

test-slow: $(VENV)/ready
	$(BIN)/python -m pytest -q -m slow

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(shell git ls-files '*.cpp' '*.cu' '*.h' '*.inc')

# The site of docs/ in site/, from an environment of its own; a link that leads nowhere is an error.
docs: $(VENV)-docs/locked
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --quiet --strict

# Minutes of both cores: on a machine that does nothing else. The raw file has every round's statistics.
bench: $(VENV)/ready
	mkdir -p .benchmarks
	$(BIN)/python -m pytest bench/test_guided_step.py -q --benchmark-quiet --benchmark-json=.benchmarks/guided_step.json
	$(BIN)/python -m bench.report .benchmarks/guided_step.json
	$(BIN)/python -m pytest bench/test_decoder.py bench/test_calls.py -q

models: $(VENV)/ready
	$(BIN)/python tools/bundled_models.py

# UPGRADE=--upgrade moves every version of .venv, UPGRADE='--upgrade-package NAME' one; the newest move in any case.
lock: $(VENV)/locked
	$(LOCK) --extra dev $(UPGRADE) --output-file requirements/venv.txt
	$(LOCK) --extra dev --upgrade --output-file requirements/venv-newest.txt
	$(LOCK) --extra train --upgrade --resolution lowest-direct --fork-strategy fewest \
		--output-file $(VENV)/lowest.txt
	$(LOCK) --extra dev --upgrade --constraint $(VENV)/lowest.txt --output-file requirements/venv-oldest.txt
	$(subst pyproject.toml,--group docs,$(LOCK)) $(UPGRADE) --output-file requirements/venv-docs.txt

LOCK = $(BIN)/uv pip compile pyproject.toml --quiet --universal --python-version 3.10 --generate-hashes --no-annotate \
	--custom-compile-command 'make lock' --constraint requirements/torch.txt --no-emit-package torch

INSTALL = $(@D)/bin/python -m pip install --quiet --disable-pip-version-check
LOCKED = --no-deps --only-binary :all: --require-hashes

# uv installs in seconds what pip takes minutes for. Pip does what uv cannot: torch, of which a machine may keep a build
# of its own, and everything where pip's configuration alone says how packages are reached.
$(VENVS:=/locked): .%/locked: requirements/%.txt requirements/torch.txt
	$(PYTHON) -m venv --clear $(@D)
	sed -n '/^uv==/,/[^\\]$$/p' $< >$(@D)/uv.txt
	$(INSTALL) $(LOCKED) --requirement $(@D)/uv.txt
	$(@D)/bin/uv pip install --quiet --python $(@D) $(LOCKED) --requirement $< || $(INSTALL) $(LOCKED) --requirement $<
	$(INSTALL) --requirement requirements/torch.txt
	touch $@

$(VENV)-docs/locked: requirements/venv-docs.txt
	$(PYTHON) -m venv --clear $(@D)
	$(INSTALL) --no-deps --only-binary :all: --requirement $<
	touch $@

# Without an index: what pyproject.toml asks for and the lock has not is an error.
$(VENVS:=/ready): %/ready: %/locked pyproject.toml setup.py $(shell find csrc -type f)
	$(INSTALL) --no-index --no-build-isolation --editable '.[dev]'
	touch $@
