"""The backends of a wheel, which are loaded when the program runs: the CPU's best variant, and CUDA's if installed.

A wheel holds ggml-cpu several times, for different instruction sets; ggml asks each whether this CPU can run it. CUDA
comes in a package of its own, fasa_gguf_cuda, whose library needs NVIDIA's runtime: that of the nvidia-* packages, or
what the loader finds. A build for one machine (`make build`) has its backends linked, and nothing is loaded here.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import FasaError

# libraries of NVIDIA's packages in the order of their needs; the folders below nvidia/ that hold them, with CUDA's
# major number for {}: first those of CUDA 13, then those of CUDA 12
CUDA_LIBRARIES = ("libcudart.so.{}", "libcublasLt.so.{}", "libcublas.so.{}")
CUDA_FOLDERS = ("cu{}/lib", "cuda_runtime/lib", "cublas/lib")


def is_portable(folder: Path) -> bool:
    """Whether the library in this folder has its CPU backend in variants."""
    return next(folder.glob("libggml-cpu-*.so"), None) is not None


def load_backends(folder: Path) -> None:
    """Load CUDA's backend and the best CPU variant of the portable library in a folder; nothing for another one.

    Raises FasaError when no variant runs on this CPU. Says on stderr why an installed CUDA backend cannot be loaded.
    """
    if not is_portable(folder):
        return
    ggml = ctypes.CDLL(str(folder / "libggml.so"))
    ggml.ggml_backend_load.argtypes, ggml.ggml_backend_load.restype = [ctypes.c_char_p], ctypes.c_void_p
    ggml.ggml_backend_load_all_from_path.argtypes = [ctypes.c_char_p]
    ggml.ggml_backend_reg_by_name.argtypes, ggml.ggml_backend_reg_by_name.restype = [ctypes.c_char_p], ctypes.c_void_p
    with _quiet(ggml):
        why = _load_cuda(ggml, folder)
        ggml.ggml_backend_load_all_from_path(str(folder).encode())
    if why:
        print(f"fasa_gguf: CUDA is off: {why}", file=sys.stderr)
    if not ggml.ggml_backend_reg_by_name(b"CPU"):
        raise FasaError(f"{folder}: no libggml-cpu-*.so runs on this CPU; build on it (docs/guide/install.md)")


@contextlib.contextmanager
def _quiet(ggml: Any) -> Iterator[None]:
    """ggml logs every backend that it loads; not within this."""
    before, data = ctypes.c_void_p(), ctypes.c_void_p()
    nothing = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    ggml.ggml_log_get(ctypes.byref(before), ctypes.byref(data))
    ggml.ggml_log_set(nothing, None)
    try:
        yield
    finally:
        ggml.ggml_log_set(before, data)


def cpu_variant(folder: Path) -> str:
    """The file of the CPU variant that was loaded from this folder; "": a linked backend, or none was loaded."""
    names = {p.name for p in folder.glob("libggml-cpu-*.so")}
    try:
        mapped = {line.rsplit("/", 1)[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    except OSError:
        return ""
    return ", ".join(sorted(names & mapped))


def _cuda_package() -> Path | None:
    """The folder of fasa_gguf_cuda; None: it is not installed."""
    spec = importlib.util.find_spec("fasa_gguf_cuda")
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0]) if places else None


@functools.cache
def cuda_facts() -> dict[str, Any]:
    """What fasa_gguf_cuda was built as: version, patches, cuda, architectures; {} where it is not installed."""
    folder = _cuda_package()
    try:
        return json.loads((folder / "build.json").read_text()) if folder else {}
    except (OSError, ValueError):
        return {}


def _built(folder: Path) -> tuple[str, str]:
    """Version and patches of the libllama in a folder, which a CUDA backend must share."""
    import cffi

    ffi = cffi.FFI()
    ffi.cdef("const char * fasa_version(void); const char * fasa_patches(void);")
    lib = ffi.dlopen(str(folder / "libllama.so"))
    return ffi.string(lib.fasa_version()).decode(), ffi.string(lib.fasa_patches()).decode()


def _load_cuda(ggml: Any, libraries: Path) -> str:
    """Load the backend of fasa_gguf_cuda. Returns why it cannot be, "" when it was loaded or is not installed."""
    folder = _cuda_package()
    if folder is None:
        return ""
    facts, built = cuda_facts(), _built(libraries)
    if (facts.get("version"), facts.get("patches")) != built:
        return (
            f"fasa_gguf_cuda {facts.get('version', 'without a version')} was built from another source than "
            f"fasa_gguf {built[0]}; run `pip install --force-reinstall 'fasa_gguf[cuda]'`"
        )
    _load_runtime(str(facts.get("cuda", "")).split(".")[0])
    path = folder / "libggml-cuda.so"
    try:
        ctypes.CDLL(str(path))
    except OSError as e:
        return _missing(str(e))
    return "" if ggml.ggml_backend_load(str(path).encode()) else f"{path}: ggml does not take it"


def _missing(error: str) -> str:
    """The loader's sentence, with what to do."""
    if "libcuda.so" in error:
        return f"{error}; NVIDIA's driver is not installed"
    if "libcu" in error:
        return f"{error}; run `pip install --force-reinstall 'fasa_gguf[cuda]'`, or add it to LD_LIBRARY_PATH"
    return error


def _load_runtime(major: str) -> None:
    """Load CUDA's runtime from NVIDIA's packages; what they lack is left to the loader, which knows the user's own."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(x) for x in spec.submodule_search_locations or []] if spec else []
    folders = [root / part.format(major) for root in roots for part in CUDA_FOLDERS]
    for name in CUDA_LIBRARIES:
        path = next((x for x in (folder / name.format(major) for folder in folders) if x.exists()), None)
        if path is not None:
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
