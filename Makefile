# Every target sets up its own environment: on a fresh machine `make demo` or `make test` is the only command needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# One thread per test worker: two workers with two threads each would fight over two cores.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: help demo bench-small zoo test lint types format check clean

help:
	@echo "make demo    set up, then search a small network on embedded data (a minute or two)"
	@echo "make bench-small  the small table of strategies on real data (hours; resumes); ARGS='--task cifar10' chooses"
	@echo "make test    set up, then run the test suite; ARGS='tests/test_cli.py -x' chooses"
	@echo "make zoo     set up, then try every model of benchmarks/zoo, beside torch-pruning, and write docs/zoo.md; ARGS='--filter timm:*vit*' chooses"
	@echo "make lint    ruff check and ruff format --check"
	@echo "make types   mypy on dmscale"
	@echo "make format  let ruff rewrite the files"
	@echo "make check   lint, types and test, as CI does"
	@echo "make clean   remove the environment and caches"

# The user's installation: the package with plots.  torch comes first and alone, so that a CPU build that pip can find
# is kept; a later package that asked for torch by itself would pull the CUDA libraries.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e ".[plot]"
	touch $@

# The developer's: every extra and every tool.
$(VENV)/.dev-installed: $(VENV)/.installed
	$(PIP) install -q -c constraints.txt -e ".[dev]"
	touch $@

# The zoo's: other model libraries, and torch-pruning to compare with.
$(VENV)/.zoo-installed: $(VENV)/.dev-installed
	$(PIP) install -q -c constraints.txt -e ".[dev,zoo]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m dmscale demo $(ARGS)

# Real data in $DMSCALE_DATA, or in ../shared/data.  A run that is finished is not repeated.
bench-small: $(VENV)/.dev-installed
	$(BIN)/python -m benchmarks.real --size small --strategies main --headline --seeds 3 --out runs/real $(ARGS)

test: $(VENV)/.dev-installed
	$(PYTEST) -q $(ARGS)

zoo: $(VENV)/.zoo-installed
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m benchmarks.zoo --peers --jobs $(WORKERS) $(ARGS)

lint: $(VENV)/.dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev-installed
	$(BIN)/mypy

format: $(VENV)/.dev-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint types test

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
