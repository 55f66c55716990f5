"""Compile our CUDA kernels for every kind of GPU that the wheel names, without a GPU: `make cuda-check`.

Needs nvcc and a prepared source (`make build`). cuBLAS's headers may lie elsewhere: --include DIR, or with make
NVCC_APPEND_FLAGS=-IDIR. Prints a line for every file and GPU: seconds, the most registers of a kernel and how many of
its kernels spill; exits 1 where one does not compile. What compiles may still be wrong on that GPU: it is not run.
"""

import argparse
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ARCHS = ("75", "80", "86", "89", "90", "120a")  # 120a: what ggml makes of 120
FLAGS = ["-std=c++17", "-O3", "-use_fast_math", "-extended-lambda", "-DGGML_USE_FASA", "-DNDEBUG", "-Xptxas=-v"]


def source():
    """The first prepared tree of llama.cpp that is there."""
    for name in ("native", "wheel-objects", "portable"):
        tree = ROOT / "build" / name / "llama.cpp-src"
        if tree.exists():
            return tree
    sys.exit("compile_kernels.py: no prepared llama.cpp source; run `make build`")


def usage(text):
    """(kernels, the most registers of one, kernels that spill) of what ptxas -v says."""
    registers = [int(x) for x in re.findall(r"Used (\d+) registers", text)]
    spilled = [int(x) for x in re.findall(r"(\d+) bytes spill stores", text)]
    return len(registers), max(registers, default=0), sum(x > 0 for x in spilled)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--archs", default=",".join(ARCHS), help="compute capabilities, joined with commas [%(default)s]")
    ap.add_argument("--include", action="append", default=[], help="more folders of headers")
    ap.add_argument("--only", default="", help="one file, as fac.cu")
    a = ap.parse_args()
    nvcc, tree, out = shutil.which("nvcc"), source(), ROOT / "build" / "cuda-check"
    if nvcc is None:
        sys.exit("compile_kernels.py: no nvcc in PATH")
    out.mkdir(parents=True, exist_ok=True)
    ggml = tree / "ggml"
    folders = (ggml / "include", ggml / "src", ggml / "src" / "ggml-cuda", ROOT / "native", *a.include)
    flags = [*FLAGS, *(f"-I{folder}" for folder in folders)]
    failed = []
    for path in sorted((ROOT / "native" / "cuda").glob("*.cu")):
        if a.only not in ("", path.name):
            continue
        for i, arch in enumerate(a.archs.split(",")):
            # the host's side is the same for all of them
            what = ["-c", "-o", str(out / f"{path.stem}.o")] if i == 0 else ["-cubin", "-o", str(out / "kernels.cubin")]
            start = time.monotonic()
            command = [nvcc, *flags, f"-gencode=arch=compute_{arch},code=sm_{arch}", *what, str(path)]
            done = subprocess.run(command, capture_output=True, text=True)
            kernels, registers, spilled = usage(done.stderr)
            said = f"{kernels} kernels, at most {registers} registers, {spilled} spill" if kernels else "no kernels"
            if done.returncode:
                said = "FAILED"
                failed.append(f"{path.name} for {arch}")
                print(done.stderr, file=sys.stderr)
            print(f"{path.name:<18} sm_{arch:<5} {time.monotonic() - start:5.0f} s  {said}", flush=True)
    if failed:
        sys.exit(f"compile_kernels.py: {len(failed)} do not compile: {', '.join(failed)}")


if __name__ == "__main__":
    main()
