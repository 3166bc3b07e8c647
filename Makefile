# make setup | demo | test | test-vllm | bench | gpu | lint | fix | bench-smoke | docs. An active virtual
# environment is used, else .venv is made. A torch that is already there is kept; TORCH chooses the one to
# install, and PIP_OPTIONS goes to every pip (an index with smaller CPU builds of torch, for example),
# DEMO_OPTIONS to the demo (--overwrite: again, over the run that is there).
#
# Nothing runs by `python -m`: that puts the repository root on sys.path, where the folder
# triton_kernels/ would shadow another project's package of that name.

TORCH ?= torch==2.13.0
PYTHON ?= python3
EXTRAS ?= bench,demo,dev,math,peft,data,tracking,triton,trl
VENV := $(or $(VIRTUAL_ENV),$(CURDIR)/.venv)
BIN := $(VENV)/bin
# In the clone and named after the environment: another clone, or another environment, sets up anew.
STAMP := build/setup$(subst /,-,$(VENV))
SOURCES := $(shell find csrc -type f)

.PHONY: setup demo test test-vllm gpu lint fix bench bench-smoke docs

setup: $(STAMP)

$(BIN)/pip:
	cd / && $(PYTHON) -m venv $(VENV)

# torch first: the extension is built against it, and nothing later may replace it.
$(STAMP): pyproject.toml setup.py $(SOURCES) $(BIN)/pip
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install $(PIP_OPTIONS) "$(TORCH)"
	$(BIN)/pip install $(PIP_OPTIONS) "setuptools>=77" wheel "pybind11>=2.13"
	$(BIN)/pip install $(PIP_OPTIONS) --no-build-isolation -e ".[$(EXTRAS)]"
	mkdir -p $(dir $@) && touch $@

demo: setup
	$(BIN)/cppo demo $(DEMO_OPTIONS)

# A process per core, as long as there is memory for them: each holds torch. A file is run by one of
# them, which makes its fixtures once.
test: setup
	$(BIN)/pytest $(or $(PYTEST_OPTIONS),-n logical --maxprocesses 8 --dist loadfile)

# With a real vLLM, in an environment of its own, on a CPU: about 3.7 GB.
test-vllm:
	tests/run_vllm.sh $(PYTEST_OPTIONS)

# Everything that needs a GPU, in three parts of at most ten minutes; run again it goes on where it
# stopped. GPU_OPTIONS="--part kernels" runs one part. Says so where there is no GPU.
gpu: setup
	$(BIN)/cppo info
	$(BIN)/python benchmarks/gpu.py $(GPU_OPTIONS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/cppo bench $(BENCH_OPTIONS)

bench-smoke: setup
	$(BIN)/cppo bench --shapes toy
	$(BIN)/python benchmarks/gpu.py --toy --device cpu --fresh --output build/gpu-toy --part correctness steps

# The site, in build/site; a broken link, a missing anchor or a forgotten page is an error (not with
# --quiet, which counts no warnings). cppo is installed, so that pip adds what its extra needs and builds
# nothing.
docs: setup
	$(BIN)/pip install --quiet $(PIP_OPTIONS) "cppo[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
