"""`doctor`: what it finds out, what it checks, and that a broken installation is named."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from fasa_gguf import FasaError
from fasa_gguf.cli import main as cli
from fasa_gguf.doctor import checks, facts
from fasa_gguf.doctor.report import format_report, report_as_dict
from fasa_gguf.runtime import cpus


@pytest.fixture
def quick(monkeypatch):
    """A timing of few cells."""
    monkeypatch.setattr(checks, "DEPTH", 1024)
    monkeypatch.setattr(checks, "COPY_BYTES", 1 << 20)


@pytest.fixture
def doctor(library, quick, capsys):
    def call(*argv):
        status = cli.main(["doctor", *argv])
        return status, capsys.readouterr().out

    return call


def test_all_is_well(doctor, library):
    status, out = doctor("--json")
    found = json.loads(out)
    assert status == 0 and found["ok"] is True
    names = [c["name"] for c in found["checks"] if c["status"] != "failed"]
    assert {"library", "lists, CPU", "identity, CPU", "counters, CPU", "dense speed"} <= set(names)
    assert found["threads"]["used"] >= 1 and found["threads"]["allowed"] == len(os.sched_getaffinity(0))
    assert "libllama.so" in found["libraries"]["files"]
    assert found["libraries"]["patches"] == library.library.patches()
    assert set(found["cpu"]["used"]) <= set(found["cpu"]["sets"])


def test_the_text_has_no_path_of_the_home(doctor, monkeypatch):
    monkeypatch.setenv("HOME", str(facts.library.PACKAGE.parent))
    monkeypatch.setenv("FASA_BUDGET", "100")
    monkeypatch.setenv("LLAMA_API_KEY", "hidden")
    status, out = doctor()
    assert status == 0 and str(facts.library.PACKAGE.parent) not in out
    assert "library files: ~/fasa_gguf/lib" in out and "variable FASA_BUDGET: 100" in out
    assert "all is well" in out and "hidden" not in out


def test_homes_are_shortened_whole(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    assert facts.shorten({"a": ["/home/ann/x:/home/anna/y", 3]}) == {"a": ["~/x:/home/anna/y", 3]}
    monkeypatch.setenv("HOME", "/")
    assert facts.shorten("/x/y") == "/x/y"


def test_a_model(doctor, tiny, tmp_path):
    from fasa_gguf.profile import embed
    from fasa_gguf.speed.random_model import synthetic_profile

    status, out = doctor(str(tiny))
    assert status == 0 and re.search(r"note   profile: none; make one with `fasa-gguf embed-profile", out)
    model = embed.rewrite(tiny, synthetic_profile([2] * 3, [8] * 3, seed=2), tmp_path / "m.gguf")
    status, out = doctor(str(model))
    assert status == 0 and "ok     sparse layers: 3\n" in out and "dense speed, model" in out


def test_a_model_that_is_none_fails(doctor, tmp_path):
    status, out = doctor(str(tmp_path / "no.gguf"))
    assert status == 1 and "FAILED model: " in out and "1 of " in out


def test_a_library_that_is_missing_is_named(monkeypatch, capsys):
    def missing():
        raise FasaError("lib/libllama.so: the native library is missing")

    monkeypatch.setattr(checks.runtime.library, "api", missing)
    monkeypatch.setattr(facts.devices, "devices", missing)
    assert cli.main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [c["name"] for c in found["checks"]] == ["library"] and "is missing" in found["checks"][0]["text"]
    assert found["system"]["python"] and found["cpu"]["sets"]


def test_other_patches_are_told(library, monkeypatch):
    built = library.library.patches()
    monkeypatch.setattr(checks, "checkout_patches", lambda: {**built, "0001-cpu-op.patch": "0" * 12})
    check = checks.patches_check()
    assert check.status == checks.NOTE and check.text.endswith("has: 0001-cpu-op.patch")
    monkeypatch.setattr(checks, "checkout_patches", dict)
    assert checks.patches_check().status == checks.OK


def test_a_wrong_list_fails(library, monkeypatch):
    right = checks.runtime.ops.op_run

    def wrong(**case):
        out = right(**case)
        out["list"][:, :, :, :10] = np.arange(290, 300)
        return out

    monkeypatch.setattr(checks.runtime.ops, "op_run", wrong)
    check = checks.lists_check("CPU")
    assert check.status == checks.FAILED and "lists differ" in check.text


def test_dense_that_is_slow_is_told(library, monkeypatch, tmp_path):
    checks.write_nano(tmp_path / "nano.gguf")
    monkeypatch.setattr(checks, "read_rate", lambda context, n: 1e15)
    check = checks.speed_check(str(tmp_path / "nano.gguf"), None, 1024, 2)
    assert check.status == checks.NOTE and "far below what the memory allows" in check.text


def test_counters_that_are_wrong_fail():
    n = checks.STEPS
    good = {"steps_sparse": n, "steps_dense": 0, "layers_sparse": 4 * n, "tokens_attended": 64, "tokens_visible": 64}
    good["lists"] = 1
    assert checks._counters_check("CPU", good, good, 4, "").status == checks.OK
    dense = {**good, "steps_sparse": 0, "steps_dense": n}
    assert f"0 of {n} steps sparse, 4 of 4" in checks._counters_check("CPU", dense, good, 4, "4 of 4").text
    assert checks._counters_check("CPU", good, {**good, "lists": 2}, 4, "").status == checks.FAILED


def test_what_the_process_may_use(monkeypatch, tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/a").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/a\n")
    (tmp_path / "sys/fs/cgroup/a/cpu.max").write_text("150000 100000\n")
    (tmp_path / "proc/cpuinfo").write_text("processor\t: 0\nflags\t\t: fma avx2\n")
    monkeypatch.setattr(cpus, "ROOT", Path(tmp_path))
    assert cpus.granted().quota == 1.5 and cpus.flags() == {"fma", "avx2"}


def test_the_report_says_what_the_build_leaves_unused(library):
    found = facts.facts()
    found["cpu"] |= {"unused": ["AVX2"], "left_out": ["AMX_INT8"]}
    found["gpu"] = {"devices": [], "backends": {}, "driver": "570.1", "cuda": "12.8"}
    text = format_report(found, [])
    assert "not used although the CPU has them: AVX2; build on this machine; left out on purpose: AMX_INT8" in text
    assert "gpu: none found; this build has no CUDA\nnvidia: driver 570.1 for CUDA 12.8" in text
    assert json.dumps(report_as_dict(found, []))
