"""Long generation: agreement, degeneration, resuming, what is refused."""

import numpy as np
import pytest

from fasa_gguf import FasaError, FasaParams
from fasa_gguf.calibrate.gguf import default_corpus
from fasa_gguf.gguf import shape
from fasa_gguf.gguf.file import GGUFFile
from fasa_gguf.quality import long_text
from fasa_gguf.quality.arms import Arm
from fasa_gguf.quality.long_text import distinct_share, format_long_text, longest_repeat, run_long
from fasa_gguf.quality.tasks import TaskSettings
from fasa_gguf.runtime.settings import ContextSettings
from fasa_gguf.session import Session
from fasa_gguf.speed.random_model import synthetic_profile

ON = FasaParams(chunks=4, budget=60, sink=4, recent=8, min_context=0)
TEXT = default_corpus()[1][:40000]
ONE_THREAD = ContextSettings(n_threads=1, mode="auto")
SETTINGS = TaskSettings(TEXT, n_predict=12, context=ONE_THREAD)


@pytest.fixture(scope="module")
def profile(tiny):
    return synthetic_profile(*shape.model_shape(GGUFFile(tiny)))


def test_degeneration():
    assert distinct_share([1, 2, 3, 4, 5, 6]) == 1 and distinct_share([1] * 7) == 0.25 and distinct_share([1, 2]) == 1
    assert (
        longest_repeat([1, 2, 3, 9, 1, 2, 3, 8]) == 3 and longest_repeat([1, 2, 3, 4]) == 0 and longest_repeat([]) == 0
    )
    assert (
        longest_repeat([5] * 10) == 9 and longest_repeat([256, 1, 2, 65536, 1, 2]) == 2
    )  # whole tokens, not bytes of them


def test_long_generation(library, tiny, profile, monkeypatch, tmp_path):
    monkeypatch.setattr(long_text, "BLOCK", 10)
    settings, told = TaskSettings(TEXT, context=ONE_THREAD), []
    out = run_long(
        tiny,
        [Arm("f", ON), Arm("steps")],
        25,
        300,
        2,
        settings,
        profile,
        lambda *a: told.append(a),
        tmp_path / "long.jsonl",
    )
    dense, f, steps = out["rows"]
    assert told[-1] == ("generating", 250, 250) and [r["arm"] for r in out["rows"]] == ["dense", "f", "steps"]
    assert (
        dense["agreement"] == 1
        and dense["equal_prefix"] == [25, 25]
        and steps["equal_prefix"] == [25, 25]
        and steps["agreement_blocks"] == [1, 1, 1]
    )
    assert (
        f["steps_sparse"] == 2 * 25 + sum(24 - e for e in f["equal_prefix"])
        and f["tokens_attended"] == 60
        and f["agreement"] < 1
    )
    assert (
        np.isclose(np.dot(f["agreement_blocks"], [10, 10, 5]) / 25, f["agreement"])
        and len(out["texts"][1]["texts"]) == 2
    )
    again = run_long(tiny, [Arm("f", ON), Arm("steps")], 25, 300, 2, settings, profile, None, tmp_path / "long.jsonl")
    assert again == out and len((tmp_path / "long.jsonl").read_text().splitlines()) == 7
    assert format_long_text(out["rows"]).splitlines()[0].split()[:8] == [
        "arm",
        "tokens",
        "equal",
        "prefix",
        "same",
        "top",
        "to",
        "10",
    ]

    with Session(tiny, n_ctx=512, n_threads=1) as s:  # the arm's own text, written by itself
        prompt = long_text.cut_windows(s, TEXT, 2, 300)[0][:300]
        s.fasa.set_profile(profile)
        s.decode(prompt[:-1], 0, logits="none")
        s.fasa.set_params(ON)
        w = long_text._Writer(s, None, 0)
        assert w.barred == [2] and s.detokenize(w.write(prompt[-1], 299, 25)) == out["texts"][1]["texts"][0]


def test_long_generation_refuses(library, tiny, profile):
    with pytest.raises(FasaError, match="--task long continues a text: give -f FILE"):
        run_long(tiny, [], 10, 100)
    with pytest.raises(
        FasaError,
        match=r"4000 tokens of text and 100 written: .* was trained on 4096 tokens of context; "
        "use a smaller --window or -n",
    ):
        run_long(tiny, [], 100, 4000, 1, SETTINGS)
    with pytest.raises(
        FasaError, match="arm f: FASA was asked for and no step used it: the context is shorter than min_context"
    ):
        run_long(tiny, [Arm("f", ON.replace(min_context=2000))], 5, 100, 1, SETTINGS, profile)
