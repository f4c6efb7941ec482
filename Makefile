# The verbs people type. `make test` and `make demo` make the environment first, where it is missing.
PYTHON ?= python3
BIN := .venv/bin
CPP := $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'csrc/*.inc' 2>/dev/null)

.PHONY: env demo test test-all bench gpu-check lint format clean

env: .venv/.installed

# torch comes first and the package is built against it: with build isolation pip would fetch a second torch.
.venv/.built: pyproject.toml setup.py cuda_build.py $(CPP)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "dlfast needs Python 3.10 or later")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip 'setuptools>=77' wheel ninja
	$(BIN)/pip install --quiet 'torch>=2.9' torchvision
	$(BIN)/pip install --no-build-isolation --verbose -e '.[train]' > .venv/build.log 2>&1 || { tail -n 50 .venv/build.log; exit 1; }
	@grep -o 'dlfast: built for .*' .venv/build.log | tail -n 1
	@touch $@

# What tests and tools need beside the package, which is installed already and so is not built a second time.
.venv/.installed: .venv/.built
	$(BIN)/pip install --quiet 'dlfast[dev]'
	@touch $@

demo: .venv/.built
	$(BIN)/dlfast demo

test: env
	$(BIN)/python -m pytest -n auto

# Also the kernels at every SIMD level of this CPU, plans as on other CPUs, and every model of torchvision.
test-all: test
	.ci/cpus
	DLFAST_ZOO=all $(BIN)/python -m pytest -n auto tests/fusion/test_zoo.py

# `make bench TARGETS="layers"` measures something else; benchmarks/README.md has the list.
bench: env
	$(BIN)/dlfast bench --out benchmarks/results $(TARGETS)

# On a machine with a GPU; results go to bench/gpu, and a second run goes on with what has none. `make gpu-check
# VERBS="tests blocks"` does a part of it; docs/cuda.md has the list.
gpu-check: env
	$(BIN)/python -m tools.cuda.gpu_check $(VERBS)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/python -m tools.seams

format: env
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf .venv build dlfast/_C.*.so dlfast/_build_info.json
