"""Which llama_cpp is taken: versions, labels, and the structs that it shares with the library."""

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import types

import pytest
from paths import ROOT

from fasa_gguf import FasaError
from fasa_gguf.runtime import library as lib
from fasa_gguf.runtime.structs import LAYOUT

SOURCE = ROOT / "build" / "native" / "llama.cpp-src"


def enable_with(tmp_path, version):
    """What enabling prints when llama-cpp-python's metadata give this version."""
    info = tmp_path / f"llama_cpp_python-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: {version}\n")
    code = "import fasa_gguf; fasa_gguf.enable(); import llama_cpp; print('fine')"
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)


def test_a_label_is_not_another_version(library, tmp_path):
    wanted = lib.upstream_version()
    assert enable_with(tmp_path, f"{wanted}+cu128").stdout == "fine\n"


def test_another_version_is_refused(library, tmp_path):
    run = enable_with(tmp_path, "0.3.1+cu128")
    assert f"llama-cpp-python 0.3.1+cu128 is installed and {lib.upstream_version()} is needed; run `pip" in run.stderr


def mirror(**changes):
    """llama_cpp.llama_cpp with some structs replaced."""
    real = lib.load().llama_cpp
    return types.SimpleNamespace(**{name: getattr(real, name) for name in LAYOUT} | changes, __file__="fork.py")


def struct(*fields):
    return type("Fork", (ctypes.Structure,), {"_fields_": fields})


def test_a_fork_with_other_structs_is_refused(library):
    real = lib.load().llama_cpp
    lib.check_structs(real)
    lib.check_structs(mirror())
    own = list(real.llama_context_params._fields_)
    swapped = [*own[:2], own[3], own[2], *own[4:]]
    token = [("id", ctypes.c_int32), ("logit", ctypes.c_float), ("p", ctypes.c_double)]
    for changes, what in (
        ({"llama_context_params": struct(*own, ("more", ctypes.c_bool))}, "llama_context_params .* the field more"),
        ({"llama_context_params": struct(*own[:-1])}, "llama_context_params .* the field ctx_other"),
        ({"llama_context_params": struct(*swapped)}, "llama_context_params .* the field n_ubatch"),
        ({"llama_token_data": struct(*token)}, "llama_token_data .* the field p"),
        ({"llama_batch": None}, "it has no struct llama_batch"),
    ):
        with pytest.raises(FasaError, match=rf"fork\.py: this llama-cpp-python is another one than .*{what}; run `pip"):
            lib.check_structs(mirror(**changes))


def test_a_fork_that_was_imported_first_is_refused(library):
    """With our own library underneath, as LLAMA_CPP_LIB_PATH gives it."""
    code = (
        "import ctypes, llama_cpp\n"
        "class B(ctypes.Structure): _fields_ = [('n_tokens', ctypes.c_int64)]\n"
        "llama_cpp.llama_cpp.llama_batch = B\nimport fasa_gguf; fasa_gguf.enable()"
    )
    env = {**os.environ, "LLAMA_CPP_LIB_PATH": str(lib.lib_dir())}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env)
    assert "its struct llama_batch differs from the library's in the field n_tokens" in run.stderr


def test_the_layout_is_the_pinned_headers():
    if not (SOURCE / "include" / "llama.h").exists() or not shutil.which(os.environ.get("CC", "cc")):
        pytest.skip("needs `make build` in this checkout, and a C compiler")
    spec = importlib.util.spec_from_file_location("structs", ROOT / "native" / "structs.py")
    structs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(structs)
    assert structs.layout(SOURCE) == LAYOUT
