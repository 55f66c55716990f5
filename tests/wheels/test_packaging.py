"""Packages: their metadata, what of llama-cpp-python they bring, and how a wheel's backends are loaded."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from paths import ROOT

from fasa_gguf import FasaError
from fasa_gguf.runtime import backends
from fasa_gguf.runtime import library as lib

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    tomllib = None

spec = importlib.util.spec_from_file_location("queue_of_patches", ROOT / "patches" / "queue.py")
Q = importlib.util.module_from_spec(spec)
spec.loader.exec_module(Q)


def project(name="pyproject.toml"):
    if tomllib is None:
        pytest.skip("Python 3.10 has no tomllib")
    return tomllib.loads((ROOT / name).read_text())


# ---- metadata ----


def test_pip_compiles_no_llama_cpp_python():
    """Its sdist is all that the index has: a dependency on it would be compiled."""
    assert not [x for x in project()["project"]["dependencies"] if re.match("llama.cpp.python", x, re.I)]


def test_what_the_packaged_binding_imports_is_installed_with_it():
    if not Q.cached().exists():
        pytest.skip("the pinned sdist was not fetched here")
    import tarfile

    with tarfile.open(Q.fetch()) as tar:
        text = tar.extractfile(Q.cached().name.removesuffix(".tar.gz") + "/pyproject.toml").read().decode()
    theirs = re.search(r"^dependencies = \[(.*?)^\]", text, re.S | re.M)[1]
    names = {re.split("[><=]", x)[0] for x in re.findall(r'"(.*?)"', theirs)}
    assert names == {"typing-extensions", "numpy", "diskcache", "jinja2"}
    assert names <= {re.split("[><=]", x)[0] for x in project()["project"]["dependencies"]}


def test_the_cuda_package_is_of_the_same_version():
    main, cuda = project(), project("native/wheel/pyproject.toml")
    version = main["project"]["version"]
    assert cuda["project"]["version"] == version and f"fasa_gguf=={version}" in cuda["project"]["dependencies"]
    assert main["project"]["optional-dependencies"]["cuda"] == [f"fasa-gguf-cuda=={version}"]


def test_the_cuda_package_links_only_what_it_depends_on():
    """llama.cpp links NCCL wherever it finds it."""
    cuda = project("native/wheel/pyproject.toml")
    needs = " ".join(cuda["project"]["dependencies"])
    assert "nvidia-nccl" in needs or "-DGGML_CUDA_NCCL=OFF" in cuda["tool"]["scikit-build"]["cmake"]["args"]


@pytest.mark.parametrize("name", ["pyproject.toml", "native/wheel/pyproject.toml"])
def test_a_wheel_brings_the_licences(name):
    """A pattern that leads out of the package's folder matches nothing, and nothing is said of it."""
    patterns = project(name)["tool"]["scikit-build"]["wheel"]["license-files"]
    folder = (ROOT / name).parent
    assert all(".." not in x and (folder / x).exists() for x in patterns)
    if not patterns:
        installed = re.findall(
            r"install\(FILES [^)]*DESTINATION fasa_gguf_cuda[^)]*\)", (ROOT / "CMakeLists.txt").read_text()
        )
        assert len(installed) == 1 and {"LICENSE", "cuda"} <= set(re.split(r"[\s()]+", installed[0]))
        assert "LICENSE.llama.cpp" in installed[0]


def test_the_install_page_names_what_there_is():
    page = (ROOT / "docs" / "guide" / "install.md").read_text()
    extras = set(re.findall(r"\[(\w+)\]'", page))
    assert extras and extras <= set(project()["project"]["optional-dependencies"])
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"\bmake ([a-z][\w-]+)", page))
    assert {"wheel", "sdist", "wheel-cuda", "cuda-check"} <= named <= targets
    options = set(re.findall(r"-D(FASA_\w+)", page))
    assert options <= set(re.findall(r"\b(FASA_\w+)", (ROOT / "CMakeLists.txt").read_text()))


def test_cibuildwheel_builds_one_wheel_for_all_pythons():
    """The library is loaded by name, so that it does not depend on Python's ABI."""
    text = project()["tool"]
    assert text["scikit-build"]["wheel"]["py-api"] == "py3" and text["cibuildwheel"]["build"].startswith("cp310-")
    assert text["cibuildwheel"]["environment"]["CMAKE_ARGS"] == "-DFASA_PORTABLE=ON"
    script = text["cibuildwheel"]["test-command"].split()[-1].replace("{project}", str(ROOT))
    assert os.path.exists(script)


# ---- the binding ----


def run(tmp_path, version, code):
    """(stdout, stderr) of code in a process that finds llama-cpp-python of this version, and our copy in tmp_path."""
    if not Q.cached().exists():
        pytest.skip("the pinned sdist was not fetched here")
    Q.binding(tmp_path / "binding")
    info = tmp_path / "site" / f"llama_cpp_python-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: {version}\n")
    start = (
        "import pathlib, sys, fasa_gguf.runtime.library as lib\n"
        f"lib.BINDING = pathlib.Path({str(tmp_path / 'binding')!r})\nimport fasa_gguf\n"
    )
    env = {**os.environ, "PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, env=env)
    return done.stdout, done.stderr


WHERE = "fasa_gguf.enable(); import llama_cpp.llama_types; print(llama_cpp.__file__, llama_cpp.Llama.__module__)"


def test_a_package_uses_its_own_binding_beside_another_version(library, tmp_path):
    out, err = run(tmp_path, "0.2.90", WHERE)
    assert out.split() == [str(tmp_path / "binding" / "llama_cpp" / "__init__.py"), "fasa_gguf.llama"], err
    assert f"llama-cpp-python 0.2.90 is installed; this process uses the {lib.upstream_version()} that" in err


def test_a_package_uses_the_installed_binding_of_its_version(library, tmp_path):
    out, err = run(tmp_path, lib.upstream_version(), WHERE)
    assert str(tmp_path) not in out and out.split()[-1] == "fasa_gguf.llama" and err == ""


# ---- backends ----


@pytest.mark.skipif(not shutil.which("nm"), reason="no nm")
def test_libllama_calls_nothing_of_a_backend(library):
    """In a wheel the backends are loaded when the program runs, after libllama: by then it must have all it needs."""

    def names(what, path):
        out = subprocess.run(["nm", "-D", what, path], capture_output=True, text=True, check=True).stdout
        return {line.split()[-1] for line in out.splitlines() if re.search(r" [TDBU] (ggml|fasa)_", line)}

    folder = lib.lib_dir()
    needed = names("--undefined-only", folder / "libllama.so")
    assert "ggml_backend_dev_type" in needed
    assert needed <= names("--defined-only", folder / "libggml.so") | names(
        "--defined-only", folder / "libggml-base.so"
    )


class Ggml:
    """Stands in for libggml; loads everything."""

    def ggml_backend_load(self, path):
        return 1


@pytest.fixture
def cuda_package(tmp_path, monkeypatch):
    """An installed fasa_gguf_cuda of this version and these patches, whose library is no library."""
    folder = tmp_path / "fasa_gguf_cuda"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "libggml-cuda.so").write_bytes(b"not a library")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(backends, "_built", lambda folder: ("1.0", "a:1"))
    backends.cuda_facts.cache_clear()
    yield folder
    backends.cuda_facts.cache_clear()


def test_without_the_cuda_package_nothing_is_said(tmp_path):
    if importlib.util.find_spec("fasa_gguf_cuda"):
        pytest.skip("fasa_gguf_cuda is installed")
    assert backends._load_cuda(Ggml(), tmp_path) == ""


@pytest.mark.parametrize("facts", [None, {"version": "1.1", "patches": "a:1"}, {"version": "1.0", "patches": "a:2"}])
def test_a_cuda_backend_of_another_source_is_not_loaded(cuda_package, facts):
    if facts is not None:
        (cuda_package / "build.json").write_text(json.dumps(facts))
    found = (facts or {}).get("version", "without a version")
    why = backends._load_cuda(Ggml(), cuda_package)
    assert why.startswith(f"fasa_gguf_cuda {found} was built from another source than fasa_gguf 1.0; run `pip install")


def test_a_cuda_backend_that_cannot_be_loaded_says_why(cuda_package):
    (cuda_package / "build.json").write_text(json.dumps({"version": "1.0", "patches": "a:1", "cuda": "13.0.88"}))
    assert "libggml-cuda.so" in backends._load_cuda(Ggml(), cuda_package)


@pytest.mark.parametrize(
    "error, advice",
    [
        ("libcuda.so.1: cannot open shared object file", "; NVIDIA's driver is not installed"),
        ("libcublas.so.13: cannot open shared object file", "; run `pip install --force-reinstall 'fasa_gguf[cuda]'`"),
        ("libcudart.so.13: cannot open shared object file", "; run `pip install --force-reinstall 'fasa_gguf[cuda]'`"),
        ("undefined symbol: x", ""),
    ],
)
def test_what_cuda_lacks(error, advice):
    assert backends._missing(error).startswith(error + advice)


def test_the_runtime_is_taken_from_nvidias_packages(tmp_path, monkeypatch):
    """Of the major version that the backend was built for, and before what needs it."""
    for name in ("cu13/lib/libcudart.so.13", "cu13/lib/libcublas.so.13", "cublas/lib/libcublas.so.12"):
        (tmp_path / "nvidia" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "nvidia" / name).touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    seen = []
    monkeypatch.setattr(backends.ctypes, "CDLL", lambda path, mode=0: seen.append(path))
    backends._load_runtime("13")
    assert [x.removeprefix(str(tmp_path)) for x in seen if str(tmp_path) in x] == [
        "/nvidia/cu13/lib/libcudart.so.13",
        "/nvidia/cu13/lib/libcublas.so.13",
    ]


def test_no_variant_for_this_cpu_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "libggml-cpu-none.so").touch()

    class Empty:
        class Function:
            def __call__(self, *args):
                return None

        ggml_log_get = ggml_log_set = ggml_backend_load = Function()
        ggml_backend_load_all_from_path = Function()
        ggml_backend_reg_by_name = Function()

    monkeypatch.setattr(backends.ctypes, "CDLL", lambda path: Empty)
    monkeypatch.setattr(backends, "_load_cuda", lambda ggml, folder: "")
    with pytest.raises(FasaError, match=r"no libggml-cpu-\*\.so runs on this CPU"):
        backends.load_backends(tmp_path)
