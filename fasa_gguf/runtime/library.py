"""The native library: where it is, and how llama_cpp is made to load it."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FasaError
from .backends import load_backends
from .structs import LAYOUT

PACKAGE = Path(__file__).parent.parent
BINDING = PACKAGE / "binding"  # llama-cpp-python's Python files, in an installed package only


def lib_dir() -> Path:
    """The folder of libllama and libggml*; FASA_LIB_PATH takes another build."""
    return Path(os.environ.get("FASA_LIB_PATH") or PACKAGE / "lib").resolve()


def find_library(name: str) -> Path:
    """The file of a library ("llama", "ggml"). Raises FasaError when it is missing."""
    suffix = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    path = lib_dir() / (("" if sys.platform == "win32" else "lib") + name + suffix)
    if not path.exists():
        raise FasaError(
            f"{path}: the native library is missing; run `make build` in a checkout, or "
            "`pip install --force-reinstall fasa_gguf`"
        )
    return path


def _loaded_library(llama_cpp: Any) -> Path:
    return Path(llama_cpp.llama_cpp._lib._name).resolve()


@functools.cache
def upstream_version() -> str:
    """The llama-cpp-python whose ctypes mirror fits our library: that of patches/UPSTREAM when it was built."""
    import cffi

    ffi = cffi.FFI()
    ffi.cdef("const char * fasa_upstream_version(void);")
    path = find_library("llama")
    try:
        return ffi.string(ffi.dlopen(str(path)).fasa_upstream_version()).decode()
    except AttributeError:
        raise FasaError(f"{path}: this libllama has no FASA, or that of another version; run `make build`") from None


def check_structs(mirror: Any) -> None:
    """Raises FasaError when llama_cpp's ctypes structs are not laid out as those of our library.

    mirror: the module llama_cpp.llama_cpp. A struct is compared by its size and by name, offset and size of every
    field; one that differs would have llama.cpp read settings from the wrong bytes.
    """
    if ctypes.sizeof(ctypes.c_void_p) != 8:
        return  # the table is of 64-bit machines
    for name, (size, fields) in LAYOUT.items():
        found = getattr(mirror, name, None)
        if found is None:
            what = f"it has no struct {name}"
        else:
            theirs = {f[0]: (getattr(found, f[0]).offset, getattr(found, f[0]).size) for f in found._fields_}
            bad = [f for f in [*fields, *theirs] if fields.get(f) != theirs.get(f)]
            if not bad and ctypes.sizeof(found) == size:
                continue
            what = f"its struct {name} has {ctypes.sizeof(found)} bytes where the library's has {size}"
            if bad:
                what = f"its struct {name} differs from the library's in the field {bad[0]}"
        wanted = upstream_version()
        raise FasaError(
            f"{mirror.__file__}: this llama-cpp-python is another one than {wanted}, whatever its number: {what}; "
            f"run `pip install --force-reinstall --no-deps llama-cpp-python=={wanted}`"
        )


def installed_binding() -> str:
    """The version of llama-cpp-python that is installed; "": none is."""
    try:
        return metadata.version("llama-cpp-python")
    except metadata.PackageNotFoundError:
        return ""


def binding_note() -> str:
    """That another llama-cpp-python is installed than the one in use, for code that imports llama_cpp; "" if not."""
    version, wanted = installed_binding(), upstream_version()
    if not version or version.split("+")[0] == wanted:
        return ""
    return f"llama-cpp-python {version} is installed; this process uses the {wanted} that fasa_gguf brings"


def _import_packaged() -> Any:
    """llama_cpp from the files in BINDING, whether another one is installed or not."""
    folder = BINDING / "llama_cpp"
    spec = importlib.util.spec_from_file_location(
        "llama_cpp", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = sys.modules["llama_cpp"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules["llama_cpp"]
        raise
    return module


@functools.cache
def load() -> Any:
    """llama_cpp with our library underneath.

    Returns the module: that of the installed llama-cpp-python if it is the version that our library was built for, else
    the one that an installed fasa_gguf brings. Raises FasaError when llama_cpp was imported before with another
    library, when there is none of that version, when its structs are others, or when the library is missing.
    """
    ours = find_library("llama")
    if "llama_cpp" in sys.modules:
        found = _loaded_library(sys.modules["llama_cpp"])
        if found != ours:
            raise FasaError(
                f"llama_cpp was imported first and uses {found}; import fasa_gguf, or call fasa_gguf.enable(), before "
                "llama_cpp"
            )
        check_structs(sys.modules["llama_cpp"].llama_cpp)
        load_backends(ours.parent)
        return sys.modules["llama_cpp"]
    wanted, version = upstream_version(), installed_binding()
    fits = version.split("+")[0] == wanted  # what follows a plus is a label of who built it
    if not fits and not (BINDING / "llama_cpp").is_dir():
        other = f"llama-cpp-python {version} is installed and {wanted} is needed"
        raise FasaError(
            f"{other if version else 'llama-cpp-python is not installed'}; run `pip install llama-cpp-python=={wanted}`"
        )
    os.environ["LLAMA_CPP_LIB_PATH"] = str(ours.parent)
    try:
        llama_cpp = importlib.import_module("llama_cpp") if fits else _import_packaged()
    except AttributeError as e:  # ctypes: a function that our library does not have
        raise FasaError(
            f"llama-cpp-python {version}: this is another one than {wanted}, whatever its number: {e}; "
            f"run `pip install --force-reinstall --no-deps llama-cpp-python=={wanted}`"
        ) from None
    check_structs(llama_cpp.llama_cpp)
    load_backends(ours.parent)
    return llama_cpp


def _header() -> str:
    here = PACKAGE
    for path in (here / "fasa.h", here.parent / "native" / "fasa.h"):
        if path.exists():
            parts = re.split(r'^#include "(fasa-\w+\.h)"$', path.read_text(), flags=re.M)
            return "".join(path.with_name(x).read_text() if i % 2 else x for i, x in enumerate(parts))
    raise FasaError(f"{here / 'fasa.h'}: the C header is missing; run `pip install --force-reinstall fasa_gguf`")


@functools.cache
def api() -> tuple[Any, Any]:
    """(ffi, lib): cffi's view of native/fasa.h, on the library that llama_cpp uses."""
    import cffi

    load()
    text = re.sub(r"^\s*#.*$", "", _header(), flags=re.M)  # preprocessor lines
    text = re.sub(r'extern "C" \{', "", text).replace("FASA_API", "")
    text = text.rstrip()[:-1] if text.rstrip().endswith("}") else text  # the brace of extern "C"
    ffi = cffi.FFI()
    ffi.cdef(text)
    return ffi, ffi.dlopen(str(find_library("llama")))


def version() -> str:
    """The version of the native library."""
    ffi, lib = api()
    return ffi.string(lib.fasa_version()).decode()


def patches() -> dict[str, str]:
    """The patches that the native library was built with: 12 digits of each one's SHA-256 by name."""
    ffi, lib = api()
    return dict(part.split(":") for part in ffi.string(lib.fasa_patches()).decode().split())


def last_error() -> str:
    """The last complaint of the native library on this thread; "" when there was none."""
    ffi, lib = api()
    return ffi.string(lib.fasa_error()).decode("utf-8", "replace")


def check(code: int) -> None:
    """Raises FasaError with the library's sentence when a call returned anything but 0."""
    if code != 0:
        raise FasaError(last_error())


def struct(name: str, **values: Any) -> Any:
    """A new struct of fasa.h with its size and these fields set; the rest is 0."""
    ffi, _ = api()
    s = ffi.new(f"{name} *")
    s.size = ffi.sizeof(name)
    for key, value in values.items():
        setattr(s, key, value)
    return s


def array(ctype: str, values: Any, dtype: Any) -> tuple[Any, np.ndarray]:
    """(pointer, the array that owns the memory)."""
    ffi, _ = api()
    a = np.ascontiguousarray(values, dtype)
    return ffi.cast(f"{ctype} *", a.ctypes.data), a
