"""llama.cpp's own programs with FASA, as `make tools` builds them: the profile in the file, settings from variables."""

import json
import os
import re
import struct
import subprocess
import time
import urllib.request

import pytest
from gguf import GGUFValueType as T
from paths import ROOT, SMOLLM2
from tiny_gguf import insert

from fasa_gguf.gguf.file import GGUFFile
from fasa_gguf.params import FasaParams
from fasa_gguf.profile import embed
from fasa_gguf.speed.random_model import synthetic_profile

BIN = ROOT / "build" / "tools" / "bin"
pytestmark = pytest.mark.skipif(not (BIN / "llama-server").exists(), reason="no native tools; run `make tools`")
CALIBRATED = SMOLLM2.with_name(SMOLLM2.stem + ".fasa.gguf")


def environment(given):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FASA_", "LLAMA_"))}
    return {**kept, "OMP_WAIT_POLICY": "passive", **given}


def run(tool, *argv, **variables):
    """(stdout, stderr) of a tool with these FASA_* variables."""
    given = {f"FASA_{k}": str(v) for k, v in variables.items()}
    done = subprocess.run(
        [BIN / tool, *map(str, argv)],
        capture_output=True,
        text=True,
        errors="replace",
        env=environment(given),
        stdin=subprocess.DEVNULL,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, done.stderr


def said(err):
    """The lines whether FASA is on."""
    return re.findall(r"^fasa: (o[nf].*)$", err, re.M)


def stats(err):
    """Counters of the last context that was freed."""
    line = re.findall(r"^fasa: stats: (.*)$", err, re.M)[-1]
    return {k: int(v) for k, v in (part.split("=") for part in line.split())}


@pytest.fixture(scope="module")
def calibrated():
    if not CALIBRATED.exists():
        pytest.skip(f"{CALIBRATED} is missing; run `make demo`")
    return CALIBRATED


@pytest.fixture(scope="module")
def known(tiny, tmp_path_factory):
    """The tiny model with a profile in it."""
    out = tmp_path_factory.mktemp("tools") / "known.gguf"
    return embed.rewrite(tiny, synthetic_profile([2] * 3, [8] * 3, seed=2), out)


def bench(model, **variables):
    return run("llama-bench", "-m", model, "-p", 0, "-n", 4, "-d", 300, "-r", 1, "-t", 1, **variables)[1]


# ---- the four tools, on the calibrated model ----


@pytest.mark.parametrize("on", [True, False])
def test_llama_bench(calibrated, on):
    err = run(
        *("llama-bench", "-m", calibrated, "-p", 0, "-n", 4, "-d", 1200, "-r", 1, "-t", 2),
        **({"BUDGET": 100} if on else {}),
        STATS=1,
    )[1]
    c = stats(err)
    assert (c["steps_sparse"], c["steps_dense"]) == ((4, 0) if on else (0, 4))
    if on:
        assert c["tokens_attended"] == 100 * c["lists"] and c["layers_sparse"] == 4 * 30
        assert said(err)[0].startswith("on: ") and "budget 100, " in said(err)[0]
        assert said(err)[0].endswith("30 of 30 layers ranked")
    else:
        assert said(err) == ["off: not asked for; FASA_ENABLE=1 turns it on"] and c["bytes_k_dom"] == 0


def test_llama_cli(calibrated):
    argv = ("-m", calibrated, "-p", "Tell me of a ship on a large sea.", "-n", 8, "-st", "-c", 512, "-t", 1)
    err = run("llama-cli", *argv, ENABLE=1, MIN_CONTEXT=16, STATS=1)[1]
    assert said(err)[0].startswith("on: ") and stats(err)["steps_sparse"] >= 6 and stats(err)["steps_dense"] == 0


def test_llama_perplexity(calibrated, tmp_path):
    """Batches as long as max_tokens whose tokens all ask for logits are decode steps, after some that did not."""
    (tmp_path / "t.txt").write_text("The ship sailed on the wide sea, and the captain wrote of what she saw. " * 120)
    argv = ("-m", calibrated, "-f", tmp_path / "t.txt", "-c", 512, "-b", 64, "-ub", 64, "--chunks", 1, "-t", 2)
    err = run("llama-perplexity", *argv, BUDGET=100, MIN_CONTEXT=0, STATS=1)[1]
    assert stats(err)["steps_sparse"] == 4 and stats(err)["tokens_attended"] == 100 * stats(err)["lists"]
    off = run("llama-perplexity", *argv, STATS=1)[1]
    assert stats(off)["steps_sparse"] == 0
    perplexity = [float(re.search(r"PPL = ([\d.]+)", x).group(1)) for x in (err, off)]
    assert perplexity[0] != perplexity[1]


def test_llama_server(calibrated, tmp_path):
    argv = ["-m", calibrated, "-c", "512", "-np", "1", "-t", "1", "--port", "18199"]
    given = {"FASA_ENABLE": "1", "FASA_MIN_CONTEXT": "8", "FASA_STATS": "1"}
    with open(tmp_path / "err", "w+") as log:
        server = subprocess.Popen([BIN / "llama-server", *argv], stdout=log, stderr=log, env=environment(given))
        try:
            body = json.dumps({"prompt": "Once upon a time there was a ship on a large sea, and", "n_predict": 8})
            for _ in range(120):
                try:
                    url = urllib.request.Request("http://127.0.0.1:18199/completion", body.encode())
                    answer = json.load(urllib.request.urlopen(url, timeout=60))
                    break
                except OSError:
                    time.sleep(0.5)
            assert answer["tokens_predicted"] == 8
        finally:
            server.terminate()
            server.wait(60)
        log.seek(0)
        err = log.read()
    assert said(err)[0].startswith("on: ") and stats(err)["steps_sparse"] == 7


# ---- what is asked for ----


def test_defaults_of_the_profile_and_what_replaces_them(tiny, tmp_path):
    p = synthetic_profile([2] * 3, [8] * 3, seed=2)
    p.defaults, p.mean_budget = {"mass": 0.9, "cap": 300, "k_dom": "q8", "min_context": 0}, {64: 0.5, 256: 0.9}
    model = embed.rewrite(tiny, p, tmp_path / "m.gguf")
    on = said(bench(model, ENABLE=1))[0]
    assert "mass 0.9, floor 64, cap 300" in on and "k_dom q8" in on and "min_context 0" in on
    for name, text in (("BUDGET", "100"), ("MEAN_BUDGET", "128")):
        wanted = FasaParams.from_mapping({name.lower(): text}, "test", p.params())
        on = said(bench(model, **{name: text}))[0].replace(";", ",") + ","
        for key in ("budget", "mass", "mean_budget"):
            assert f"{key} {getattr(wanted, key):g}," in on


def test_a_quality_is_a_variable(known):
    on = said(bench(known, QUALITY="careful", CAP=300))[0]
    assert "mass 0.985, floor 128, cap 300" in on
    assert "mass 0, " in said(bench(known, QUALITY="careful", BUDGET=100))[0]


@pytest.mark.parametrize(
    "variables, why",
    [
        ({"ENABLE": "yes"}, "FASA_ENABLE: expected 0 or 1, found 'yes'"),
        ({"ENABLE": "0", "BUDGET": 100}, "not asked for; FASA_ENABLE=1 turns it on"),
        ({"BUDGET": "many"}, "FASA_BUDGET: expected a whole number, found 'many'"),
        ({"BUDGET": "1e12"}, "FASA_BUDGET: expected a whole number from 1 to 2147483647, found 1e+12"),
        ({"BUDGET": "1.5"}, "FASA_BUDGET: expected a whole number from 1 to 2147483647, found 1.5"),
        ({"MASS": "nan"}, "FASA_MASS: expected a number, found 'nan'"),
        ({"K_DOM": "q5"}, "FASA_K_DOM: expected one of f16, q8, q4, found 'q5'"),
        ({"QUALITY": "best"}, "FASA_QUALITY: expected one of fast, balanced, careful, found 'best'"),
        ({"MODE": "disk"}, "FASA_MODE: expected auto, device or host, found 'disk'"),
        ({"MODE": "host"}, "FASA_MODE host: this context has no K and V in pinned host memory"),
        ({"PROFILE": "x.json"}, "FASA_PROFILE: this program reads the profile in the model's file only"),
        ({"MASS": 0.9, "FLOOR": 10, "CAP": 5}, "settings floor and cap: expected 1 <= floor <= cap"),
        ({"MEAN_BUDGET": 128}, "mean_budget 128: the profile has no table of mean budgets"),
    ],
)
def test_what_is_wrong_is_one_line(known, variables, why):
    err = bench(known, **variables, STATS=1)
    assert len(said(err)) == 1 and said(err)[0].startswith(f"off: {why}")
    assert stats(err)["steps_sparse"] == 0


def test_flash_attention_that_is_off_is_told(known):
    err = run("llama-bench", "-m", known, "-p", 0, "-n", 1, "-r", 1, "-fa", "off", ENABLE=1)[1]
    assert said(err)[0].startswith("off: flash attention is off in this context")


def test_a_model_without_a_profile(tiny):
    assert said(bench(tiny, ENABLE=1)) == [
        "off: there is no FASA profile in this model; run `fasa-gguf embed-profile MODEL`"
    ]


def test_a_context_that_is_too_short_is_told(known):
    assert said(bench(known, ENABLE=1))[0].endswith("every step is dense: the context is shorter than min_context")


# ---- hostile files ----


def number(key, kind, value, code):
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I" + code, kind, value)


def array(key, kind, values, code):
    head = struct.pack("<Q", len(key)) + key.encode() + struct.pack("<IIQ", T.ARRAY, kind, len(values))
    return head + struct.pack(f"<{len(values)}{code}", *values)


GOOD = {
    "fasa.version": number("fasa.version", T.UINT32, 1, "I"),
    "fasa.n_layer": number("fasa.n_layer", T.UINT32, 3, "I"),
    "fasa.n_head_kv": array("fasa.n_head_kv", T.UINT32, [2] * 3, "I"),
    "fasa.n_chunk": array("fasa.n_chunk", T.UINT32, [8] * 3, "I"),
    "fasa.ranking": array("fasa.ranking", T.UINT8, list(range(8)) * 6, "B"),
}


@pytest.mark.parametrize(
    "key, entry, why",
    [
        ("version", (number, T.UINT32, 2, "I"), "expected at most 1, found 2"),
        ("version", (number, T.FLOAT32, float("nan"), "f"), "expected a number from 1 to 4294967295, found nan"),
        ("n_layer", (number, T.UINT64, 2**63, "Q"), "expected a number from 1 to 4096"),
        ("n_layer", (number, T.UINT32, 2, "I"), "expected 2 numbers, found 3"),
        ("n_layer", None, "expected it, found nothing"),
        ("n_head_kv", (array, T.UINT32, [2] * 4, "I"), "expected 3 numbers, found 4"),
        ("n_head_kv", (array, T.INT32, [-1] * 3, "i"), "expected numbers from 0 to 4096, found -1 at index 0"),
        ("n_head_kv", (number, T.UINT32, 2, "I"), "expected an array of numbers"),
        ("n_chunk", (array, T.FLOAT64, [8.5] * 3, "d"), "expected numbers from 0 to 4096, found 8.5 at index 0"),
        ("n_chunk", (array, T.UINT32, [4096] * 3, "I"), "expected 24576 numbers, found 48"),
        ("n_chunk", (array, T.BOOL, [1] * 3, "?"), "expected numbers from 0 to 4096"),
        ("ranking", (array, T.UINT8, [0] * 7, "B"), "expected 48 numbers, found 7"),
        ("ranking", (array, T.UINT8, [0] * 48, "B"), "layer 0, KV head 0, rank 1: chunk 0 is ranked twice"),
        ("ranking", None, "expected it, found nothing"),
        ("weight_k", (number, T.UINT32, 4, "I"), "key fasa.weight: expected it, found nothing"),
        ("layer_miss", (array, T.FLOAT32, [1.0], "f"), "expected 3 numbers, found 1"),
        ("mean_budget", (array, T.UINT32, [1, 2], "I"), "key fasa.mean_budget_mass: expected it"),
        ("default.budget", (number, T.FLOAT32, 3.5, "f"), "expected a whole number from 1 to 2147483647"),
        ("default.cap", (number, T.INT64, -5, "q"), "expected a number from 0 to 2147483647"),
    ],
)
def test_hostile_profiles_are_one_line(tiny, tmp_path, key, entry, why):
    entries = dict(GOOD)
    entries.pop(f"fasa.{key}", None)
    if entry:
        make, kind, value, code = entry
        entries[f"fasa.{key}"] = make(f"fasa.{key}", kind, value, code)
    model = insert(tiny, tmp_path / "m.gguf", *entries.values())
    assert "fasa.version" in GGUFFile(model).kv
    lines = said(bench(model, ENABLE=1))
    assert len(lines) == 1 and lines[0].startswith("off: ") and why in lines[0]


def test_integers_of_any_type_are_read(tiny, tmp_path):
    entries = dict(GOOD)
    entries["fasa.n_chunk"] = array("fasa.n_chunk", T.INT64, [8] * 3, "q")
    entries["fasa.ranking"] = array("fasa.ranking", T.UINT16, list(range(8)) * 6, "H")
    model = insert(tiny, tmp_path / "m.gguf", *entries.values())
    err = bench(model, ENABLE=1, MIN_CONTEXT=0, STATS=1)
    assert said(err)[0].startswith("on: ") and stats(err)["steps_sparse"] == 4


def test_python_sets_everything_itself(known, monkeypatch, capfd):
    """The variables reach a context of the Python package through its own functions only."""
    from fasa_gguf.session import Session

    monkeypatch.setenv("FASA_ENABLE", "1")
    monkeypatch.setenv("FASA_STATS", "1")
    with Session(known, n_ctx=256, n_threads=1) as s:
        s.decode([3, 4, 5], 0)
        assert s.fasa.params() is None and s.fasa.counters()["bytes_k_dom"] == 0
    assert "fasa:" not in capfd.readouterr().err
