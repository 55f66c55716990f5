"""Comparisons: FASA in the harness against the library, results, resuming, tuning, the command."""

import json

import numpy as np
import pytest

from fasa_gguf import FasaError
from fasa_gguf.calibrate.gguf import default_corpus
from fasa_gguf.cli import main as cli
from fasa_gguf.gguf.file import GGUFFile
from fasa_gguf.gguf.shape import model_shape
from fasa_gguf.profile.embed import rewrite
from fasa_gguf.quality.perplexity import loss_text
from fasa_gguf.speed.random_model import synthetic_profile

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'fasa_gguf[harness]'")

from fasa_gguf.harness import compare as C  # noqa: E402
from fasa_gguf.harness.calibrate import Knowledge  # noqa: E402
from fasa_gguf.harness.decoder import Decoder  # noqa: E402
from fasa_gguf.profile.find import find_profile  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def decoder(tiny):
    return Decoder(tiny, kv_type="f32")


@pytest.fixture(scope="module")
def text():
    return default_corpus()[1][:40000]


@pytest.fixture(scope="module")
def profiled(tiny, tmp_path_factory):
    profile = synthetic_profile(*model_shape(GGUFFile(tiny)), seed=2)
    return str(rewrite(tiny, profile, tmp_path_factory.mktemp("harness") / "tiny.gguf"))


def settings(model, text, **kw):
    kw = {
        "methods": ["window", "fasa"],
        "budgets": [60],
        "windows": 2,
        "window": 300,
        "score": 20,
        "threads": 1,
        "profile": find_profile(model),
        **kw,
    }
    return C.CompareSettings(model=model, text=text, **kw)


def test_fasa_agrees_with_the_shipped_library(library, decoder, profiled, text, tmp_path):
    """f32 weights, f16 cache: what is left is the rounding of queries to f16 and sums in another order."""
    out = C.compare(
        settings(
            profiled, text, methods=["fasa", "fasa:mass=0.8:floor=40:cap=200", "fasa:k=5:k_dom=q8", "fasa:shared=0"]
        ),
        tmp_path,
        library=True,
    )
    assert [r["spec"] for r in out["library"]] == [
        "dense",
        "fasa",
        "fasa:mass=0.8:floor=40:cap=200",
        "fasa:k=5:k_dom=q8",
        "fasa:shared=0",
    ]
    for ours, theirs in zip(out["rows"][1:], out["library"][1:], strict=True):
        assert theirs["kl"] > 0.02 and abs(ours["kl"] / theirs["kl"] - 1) < 0.02, ours["spec"]
        assert abs(ours["ppl_ratio"] - theirs["ppl_ratio"]) < 4e-3
        assert abs(ours["tokens_attended"] / theirs["tokens_attended"] - 1) < 2e-3
        index = C.Trial(ours["spec"], 60).policy(decoder, Knowledge(synthetic_profile([2] * 3, [8] * 3))).index_bytes()
        read = theirs["kv_bytes_per_token"] - 3 * 2 * index * (
            512 - 290.5
        )  # the library's view of the cache has 512 cells
        if ours["spec"] != "fasa:shared=0":  # the library reads a row for every head that chose it
            assert abs(3 * ours["bytes_per_token"] / read - 1) < 2e-3
    assert "## FASA here and in the shipped library" in (tmp_path / "results.md").read_text()


def test_results(library, profiled, text, tmp_path, monkeypatch):
    told = []
    methods = ["window", "oracle", "fasa", "fasa:mass=0.9", "double-sparsity", "paper", "snapkv:sink=2"]
    out = C.compare(
        settings(profiled, text, methods=methods, budgets=[50, 100]), tmp_path, progress=lambda *x: told.append(x)
    )
    assert out == json.loads((tmp_path / "results.json").read_text()) and told[-1] == ("comparing", 28, 28)
    rows = {(r["spec"], r["budget"]): r for r in out["rows"]}
    assert len(rows) == 14 and rows["dense", 0]["kl"] == 0 and ("fasa:mass=0.9", 0) in rows
    assert all(r["tokens_attended"] == b for (_, b), r in rows.items() if b)
    assert (
        rows["window", 100]["bytes_per_token"] == 2 * 100 * 64 and rows["window", 50]["kl"] > rows["oracle", 50]["kl"]
    )
    assert rows["fasa", 50]["bytes_per_token"] == 2 * (50 * 64 + 6 * np.mean(np.arange(281, 301)))
    config = out["config"]
    assert (
        config["windows"] == 2
        and config["budgets"] == [50, 100]
        and config["shape"]["n_head_kv"] == 2
        and not config["tuned"]
    )
    markdown = (tmp_path / "results.md").read_text()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()]
    oracle = rows["oracle", 50]
    assert ["oracle", "50", "50.0", f"{oracle['ppl']:.3f}", loss_text(oracle)] in [line[:5] for line in cells]
    assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in ("budget.png", "bytes.png"))
    # finished: nothing is decoded and no library is needed; one more budget runs only itself
    calls, decode = [], Decoder.decode
    monkeypatch.setattr(Decoder, "decode", lambda self, p, t, m: calls.append(m.name) or decode(self, p, t, m))
    monkeypatch.setattr(C, "Session", None)
    assert C.compare(settings(profiled, text, methods=methods, budgets=[50, 100]), tmp_path) == out and calls == []
    C.compare(settings(profiled, text, methods=methods, budgets=[50, 70]), tmp_path)
    assert calls == ["dense", "window", "oracle", "fasa", "double-sparsity", "paper", "snapkv"] * 2
    with pytest.raises(FasaError, match=r"was begun with other settings \(score: 20 there, 19 here"):
        C.compare(settings(profiled, text, methods=methods, score=19), tmp_path)


def test_an_interrupted_comparison_goes_on_to_the_same_figures(library, profiled, text, tmp_path, monkeypatch):
    whole = C.compare(settings(profiled, text), tmp_path / "a")
    assert C.compare(settings(profiled, text), tmp_path / "b", prepare=True) is None
    monkeypatch.setattr(C, "Session", None)  # the windows are there already
    calls, decode = [], Decoder.decode

    def stop(self, prefix, tokens, method):
        calls.append(method.name)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return decode(self, prefix, tokens, method)

    monkeypatch.setattr(Decoder, "decode", stop)
    with pytest.raises(KeyboardInterrupt):
        C.compare(settings(profiled, text), tmp_path / "b")
    assert C.compare(settings(profiled, text), tmp_path / "b")["rows"] == whole["rows"]
    assert calls == ["dense", "window", "fasa", "dense", "window", "dense", "window", "fasa"]


def test_tuning(library, profiled, text, tmp_path):
    s = settings(
        profiled,
        text,
        methods=["quest", "quest:page=64", "sparq", "window", "fasa", "fasa-mass"],
        budgets=[60, 120],
        tune=text[10000:],
        tune_windows=1,
    )
    out = C.compare(s, tmp_path)
    specs = {(r["method"], r["budget"]): r["spec"] for r in out["rows"]}
    trials = {(t["spec"], t["budget"]): t for t in out["trials"]}
    for name, n in (("quest", 6), ("fasa", 5)):
        for b in (60, 120):
            tried = [t for t in out["trials"] if t["spec"].split(":")[0] == name and t["budget"] == b]
            best = min((t for t in tried if t["score_share"] <= 0.1251), key=lambda t: t["kl"])
            assert len(tried) == n and trials[best["spec"], b]["kl"] <= min(
                t["kl"] for t in tried if t["score_share"] <= 0.125
            )
            assert best["spec"] in [r["spec"] for r in out["rows"] if r["budget"] == b]
    for b in (60, 120):  # a mean within the budget, and near it
        t = trials[specs["fasa-mass", b], b]
        assert 0.9 * b < t["tokens"] <= b and t["spec"].startswith("fasa-mass:mass=0.")
        assert all(
            other["tokens"] <= t["tokens"] or other["tokens"] > b
            for (spec, bb), other in trials.items()
            if spec.startswith("fasa-mass") and bb == b
        )
    assert specs["window", 60] == "window" and out["config"]["tuned"]
    assert ("quest:page=64", 60) in {(r["spec"], r["budget"]) for r in out["rows"]}  # fixed by the user: not tuned


def test_the_command(library, profiled, text, tmp_path, capsys):
    file = tmp_path / "t.txt"
    file.write_text(text)
    base = [
        "compare",
        profiled,
        "-f",
        str(file),
        "--windows",
        "1",
        "--window",
        "300",
        "--score",
        "10",
        "--budgets",
        "50",
        "-t",
        "1",
        "-o",
        str(tmp_path / "d"),
    ]
    assert cli.main([*base, "--methods", "window,quest:page=8", "--prepare"]) == 0
    assert (
        capsys.readouterr().out == ""
        and (tmp_path / "d" / "samples.jsonl").exists()
        and not (tmp_path / "d" / "results.md").exists()
    )
    assert cli.main([*base, "--methods", "window,quest:page=8", "--plan"]) == 0  # its former name
    assert cli.main([*base, "--methods", "window,quest:page=8"]) == 0
    assert [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()] == [
        "method",
        "------------",
        "dense",
        "window",
        "quest:page=8",
    ]
    assert cli.main([*base, "--methods", "window", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["texts"] == {"text": "t.txt"}
    for extra, message in (
        (["--methods", "magic"], "--methods 'magic': expected one of"),
        (["--methods", "window", "--budgets", "30"], "method window: budget 30: expected"),
        (["--methods", "fasa-mass"], "fasa-mass: its mass comes from tuning; give --tune TEXT"),
    ):
        assert cli.main([*base, *extra]) == 1 and message in capsys.readouterr().err


def test_a_missing_torch_is_one_sentence(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    assert cli.main(["compare", "m", "-f", "t", "-o", str(tmp_path)]) == 1
    assert "the comparison needs torch; run `pip install 'fasa_gguf[harness]'`" in capsys.readouterr().err
