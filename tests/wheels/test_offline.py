"""native/wheel/offline.sh with a stand-in for Python, and what compile_kernels.py reads of ptxas."""

import importlib.util
import os
import re
import shutil
import subprocess

import pytest
from paths import ROOT

STAND_IN = """#!/bin/sh
echo "$PIP_NO_INDEX|$CMAKE_ARGS|$@" >> {log}
case "$*" in
  *"-m venv"*) for folder; do :; done; mkdir -p $folder/bin; cp "$0" $folder/bin/python;;
  *"queue.py prepare"*) mkdir -p $3 && echo stamp > $3/.fasa-prepared;;
  *"pip wheel"*) touch dist/fasa_gguf_cuda-1-py3-none-linux_x86_64.whl;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A folder with the script, a wheel of `make wheel`, and a Python that writes down what it is asked for."""
    (tmp_path / "native" / "wheel").mkdir(parents=True)
    shutil.copy(ROOT / "native" / "wheel" / "offline.sh", tmp_path / "native" / "wheel")
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / "fasa_gguf-1-py3-none-manylinux_2_35_x86_64.manylinux_2_31_x86_64.whl").touch()
    (tmp_path / "python").write_text(STAND_IN.format(log=tmp_path / "log"))
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def offline(checkout, *args):
    env = {k: v for k, v in os.environ.items() if k not in ("CMAKE_ARGS", "PIP_NO_INDEX")}
    command = ["bash", "native/wheel/offline.sh", *args]
    env |= {"PYTHON": str(checkout / "python")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=checkout, env=env)
    log = checkout / "log"
    return done, [line.split("|") for line in log.read_text().splitlines()] if log.exists() else []


def test_what_is_packed(checkout):
    """All that the wheel needs at the versions of the other Python, and what builds the CUDA wheel."""
    done, calls = offline(checkout, "pack", "away", "3.12")
    assert done.returncode == 0, done.stderr
    download = next(c for _, _, c in calls if "pip download" in c).split()
    assert "--no-deps" not in download and download[download.index("--python-version") + 1] == "3.12"
    needs = (ROOT / "native" / "wheel" / "pyproject.toml").read_text()
    for name in re.findall(r'"([\w.>=-]+)"', re.search(r"^requires = \[(.*)\]", needs, re.M)[1]):
        assert name in download
    assert {"dist/fasa_gguf-1-py3-none-manylinux_2_35_x86_64.manylinux_2_31_x86_64.whl", "ninja"} <= set(download)
    assert {"manylinux_2_35_x86_64", "manylinux_2_31_x86_64", "manylinux2014_x86_64"} <= set(download)
    listed = subprocess.run(["tar", "tf", checkout / "away" / "tree.tar.xz"], capture_output=True, text=True).stdout
    assert "llama.cpp-src/.fasa-prepared" in listed.splitlines()  # the stamp of a tree that need not be fetched


def test_the_build_asks_no_index(checkout):
    offline(checkout, "pack", "away", "3.12")
    (checkout / "away" / "pip-1-py3-none-any.whl").touch()
    (checkout / "log").unlink()
    done, calls = offline(checkout, "build", "away", "90-real")
    assert done.returncode == 0, done.stderr
    assert (checkout / "build" / "wheel-cuda-objects" / "llama.cpp-src" / ".fasa-prepared").exists()
    assert {index for index, _, _ in calls} == {"1"}
    assert sum(f"{checkout}/away/pip-1-py3-none-any.whl/pip install" in c for _, _, c in calls) == 3
    building = next(x for x in calls if "pip wheel" in x[2])
    assert building[1] == "-DCMAKE_CUDA_ARCHITECTURES=90-real" and "--no-build-isolation" in building[2]
    assert calls[-1][2] == "tests/wheels/smoke.py --gpu"
    assert "dist/fasa_gguf_cuda-1-py3-none-linux_x86_64.whl" in calls[-2][2] and "--no-deps" in calls[-2][2]


@pytest.mark.parametrize("args", [(), ("build", "away"), ("carry", "away", "3.12")])
def test_wrong_words_show_how(checkout, args):
    done, calls = offline(checkout, *args)
    assert done.returncode == 2 and "offline.sh pack DIR 3.12" in done.stderr and not calls


def test_what_ptxas_says_of_kernels():
    spec = importlib.util.spec_from_file_location("compile_kernels", ROOT / "tests" / "wheels" / "compile_kernels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (
        "ptxas info    : Function properties for f\n   0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 1 barriers\n"
        "    16 bytes stack frame, 12 bytes spill stores, 24 bytes spill loads\nptxas info    : Used 64 registers\n"
    )
    assert module.usage(text) == (2, 168, 1) and module.usage("") == (0, 0, 0)
