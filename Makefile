# Needs Python 3.11 or newer, a C++20 compiler and a package index; everything else is installed into .venv.
PYTHON ?= python3
PYTEST_ARGS ?=
BIN := .venv/bin
READY := .venv/.ready
NATIVE := CMakeLists.txt $(shell find csrc -type f)

# The first pins what runs, for old pips also what builds; new pips want the second for that.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo demo-s3 test test-heavy check format bench sanitize native-plain native-address native-thread clean

demo: $(READY)
	$(BIN)/python -m benchmarks.demo

# The same through an S3 server of its own.
demo-s3: $(READY)
	$(BIN)/python -m benchmarks.s3_server $(BIN)/python -m benchmarks.demo --root s3://demo/runs

test: $(READY)
	$(BIN)/python -m pytest -q $(PYTEST_ARGS)

# Minutes, and Ceph's daemons: .ci/system-packages installs them.
test-heavy: $(READY)
	$(BIN)/python -m pytest -q --heavy tests/storage tests/end_to_end $(PYTEST_ARGS)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict dscheck
	$(BIN)/lint-imports --no-logo
	$(BIN)/clang-format --dry-run -Werror $(filter %.cpp %.h %.cu,$(NATIVE))
	$(MAKE) test

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(filter %.cpp %.h %.cu,$(NATIVE))

bench: $(READY)
	$(BIN)/python -m benchmarks

# The tests of the native core, plainly and under sanitizers: with CMake and a compiler, without Python or a GPU.
sanitize: native-plain native-address native-thread

native-address: SANITIZE := address,undefined
native-thread: SANITIZE := thread
native-plain native-address native-thread:
	cmake -S . -B build/$@ -DDSCHECK_TESTS=ON -DDSCHECK_SANITIZE=$(SANITIZE) -DCMAKE_BUILD_TYPE=RelWithDebInfo
	cmake --build build/$@ --parallel
	ctest --test-dir build/$@ --output-on-failure --parallel 2

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# Editable: Python files are read in place, so only the build's own inputs make it stale.
$(READY): pyproject.toml constraints.txt $(filter-out csrc/tests/%,$(NATIVE))
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -e '.[test,dev]'
	touch $@
