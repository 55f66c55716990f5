"""What a step is (a prompt, or tokens that continue sequences), that every layer of it is counted, and that settings
wait for a decode."""

import threading

import numpy as np
import pytest

from fasa_gguf import FasaError, FasaParams
from fasa_gguf.reasons import Reason
from fasa_gguf.speed.random_model import synthetic_profile

SOME = FasaParams(chunks=4, budget=40, min_context=0)


def open_session(model, **kw):
    """With a ranking of every attention layer that the context has."""
    from fasa_gguf.session import Session

    s = Session(model, **{"n_ctx": 2048, "n_threads": 2, **kw})
    shapes = [s.fasa.layer_shape(il) for il in range(s.fasa.model_info()["n_layer"])]
    s.fasa.set_profile(synthetic_profile([h[1] for h in shapes], [h[2] // 2 if h[1] else 0 for h in shapes], seed=3))
    s.fasa.set_params(SOME)
    return s


def items(tokens, pos0, seq=0):
    """All tokens ask for logits."""
    return [(t, pos0 + i, seq, True) for i, t in enumerate(tokens)]


class Steps:
    """The kinds of the ubatches that a call computes."""

    def __init__(self, s):
        self.s = s

    def __call__(self, *batches):
        names = ("steps_sparse", "steps_dense", "steps_prefill")
        before = self.s.fasa.counters()
        for batch in batches:
            self.s.decode_batch(batch)
        after = self.s.fasa.counters()
        return tuple(after[name] - before[name] for name in names)


@pytest.fixture
def two(tiny):
    with open_session(tiny, n_seq_max=2) as s:
        yield s, Steps(s)


# ---- what a step is ----


@pytest.mark.parametrize("unified", [False, True])
@pytest.mark.parametrize("n_seq", [12, 60])
def test_many_sequences_with_a_token_each_are_a_decode_step(tiny, n_seq, unified):
    with open_session(tiny, n_seq_max=n_seq, kv_unified=unified, n_ctx=128 * n_seq) as s:
        s.decode(range(3, 73), 0)
        for q in range(1, n_seq):
            s.copy(0, q)
        assert Steps(s)([(5, 70, q, True) for q in range(n_seq)]) == (1, 0, 0)
        assert s.fasa.step_reason_code() == Reason.NONE


@pytest.mark.parametrize("n_batch", [1, 2, 8, 48])
def test_a_prompt_whose_logits_are_all_wanted_is_a_prompt(two, n_batch):
    s, steps = two
    tokens = list(np.arange(200) % 250 + 3)
    parts = [items(tokens[i : i + n_batch], i) for i in range(0, 200, n_batch)]
    if n_batch == 1:  # nobody can see that it is a prompt, so the caller says it
        assert steps(*parts) == (199, 0, 1)
        s.clear()
        with s.fasa.step_kind("prompt"):
            assert steps(*parts) == (0, 0, 200)
    else:
        assert steps(*parts) == (0, 0, len(parts))
        assert s.fasa.step_reason_code() == Reason.PREFILL


@pytest.mark.parametrize("n", [2, 5, 8])
def test_the_rest_of_a_prompt_is_a_prompt(two, n):
    steps = two[1]
    assert steps(items(range(3, 103), 0), items(range(3, 3 + n), 100)) == (0, 0, 2)


def test_drafts_of_up_to_max_tokens_are_decode_steps(two):
    s, steps = two
    s.decode_batch(items(range(3, 103), 0))
    assert steps(items([9], 100)) == (1, 0, 0)
    for n in (11, 17, 64):
        assert steps(items(range(3, 3 + n), 101)) == (1, 0, 0)
        s.remove(0, 101)  # they are rejected
    assert steps(items(range(3, 68), 101)) == (0, 0, 1)  # 65 of them
    assert steps(items(range(3, 8), 166)) == (0, 0, 1)  # and they go on
    assert steps(items([9], 171), items(range(3, 8), 172)) == (2, 0, 0)


def test_drafts_behind_a_prompt_that_asked_for_its_last_logits_alone(two):
    s, steps = two
    s.decode(range(3, 103), 0)
    assert steps(items(range(3, 14), 100)) == (1, 0, 0)


def test_each_sequence_counts_for_itself(two):
    s, steps = two
    for seq in (0, 1):
        s.decode_batch(items(range(3, 103), 0, seq))
    assert steps(items([9], 100, 0) + items([9], 100, 1)) == (1, 0, 0)
    assert steps(items(range(3, 67), 101, 0) + items(range(3, 67), 101, 1)) == (1, 0, 0)  # 64 tokens of each
    s.remove(1, 0)
    assert steps(items([3, 4], 165, 0) + items([3, 4], 0, 1)) == (0, 0, 1)  # one begins anew
    assert steps(items([3, 4], 167, 0)) == (1, 0, 0)  # which does not matter to the other
    assert steps(items([3, 4], 2, 1)) == (0, 0, 1)
    s.remove(0, 0)
    s.copy(1, 0)
    s.decode_batch(items(range(3, 203), 4, 1))
    s.remove(0, 0)
    s.copy(1, 0)
    assert steps(items([3, 4], 204, 0)) == (0, 0, 1)  # another sequence than the one that had drafts


def test_who_knows_says_what_a_step_is(two):
    s, steps = two
    with s.fasa.step_kind("decode"):
        assert steps(items(range(3, 103), 0)) == (1, 0, 0)
        with s.fasa.step_kind("prompt"):
            assert steps(items([9], 100)) == (0, 0, 1)
        assert steps([(9, 101, 0, False), (9, 102, 0, True)]) == (1, 0, 0)
    assert steps(items([9], 103)) == (1, 0, 0)
    with pytest.raises(FasaError, match="step kind 'prefill': expected one of auto, prompt, decode"):
        s.fasa.step_kind("prefill").__enter__()
    lib = s.fasa._lib
    assert lib.fasa_set_step(s.fasa._ctx, 3) == -1
    assert s.fasa._ffi.string(lib.fasa_error()) == b"step 3: expected 0 (auto), 1 (prompt) or 2 (decode)"


def test_a_graph_is_not_reused_for_the_other_kind(two):
    """The same token at the same place, as a prompt and as a decode step."""
    s = two[0]
    s.decode(range(3, 203), 0)
    rows = {}
    for kind in ("prompt", "decode", "prompt", "decode"):
        with s.fasa.step_kind(kind):
            rows.setdefault(kind, []).append(s.decode([9], 200))
        s.remove(0, 200)
    assert (rows["prompt"][0] == rows["prompt"][1]).all() and (rows["decode"][0] == rows["decode"][1]).all()
    assert (rows["prompt"][0] != rows["decode"][0]).any()
    s.fasa.set_params(None)
    assert (s.decode([9], 200) == rows["prompt"][0]).all()


# ---- everything that runs is counted ----


def check_law(s, n_ubatch, n_layer):
    """Every ubatch has one kind, and every attention layer of it is counted."""
    c = s.fasa.counters()
    assert c["steps_sparse"] + c["steps_dense"] + c["steps_prefill"] == n_ubatch
    assert c["layers_sparse"] + c["layers_dense"] + c["layers_prefill"] == n_ubatch * n_layer
    assert c["layers_prefill"] == c["steps_prefill"] * n_layer
    return c


MODELS = {"tiny": 3, "sliding": 4, "hybrid": 2}


@pytest.mark.parametrize("swa_full", [True, False])
@pytest.mark.parametrize("model", MODELS)
def test_every_layer_of_every_ubatch_is_counted(request, model, swa_full):
    n_layer = MODELS[model]
    with open_session(request.getfixturevalue(model), n_seq_max=2, n_ubatch=64, swa_full=swa_full) as s:
        for params, reason in ((None, Reason.OFF), (SOME, None), (SOME.replace(min_context=4096), Reason.MIN_CONTEXT)):
            s.fasa.set_params(params)
            s.fasa.reset_counters()
            s.clear()
            s.decode(range(3, 63), 0, 0)
            s.decode(range(3, 63), 0, 1)
            s.decode(np.arange(150) % 60, 60, 0)  # 3 ubatches
            s.decode(np.arange(150) % 60, 60, 1)
            c = check_law(s, 8, n_layer)
            assert c["steps_prefill"] == 8
            assert s.fasa.step_reason_code() == (Reason.PREFILL if params else Reason.OFF)
            for i in range(3):
                s.decode_batch([(5, 210 + i, 0, True), (6, 210 + i, 1, True)])
            s.decode_batch(items(range(3, 8), 213))
            c = check_law(s, 12, n_layer)
            assert s.fasa.step_reason_code() == (reason or Reason.NONE)
            assert (c["steps_sparse"], c["steps_dense"]) == ((0, 4) if reason else (4, 0))
            assert (c["layers_sparse"] > 0) == (reason is None)


def test_one_cache_of_two_is_enough_for_a_sparse_step(sliding):
    """Only layers with a window, and only layers without one, are ranked."""
    for some in ([0, 1, 2], [3]):
        with open_session(sliding) as s:
            n_chunk = [8 if il in some else 0 for il in range(4)]
            s.fasa.set_profile(synthetic_profile([2] * 4, n_chunk, seed=3))
            s.decode(range(3, 63), 0)
            s.decode([5], 60)
            c = check_law(s, 2, 4)
            assert (c["steps_sparse"], c["layers_sparse"], c["layers_dense"]) == (1, len(some), 4 - len(some))
            assert s.fasa.step_reason_code() == Reason.NONE


def test_an_aborted_ubatch_is_not_counted(tiny):
    with open_session(tiny) as s:
        s.decode(range(3, 103), 0)
        s.decode([5], 100)
        before = s.fasa.counters()
        s.abort = lambda: True
        for tokens in ([6], range(3, 203)):
            with pytest.raises(FasaError, match="code 2"):
                s.decode(tokens, 101)
        after = s.fasa.counters()
        s.abort = None
        names = [n for n in before if n.startswith(("steps_", "layers_")) or n in ("cells_refreshed", "rebuilds")]
        assert {n: after[n] for n in names} == {n: before[n] for n in names}
        s.remove(0, 101)
        s.decode([6], 101)
        assert check_law(s, 3, 3)["steps_sparse"] == 2


def test_nothing_computed_yet(tiny):
    with open_session(tiny) as s:
        assert s.fasa.step_reason() == "nothing was computed yet"
        s.decode(range(3, 103), 0)
        assert s.fasa.step_reason() == "the last step was a prompt"


# ---- settings and decodes on two threads ----


def test_settings_wait_for_a_decode(tiny):
    """The same settings set again and again while another thread decodes: the same logits."""
    with open_session(tiny) as s:

        def run():
            s.clear()
            return np.stack([s.decode(range(3, 203), 0)] + [s.decode([5 + i], 200 + i) for i in range(40)])

        want, stop, errors = run(), threading.Event(), []

        def admin():
            profile = synthetic_profile([2] * 3, [8] * 3, seed=3)
            while not stop.is_set():
                try:
                    s.fasa.set_params(SOME)
                    s.fasa.set_profile(profile)
                    s.fasa.invalidate()
                    s.fasa.counters(), s.fasa.layer_reasons(), s.fasa.step_reason(), s.fasa.params()
                except Exception as e:
                    errors.append(e)
                    return

        thread = threading.Thread(target=admin)
        thread.start()
        try:
            got = [run() for _ in range(6)]
        finally:
            stop.set()
            thread.join()
        assert not errors
        assert all((g == want).all() for g in got)


def test_the_library_refuses_to_change_what_a_decode_uses(tiny):
    """Through the C interface, from inside a decode; what reads answers."""
    with open_session(tiny) as s:
        f, lib = s.fasa, s.fasa._lib
        p = f._ffi.new("fasa_params *", lib.fasa_params_default())
        seen = []

        def abort():
            if not seen:
                calls = (
                    lib.fasa_set_params(f._ctx, p),
                    lib.fasa_invalidate(f._ctx),
                    lib.fasa_reset_counters(f._ctx),
                    lib.fasa_borrow_list(f._ctx, 1, 0),
                    lib.fasa_set_observer(f._ctx, f._ffi.NULL, f._ffi.NULL),
                    lib.fasa_fill_random(f._ctx, 10, 0),
                )
                seen.append(
                    (calls, f._ffi.string(lib.fasa_error()).decode(), f.counters(), f.params(), f.step_reason())
                )
            return False

        s.abort = abort
        s.decode(range(3, 103), 0)
        calls, error, _, params, _ = seen[0]
        assert calls == (-1,) * 6 and params.budget == SOME.budget
        assert error.startswith("this context is decoding") and error.endswith("call it between two decodes")
        s.abort = None
        s.decode([5], 100)
        check_law(s, 2, 3)


def test_an_observer_cannot_change_settings(tiny):
    with open_session(tiny) as s:
        s.fasa.observe(lambda _: s.fasa.set_params(None))
        with pytest.raises(FasaError, match="an observer runs inside a decode"):
            s.decode(range(3, 13), 0)
        s.fasa.observe(None)
