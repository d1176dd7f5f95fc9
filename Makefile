# `make train` and `make test` start from a bare machine: git, python3 (3.11 to 3.13), a C++ compiler, a package index.
# Another interpreter: make PYTHON=python3.12 ... ; an environment that is already there: make gpu PYTHON=python3

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
COMPAT := .venv-compat
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export TOKENIZERS_PARALLELISM := false

NATIVE_SOURCES := CMakeLists.txt $(wildcard csrc/*.cpp csrc/*.h $(foreach kind,h cpp cu cuh,csrc/*/*.$(kind)))
INSTALL_INPUTS := pyproject.toml setup.py constraints.txt python/fuselora/_version.py $(NATIVE_SOURCES)
PYTEST := -m pytest -n 2

# Given PY on the command line, nothing is installed and the package is taken from the checkout.
ifeq ($(origin PY),command line)
SETUP :=
export PYTHONPATH := $(CURDIR)/python
else
SETUP := $(VENV)/.installed
endif

.PHONY: setup train test aot test-peft test-transformers test-compat bench bench-all gate lint format native sanitize gpu gpu-smoke \
	dist-check arm64 clean

setup: $(SETUP)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(INSTALL_INPUTS) | $(VENV)/bin/python
	FUSELORA_EMULATE_AMX=1 $(PY) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(PY) -c "from fuselora.kernels import native; print(native.reason() or 'native ops: ready')"
	touch $@

train: $(SETUP)
	$(PY) train.py examples/quickstart.yaml

# The kernels' tests run twice: with the Triton kernels in Triton's interpreter, then, with everything else, natively.
test: $(SETUP)
	status=0; \
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PY) $(PYTEST) tests/kernels || status=$$?; \
	OMP_NUM_THREADS=1 $(PY) $(PYTEST) || status=$$?; \
	exit $$status

# Every Triton kernel on every architecture, dtype and workload, with instruction counts: build/gpu/aot.md.
aot: $(SETUP)
	FUSELORA_AOT=full OMP_NUM_THREADS=1 $(PY) $(PYTEST) tests/gpu/test_aot.py

# PEFT's own test suite on patched models, judged against the same suite on stock PEFT.
test-peft: $(VENV)/.peft-suite
	OMP_NUM_THREADS=1 $(PY) tests/outside/run_peft.py

# transformers' model tests on patched families, judged the same way.
test-transformers: $(VENV)/.peft-suite
	OMP_NUM_THREADS=1 $(PY) tests/outside/run_transformers.py

$(VENV)/.peft-suite: $(SETUP)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[dev,peft-suite]'
	touch $@

# Wheel and source distribution: built, compared with what belongs in them, installed and run without a compiler.
dist-check: $(SETUP)
	$(PY) tests/outside/dist_check.py

# The library and its C tests for 64-bit ARM, the scalar kernels alone. Compiled with zig's clang, not run.
ZIG := $(CURDIR)/build/arm64/zig/bin/python -m ziglang
arm64:
	test -x build/arm64/zig/bin/python || $(PYTHON) -m venv build/arm64/zig
	build/arm64/zig/bin/python -m pip install --quiet ziglang
	CC="$(ZIG) cc -target aarch64-linux-gnu" CXX="$(ZIG) c++ -target aarch64-linux-gnu" \
		cmake -S . -B build/arm64/native -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
		-DFUSELORA_CUDA=OFF -DFUSELORA_TESTS=ON -DFUSELORA_OUTPUT_DIR=$(CURDIR)/build/arm64/lib
	cmake --build build/arm64/native --parallel

# The whole suite on the CPU, about 20 minutes: build/bench/report.md.
bench-all: $(SETUP)
	$(PY) bench/bench_all.py

# Slower, larger or wrong against the merge base (the commit before, on main)? A few rounds; more: bench/gate.py --rounds.
gate: $(SETUP)
	$(PY) bench/gate.py --rounds 8

# The oldest supported transformers and Triton in an environment of their own: what binds to transformers and PEFT, and
# the Triton kernels, compiled for the architectures with the most different limits.
test-compat: $(COMPAT)/.installed
	OMP_NUM_THREADS=1 $(COMPAT)/bin/python $(PYTEST) tests/engine tests/parity
	OMP_NUM_THREADS=1 $(COMPAT)/bin/python $(PYTEST) tests/gpu/test_aot.py -k '90 or 120'

# Builds of torch with CUDA insist on one Triton, so it is installed around them.
OLD_TRITON := $(COMPAT)/bin/python -m pip install --quiet --no-deps $(shell grep '^triton==' constraints-compat.txt)

$(COMPAT)/.installed: $(INSTALL_INPUTS) constraints-compat.txt | $(SETUP)
	test -x $(COMPAT)/bin/python || $(PYTHON) -m venv $(COMPAT)
	awk -F '==' '$$1 == "triton" {next} NR == FNR {override[$$1]; print; next} !($$1 in override)' \
		constraints-compat.txt constraints.txt > $(COMPAT)/constraints.txt
	$(OLD_TRITON)
	FUSELORA_SKIP_NATIVE=1 $(COMPAT)/bin/python -m pip install --quiet \
		--constraint $(COMPAT)/constraints.txt --editable '.[dev]'
	$(OLD_TRITON)
	touch $@

bench: $(SETUP)
	$(PY) bench/train_step.py --preset cpu

lint: $(SETUP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(SETUP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# Builds csrc/ into python/fuselora/_lib and runs its C tests under every instruction set.
native: $(SETUP)
	cmake -S . -B build/native -DFUSELORA_TESTS=ON -DFUSELORA_EMULATE_AMX=ON
	cmake --build build/native --parallel
	ctest --test-dir build/native --output-on-failure

# The CPU library with AddressSanitizer and UndefinedBehaviorSanitizer: its C tests under every instruction set, the native
# tests, and FUZZ_SECONDS of random shapes and strides. Leaks are not looked for: Python's own would drown ours.
FUZZ_SECONDS ?= 60
SANITIZED := build/sanitize/lib/libfuselora_cpu.so
SANITIZERS = $(foreach name,asan ubsan,$(shell $(CC) -print-file-name=lib$(name).so))
sanitize: $(SETUP)
	cmake -S . -B build/sanitize -DFUSELORA_SANITIZE=address,undefined -DFUSELORA_TESTS=ON -DFUSELORA_CUDA=OFF \
		-DFUSELORA_OUTPUT_DIR=$(CURDIR)/build/sanitize/lib
	cmake --build build/sanitize --parallel
	ASAN_OPTIONS=detect_leaks=0 ctest --test-dir build/sanitize --output-on-failure
	LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 FUSELORA_TEST_LIBRARY=$(CURDIR)/$(SANITIZED) \
		$(PY) tests/native/fuzz.py --seconds $(FUZZ_SECONDS)

# On a CUDA machine: build, GPU tests, measurements, in order of priority within BUDGET seconds; JSON under build/gpu.
# Given PYTHON on the command line, that interpreter runs them with what it has, and nothing is installed.
BUDGET ?= 540
ifeq ($(origin PYTHON),command line)
gpu gpu-smoke: GPU_PY := $(PYTHON)
gpu gpu-smoke:
else
gpu gpu-smoke: GPU_PY := $(PY)
gpu gpu-smoke: $(SETUP)
endif

gpu:
	$(GPU_PY) bench/gpu_suite.py --budget $(BUDGET)

# The same stages on tiny sizes, without a GPU.
gpu-smoke:
	$(GPU_PY) bench/gpu_suite.py --device cpu --smoke --out build/gpu-smoke

clean:
	rm -rf build dist saves $(VENV) $(COMPAT) python/fuselora/_lib python/fuselora.egg-info
	rm -rf .pytest_cache .ruff_cache .mypy_cache .benchmarks .hypothesis
