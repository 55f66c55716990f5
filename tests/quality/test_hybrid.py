"""Models whose memory cannot forget single positions: arms share a prefix all the same, by its saved state."""

import numpy as np
import pytest
from paths import ROOT

from fasa_gguf import FasaParams
from fasa_gguf.calibrate.layers import LayerGrid, calibrate_layers
from fasa_gguf.gguf.file import GGUFFile
from fasa_gguf.gguf.shape import model_shape
from fasa_gguf.quality import long_text, tasks
from fasa_gguf.quality.arms import Arm, ArmSwitch
from fasa_gguf.quality.perplexity import WindowSettings, evaluate
from fasa_gguf.quality.prompts import greedy
from fasa_gguf.quality.sweep import Grid, sweep
from fasa_gguf.quality.text import cut_windows
from fasa_gguf.runtime.settings import ContextSettings
from fasa_gguf.session import Session
from fasa_gguf.speed.random_model import synthetic_profile

ARCHS = ROOT / "build" / "archs"
HYBRIDS = ["granitehybrid-dense", "falcon-h1-dense", "lfm2moe-moe", "qwen35-dense", "qwen3next-moe"]
ON = FasaParams(chunks=4, budget=60, sink=4, recent=8, min_context=0)
SIZE = WindowSettings(windows=1, window=300, score=20)
ONE = ContextSettings(n_threads=1)


@pytest.fixture
def words(monkeypatch):
    """Tokens for models without a vocabulary: a letter each."""
    monkeypatch.setattr(Session, "tokenize", lambda s, text, *_, **__: [ord(c) % min(s.n_vocab, 64) for c in text])
    monkeypatch.setattr(Session, "detokenize", lambda s, tokens: "".join(chr(32 + t) for t in tokens))


@pytest.fixture
def profile(hybrid):
    return synthetic_profile(*model_shape(GGUFFile(hybrid)))


def test_arms_begin_where_the_prefix_ends(library, hybrid, text, profile, words):
    arms = [Arm("a", ON), Arm("all", ON.replace(budget=300)), Arm("steps"), Arm("a again", ON)]
    dense, a, whole, steps, again = evaluate(hybrid, text, arms, SIZE, ONE, profile=profile)
    assert a["steps_sparse"] == 20 and a["layers_sparse"] == 40 and a["kl"] > 1e-3 and dense["kl"] == 0
    assert whole["kl"] < 1e-4 and steps["kl"] < 1e-4  # a state that went on from the arm before would show here
    assert (again["kl"], again["ppl"]) == (a["kl"], a["ppl"])


def test_the_state_is_the_prefixs(library, hybrid):
    tokens = np.random.default_rng(0).integers(0, 64, 320).tolist()
    with Session(hybrid, n_ctx=512, n_threads=1) as s:
        assert s.is_recurrent
        s.decode(tokens[:300], 0, logits="none")
        rewind = s.rewinder(300)
        first = s.decode(tokens[300:], 300, logits="all")
        for _ in range(2):
            rewind()
            assert np.array_equal(s.decode(tokens[300:], 300, logits="all"), first)


def test_a_long_continuation(library, hybrid, text, profile, words):
    """Where the arm's text parts from dense's it goes on from its own state: written alone it is the same."""
    settings = tasks.TaskSettings(text=text, context=ONE)
    out = long_text.run_long(
        hybrid, [Arm("all", ON.replace(budget=400)), Arm("few", ON)], 24, 256, 1, settings, profile
    )
    every, few = out["rows"][1:]
    assert every["agreement"] == 1.0 and few["agreement"] < 1.0 and few["equal_prefix"][0] < 23
    with Session(hybrid, n_ctx=512, n_threads=1) as s:
        prompt = cut_windows(s, text, 1, 256)[0][:256]
        s.decode(prompt[:-1], 0, logits="none")
        ArmSwitch(s, profile).use(Arm("few", ON))
        alone = s.detokenize(greedy(s, prompt[-1], 255, 24))
    assert out["texts"][2]["texts"] == [alone]


def test_sweep_and_calibrate_layers(library, hybrid, text, profile, words, tmp_path):
    result = sweep(hybrid, text, tmp_path / "s", Grid((4,), (40, 80)), 0.5, ON, profile, SIZE, ONE)
    assert len(result["rows"]) == 2 and all(r["steps_sparse"] == 20 for r in result["rows"])
    grid = LayerGrid((0.5, 0.9), (60, 120))
    _, figures = calibrate_layers(
        hybrid, text, tmp_path / "l.json", grid, ON, profile, 1, 300, 20, n_threads=1, mode="device"
    )
    assert [x["layers"] for x in figures["layers"]] == [[1], [3]]


@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrids_of_other_kinds(library, text, words, name):
    model = ARCHS / f"{name}.gguf"
    if not model.exists():
        pytest.skip("no models in build/archs; run `make upstream-tests`")
    profile = synthetic_profile(*model_shape(GGUFFile(model)))
    size = WindowSettings(windows=1, window=120, score=10)
    arms = [Arm("all", ON.replace(budget=120)), Arm("few", ON.replace(budget=20)), Arm("steps")]
    _, whole, few, steps = evaluate(model, text, arms, size, ONE, profile=profile)
    assert few["steps_sparse"] == 10 and whole["kl"] < 1e-3 and steps["kl"] < 1e-3
