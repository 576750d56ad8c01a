# make train    set up, then train AC/DC on Fashion-MNIST
# make test     set up, then run the tests that are not marked slow (about three minutes)
# make test-slow  the slow tests: real launches, two ranks, damaged data (several minutes more)
# make test-rare  the few slow ones that take longest
# make torture    runs killed, stopped, damaged, fed with nonsense; disks filled: counted; KILLS=100, 30 minutes
# make setup    the set-up alone: .venv with pinned dependencies
# make lint     ruff and mypy
# make sanitize the C++ kernels' tests under address and undefined-behaviour sanitizers
# make chromium the browser that some tests look at pages with (Debian, Ubuntu); without it they skip
# make docs     the documentation as a site, in site/
# make gpu-check  what needs a GPU: tests and all benchmarks, within 9 minutes, with what is installed;
#               less of it with ARGUMENTS="--only tests variants --seconds 200"

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
PARALLEL = --numprocesses auto --dist loadfile --no-loadscope-reorder --durations 10
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check

.PHONY: setup train test test-slow test-rare torture lint chromium docs sanitize claims gpu-check clean
setup: $(INSTALLED)

# First what one file serves on every machine, by its hash; then torch, whose build is the machine's; then the rest.
$(INSTALLED): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is %s; try make PYTHON=python3.11" % sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	grep -e '--hash=' constraints.txt > .venv/hashed.txt
	sed 's/ *--hash=.*//' constraints.txt > .venv/constraints.txt
	$(INSTALL) --no-deps --requirement .venv/hashed.txt
	$(INSTALL) --constraint .venv/constraints.txt torch
	$(INSTALL) --constraint .venv/constraints.txt --editable '.[dev]'
	@touch $@

train: setup
	$(BIN)/acdc train quickstart --devices 1

test: setup
	$(BIN)/python -m pytest -m "not slow and not rare" $(PARALLEL)

test-slow: setup
	$(BIN)/python -m pytest -m "slow and not rare" $(PARALLEL)

test-rare: setup
	$(BIN)/python -m pytest -m rare $(PARALLEL)

KILLS = 100
torture: setup
	$(BIN)/python -m tests.torture --kills $(KILLS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

SUDO = $(if $(filter 0,$(shell id -u)),,sudo)
chromium:
	command -v chromium || command -v chromium-browser || command -v google-chrome || \
	    { $(SUDO) apt-get update && $(SUDO) apt-get install --yes --no-install-recommends chromium fonts-dejavu-core; }

docs: setup
	PYTHONPATH=. NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Address and undefined-behaviour sanitizers over the C++ kernels, while their tests run
sanitize: setup
	CXXFLAGS='-g -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined' ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	$(BIN)/python -m pytest tests/sparsity/kernels/test_unstructured.py tests/sparsity/kernels/test_between.py \
		tests/sparsity/inference/test_graph.py

claims: setup
	$(BIN)/python -m benchmarks.quickstart

gpu-check:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu_check $(ARGUMENTS)

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
