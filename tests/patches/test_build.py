"""What the Makefile and CMakeLists.txt set up, with stand-ins for python, pip and cmake; and a real configuration."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

CMAKE = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
NINJA = shutil.which("ninja", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
needs_cmake = pytest.mark.skipif(not (CMAKE and NINJA and shutil.which("c++")), reason="no cmake, ninja or compiler")
needs_make = pytest.mark.skipif(not shutil.which("make"), reason="no make")


# ---- CMakeLists.txt ----


def configure(folder, *args):
    env = {k: v for k, v in os.environ.items() if k not in ("CXXFLAGS", "CFLAGS")}
    command = [CMAKE, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={NINJA}", f"-DPython3_EXECUTABLE={sys.executable}"]
    command += ["-S", str(ROOT), "-B", str(folder), *args]
    return subprocess.run(command, capture_output=True, text=True, env=env)


@needs_cmake
@pytest.mark.parametrize("option", ["GGML_BACKEND_DL", "GGML_CPU_ALL_VARIANTS", "GGML_STATIC", "LLAMA_USE_SYSTEM_GGML"])
def test_what_could_not_be_loaded_is_refused(option, tmp_path):
    done = configure(tmp_path, f"-D{option}=ON")
    assert done.returncode and f"-D{option}=ON: fasa_gguf is built with backends linked to its own shared ggml" in (
        " ".join(done.stderr.split())
    )
    assert not (tmp_path / "llama.cpp-src").exists()  # at once


@needs_cmake
def test_a_build_without_the_cpu_is_refused(tmp_path):
    assert "-DGGML_CPU=OFF: fasa_gguf needs the CPU backend" in configure(tmp_path, "-DGGML_CPU=OFF").stderr


def supports(flag):
    return subprocess.run(["c++", flag, "-x", "c++", "-fsyntax-only", os.devnull], capture_output=True).returncode == 0


@needs_cmake
@pytest.mark.parametrize("patched", ["ON", "OFF"])
def test_flags_of_the_cpu_backend_and_what_is_installed(patched, tmp_path):
    done = configure(tmp_path, "-DGGML_RPC=ON", f"-DFASA_PATCHED={patched}")
    if "could not prepare the llama.cpp source" in done.stderr:
        pytest.skip("the pinned source is not there")
    assert done.returncode == 0, done.stderr
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    of_cpu = [c["command"] for c in commands if "ggml-cpu.dir" in c["output"]]
    assert len(of_cpu) > 10 and any("native/cpu/tip.cpp" in c for c in of_cpu) == (patched == "ON")
    assert all("native/cpu/f16-step.h" in command for command in of_cpu)
    for flag in filter(supports, ("-mno-amx-int8",)):
        assert all(flag in command.split() for command in of_cpu)
    listing = (tmp_path / "cmake_install.cmake").read_text()
    installed = {f"lib{x}.so" for x in ("llama", "ggml", "ggml-base", "ggml-cpu", "ggml-rpc")}
    assert set(re.findall(r"bin/(lib[\w-]+\.so)\"", listing)) == installed


VARIANTS = {
    "x64",
    "sse42",
    "sandybridge",
    "ivybridge",
    "piledriver",
    "haswell",
    "skylakex",
    "cannonlake",
    "cascadelake",
}
VARIANTS |= {"icelake", "cooperlake", "zen4", "alderlake", "sapphirerapids"}


@needs_cmake
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the variants are those of x86")
def test_every_variant_of_a_portable_build_has_our_ops_and_flags(tmp_path):
    done = configure(tmp_path, "-DFASA_PORTABLE=ON")
    if "could not prepare the llama.cpp source" in done.stderr:
        pytest.skip("the pinned source is not there")
    assert done.returncode == 0, done.stderr
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    ours = sorted(p.name for p in (ROOT / "native" / "cpu").glob("*.cpp"))
    found = {}
    for c in commands:
        if m := re.search(r"ggml-cpu-(\w+)\.dir", c["output"]):
            found.setdefault(m[1], []).append(c)
    assert set(found) == VARIANTS
    for name, mine in found.items():
        assert sorted(Path(c["file"]).name for c in mine if "native/cpu/" in c["file"]) == ours, name
        for command in (c["command"].split() for c in mine):
            assert str(ROOT / "native/cpu/f16-step.h") in command and "-march=native" not in command, name
            amx = [x for x in command if re.match("-m(no-)?amx-int8", x)]
            assert amx[-1:] == ["-mno-amx-int8"] * supports("-mno-amx-int8"), name  # the last one holds
            assert ("-mavx512fp16" in command) == (name == "sapphirerapids"), name
    feats = next(c["command"] for c in commands if "ggml-cpu-sapphirerapids-feats.dir" in c["output"])
    assert "GGML_AMX" not in feats and "GGML_AVX512_BF16" in feats  # AMX is not used, so not asked for
    listing = (tmp_path / "cmake_install.cmake").read_text()
    libraries = {f"lib{x}.so" for x in ("llama", "ggml", "ggml-base", *(f"ggml-cpu-{v}" for v in VARIANTS))}
    assert set(re.findall(r"bin/(lib[\w-]+\.so)\"", listing)) == libraries
    ninja = (tmp_path / "build.ninja").read_text()
    links = re.findall(r"^build bin/(lib[\w-]+\.so): .*?^  LINK_FLAGS = (.*?)$", ninja, re.M | re.S)
    assert {name for name, flags in links if "-Wl,--exclude-libs,ALL" in flags} == libraries


@needs_cmake
@pytest.mark.parametrize("option", ["FASA_TOOLS", "FASA_UPSTREAM_TESTS"])
def test_a_portable_build_has_no_programs(option, tmp_path):
    assert "-DFASA_PORTABLE=ON is for wheels" in configure(tmp_path, "-DFASA_PORTABLE=ON", f"-D{option}=ON").stderr


@needs_cmake
@pytest.mark.parametrize("cpu, step", [("sapphirerapids", 64), ("znver4", 64), ("haswell", 32)])
def test_f16_steps_fit_heads_of_64(cpu, step, tmp_path):
    """The steps of ggml's f16 sums, by the preprocessor, for CPUs that need not be this one."""
    if not supports(f"-march={cpu}"):
        pytest.skip(f"the compiler does not know {cpu}")
    source = ROOT / "build/native/llama.cpp-src/ggml"
    if not source.exists():
        pytest.skip("nothing was built here")
    command = ["c++", f"-march={cpu}", "-std=gnu++17", "-E", "-dM", "-include", str(ROOT / "native/cpu/f16-step.h")]
    command += [f"-I{source / folder}" for folder in ("include", "src", "src/ggml-cpu")]
    (tmp_path / "x.cpp").write_text('#include "simd-mappings.h"')
    out = subprocess.run([*command, str(tmp_path / "x.cpp")], capture_output=True, text=True, check=True).stdout
    assert re.findall(r"#define GGML_F16_STEP (\d+)", out) == [str(step)]


# ---- Makefile ----


def make(folder, *args, **env):
    inherited = {k: v for k, v in os.environ.items() if k not in ("CMAKE_ARGS", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(
        ["make", "-C", str(folder), *args], capture_output=True, text=True, env=inherited | env, timeout=60
    )


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path):
    """A folder with the Makefile and a pin; nothing is set up."""
    (tmp_path / "patches").mkdir()
    for name in ("Makefile", "patches/UPSTREAM", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


@needs_make
def test_other_cmake_args_configure_anew(checkout):
    log = checkout / "log"
    program(
        checkout / ".venv/bin/cmake",
        f'#!/bin/sh\ncase "$*" in *--fresh*) echo "$@" >> {log}; case "$*" in *WRONG*) exit 1;; esac\n'
        'while [ "$1" != -B ]; do shift; done; mkdir -p "$2"; touch "$2/build.ninja";; esac\n',
    )
    (checkout / ".venv/.ready").touch()

    def configured(*args, **env):
        """The -D words of every configuration that this `make build` did."""
        log.write_text("")
        done = make(checkout, *args, **env)
        given = [
            [x for x in line.split() if x.startswith("-D") and "MAKE_PROGRAM" not in x and "Python3" not in x]
            for line in log.read_text().splitlines()
        ]
        return given if done.returncode == 0 else (given, "failed")

    assert configured("build", CMAKE_ARGS="-DGGML_RPC=ON") == [["-DGGML_RPC=ON"]]
    assert configured("build", CMAKE_ARGS="-DGGML_RPC=ON") == []
    assert configured("build") == []  # not given: as before
    assert configured("stock") == [["-DFASA_PATCHED=OFF", "-DGGML_RPC=ON"]] and configured("stock") == []
    assert configured("build", "CMAKE_ARGS=-DGGML_BLAS=ON -DX=1") == [["-DGGML_BLAS=ON", "-DX=1"]]
    assert configured("build", CMAKE_ARGS="-DWRONG=1") == ([["-DWRONG=1"]], "failed")
    assert configured("build", CMAKE_ARGS="-DWRONG=1") == ([["-DWRONG=1"]], "failed")  # refused is not configured
    assert configured("build", "CMAKE_ARGS=") == [[]] and configured("build") == []


PYTHON = """#!/bin/sh
echo "$@" >> {log}
case "$*" in
  "-m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python;;
  *sysconfig*) echo {folder};;
  *"queue.py fetch") echo /cache/llama_cpp_python-1.tar.gz;;
  *"pip wheel"*) mkdir -p build/wheels; touch build/wheels/llama_cpp_python-1-py3-none-any.whl;;
esac
"""


@needs_make
def test_the_set_up_leaves_nothing_for_others_and_the_command(checkout):
    log = checkout / "log"
    program(checkout / "python", PYTHON.format(log=log, folder=checkout))
    done = make(checkout, ".venv/.ready", f"PYTHON={checkout / 'python'}")
    assert done.returncode == 0, done.stderr
    calls = log.read_text().splitlines()
    building = [c for c in calls if "LLAMA_BUILD=OFF" in c]
    assert len(building) == 1 and "pip wheel" in building[0] and "/cache/llama_cpp_python-1.tar.gz" in building[0]
    assert {"--no-cache-dir", "--no-deps", "build/wheels"} <= set(building[0].split())
    installs = [c for c in calls if "pip install" in c and "llama" in c]
    assert installs[0].endswith("--no-deps build/wheels/llama_cpp_python-1-py3-none-any.whl")  # so the next finds it
    assert (checkout / "fasa_gguf.pth").read_text().strip() == str(checkout)
    command = checkout / ".venv/bin/fasa-gguf"
    assert os.access(command, os.X_OK) and f"{checkout}/.venv/bin/python" in command.read_text()
    program(checkout / ".venv/bin/python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    shown = subprocess.run(
        [command, "--version"], capture_output=True, text=True, cwd="/", env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert shown.returncode == 0 and shown.stdout.startswith("fasa-gguf "), shown.stderr
