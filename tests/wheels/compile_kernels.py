"""Compile our CUDA kernels for every kind of GPU that the wheel names, without a GPU: `make cuda-check`.

Needs nvcc and a prepared source (`make build`). cuBLAS's headers may lie elsewhere: --include DIR. Prints seconds by
file, and exits 1 where one does not compile. What compiles may still be wrong on that GPU: it is not run.
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ARCHS = ("75", "80", "86", "89", "90", "120a")  # 120a: what ggml makes of 120


def source():
    """The first prepared tree of llama.cpp that is there."""
    for name in ("native", "wheel-objects", "portable"):
        tree = ROOT / "build" / name / "llama.cpp-src"
        if tree.exists():
            return tree
    sys.exit("compile_kernels.py: no prepared llama.cpp source; run `make build`")


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
    flags = ["-std=c++17", "-O3", "-use_fast_math", "-extended-lambda", "-DGGML_USE_FASA", "-DNDEBUG"]
    flags += [f"-gencode=arch=compute_{x},code=sm_{x}" for x in a.archs.split(",")]
    for folder in (ggml / "include", ggml / "src", ggml / "src" / "ggml-cuda", ROOT / "native", *a.include):
        flags.append(f"-I{folder}")
    failed = []
    for path in sorted((ROOT / "native" / "cuda").glob("*.cu")):
        if a.only in ("", path.name):
            start = time.monotonic()
            command = [nvcc, *flags, "-c", str(path), "-o", str(out / f"{path.stem}.o")]
            done = subprocess.run(command, capture_output=True, text=True)
            state = "ok" if done.returncode == 0 else "FAILED"
            print(f"{path.name:<16} {state:<6} {time.monotonic() - start:6.0f} s   sm_{a.archs}", flush=True)
            if done.returncode:
                failed.append(path.name)
                print(done.stderr, file=sys.stderr)
    if failed:
        sys.exit(f"compile_kernels.py: {len(failed)} of our kernels do not compile: {', '.join(failed)}")


if __name__ == "__main__":
    main()
