# `make demo` and `make test` set up everything they need; the rest assumes nothing more.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# bytecode is made of what is imported, when it is
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
# the pin first: an open range would fetch another build of torch
TORCH := torch==2.13.0
export LOGRA_KERNELS_JOBS ?= $(shell nproc 2>/dev/null || echo 2)
# processes that share the tests; threads that wait let the others work
TESTERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 4 ? n : 4)))
SOURCES := $(shell find csrc python -type f 2>/dev/null) setup.py pyproject.toml

.PHONY: demo test test-isa test-sanitized lint format bench test-gpu bench-gpu in-place wheel clean

demo: $(VENV)/demo.stamp
	$(BIN)/logra demo

test: $(VENV)/test.stamp
	$(BIN)/python -c "import torch, logra_kernels._C as c; print('C++ kernels built, instruction set', c.isa())"
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(TESTERS) --dist worksteal

# The kernels of instruction sets that this machine lacks, run in plain C++: a quarter of an hour. SETS: some of them.
test-isa: $(VENV)/test.stamp
	$(BIN)/python tests/isa.py $(SETS)

# The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer: six minutes.
test-sanitized: $(VENV)/test.stamp
	$(BIN)/python tests/sanitized.py

lint: $(VENV)/test.stamp $(VENV)/lint.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc python \( -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh' \) -print0 \
	  | xargs -0 $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/lint.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc python \( -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh' \) -print0 | xargs -0 $(BIN)/clang-format -i

bench: $(VENV)/test.stamp
	mkdir -p build
	$(BIN)/python -m pytest bench --benchmark-json=build/bench.json
	$(BIN)/python bench/record.py build/bench.json

# On a machine with a CUDA device, in its own Python: builds in place and installs nothing. Either is done in 8 minutes.
# TESTS: some of the tests; PARTS: some of the parts, as "--only resident,topk".
test-gpu: in-place
	$(PYTHON) tests/gpu.py $(TESTS)

bench-gpu: in-place
	PYTHONPATH=.:tests:$$PYTHONPATH $(PYTHON) bench/bench_gpu.py $(PARTS)

in-place:
	$(PYTHON) -c "import numpy, pyarrow, pytest, safetensors, torch, tqdm, xxhash"
	$(PYTHON) setup.py --quiet build_ext --inplace

wheel: $(VENV)/build.stamp
	$(PIP) build
	$(BIN)/python -m build --wheel

clean:
	rm -rf build dist *.egg-info $(VENV) demo-out
	find logra_kernels -name '*.so' -delete

$(VENV)/build.stamp:
	$(PYTHON) -m venv $(VENV)
	$(PIP) 'setuptools>=77' 'pybind11>=3.0,<4'
	touch $@

# without isolation: a build environment of its own would fetch torch's neighbours again
INSTALL = $(PIP) "$(TORCH)" && LOGRA_KERNELS_CPP=0 LOGRA_KERNELS_CUDA=0 $(PIP) --no-build-isolation -e

# the kernels are built in place while pip fetches
$(VENV)/demo.stamp $(VENV)/test.stamp: $(VENV)/%.stamp: $(VENV)/build.stamp $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace & kernels=$$!; $(INSTALL) '.[$*]' && wait $$kernels
	touch $@

$(VENV)/lint.stamp: $(VENV)/build.stamp pyproject.toml
	$(INSTALL) '.[lint]'
	touch $@
