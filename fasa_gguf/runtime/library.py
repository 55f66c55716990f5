"""The native library: where it is, and how llama_cpp is made to load it."""

from __future__ import annotations

import functools
import os
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FasaError

LLAMA_CPP_VERSION = (
    "0.3.36"  # the llama-cpp-python whose ctypes mirror fits our library; patches/UPSTREAM pins the same
)
PACKAGE = Path(__file__).parent.parent


def lib_dir() -> Path:
    """The folder of libllama and libggml*; FASA_LIB_PATH takes another build."""
    return Path(os.environ.get("FASA_LIB_PATH") or PACKAGE / "lib").resolve()


def _library(name: str) -> Path:
    suffix = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    path = lib_dir() / (("" if sys.platform == "win32" else "lib") + name + suffix)
    if not path.exists():
        raise FasaError(
            f"{path}: the native library is missing; run `make build` in a checkout, or `pip install --force-reinstall fasa_gguf`"
        )
    return path


def _loaded_library(llama_cpp: Any) -> Path:
    return Path(llama_cpp.llama_cpp._lib._name).resolve()


@functools.cache
def load() -> Any:
    """llama_cpp with our library underneath.

    Returns the module. Raises FasaError when llama_cpp was imported before with another library, when its version is not
    the one our library was built for, or when the library is missing.
    """
    ours = _library("llama")
    if "llama_cpp" in sys.modules:
        found = _loaded_library(sys.modules["llama_cpp"])
        if found != ours:
            raise FasaError(
                f"llama_cpp was imported first and uses {found}; import fasa_gguf, or call fasa_gguf.enable(), before llama_cpp"
            )
        return sys.modules["llama_cpp"]
    try:
        version = metadata.version("llama-cpp-python")
    except metadata.PackageNotFoundError:
        raise FasaError(
            f"llama-cpp-python is not installed; run `pip install llama-cpp-python=={LLAMA_CPP_VERSION}`"
        ) from None
    if version != LLAMA_CPP_VERSION:
        raise FasaError(
            f"llama-cpp-python {version} is installed and {LLAMA_CPP_VERSION} is needed; "
            f"run `pip install llama-cpp-python=={LLAMA_CPP_VERSION}`"
        )
    os.environ["LLAMA_CPP_LIB_PATH"] = str(ours.parent)
    import llama_cpp

    return llama_cpp


def _header() -> str:
    here = PACKAGE
    for path in (here / "fasa.h", here.parent / "native" / "fasa.h"):
        if path.exists():
            return path.read_text()
    raise FasaError(f"{here / 'fasa.h'}: the C header is missing; run `pip install --force-reinstall fasa_gguf`")


@functools.cache
def _api() -> tuple[Any, Any]:
    """(ffi, lib): cffi's view of native/fasa.h, on the library that llama_cpp uses."""
    import cffi

    load()
    text = re.sub(r"^\s*#.*$", "", _header(), flags=re.M)  # preprocessor lines
    text = re.sub(r'extern "C" \{', "", text).replace("FASA_API", "")
    text = text.rstrip()[:-1] if text.rstrip().endswith("}") else text  # the brace of extern "C"
    ffi = cffi.FFI()
    ffi.cdef(text)
    return ffi, ffi.dlopen(str(_library("llama")))


def version() -> str:
    """The version of the native library."""
    ffi, lib = _api()
    return ffi.string(lib.fasa_version()).decode()


def last_error() -> str:
    """The last complaint of the native library on this thread; "" when there was none."""
    ffi, lib = _api()
    return ffi.string(lib.fasa_error()).decode("utf-8", "replace")


def _check(code: int) -> None:
    if code != 0:
        raise FasaError(last_error())


def _struct(name: str, **values: Any) -> Any:
    ffi, _ = _api()
    s = ffi.new(f"{name} *")
    s.size = ffi.sizeof(name)
    for key, value in values.items():
        setattr(s, key, value)
    return s


def _array(ctype: str, values: Any, dtype: Any) -> tuple[Any, np.ndarray]:
    """(pointer, the array that owns the memory)."""
    ffi, _ = _api()
    a = np.ascontiguousarray(values, dtype)
    return ffi.cast(f"{ctype} *", a.ctypes.data), a
