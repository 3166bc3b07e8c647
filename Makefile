# make setup | demo | test | lint | fix | bench-smoke. Inside a virtual environment that is used,
# else .venv is made. TORCH chooses the torch to install: make setup TORCH="torch==2.12.0"
#
# After the first line of setup, `python -m` is avoided: it puts the repository root on sys.path, where the folder
# triton_kernels/ would shadow another project's package of that name.

TORCH ?= torch==2.13.0
PYTHON ?= python3
EXTRAS ?= demo,dev,math,peft,data,tracking
VENV := $(or $(VIRTUAL_ENV),$(CURDIR)/.venv)
BIN := $(VENV)/bin
STAMP := $(VENV)/.cppo-setup
SOURCES := $(shell find csrc -type f)

.PHONY: setup demo test lint fix bench-smoke

setup: $(STAMP)

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

# torch first: the extension is built against it, and nothing later may replace it.
$(STAMP): pyproject.toml setup.py $(SOURCES) | $(BIN)/pip
	$(BIN)/pip install $(PIP_OPTIONS) "$(TORCH)" "setuptools>=77" wheel "pybind11>=2.13"
	$(BIN)/pip install $(PIP_OPTIONS) --no-build-isolation -e ".[$(EXTRAS)]"
	touch $@

demo: setup
	$(BIN)/cppo demo

test: setup
	$(BIN)/pytest $(PYTEST_OPTIONS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-smoke: setup
	$(BIN)/python benchmarks/bench_host_ops.py --smoke
