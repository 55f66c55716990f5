"""llama-cpp-python's own tests, from the pinned sdist, on the patched library: with FASA off, and on.

Two of them name tokens and a text of Qwen, which become SmolLM2's here. The models that they download are SmolLM2, and
tiny random ones of the same kind. `make binding-tests` installs what they import.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import tiny_apps
from apps import environment
from paths import ROOT

from fasa_gguf.gguf.file import GGUFFile
from fasa_gguf.gguf.shape import model_shape
from fasa_gguf.speed.random_model import synthetic_profile

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("scipy"), reason="upstream's tests import scipy; run `make binding-tests`"
)
TESTS = 26
VOCABULARY = "vendor/llama.cpp/models/ggml-vocab-llama-spm.gguf"
ADAPTED = (  # (Qwen's, SmolLM2's, how often)
    ("[9419, 11, 1814, 0]", "[19556, 28, 905, 17]", 1),
    ('" jumps over the lazy dog."', '" is a classic example of a"', 2),
)
# few enough tokens for steps of these short prompts to leave some out
SPARSE = {"BUDGET": 12, "SINK": 1, "RECENT": 4}


def sdist():
    """The pinned sdist, where `make build` left it."""
    spec = importlib.util.spec_from_file_location("queue_py", ROOT / "patches" / "queue.py")
    queue = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(queue)
    return queue.cached()


def unpack(folder):
    """Upstream's tests, adapted, and the vocabulary that they read, as the sdist has them."""
    with tarfile.open(sdist()) as tar:
        for member in tar:
            name = member.name.partition("/")[2]
            if name == VOCABULARY or name.startswith("tests/test_"):
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(tar.extractfile(member).read())
    path = folder / "tests" / "test_llama.py"
    text = path.read_text()
    for theirs, ours, count in ADAPTED:
        assert text.count(theirs) == count, f"{theirs}: no longer there {count} times"
        text = text.replace(theirs, ours)
    path.write_text(text)


def write_models(folder, smollm2, calibrated):
    """The models under the names by which upstream's tests ask for them, with profiles where there can be one."""
    for name in ("Qwen3.5-0.8B-Q8_0", "stories15M-q4_0"):
        (folder / f"{name}.gguf").symlink_to(smollm2)
        (folder / f"{name}.fasa.json").symlink_to(calibrated)
    hybrid = folder / "Falcon-H1-Tiny-90M-Instruct-Q2_K.gguf"
    tiny_apps.write_hybrid_heads(hybrid)
    synthetic_profile(*model_shape(GGUFFile(hybrid))).save(hybrid.with_suffix(".fasa.json"))
    tiny_apps.write_recurrent(folder / "mamba-130m-hf.Q2_K.gguf")
    tiny_apps.write_embedder(folder / "bge-small-en-v1.5-q4_k_m.gguf")


@pytest.fixture(scope="module")
def upstream(smollm2, calibrated, tmp_path_factory):
    if not sdist().exists():
        pytest.skip(f"{sdist()} is missing; run `python patches/queue.py fetch`")
    folder = tmp_path_factory.mktemp("upstream")
    unpack(folder)
    write_models(folder, smollm2, calibrated)
    return folder


@pytest.mark.parametrize("fasa", ["off", "auto"])
def test_their_own_tests(upstream, fasa, tmp_path):
    report = tmp_path / "report.json"
    env = environment(**SPARSE) | {
        "FASA_APPS_FASA": fasa,
        "FASA_APPS_MODELS": str(upstream),
        "FASA_APPS_REPORT": str(report),
    }
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "upstream_plugin"]
    run = subprocess.run([*command, "tests"], capture_output=True, text=True, cwd=upstream, env=env)
    assert report.exists(), run.stdout[-3000:] + run.stderr[-3000:]
    found = json.loads(report.read_text())
    assert found["outcomes"] == {"passed": TESTS}, run.stdout[-6000:]
    c = found["counters"]
    print(f"FASA {fasa}: {TESTS} passed, {c['steps_sparse']} sparse and {c['steps_dense']} dense decode steps")
    assert c["models"] > 30
    if fasa == "off":
        assert c["steps_dense"] > 40 and c["steps_sparse"] == c["layers_sparse"] == 0
    else:
        assert c["steps_sparse"] > 40 and c["tokens_attended"] < 0.9 * c["tokens_visible"]
