"""`own_prompt`: every arm processes the prompt with its own settings, sparsely where `prefill` says so."""

from dataclasses import replace

import pytest

from fasa_gguf import FasaError, FasaParams
from fasa_gguf.calibrate.gguf import default_corpus
from fasa_gguf.gguf.file import GGUFFile
from fasa_gguf.gguf.shape import model_shape
from fasa_gguf.quality.answers import format_answers, summarize
from fasa_gguf.quality.arms import Arm
from fasa_gguf.quality.perplexity import WindowSettings, evaluate, format_scores
from fasa_gguf.quality.tasks import Question, TaskSettings, run_questions
from fasa_gguf.reasons import Reason
from fasa_gguf.runtime.settings import ContextSettings
from fasa_gguf.session import Session
from fasa_gguf.speed.bench import BenchSettings, bench
from fasa_gguf.speed.random_model import synthetic_profile

TEXT = default_corpus()[1][:40000]
ONE = ContextSettings(n_threads=1, mode="auto")
PROMPT = FasaParams(chunks=4, min_context=10**6, prefill="on", prefill_mass=0.0, prefill_tile=32, prefill_band=8)
SOME, ALL = PROMPT.replace(prefill_budget=60), PROMPT.replace(prefill_budget=10**6)
SIZE = WindowSettings(windows=2, window=400, score=20, own_prompt=True)


@pytest.fixture(scope="module")
def profile(tiny):
    return synthetic_profile(*model_shape(GGUFFile(tiny)))


def test_perplexity_of_sparse_prompts(library, tiny, profile):
    arms = [Arm("some", SOME), Arm("all", ALL), Arm("both", SOME.replace(min_context=0, budget=60)), Arm("steps")]
    dense, some, everything, both, steps = evaluate(tiny, TEXT, arms, SIZE, ONE, profile=profile)
    assert some["kl"] > 20 * everything["kl"] and everything["kl"] < 1e-4 and both["kl"] > some["kl"]
    assert everything["prefill_share"] == 1 and 0.1 < some["prefill_share"] == both["prefill_share"] < 0.6
    assert dense["prefill_share"] is None and steps["prefill_share"] is None
    assert some["steps_sparse"] == 0 and both["steps_sparse"] == 40
    note = format_scores([dense, some]).splitlines()[-1]
    assert note == f"some: its prompts attended {100 * some['prefill_share']:.0f}% of the cells"


def test_a_dense_arm_with_another_ubatch(library, tiny, profile):
    """Equal but for rounding; decoding as the reference does, so the prompt alone differs."""
    arms = [Arm("steps"), Arm("cut", ubatch=48), Arm("some", SOME), Arm("some, cut", SOME, ubatch=64)]
    for score_batch in (1, 7):
        size = replace(SIZE, batched_dense=False, score_batch=score_batch)
        dense, steps, cut, some, both = evaluate(tiny, TEXT, arms, size, ONE, profile=profile)
        assert steps["kl"] == 0 and steps["ppl"] == dense["ppl"] and dense["dense"] == "steps"
        assert 0 <= cut["kl"] < 1e-4 < some["kl"]
        assert both["kl"] == pytest.approx(some["kl"], rel=0.05)  # tiles do not depend on ubatches
    with pytest.raises(FasaError, match="arm cut: ubatch is of an arm's own prompt; add --own-prompt"):
        evaluate(tiny, TEXT, arms, replace(SIZE, own_prompt=False), ONE, profile=profile)
    with pytest.raises(FasaError, match=r"arm big: expected a ubatch of 1 to 512 tokens, .* 513; use a larger -ub"):
        evaluate(tiny, TEXT, [Arm("big", ubatch=513)], SIZE, ONE)


def test_prompts_are_read_in_ubatches_of_an_arm(library, tiny):
    with Session(tiny, n_ctx=512, n_threads=1) as s:
        seen, decode = [], s.decode_batch
        s.decode_batch = lambda items: seen.append(len(items)) or decode(items)
        tokens = s.tokenize(TEXT)[:300]
        rows = Arm("a", ubatch=128).read_prompt(s, tokens, range(127, 130))
        assert seen == [128, 128, 44] and len(rows) == 3
        s.clear()
        everything = s.decode(tokens, 0, logits="all")
        assert all(abs(row - everything[127 + i]).max() < 1e-3 for i, row in enumerate(rows))


def test_without_it_prompts_are_dense(library, tiny, profile):
    with pytest.raises(FasaError, match="FASA was asked for and no step used it"):
        evaluate(tiny, TEXT, [Arm("some", SOME)], WindowSettings(1, 400, 20), ONE, profile=profile)


def test_answers_to_sparse_prompts(library, tiny, profile):
    settings = TaskSettings(TEXT, n_predict=5, own_prompt=True, context=ONE)
    arms = [Arm("some", SOME.replace(min_context=0)), Arm("dense prompt", SOME.replace(min_context=0, prefill="off"))]
    sample = run_questions(tiny, [Question("niah_single_2", 700, 0)], arms, settings, profile)[0]
    counters = [a["counters"] for a in sample["arms"]]
    assert counters[0]["steps_prefill"] == 0  # of all arms that need no other: before the counters were reset
    assert counters[1]["steps_prefill_sparse"] > 0 and counters[2]["steps_prefill_sparse"] == 0
    assert counters[2]["steps_prefill"] > 0 and counters[2]["tiles_dense"] > 0
    assert [a["prefill_reason"] for a in sample["arms"]] == [None, None, "PREFILL_OFF"]


def test_a_dense_arm_behind_a_sparse_one_has_a_dense_prompt(library, tiny, profile):
    settings = TaskSettings(TEXT, n_predict=5, own_prompt=True, context=ONE)
    arms = [Arm("some", SOME.replace(prefill_budget=1, prefill_band=0)), Arm("steps"), Arm("cut", ubatch=64)]
    samples = run_questions(tiny, [Question("niah_single_2", 700, i) for i in range(3)], arms, settings, profile)
    for r in samples:
        dense, _, steps, cut = (a["text"] for a in r["arms"])
        assert steps == dense == cut
    assert any(r["arms"][1]["text"] != r["arms"][0]["text"] for r in samples)
    rows = summarize(samples)  # its min_context of a million keeps decoding dense, not the prompt
    assert 0 < rows[0]["arms"][1]["prefill_share"] < 0.5 and rows[0]["arms"][2]["prefill_share"] is None
    note = f"some: its prompts attended {100 * rows[0]['arms'][1]['prefill_share']:.0f}% of the cells"
    assert note in format_answers(rows).splitlines()
    off = [Arm("short", SOME.replace(prefill="auto", prefill_min_context=5000))]
    with pytest.raises(FasaError, match=r"arm short: FASA was asked .*shorter than prefill_min_context so far; use"):
        run_questions(tiny, [Question("niah_single_2", 700, 0)], off, settings, profile)


def test_bench_times_sparse_prompts(library, tiny, profile):
    settings = BenchSettings(depths=(0, 256), n_gen=2, n_prompt=(64, 8), repetitions=1, n_threads=1)
    results = bench(tiny, settings, {"fasa": SOME.replace(min_context=0)}, profile)
    notes = {r.test: r.note for r in results if r.arm == "fasa" and r.n_prompt}
    assert notes["pp8 @ d256"] == f"prompt dense: {Reason.PREFILL_SHORT.text}"
    assert notes["pp64 @ d0"].endswith("% of the cells attended")
    assert int(notes["pp64 @ d256"].split("%")[0]) < 40
    assert {r.test: r.sparse_share for r in results if r.arm == "fasa" and r.n_prompt}["pp64 @ d256"] == 1
