"""ggml's f16 vectors on CPUs with AVX512: dense attention is as fast for heads of 80 and 96 as for 64 and 128."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from paths import ROOT

# With AVX512, upstream's steps: 64 values, with AVX512-FP16 128
X86 = {"x86-64-v3": (32, 32), "x86-64-v4": (16, 16), "sapphirerapids": (16, 16)}


def steps(arch, *flags):
    """GGML_F16_STEP and GGML_F16_DOT_STEP as ggml-cpu sees them."""
    ggml = ROOT / "build/native/llama.cpp-src/ggml"
    if not ggml.exists():
        pytest.skip("the pinned source is not there; run `make build`")
    text = '#include "simd-mappings.h"\nint f16[] = { GGML_F16_STEP, GGML_F16_DOT_STEP };\n'
    includes = [f"-I{ggml / folder}" for folder in ("include", "src", "src/ggml-cpu")]
    done = subprocess.run(
        ["c++", "-E", "-P", f"-march={arch}", *flags, *includes, "-x", "c++", "-"],
        input=text,
        capture_output=True,
        text=True,
    )
    if "march" in done.stderr:
        pytest.skip(f"this compiler has no -march={arch}")
    assert done.returncode == 0, done.stderr
    return tuple(int(x) for x in done.stdout.split("int f16[] = {")[1].split("}")[0].split(","))


@pytest.mark.skipif(not shutil.which("c++"), reason="no compiler")
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="not an x86 CPU")
@pytest.mark.parametrize("arch", X86)
def test_steps_divide_the_sizes_of_heads(arch):
    header = ROOT / "native/cpu/f16-step.h"
    assert steps(arch, "-include", str(header)) == X86[arch]
    if arch == "x86-64-v3":
        assert steps(arch) == X86[arch]  # other instruction sets are upstream's
    else:
        assert min(steps(arch)) >= 64  # not needed any more where upstream changes it


def test_dense_attention_is_as_fast_for_every_size_of_heads(library):
    """Per value of K and V; upstream's steps make heads of 80 and 96 about three times slower with AVX512."""
    if "avx512f" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("no AVX512")
    rng = np.random.default_rng(0)

    def seconds(d):
        kv = rng.standard_normal((1, library.ops.TIME_CELLS, 1, d)).astype(np.float32)
        times = library.ops.op_time(
            q=np.ones((1, 1, 2, d), np.float32),
            k=kv,
            v=kv,
            dims=np.arange(8)[None],
            weight=np.ones((1, 8)),
            forced=np.full((1, 1, 4), -1),
            budget=64,
            scale=d**-0.5,
            n_kv=2048,
            n_threads=1,
            n_layer=1,
            n_rep=40,
        )
        return times["dense"] / d

    best = {64: 9.0, 80: 9.0, 96: 9.0, 128: 9.0}
    for _ in range(5):
        best = {d: min(t, seconds(d)) for d, t in best.items()}
        if max(best.values()) < 1.6 * min(best.values()):
            return
    assert max(best.values()) < 2 * min(best.values()), best


def test_dot_products_of_any_length(library):
    ggml = ctypes.CDLL(str(library.library.find_library("ggml-cpu")))
    rng = np.random.default_rng(0)
    for n in (*range(1, 200), 4097):
        x, y = rng.standard_normal((2, n)).astype(np.float16)
        out = ctypes.c_float()
        pointers = (x.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(0), y.ctypes.data_as(ctypes.c_void_p))
        ggml.ggml_vec_dot_f16(n, ctypes.byref(out), ctypes.c_size_t(0), *pointers, ctypes.c_size_t(0), 1)
        exact = x.astype(np.float64) @ y.astype(np.float64)
        assert abs(out.value - exact) <= 1e-5 * (np.abs(x) @ np.abs(y).astype(np.float64) + 1e-3), n
