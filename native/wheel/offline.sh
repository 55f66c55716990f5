#!/usr/bin/env bash
# The CUDA wheel on a machine without a package index. Run in the root of a checkout.
#
#   native/wheel/offline.sh pack DIR 3.12       where there is an index, after `make wheel`; 3.12: the other's Python
#   native/wheel/offline.sh build DIR 90-real   on the other machine, with the same checkout and DIR (about 60 MB)
#
# `build` makes dist/fasa_gguf_cuda-*.whl, installs it and what it needs from DIR into build/offline-env, a fresh
# environment, and runs the smoke test on the GPU. That machine needs a C++ compiler, nvcc and cuBLAS of CUDA 13, cmake,
# and Python 3.12; PYTHON=... names another program than python3.
set -euo pipefail
python=${PYTHON:-python3}

# A fresh environment build/$1 with these packages. pip is DIR's: that Python may lack it.
environment() {
    "$python" -m venv --clear --without-pip "build/$1"
    "build/$1/bin/python" "$pip" install -q --no-index --find-links "$folder" "${@:2}"
}

case ${1:-}${3:+ ok} in
"pack ok")
    folder=$2
    own=$(ls dist/fasa_gguf-*.whl)
    rm -rf "$folder" && mkdir -p "$folder"
    "$python" patches/queue.py prepare build/offline-tree/llama.cpp-src
    tar -C build/offline-tree -cJf "$folder/tree.tar.xz" llama.cpp-src
    platforms=()
    tags=$(grep -o 'manylinux_[0-9_]*[0-9]' <<<"$own" || true)
    for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 $tags; do
        platforms+=(--platform "${tag}_x86_64")
    done
    "$python" -m pip download -q --only-binary=:all: --python-version "$3" --implementation cp "${platforms[@]}" \
        -d "$folder" "$own" pip 'scikit-build-core>=0.10' ninja
    du -sh "$folder"
    ;;
"build ok")
    folder=$(cd "$2" && pwd)
    pip=$(echo "$folder"/pip-*.whl)/pip # Python runs a wheel's package as it lies
    export PIP_NO_INDEX=1 # where the checkout is another one, its source would be fetched
    mkdir -p build/wheel-cuda-objects
    tar -C build/wheel-cuda-objects -xJf "$folder/tree.tar.xz"
    rm -f dist/fasa_gguf_cuda-*.whl
    environment offline-build pip scikit-build-core ninja
    CMAKE_ARGS="-DCMAKE_CUDA_ARCHITECTURES=$3" build/offline-build/bin/python -m pip wheel -q --no-build-isolation \
        --no-deps -C build-dir="$PWD/build/wheel-cuda-objects" -w dist native/wheel
    ls -l dist
    environment offline-env fasa_gguf
    # CUDA's libraries are the machine's
    build/offline-env/bin/python "$pip" install -q --no-deps dist/fasa_gguf_cuda-*.whl
    build/offline-env/bin/python tests/wheels/smoke.py --gpu
    ;;
*)
    sed -n '2,9p' "$0" >&2
    exit 2
    ;;
esac
