# Needs Python >= 3.10, a C++ compiler and a package index; everything else is installed into .venv.
PYTHON ?= python3
JOBS   ?= $(shell $(PYTHON) -c 'import os; print(os.cpu_count())')
VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip install -q --disable-pip-version-check
CMAKE  := $(VENV)/bin/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja \
          -DPython3_EXECUTABLE=$(CURDIR)/$(PY)
PIN    := $(shell sed -n 's/^version = //p' patches/UPSTREAM)
MODEL  := models/cache/SmolLM2-135M-Instruct.Q4_1.gguf

help:
	@echo 'make demo   set everything up, then show dense beside FASA on a small model'
	@echo 'make test   the test-suite'
	@echo 'make build  the native library, into fasa_gguf/lib'
	@echo 'make stock  the unpatched library with the same flags, into build/stock-lib'
	@echo 'make upstream-tests  the own tests of the pinned llama.cpp, against the patched library'
	@echo 'make check  does the patch queue apply'
	@echo 'make lint   ruff, mypy and clang-format; `make format` writes what they want'
	@echo 'make tables writes the C side of settings, counters and reasons anew, from the Python tables'
	@echo 'make compare OTHER=DIR  does this checkout compute what another one does, bit for bit'

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) cmake ninja
	$(PIP) llama-cpp-python==$(PIN) --config-settings=cmake.args=-DLLAMA_BUILD=OFF
	$(PIP) 'cffi>=1.16' 'matplotlib>=3.7' 'numpy>=1.24' 'tqdm>=4.60' 'pytest>=7.4' 'gguf>=0.19'
	@touch $@

build/native/build.ninja: $(VENV)/.ready
	$(CMAKE) -S . -B build/native $(CMAKE_ARGS)

build: build/native/build.ninja
	$(VENV)/bin/cmake --build build/native -j $(JOBS)
	$(VENV)/bin/cmake --install build/native --prefix . --component fasa

stock: $(VENV)/.ready
	$(CMAKE) -S . -B build/stock -DFASA_PATCHED=OFF $(CMAKE_ARGS)
	$(VENV)/bin/cmake --build build/stock -j $(JOBS)
	$(VENV)/bin/cmake --install build/stock --prefix build/stock-lib --component fasa

upstream-tests: build $(MODEL)
	$(CMAKE) -S . -B build/upstream-tests -DFASA_UPSTREAM_TESTS=ON $(CMAKE_ARGS)
	$(VENV)/bin/cmake --build build/upstream-tests -j $(JOBS) --target test-llama-archs test-save-load-state
	build/upstream-tests/bin/test-llama-archs
	build/upstream-tests/bin/test-save-load-state -m $(MODEL)
	mkdir -p build/archs
	build/upstream-tests/bin/test-llama-archs -s 1 -o build/archs
	$(PY) -m pytest -q tests/native/test_archs.py

$(MODEL): $(VENV)/.ready
	$(PY) models/fetch.py $@

demo: build $(MODEL)
	$(PY) -m fasa_gguf.cli.demo $(MODEL)

# TEST_EXTRAS: packages of the optional extras; without torch and transformers their tests skip, and say so
test: build stock $(MODEL)
	$(if $(TEST_EXTRAS),$(PIP) $(foreach p,$(TEST_EXTRAS),'$(p)'))
	$(PY) -m pytest -q -rs

check: $(VENV)/.ready
	$(PY) patches/queue.py check

# pinned: another version formats otherwise
$(VENV)/.lint: $(VENV)/.ready
	$(PIP) ruff==0.17.6 mypy==2.4.1 clang-format==23.1.5
	@touch $@

NATIVE := $(shell find native -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
PYTHONS := fasa_gguf tests patches models native

lint: $(VENV)/.lint
	$(VENV)/bin/ruff check $(PYTHONS)
	$(VENV)/bin/ruff format --check $(PYTHONS)
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(NATIVE)

format: $(VENV)/.lint
	$(VENV)/bin/ruff check --fix $(PYTHONS)
	$(VENV)/bin/ruff format $(PYTHONS)
	$(VENV)/bin/clang-format -i $(NATIVE)

tables: $(VENV)/.ready
	$(PY) native/generate.py

compare: $(VENV)/.ready
	$(PY) tests/helpers/compare_checkouts.py $(OTHER)

.PHONY: help build stock upstream-tests demo test check lint format tables compare
