"""A model with sliding windows: which layers run sparse, and which bytes and tokens are counted, against the mask.

The model has four layers: three with a window of 64, then one that attends to all.
"""

from dataclasses import replace

import pytest
from benching import ON, QUICK, run

from fasa_gguf import FasaError, FasaParams
from fasa_gguf.calibrate.gguf import CalibrationParams, calibrate
from fasa_gguf.calibrate.layers import layer_arms, make_groups, sparse_alone
from fasa_gguf.cli.run import layer_lines
from fasa_gguf.counters import bytes_of_dense, bytes_read
from fasa_gguf.gguf.shape import describe_windows
from fasa_gguf.profile.profile import Profile
from fasa_gguf.reasons import Reason
from fasa_gguf.session import Session
from fasa_gguf.speed.random_model import synthetic_profile

CELL = 2 * 2 * 16 * 2  # bytes of a layer: K and V, KV heads, head_dim, f16
RANKED = synthetic_profile([2] * 4, [8] * 4)
BELOW = FasaParams(budget=48, sink=2, recent=8, min_context=0, chunks=4)  # less than a window
ABOVE = BELOW.replace(budget=64)
SHORT = [Reason.SMALL_WINDOW] * 3


def mask_of(n, window):
    """Cells that a token at position n - 1 sees."""
    return min(n, window) if window else n


def step(s, params, depth, n=1, profile=RANKED):
    """Counters of n tokens decoded at once behind `depth` others."""
    s.fasa.set_params(None)
    s.clear()
    s.decode([1 + i % 60 for i in range(depth)], 0, logits="none")
    s.fasa.set_profile(profile)
    s.fasa.set_params(params)
    s.fasa.reset_counters()
    s.decode([7] * n, depth, logits="all")
    return s.fasa.counters()


@pytest.mark.parametrize("swa_full", [True, False])
@pytest.mark.parametrize("depth", [40, 300])
def test_bytes_and_tokens_are_those_that_the_mask_shows(library, sliding, swa_full, depth):
    with Session(sliding, n_ctx=512, n_ubatch=64, n_batch=64, swa_full=swa_full, n_threads=1) as s:
        seen = [mask_of(depth + 1, w) for w in (64, 64, 64, 0)]
        c = step(s, BELOW, depth)
        assert s.fasa.layer_reason_codes() == [Reason.NONE] * 4 and c["layers_sparse"] == 4
        assert (c["bytes_dense"], c["bytes_layers_dense"]) == (sum(seen) * CELL, 0)
        assert (c["tokens_visible"], c["lists"]) == (2 * sum(seen), 8)
        c = step(s, ABOVE, depth)
        assert s.fasa.layer_reason_codes() == [*SHORT, Reason.NONE] and c["layers_sparse"] == 1
        assert (c["bytes_dense"], c["bytes_layers_dense"]) == (seen[3] * CELL, sum(seen[:3]) * CELL)
        assert (c["tokens_visible"], c["tokens_attended"], c["lists"]) == (2 * seen[3], 2 * min(seen[3], 64), 2)
        assert bytes_of_dense(c) == sum(seen) * CELL
        assert bytes_read(c) == sum(seen[:3]) * CELL + min(seen[3], 64) * CELL + c["bytes_tip"]
        c = step(s, None, depth)
        assert (c["bytes_dense"], c["bytes_layers_dense"], bytes_read(c)) == (0, sum(seen) * CELL, sum(seen) * CELL)


def test_several_tokens_read_a_cell_once(library, sliding):
    with Session(sliding, n_ctx=512, n_threads=1) as s:
        c = step(s, ABOVE, 300, n=3)
        assert (c["bytes_dense"], c["bytes_layers_dense"]) == (303 * CELL, 3 * 66 * CELL)


def test_only_layers_that_reach_farther_have_dominant_keys(library, sliding):
    with Session(sliding, n_ctx=512, n_threads=1) as s:
        s.fasa.set_profile(RANKED)
        sizes = []
        for params in (BELOW, ABOVE, BELOW.replace(mass=0.9, cap=64), BELOW.replace(mass=0.9, floor=8, cap=63)):
            s.fasa.set_params(params)
            sizes.append(s.fasa.counters()["bytes_k_dom"])
        assert sizes == [4 * sizes[1], sizes[1], sizes[1], 4 * sizes[1]] and sizes[1] > 0


def test_bench_counts_every_layer(library, sliding):
    dense, fasa = run(sliding, replace(QUICK, fill="random"), RANKED)
    depth = fasa.n_depth
    assert dense.kv_bytes == CELL * (depth + 3 + 2.5 + 3 * 64)
    tip = fasa.kv_bytes - CELL * (64 + 3 * 64)  # of one layer, 10 to 16 tiles of 32 cells
    assert 2 * 320 * (8 // 2 + 2) <= tip <= 2 * 512 * (8 // 2 + 2)
    assert fasa.tokens_attended == ON.budget == 64
    assert fasa.note == "3 of 4 layers dense (3: its sliding window is not longer than what it would attend)"


# ---- calibration ----


def ids(n=600):
    return "ids", [1 + (i * i) % 60 for i in range(n)]


def test_calibration_ranks_layers_that_reach_farther(library, sliding, tmp_path):
    small = CalibrationParams(context=512, queries=16, budget=40)
    p = calibrate(sliding, ids(), small, out=tmp_path / "p.json")
    assert p.n_chunk == [0, 0, 0, 8] and p.window == [64, 64, 64, 0] == Profile.load(tmp_path / "p.json").window
    assert p.rope["base"] == 10000 and p.rope["base_window"] == 10000
    every = calibrate(sliding, ids(), replace(small, window_layers=True))
    assert every.n_chunk == [8] * 4 and (every.ranking[3] == p.ranking[3]).all()


def test_a_model_of_short_windows_only(library, sliding, monkeypatch):
    from fasa_gguf.calibrate import gguf

    monkeypatch.setattr(gguf, "sliding_windows", lambda model, n: [64] * n)
    message = r"every attention layer has a sliding window of at most 64 tokens, .* up to 1024; rank .*--window-layers"
    with pytest.raises(FasaError, match=message):
        calibrate(sliding, ids(), CalibrationParams(context=512, queries=16, budget=40))


def test_layers_alone_are_sparse(library, sliding):
    """calibrate-layers leaves out layers that stay dense, and the others run sparse in each of its arms."""
    profile = replace(RANKED, window=[64, 64, 64, 0])
    assert make_groups(profile, 1, 64) == [[3]] and make_groups(profile, 2, 63) == [[0, 1], [2, 3]]
    arms = layer_arms(profile, [[0], [3]], [0.5], BELOW.replace(cap=63, floor=8), 300)
    assert [a.params.budget for a in arms] == [63, 48, 300, 48]
    with Session(sliding, n_ctx=512, n_threads=1) as s:
        for a in arms:
            assert step(s, a.params, 300, profile=a.profile)["layers_sparse"] == 1
        c = step(s, ABOVE, 300, profile=sparse_alone(profile, [0]))
        assert (c["layers_sparse"], s.fasa.layer_reason_codes()) == (0, [*SHORT, Reason.NOT_RANKED])


def test_run_verbose_says_what_each_layer_did(sliding):
    why = Reason.SMALL_WINDOW.text
    assert layer_lines([why, why, why, None], str(sliding)) == [
        f"layers 0-2: dense, {why}",
        "layers 3: sparse",
        "layers 0-2 have a sliding window of 64 tokens",
    ]


def test_windows_in_words():
    assert describe_windows([512, 512, 512, 0, 512, 0]) == ["layers 0-2, 4 have a sliding window of 512 tokens"]
    assert describe_windows([0, 0]) == []
