#!/usr/bin/env bash
# The CUDA wheel on a machine without a package index. Run in the root of a checkout.
#
#   packaging/cuda/offline.sh pack DIR 3.12         where there is an index, after `make wheel`; 3.12: the other's Python
#   packaging/cuda/offline.sh build DIR 90-real     on the other machine, with this checkout and DIR (about 35 MB)
#
# `build` makes dist/fasa_gguf_cuda-*.whl, installs it and DIR's wheels into build/offline-env, and runs the smoke test
# on the GPU. That machine needs a C++ compiler, nvcc and cuBLAS of CUDA 13, and a Python with scikit-build-core, cmake,
# ninja, numpy, matplotlib, tqdm, jinja2 and typing-extensions.
set -euo pipefail
folder=$2
case $1 in
pack)
    rm -rf "$folder" && mkdir -p "$folder"
    python3 patches/queue.py prepare build/offline-tree/llama.cpp-src
    tar -C build/offline-tree -cJf "$folder/tree.tar.xz" llama.cpp-src
    cp dist/fasa_gguf-*.whl "$folder"
    platforms=(--platform "manylinux_2_28_x86_64" --platform "manylinux_2_17_x86_64" --platform "manylinux2014_x86_64")
    python3 -m pip download -q --no-deps --only-binary=:all: --python-version "$3" --implementation cp \
        "${platforms[@]}" -d "$folder" cffi pycparser gguf diskcache
    ;;
build)
    mkdir -p build/wheel-cuda-objects
    tar -C build/wheel-cuda-objects -xJf "$folder/tree.tar.xz"
    rm -f dist/fasa_gguf_cuda-*.whl
    CMAKE_ARGS="-DCMAKE_CUDA_ARCHITECTURES=$3" python3 -m pip wheel -q --no-build-isolation --no-deps --no-index \
        -C build-dir="$PWD/build/wheel-cuda-objects" -w dist packaging/cuda
    ls -l dist
    python3 -m venv --clear build/offline-env
    env=build/offline-env/bin/python
    python3 -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
        >"$($env -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/behind.pth" # its numpy and the like
    $env -m pip install -q --no-index --no-deps --ignore-installed "$folder"/*.whl dist/fasa_gguf_cuda-*.whl
    $env tests/wheels/smoke.py --gpu
    ;;
*)
    sed -n '2,10p' "$0"
    exit 2
    ;;
esac
