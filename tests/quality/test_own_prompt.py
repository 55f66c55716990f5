"""`own_prompt`: every arm processes the prompt with its own settings, sparsely where `prefill` says so."""

import pytest

from fasa_gguf import FasaError, FasaParams
from fasa_gguf.calibrate.gguf import default_corpus
from fasa_gguf.gguf.file import GGUFFile
from fasa_gguf.gguf.shape import model_shape
from fasa_gguf.quality.arms import Arm
from fasa_gguf.quality.perplexity import WindowSettings, evaluate, format_scores
from fasa_gguf.quality.tasks import Question, TaskSettings, run_questions
from fasa_gguf.runtime.settings import ContextSettings
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


def test_bench_times_sparse_prompts(library, tiny, profile):
    settings = BenchSettings(depths=(0, 256), n_gen=2, n_prompt=(64, 8), repetitions=1, n_threads=1)
    results = bench(tiny, settings, {"fasa": SOME.replace(min_context=0)}, profile)
    notes = {r.test: r.note for r in results if r.arm == "fasa" and r.n_prompt}
    assert notes["pp8 @ d256"] == ""  # too few tokens
    assert notes["pp64 @ d0"].endswith("% of the cells attended")
    assert int(notes["pp64 @ d256"].split("%")[0]) < 40
    assert {r.test: r.sparse_share for r in results if r.arm == "fasa" and r.n_prompt}["pp64 @ d256"] == 1
