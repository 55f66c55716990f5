"""What the machine and the installation are: CPU, threads, GPUs, libraries, versions, patches, environment."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import FasaError
from ..runtime import backends, cpus, devices, library
from ..runtime.settings import thread_count

# ggml's name of an instruction set: the kernel's, in /proc/cpuinfo
INSTRUCTION_SETS = {
    "SSE3": "pni",
    "SSSE3": "ssse3",
    "AVX": "avx",
    "AVX2": "avx2",
    "AVX_VNNI": "avx_vnni",
    "F16C": "f16c",
    "FMA": "fma",
    "BMI2": "bmi2",
    "AVX512": "avx512f",
    "AVX512_VBMI": "avx512vbmi",
    "AVX512_VNNI": "avx512_vnni",
    "AVX512_BF16": "avx512_bf16",
    "AVX512_FP16": "avx512_fp16",
    "AMX_INT8": "amx_int8",
    "NEON": "asimd",
    "FP16_VA": "asimdhp",
    "DOTPROD": "asimddp",
    "MATMUL_INT8": "i8mm",
    "SVE": "sve",
    "SVE2": "sve2",
    "SME": "sme",
}
LEFT_OUT = ("AVX512_FP16", "AMX_INT8")  # by every build: docs/guide/install.md
PACKAGES = ("fasa_gguf", "llama-cpp-python", "gguf", "numpy", "cffi")
VARIABLES = re.compile(r"^(FASA|LLAMA|GGML|OMP|CUDA|MKL|OPENBLAS)_|^LD_LIBRARY_PATH$")
SECRET = re.compile(r"KEY|TOKEN|PASS|SECRET", re.I)


def facts() -> dict[str, Any]:
    """Everything that can be found out, in groups; an entry that cannot be is left out. Never raises FasaError."""
    out: dict[str, Any] = {
        "system": {"platform": platform.platform(), "python": platform.python_version()},
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "cpu": {"sets": sorted(name for name, flag in INSTRUCTION_SETS.items() if flag in cpus.flags())},
        "threads": _threads(),
        "gpu": _driver(),
        "libraries": _libraries(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if VARIABLES.match(k) and not SECRET.search(k)},
    }
    try:
        found, features = devices.devices(), devices.features()
    except FasaError:  # the check of the library says why
        return out
    used = features.pop("CPU", {})
    out["cpu"] |= {
        "name": ", ".join(d.description for d in found if d.name == "CPU"),
        "used": sorted(name for name in used if name in INSTRUCTION_SETS),
        "features": used,
        "unused": [x for x in out["cpu"]["sets"] if x not in used and x not in LEFT_OUT],
        "left_out": [x for x in LEFT_OUT if x in out["cpu"]["sets"] and x not in used],
    }
    out["gpu"] |= {
        "devices": [
            {"name": d.name, "description": d.description, "free": free, "total": total}
            for d in found
            if d.is_gpu
            for free, total in [_memory(d.name)]
        ],
        "backends": {name: values for name, values in features.items() if name != "CPU"},
    }
    if variant := backends.cpu_variant(library.lib_dir()):
        out["libraries"]["cpu"] = variant
    if cuda := backends.cuda_facts():
        out["libraries"]["cuda"] = cuda
    out["libraries"] |= {"fasa": library.version(), "upstream": library.upstream_version(), "patches": _patches()}
    return out


def checkout_patches() -> dict[str, str]:
    """12 digits of the SHA-256 of every patch of the checkout that this package lies in; {} outside of one."""
    folder = library.PACKAGE.parent / "patches"
    try:
        names = (folder / "series").read_text().split()
        return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest()[:12] for name in names}
    except OSError:
        return {}


def shorten(value: Any) -> Any:
    """The same with the user's home folder as ~ in every text, also in dicts and lists."""
    if isinstance(value, dict):
        return {shorten(k): shorten(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [shorten(x) for x in value]
    if isinstance(value, str):
        for home in {os.path.expanduser("~"), os.path.realpath(os.path.expanduser("~"))}:
            if len(home) > 1:
                value = re.sub(re.escape(home) + r"(?![\w.-])", "~", value)
    return value


def _version(name: str) -> str:
    if name == "fasa_gguf":
        from .. import __version__

        return __version__
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _threads() -> dict[str, Any]:
    g = cpus.granted()
    return {
        "used": thread_count(),
        "cpus": g.cpus,
        "allowed": g.allowed,
        "cores": g.cores,
        "quota": g.quota,
    }


def _memory(device: str) -> tuple[int | None, int | None]:
    try:
        return devices.device_memory(device)
    except FasaError:  # of a backend that is not CUDA
        return None, None


def _driver() -> dict[str, Any]:
    """NVIDIA's driver and the CUDA version that it runs, whether the build has CUDA or not."""
    out: dict[str, Any] = {}
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
        if found := re.search(r"Module.*?(\d+\.\d[\d.]*)", text):
            out["driver"] = found.group(1)
    except OSError:
        pass
    try:
        cuda, number = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(0)
        if cuda.cuDriverGetVersion(ctypes.byref(number)) == 0:
            out["cuda"] = f"{number.value // 1000}.{number.value % 1000 // 10}"
    except (OSError, AttributeError):
        pass
    return out


def _libraries() -> dict[str, Any]:
    folder = library.lib_dir()
    names = sorted(p for p in folder.glob("*") if p.suffix in (".so", ".dylib", ".dll"))
    files = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)[:12]} for p in names}
    out: dict[str, Any] = {"folder": str(folder), "files": files}
    if "llama_cpp" in sys.modules:
        out["llama_cpp"] = str(Path(sys.modules["llama_cpp"].__file__ or "").parent)
    return out


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with open(path, "rb") as f:
        while part := f.read(1 << 20):
            total.update(part)
    return total.hexdigest()


def _patches() -> dict[str, str] | None:
    try:
        return library.patches()
    except AttributeError:  # a library of another version, which FASA_LIB_PATH may name
        return None
