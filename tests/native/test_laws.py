"""The laws of the design on a real model: identity, bit-equality when off, and dominant keys that are never stale."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from paths import ROOT

from fasa_gguf import FasaError, FasaParams
from fasa_gguf import reference as R
from fasa_gguf.calibrate.gguf import default_corpus
from fasa_gguf.profile import embed
from fasa_gguf.quality.perplexity import log_softmax
from fasa_gguf.reasons import Reason
from fasa_gguf.speed.random_model import synthetic_profile

ALL = FasaParams(chunks=32, budget=10**6, min_context=0, k_dom="f16")  # everything attended, by the sparse path
SOME = FasaParams(chunks=12, budget=100, min_context=0)
PREFIX = 600


@pytest.fixture(scope="module")
def profile():
    return synthetic_profile([3] * 30, [32] * 30, seed=7)


@pytest.fixture(scope="module")
def text():
    return default_corpus()[1][5000:12000]


def open_session(model, profile, **kw):
    from fasa_gguf.session import Session

    s = Session(model, **{"n_ctx": 2048, "n_threads": 2, **kw})
    s.fasa.set_profile(profile)
    return s


@pytest.mark.parametrize("cache", ["f16", "q8_0"])
def test_identity(smollm2, profile, text, cache):
    """Budget >= the cached tokens: dense attention up to a reordered sum.

    The model's 4-bit products make noise of their own: dense with one thread and dense with two differ by a KL of
    0.003. FASA must stay within 0.006, and greedy text be equal.
    """
    with open_session(smollm2, profile, type_k=cache, type_v=cache) as s:
        tokens = s.tokenize(text)[: PREFIX + 48]
        out = []
        for params in (None, ALL):
            s.fasa.set_params(None)
            s.clear()
            s.decode(tokens[:PREFIX], 0, logits="none")
            s.fasa.set_params(params)
            s.fasa.reset_counters()
            out.append(log_softmax(np.stack([s.decode([t], PREFIX + i) for i, t in enumerate(tokens[PREFIX:])])))
        c = s.fasa.counters()
        assert c["steps_sparse"] == 48 and c["steps_dense"] == 0 and c["layers_sparse"] == 48 * 30
        assert c["tokens_attended"] == c["tokens_visible"]
        kl = (np.exp(out[0]) * (out[0] - out[1])).sum(-1)
        assert kl.mean() < 0.006
        assert (out[0].argmax(-1) == out[1].argmax(-1)).mean() > 0.9


def test_greedy_text_of_500_tokens_is_equal(smollm2, profile):
    with open_session(smollm2, profile) as s:
        # the model is certain of this text: its two best logits stay 1.9 apart, and rounding moves one by 0.7
        prompt = s.tokenize("".join(f"{i}, {i + 1}, {i + 2}, " for i in range(1, 10)) * 12)
        texts = []
        for params in (None, ALL):
            s.fasa.set_params(params)
            s.clear()
            logits, out = s.decode(prompt, 0), []
            for i in range(500):
                out.append(int(logits.argmax()))
                logits = s.decode([out[-1]], len(prompt) + i)
            texts.append(out)
        assert texts[0] == texts[1]
        assert s.fasa.counters()["steps_sparse"] >= 500


def test_off_is_the_unpatched_library_bit_for_bit(smollm2, profile, tmp_path):
    stock = ROOT / "build" / "stock-lib" / "fasa_gguf" / "lib"
    if not stock.exists():
        pytest.skip("the unpatched library is missing; run `make stock`")
    embedded = embed.rewrite(smollm2, profile, tmp_path / "m.gguf")
    ours = ROOT / "fasa_gguf" / "lib"
    runs = [
        subprocess.run(
            [sys.executable, ROOT / "tests" / "helpers" / "run_stock.py", lib, model],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for lib, model in ((stock, smollm2), (ours, smollm2), (stock, embedded))
    ]
    assert runs[0] == runs[1] == runs[2] and len(runs[0]) > 100


def test_below_min_context_nothing_changes(smollm2, profile, text):
    with open_session(smollm2, profile) as s:
        tokens = s.tokenize(text)[:300]
        out = []
        for params in (None, SOME.replace(min_context=4096)):
            s.fasa.set_params(params)
            s.clear()
            out.append(s.decode(tokens[:290], 0))
            out.append(np.stack([s.decode([t], 290 + i) for i, t in enumerate(tokens[290:])]))
        assert (out[0] == out[2]).all() and (out[1] == out[3]).all()
        assert s.fasa.step_reason() == "the context is shorter than min_context"
        assert s.fasa.step_reason_code() == Reason.MIN_CONTEXT
        assert s.fasa.counters()["layers_sparse"] == 0


@pytest.mark.parametrize("unified", [False, True])
def test_a_decode_steps_mask_is_the_stock_one(tiny, unified):
    """A sequence without holes gets its mask by its length: the bits of the mask that looks at every cell."""
    got = []
    for params in (None, SOME.replace(min_context=4096)):
        with open_session(tiny, synthetic_profile([2] * 3, [8] * 3, seed=2), n_seq_max=2, kv_unified=unified) as s:
            s.fasa.set_params(params)
            rows = [s.decode(range(3, 203), 0), s.decode([7], 200)]
            rows += list(s.decode([8, 9, 10, 11], 201, logits="all"))  # a draft, of which two tokens are rejected
            s.remove(0, 203)
            rows.append(s.decode([12], 203))
            s.remove(0, 50, 60)  # a hole
            rows.append(s.decode([13], 204))
            rows.append(s.decode([14], 205))  # a cell of the hole, or one behind the others
            s.llama.llama_memory_seq_add(s.memory, 0, 60, -1, -10)  # a context shift
            rows.append(s.decode([15], 196))
            s.decode(range(20, 120), 0, 1)
            s.decode_batch([(16, 197, 0, True), (17, 100, 1, True)])  # two sequences
            rows += [s.logits(0), s.logits(1)]
            s.remove(0, 0)
            rows.append(s.decode([18], 101, 1))  # one of them has gone
            s.copy(1, 0)
            s.decode_batch([(19, 102, 0, True), (20, 102, 1, True)])  # and comes back as a copy of the other
            rows += [s.logits(0), s.logits(1)]
            s.clear()
            rows += [s.decode(range(30, 60), 5), s.decode([21], 35)]  # a sequence that does not begin at 0
            got.append(np.array(rows))
    assert (got[0] == got[1]).all() and np.isfinite(got[0]).all()


def check_fresh(s, token, pos, seq=0):
    """The next step's logits are those with all dominant keys derived anew."""
    first = s.decode([token], pos, seq)
    s.remove(seq, pos)
    s.fasa.invalidate()
    assert (first == s.decode([token], pos, seq)).all()
    s.remove(seq, pos)


@pytest.mark.parametrize("cache, k_dom", [("f16", "q4"), ("q8_0", "q4"), ("f16", "f16"), ("q8_0", "q8")])
def test_dominant_keys_stay_fresh(smollm2, profile, text, cache, k_dom):
    with open_session(smollm2, profile, type_k=cache, type_v=cache) as s:
        tokens = s.tokenize(text)
        s.fasa.set_params(SOME.replace(k_dom=k_dom))
        s.decode(tokens[:PREFIX], 0)
        for i in range(5):
            s.decode([tokens[PREFIX + i]], PREFIX + i)
        n = PREFIX + 5
        check_fresh(s, tokens[n], n)

        saved = s.state()  # state load over another text
        s.clear()
        s.decode(tokens[200:900], 0)
        s.decode([tokens[900]], 700)
        s.clear()
        s.set_state(saved)
        check_fresh(s, tokens[n], n)

        llama = s.llama  # context shift
        s.decode([tokens[n]], n)
        s.remove(0, 10, 110)
        llama.llama_memory_seq_add(s.memory, 0, 110, -1, -100)
        check_fresh(s, tokens[n + 1], n - 99)

        s.decode(tokens[300:400], n - 99)  # prefill behind a decode
        check_fresh(s, tokens[400], n + 1)


@pytest.mark.parametrize("unified", [False, True])
def test_two_sequences(smollm2, profile, text, unified):
    with open_session(smollm2, profile, n_seq_max=2, kv_unified=unified, n_ctx=4096) as s:
        tokens = s.tokenize(text)
        s.fasa.set_params(SOME)
        alone = []
        for seq, at in ((0, 0), (1, 700)):
            s.clear()
            s.decode(tokens[at : at + PREFIX], 0, seq)
            alone.append([s.decode([tokens[at + PREFIX + i]], PREFIX + i, seq) for i in range(3)])
        s.clear()
        for seq, at in ((0, 0), (1, 700)):
            s.decode(tokens[at : at + PREFIX], 0, seq)
        s.fasa.reset_counters()
        for i in range(3):
            s.decode_batch([(tokens[at + PREFIX + i], PREFIX + i, seq, True) for seq, at in ((0, 0), (1, 700))])
            for seq in (0, 1):
                a, b = (log_softmax(x) for x in (alone[seq][i], s.logits(seq)))
                assert (np.exp(a) * (a - b)).sum() < 0.05
        assert s.fasa.counters()["steps_sparse"] == 3
        s.llama.llama_memory_seq_rm(s.memory, 1, -1, -1)
        s.llama.llama_memory_seq_cp(s.memory, 0, 1, -1, -1)
        check_fresh(s, 17, PREFIX + 3, seq=1)


def test_several_tokens_per_step_are_drafts(smollm2, profile, text):
    """Five tokens at once see what five steps see."""
    with open_session(smollm2, profile) as s:
        tokens = s.tokenize(text)
        s.fasa.set_params(SOME)
        s.decode(tokens[:PREFIX], 0, logits="none")
        steps = np.stack([s.decode([tokens[PREFIX + i]], PREFIX + i) for i in range(5)])
        s.remove(0, PREFIX)
        s.fasa.reset_counters()
        once = s.decode(tokens[PREFIX : PREFIX + 5], PREFIX, logits="all")
        assert s.fasa.counters()["steps_sparse"] == 1
        a, b = log_softmax(steps), log_softmax(once)
        assert (np.exp(a) * (a - b)).sum(-1).max() < 0.05


def test_prefill_is_dense_and_counted(smollm2, profile, text):
    with open_session(smollm2, profile) as s:
        s.fasa.set_params(SOME)
        s.decode(s.tokenize(text)[:PREFIX], 0)
        c = s.fasa.counters()
        assert c["steps_prefill"] == 2 and c["layers_sparse"] == 0
        assert c["bytes_k_dom"] == s.n_ctx * 3 * 30 * (12 + 6) and c["bytes_kv"] == s.n_ctx * 3 * 30 * 256
        s.fasa.set_params(None)
        assert s.fasa.counters()["bytes_k_dom"] == 0
        assert s.fasa.layer_reasons() == ["FASA is off"] * 30


def test_a_layer_has_its_own_mass(smollm2, profile, text):
    own = replace(
        profile,
        layer_miss=np.array([0.5, 2.0, 99.0] + [1.0] * 27, np.float32),
        mean_budget={100: 0.5, 300: 0.9, 500: 0.95},
    )
    with open_session(smollm2, own) as s:
        assert s.fasa.layer_params(0) is None
        s.fasa.set_params(SOME.replace(mass=0.9))
        for il in range(4):
            p = s.fasa.layer_params(il)
            assert np.float32(p.mass) == R.layer_mass(0.9, own.layer_miss[il]) and p.budget == 100
        for n in (100, 123, 300, 444, 500):
            s.fasa.set_params(SOME.replace(mean_budget=n))
            mass = R.mean_budget_mass(list(own.mean_budget), list(own.mean_budget.values()), n)
            real = s.fasa.layer_params(3)
            assert (
                np.isclose(real.mass, mass, atol=2e-7)
                and (real.floor, real.cap) == R.mean_budget_bounds(n)
                and real.mean_budget == 0
                and s.fasa.params().mass == 0
                and s.fasa.params().mean_budget == n
            )
        tokens = s.tokenize(text)
        s.decode(tokens[:PREFIX], 0, logits="none")
        seen = []
        for params in (SOME.replace(mean_budget=300), SOME.replace(mass=0.9, floor=75, cap=600)):
            s.fasa.set_params(params)
            s.fasa.reset_counters()
            seen.append((s.decode([tokens[PREFIX]], PREFIX), s.fasa.counters()["tokens_attended"]))
            s.remove(0, PREFIX)
        assert (seen[0][0] == seen[1][0]).all() and seen[0][1] == seen[1][1]
        for params, message in (
            (
                SOME.replace(mean_budget=501),
                "mean_budget 501: the profile's table reaches from 100 to 500 tokens; give one of these, or a mass",
            ),
            (SOME.replace(mean_budget=99), "mean_budget 99: the profile's table reaches"),
        ):
            with pytest.raises(FasaError, match=message):
                s.fasa.set_params(params)
        s.fasa.set_params(SOME.replace(mean_budget=300))
        with pytest.raises(
            FasaError,
            match="mean_budget 300: the profile has no table of mean budgets; make one with "
            "`fasa-gguf calibrate-layers MODEL -f TEXT`",
        ):
            s.fasa.set_profile(profile)
        assert np.isclose(s.fasa.layer_params(0).mass, 0.95)  # what was there stays
        s.fasa.set_profile(replace(own, mean_budget={300: 0.8, 500: 0.9}, layer_miss=None))
        assert np.isclose(s.fasa.layer_params(0).mass, 0.8)  # a live context takes the new table
        for bad, message in (
            ({"layer_miss": np.array([1.0] * 29 + [0.0])}, "layer 29: layer_miss is 0, and must be above 0"),
            (
                {"layer_miss": np.array([1.0, np.nan] + [1.0] * 28)},
                "layer 1: layer_miss is nan, and must be above 0",
            ),
            (
                {"mean_budget": {300: 0.9, 500: 0.8}},
                "entry 1 of the table of mean budgets: 500 tokens at a mass of 0.8; both must ascend",
            ),
            ({"mean_budget": {300: 0.9, 200: 0.95}}, "entry 1 of the table of mean budgets: 200 tokens"),
            ({"mean_budget": {300: 1.0}}, "entry 0 of the table"),
        ):
            with pytest.raises(FasaError, match=message):
                s.fasa.set_profile(replace(own, **bad))
        with pytest.raises(FasaError, match="layer 30: no such layer"):
            s.fasa.layer_params(30)


def test_what_cannot_run_says_why(smollm2, profile):
    from fasa_gguf.session import Session

    with Session(smollm2, n_ctx=256) as s:
        with pytest.raises(FasaError, match="there is no FASA profile; embed one"):
            s.fasa.set_params(SOME)
        with pytest.raises(FasaError, match="the profile is for a model of 2 layers, this one has 30"):
            s.fasa.set_profile(synthetic_profile([3] * 2, [32] * 2))
        with pytest.raises(FasaError, match="layer 0: the profile has 3 KV heads of 16 chunks, the model 3 of 32"):
            s.fasa.set_profile(synthetic_profile([3] * 30, [16] * 30))
    with (
        open_session(smollm2, profile, flash_attn=False, n_ctx=256) as s,
        pytest.raises(FasaError, match="flash attention is off in this context"),
    ):
        s.fasa.set_params(SOME)
