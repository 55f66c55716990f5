"""Calibration, eval, bench, the drop-in and the command line."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from paths import ROOT

from fasa_gguf import FasaError, FasaParams
from fasa_gguf.calibrate.gguf import (
    Calibration,
    CalibrationParams,
    calibrate,
    default_corpus,
)
from fasa_gguf.cli import main as cli
from fasa_gguf.profile import embed
from fasa_gguf.profile.profile import Profile

SMALL = CalibrationParams(context=512, queries=16, budget=40)


@pytest.fixture(scope="module")
def tiny_profiled(library, tiny, tmp_path_factory):
    return embed.rewrite(tiny, calibrate(tiny, params=SMALL), tmp_path_factory.mktemp("p") / "tiny.gguf")


@pytest.mark.parametrize("method", ["recall", "energy", "ca"])
def test_calibrate(library, tiny, method):
    p = calibrate(tiny, params=CalibrationParams(method=method, context=512, queries=16, budget=40))
    p.check([2] * 3, [8] * 3, "t")
    assert Profile.from_flat(p.to_flat(), "t").ranking_method == method
    assert p.calibration["tokens"] == 512 and len(p.calibration["weights_sha256"]) == 64
    if method == "recall":
        assert all((np.diff(r, axis=-1) > -0.02).all() and r.max() <= 1.001 for r in p.recall)


def test_calibrate_for_more_chunks(library, tiny):
    """As many are chosen as a set and weighted, and decoding uses them by default; no more than a head has."""
    p = calibrate(tiny, params=dataclasses.replace(SMALL, chunks=6))
    plain = calibrate(tiny, params=SMALL)
    assert (p.weight_k, p.recall_k, p.params().chunks) == (6, 6, 6) and (
        plain.weight_k,
        plain.recall_k,
        plain.defaults,
    ) == (4, 4, {})
    assert all(
        r[:, :4].tolist() == s[:, :4].tolist() for r, s in zip(p.ranking, plain.ranking, strict=True)
    )  # the greedy search begins the same
    assert calibrate(tiny, params=dataclasses.replace(SMALL, chunks=99)).params().chunks == 8
    with pytest.raises(FasaError, match="--chunks -1: expected 0 to"):
        calibrate(tiny, params=dataclasses.replace(SMALL, chunks=-1))


def test_an_interrupted_calibration_goes_on(library, tiny, tmp_path, monkeypatch):
    out = tmp_path / "p.json"
    whole = calibrate(tiny, params=SMALL)
    rank, calls = Calibration._rank_layer, []

    def stop_after_two(self, il, s):
        calls.append(il)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return rank(self, il, s)

    monkeypatch.setattr(Calibration, "_rank_layer", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        calibrate(tiny, params=SMALL, out=out)
    assert not out.exists() and (tmp_path / "p.json.partial").exists()
    calls.extend([0] * 10)
    done = calibrate(tiny, params=SMALL, out=out)
    assert calls[13:] == [2]  # only the layer that was missing
    assert done.to_flat() == whole.to_flat() and Profile.load(out) and not (tmp_path / "p.json.partial").exists()


def test_calibration_refuses(library, tiny):
    with pytest.raises(FasaError, match=r"the text has .* tokens; calibration needs at least 256"):
        calibrate(tiny, ("short", "a few words"), SMALL)
    with pytest.raises(FasaError, match="ranking method 'magic': expected one of recall, energy, ca"):
        calibrate(tiny, params=CalibrationParams(method="magic"))


def test_metrics_on_planted_logits():
    from fasa_gguf.quality.perplexity import Score, log_softmax, score_tokens

    dense = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]))
    arm = np.log(np.array([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]]))
    nll, kl, hit = score_tokens(dense, arm, np.array([0, 1]))
    assert np.allclose(nll, [np.log(4), -np.log(0.8)]) and hit.tolist() == [0, 1]
    assert np.allclose(kl, [0.5 * np.log(2) - 0.25 * np.log(2), 0])
    assert np.allclose(log_softmax(np.log([[2.0, 6.0]])), np.log([[0.25, 0.75]]))
    base, other = (
        Score("dense", [np.array([1.0, 2.0])], [np.zeros(2)], [np.ones(2)]),
        Score("x", [np.array([1.5, 2.5])], [np.array([0.1, 0.3])], [np.array([1.0, 0])]),
    )
    row = other.figures(base)
    assert (
        np.isclose(row["ppl"], np.exp(2))
        and np.isclose(row["ppl_ratio"], np.exp(0.5))
        and np.isclose(row["kl"], 0.2)
        and row["same_top"] == 0.5
    )


def test_eval(tiny_profiled):
    from fasa_gguf.quality.arms import Arm
    from fasa_gguf.quality.perplexity import WindowSettings, evaluate, format_scores

    text = default_corpus()[1][:30000]
    rows = evaluate(
        tiny_profiled,
        text,
        [Arm("f", FasaParams(chunks=4, budget=60, sink=4, recent=8, min_context=0))],
        WindowSettings(2, 300, 20),
    )
    assert (
        [r["arm"] for r in rows] == ["dense", "f"]
        and rows[1]["steps_sparse"] == 40
        and rows[1]["tokens_attended"] == 60
    )
    assert rows[0]["kl"] == 0 and rows[1]["kl"] > 0 and "ppl" in format_scores(rows)
    with pytest.raises(FasaError, match="FASA was asked for and no step used it: the context is shorter"):
        evaluate(tiny_profiled, text, [Arm("f", FasaParams(min_context=4096))], WindowSettings(1, 300, 5))
    with pytest.raises(FasaError, match="too short for 2 windows"):
        evaluate(tiny_profiled, text[:100], [], WindowSettings(2, 300, 20))


def test_dense_in_a_batch_is_dense_in_steps(smollm2):
    from fasa_gguf.quality.arms import Arm
    from fasa_gguf.quality.perplexity import WindowSettings, evaluate

    rows = evaluate(smollm2, default_corpus()[1][:20000], [Arm("dense by steps")], WindowSettings(1, 600, 40))
    assert rows[1]["kl"] < 0.006 and abs(rows[1]["ppl_ratio"] - 1) < 0.02


def test_drop_in(tiny_profiled, tiny, capfd):
    from fasa_gguf import Llama

    on = FasaParams(chunks=4, budget=64, min_context=0)
    llm = Llama(str(tiny_profiled), n_ctx=1024, fasa=on, verbose=False)
    prompt = "a" * 400
    llm.create_completion(prompt, max_tokens=5, temperature=0)
    assert llm.fasa_stats()["steps_sparse"] > 0 and llm.fasa_stats()["layer_reasons"] == [None] * 3
    state = llm.save_state()
    llm.reset_fasa_stats()
    llm.set_fasa("off")
    llm.create_completion(prompt + "b", max_tokens=5, temperature=0)
    assert llm.fasa_stats()["layers_sparse"] == 0
    llm.load_state(state)
    with pytest.raises(FasaError, match=r"no FASA profile in .*; run `fasa-gguf embed-profile"):
        Llama(str(tiny), fasa=on, verbose=False)
    Llama(str(tiny), n_ctx=256, verbose=False)
    assert "no FASA profile in" in capfd.readouterr().err
    with pytest.raises(FasaError, match="FASA needs flash attention"):
        Llama(str(tiny_profiled), fasa=on, flash_attn=False, verbose=False)
    with pytest.raises(FasaError, match='expected "auto", "off", "fast", "balanced", "careful" or FasaParams'):
        Llama(str(tiny_profiled), fasa="on")


def test_llama_cpp_imported_first(library, tmp_path):
    code = (
        "import sys, types\n"
        "m = types.ModuleType('llama_cpp')\n"
        "m.llama_cpp = types.SimpleNamespace(_lib=types.SimpleNamespace(_name='/elsewhere/libllama.so'))\n"
        "sys.modules['llama_cpp'] = m\nimport fasa_gguf\nfasa_gguf.enable()"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "llama_cpp was imported first and uses /elsewhere/libllama.so" in run.stderr
    code = "import fasa_gguf; fasa_gguf.enable(); import llama_cpp; assert llama_cpp.Llama is fasa_gguf.Llama"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# ---- the command line ----


def test_errors_are_one_line_and_exit_1(tmp_path, capsys):
    assert cli.main(["inspect", str(tmp_path / "none.gguf")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("fasa-gguf: error: ") and err.count("\n") == 1
    with pytest.raises(FasaError):
        cli.main(["--debug", "inspect", str(tmp_path / "none.gguf")])
    with pytest.raises(SystemExit) as e:
        cli.main(["inspect"])
    assert e.value.code == 2


def test_commands(tiny, tiny_profiled, tmp_path, capsys):
    model = tmp_path / "m.gguf"
    assert cli.main(["embed-profile", str(tiny), "-o", str(model), "-c", "512"]) == 0
    assert cli.main(["inspect", str(model), "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out[out.index("{") :])["n_layer"] == 3
    assert (
        cli.main(
            [
                "run",
                str(model),
                "-p",
                "x" * 600,
                "-n",
                "4",
                "-c",
                "1024",
                "--fasa-min-context",
                "0",
                "--fasa-budget",
                "64",
            ]
        )
        == 0
    )
    assert "FASA in" in capsys.readouterr().err
    assert cli.main(["run", str(model), "-p", "x", "-n", "4", "-c", "1024", "--fasa-min-context", "900"]) == 1
    assert "FASA was asked for and no step used it" in capsys.readouterr().err
    assert (
        cli.main(
            [
                "bench",
                str(model),
                "-d",
                "300",
                "-n",
                "2",
                "-r",
                "1",
                "--fill",
                "prefill",
                "--fasa-min-context",
                "0",
                "--json",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)[-1]["sparse_share"] == 1
    assert cli.main(["run", str(model), "-p", "x", "--fasa-budget", "many"]) == 1
    assert (
        "setting budget: expected a whole number (tokens per step and KV head), found 'many'" in capsys.readouterr().err
    )
    assert cli.main(["embed-profile", str(model), "--remove"]) == 0
    assert cli.main(["inspect", str(model)]) == 1


def test_settings_from_the_environment(monkeypatch):
    monkeypatch.setenv("FASA_BUDGET", "77")
    monkeypatch.setenv("FASA_K_DOM", "q8")
    assert FasaParams.from_env() == FasaParams(budget=77, k_dom="q8")
    monkeypatch.setenv("FASA_BUDGET", "x")
    with pytest.raises(FasaError, match="environment: setting budget: expected a whole number \\(tokens per step"):
        FasaParams.from_env()
