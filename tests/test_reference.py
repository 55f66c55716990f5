import numpy as np
import pytest

from fasa_gguf import FasaError, FasaParams
from fasa_gguf import reference as R


def test_chunk_dims_pair_as_rope_does():
    assert R.chunk_dims(8, 8, "norm").tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert R.chunk_dims(8, 8, "neox").tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert R.chunk_dims(8, 4, "neox").tolist() == [[0, 2], [1, 3], [4, 5], [6, 7]]  # partial rotary: the rest in pairs


def test_dominant_dims_are_padded_to_groups():
    dims = R.chunk_dims(16, 16, "neox")
    assert R.dominant_dims(np.array([3, 0, 5]), 3, dims).tolist() == [3, 11, 0, 8, 5, 13, -1, -1]


def test_hadamard_is_its_own_inverse():
    x = np.random.default_rng(0).standard_normal((3, 128)).astype(np.float32)
    h = np.array([[1, 1], [1, -1]])
    for _ in range(5):
        h = np.kron(h, [[1, 1], [1, -1]])
    assert np.allclose(R.hadamard(x, 64)[:, :64], x[:, :64] @ h / 8, atol=1e-5)
    assert np.allclose(R.hadamard(R.hadamard(x, 64), 64), x, atol=1e-5)


@pytest.mark.parametrize("kind, error", [("f16", 1e-3), ("q8", 0.02), ("q4", 0.35)])
def test_quantised_keys_are_near(kind, error):
    k = np.random.default_rng(1).standard_normal((50, 32)).astype(np.float32)
    dims = np.append(np.arange(14), [-1, -1])
    x = R.quantize_k_dom(k, dims, kind)
    assert np.abs(x[:, :14] - k[:, :14]).max() < error and (x[:, 14:] == 0).all()
    assert (R.quantize_k_dom(np.zeros((2, 32), np.float32), dims, kind) == 0).all()


def test_select_takes_forced_then_best_with_ties_to_the_lower_cell():
    score = np.array([0.1, 0.5, 0.5, 0.5, 0.2, 0.0], np.float32)
    visible = np.array([1, 1, 1, 1, 1, 0], bool)
    forced = np.array([1, 0, 0, 0, 0, 1], bool)
    assert R.select(score, visible, forced, 1, 3).tolist() == [0, 1, 2]
    assert R.select(score, visible, forced, 1, 100).tolist() == [0, 1, 2, 3, 4]
    assert R.select(score, visible, forced, 1, 0).tolist() == [0]


def test_select_by_mass_counts_exactly():
    score = np.array([0.5, 0.25, 0.125, 0.125], np.float32)
    every, none = np.ones(4, bool), np.zeros(4, bool)
    for mass, count in ((0.5, 1), (0.51, 2), (0.75, 2), (0.8, 3), (1.0, 4)):
        assert len(R.select(score, every, none, 1, 99, mass, 1, 99)) == count
    assert len(R.select(score, every, none, 1, 99, 0.5, 3, 99)) == 3  # floor
    assert len(R.select(score, every, none, 1, 99, 1.0, 1, 2)) == 2  # cap


def test_a_layer_s_mass():
    assert (
        R.layer_mass(0.9, 1.0) == np.float32(0.9)
        and np.isclose(R.layer_mass(0.9, 0.5), 0.95)
        and np.isclose(R.layer_mass(0.9, 2.0), 0.8)
    )
    assert R.layer_mass(0.9, 50.0) == R.MASS_LEAST and R.layer_mass(1.0, 50.0) == 1 and R.layer_mass(0.0, 2.0) == 0


def test_the_mass_of_a_mean_budget():
    tokens, mass = [100, 400, 800], [0.5, 0.875, 0.9]
    assert [R.mean_budget_mass(tokens, mass, n) for n in (100, 400, 800)] == [np.float32(x) for x in mass]
    assert np.isclose(R.mean_budget_mass(tokens, mass, 200), 0.75)  # half way: sqrt(1/2 * 1/8) is missed
    assert [R.mean_budget_bounds(n) for n in (40, 128, 256, 512)] == [(40, 80), (64, 256), (64, 512), (128, 1024)]
    assert [R.mean_budget_mass(tokens, mass, n) for n in (99, 801)] == [0, 0] and R.mean_budget_mass([], [], 5) == 0


def test_forced_cells_go_by_position():
    positions = np.array([7, 6, 5, 4, 3, 2, 1, 0])
    forced = R.forced_cells(positions, np.ones(8, bool), 2, 3)
    assert np.flatnonzero(forced).tolist() == [0, 1, 2, 6, 7]


def test_a_planted_needle_is_selected_and_its_chunk_is_ranked_first():
    rng = np.random.default_rng(3)
    d, n, needle = 16, 200, 77
    k = rng.standard_normal((n, d)).astype(np.float32) * 0.1
    q = rng.standard_normal((2, 4, d)).astype(np.float32) * 0.1
    dims = R.chunk_dims(d, d, "neox")
    k[needle, dims[5]] = q[:, :, dims[5]] = 6.0
    pos = np.arange(n - 4, n)
    order, kept = R.rank_recall(q, k, pos, dims, 0.25, 0, 2, 20, 2, 4)
    assert order[0] == 5 and kept[0] > 0.9
    dd = R.dominant_dims(np.append(order, [0]), 1, dims)
    est = R.estimate(q[:, -1], R.quantize_k_dom(k, dd, "q4"), dd, np.ones(len(dd)), 0.25)
    score = R.group_score(est, np.ones(n, bool))
    assert needle in R.select(score, np.ones(n, bool), np.zeros(n, bool), 2, 3)


def test_attention_over_all_cells_is_dense():
    rng = np.random.default_rng(4)
    q, k, v = (rng.standard_normal(s).astype(np.float32) for s in ((2, 8), (30, 8), (30, 5)))
    assert np.allclose(R.attend(q, k, v, np.arange(30), 0.3), R.softmax(q @ k.T * 0.3) @ v, atol=1e-6)
    half = R.attend(q, k, v, np.arange(30), 0.3, sink=np.log(np.exp(q @ k.T * 0.3).sum(-1)))
    assert np.allclose(half, 0.5 * R.attend(q, k, v, np.arange(30), 0.3), atol=1e-6)


def test_quantised_values_by_hand():
    x = np.zeros((1, 8), np.float32)
    x[0, :4] = [12.7, -6.35, 0.05, 0.0]  # q8: the step is 0.1 as f16
    step = np.float32(np.float16(0.1))
    assert np.allclose(R.quantize_k_dom(x, np.arange(8), "q8")[0, :4], np.array([127, -64, 1, 0]) * step)
    x[0, :4] = [-8.0, 3.4, 3.6, 7.9]  # q4: the step is 1, from the value of largest magnitude; 8 is out of reach
    assert R.quantize_k_dom(x, np.arange(8), "q4")[0, :4].tolist() == [-8, 3, 4, 7]
    x[0, :4] = [4.0, -4.0, 0, 0]  # equal magnitudes: the first gives the sign
    assert R.quantize_k_dom(x, np.arange(8), "q4")[0, :2].tolist() == [4.0, -3.5]


def test_q4_is_ggmls_arithmetic():
    from gguf import GGMLQuantizationType, quants

    x = np.zeros((40, 32), np.float32)
    x[:, :8] = np.random.default_rng(2).standard_normal((40, 8))  # one group of ours in a block of q4_0
    theirs = quants.dequantize(quants.quantize(x, GGMLQuantizationType.Q4_0), GGMLQuantizationType.Q4_0)[:, :8]
    ours = R.quantize_k_dom(x, np.arange(8), "q4")
    step = np.abs(x).max(-1, keepdims=True) / 8
    assert (np.abs(ours - theirs) < 1e-6).mean() > 0.99 and (
        np.abs(ours - theirs) < 1.01 * step
    ).all()  # the rounded f16 step


def brute_step(q, k, v, visible, forced, dims, weight, n, scale, cap):
    """The same step with loops over heads and cells and one sort of (not forced, -score, cell)."""
    score = np.zeros(len(k))
    for head in q:
        est = [
            cap * np.tanh(scale * sum(head[d] * w * key[d] for d, w in zip(dims, weight, strict=True)) / cap)
            for key in k
        ]
        e = [np.exp(x) if see else 0.0 for x, see in zip(est, visible, strict=True)]
        score += np.array(e) / sum(e)
    order = sorted((not forced[j], -score[j], j) for j in range(len(k)) if visible[j])
    cells = sorted(j for _, _, j in order[:n])
    out = []
    for head in q:
        e = {j: np.exp(cap * np.tanh(scale * sum(head * k[j]) / cap)) for j in cells}
        out.append(sum(e[j] * v[j] for j in cells) / sum(e.values()))
    return np.array(out), cells


def test_decode_step_is_the_brute_force_step():
    rng = np.random.default_rng(6)
    d, n = 12, 60
    q, k, v = (rng.standard_normal(s) for s in ((3, d), (n, d), (n, 5)))
    k = k.astype(np.float16).astype(np.float32)
    positions = rng.permutation(n)  # a cell's position is not its index
    visible = positions < 50
    forced = visible & ((positions < 2) | (positions >= 47))
    dims = R.chunk_dims(d, 8, "neox")
    ranking, weight = np.array([4, 1, 3, 0, 5, 2]), np.array([0.5, 2.0], np.float32)
    p = FasaParams(chunks=3, budget=14, sink=2, recent=3, k_dom="f16")
    out, cells = R.decode_step(q, k, v, positions, visible, ranking, dims, p, 0.4, 2.0, weight)
    want, expected = brute_step(q, k, v, visible, forced, [8, 9, 1, 5, 3, 7], [0.5, 0.5, 2, 2, 1, 1], 14, 0.4, 2.0)
    assert cells.tolist() == expected and set(np.flatnonzero(forced)) <= set(cells)
    assert np.allclose(out, want, atol=1e-5)


def test_decode_step_with_every_cell_is_dense_attention():
    rng = np.random.default_rng(7)
    q, k, v = (rng.standard_normal(s).astype(np.float32) for s in ((2, 16), (40, 16), (40, 8)))
    out, cells = R.decode_step(
        q,
        k,
        v,
        np.arange(40),
        np.ones(40, bool),
        np.arange(8),
        R.chunk_dims(16, 16, "norm"),
        FasaParams(chunks=2, budget=40),
        0.25,
    )
    assert cells.tolist() == list(range(40)) and np.allclose(out, R.softmax(q @ k.T * 0.25) @ v, atol=1e-6)


def ahead_case(n=60, seed=12):
    rng = np.random.default_rng(seed)
    q, q_ahead, k, v = (rng.standard_normal(s).astype(np.float32) for s in ((3, 12), (3, 12), (n, 12), (n, 5)))
    step = {"q": q, "k": k, "v": v, "positions": np.arange(n), "visible": np.arange(n) < n - 2}
    step |= {"ranking": np.array([4, 1, 3, 0, 5, 2]), "dims": R.chunk_dims(12, 8, "neox"), "scale": 0.4}
    return step, q_ahead


@pytest.mark.parametrize("how", [{"budget": 14}, {"mass": 0.7, "floor": 1, "cap": 60}])
def test_a_list_made_ahead_leaves_fresh_cells_out_of_the_estimate_and_takes_them_all(how):
    """Six cells are written, four of which the token sees; `recent` is two."""
    step, q_ahead = ahead_case()
    fresh = np.zeros(60, bool)
    fresh[[20, 54, 55, 57, 58, 59]] = True
    p = FasaParams(chunks=3, sink=2, recent=2, k_dom="f16", **how)
    out, cells = R.decode_step(**step, p=p, q_ahead=q_ahead, fresh=fresh)
    seen = np.flatnonzero(fresh & step["visible"])
    assert set(seen) | {0, 1} <= set(cells) and not {58, 59} & set(cells)
    assert np.allclose(out, R.attend(step["q"], step["k"], step["v"], cells, 0.4), atol=1e-6)

    # the same list from keys that lack the fresh cells, which are then added to it
    old = dict(step, q=q_ahead, visible=step["visible"] & ~fresh)
    room = len(cells) - len(seen)
    dims = R.dominant_dims(step["ranking"], 3, step["dims"])
    keys = R.quantize_k_dom(step["k"], dims, "f16")
    score = R.group_score(R.estimate(q_ahead, keys, dims, np.ones(len(dims)), 0.4), old["visible"])
    forced = R.forced_cells(step["positions"], step["visible"], 2, 2) & ~fresh
    assert cells.tolist() == sorted([*seen, *R.select(score, old["visible"], forced, 3, room)])
    if "mass" in how:
        share = [score[c[~fresh[c]]].sum() / 3 for c in (cells, R.select(score, old["visible"], forced, 3, room - 1))]
        assert share[0] >= 0.7 > share[1]

    step["k"][fresh] = np.nan  # what is stored there does not matter to the list
    with np.errstate(invalid="ignore"):
        assert R.decode_step(**step, p=p, q_ahead=q_ahead, fresh=fresh)[1].tolist() == cells.tolist()


def test_a_list_made_ahead_by_true_queries_is_the_own_list_when_the_newest_cells_are_forced_anyway():
    step, _ = ahead_case()
    fresh = np.arange(60) >= 57
    p = FasaParams(chunks=3, budget=20, sink=2, recent=3, k_dom="f16")
    for head in range(3):  # of several heads the newest cells move the shares of a score
        one = dict(step, q=step["q"][head : head + 1])
        own, ahead = R.decode_step(**one, p=p), R.decode_step(**one, p=p, q_ahead=one["q"], fresh=fresh)
        assert own[1].tolist() == ahead[1].tolist() and (own[0] == ahead[0]).all()


def test_when_all_that_a_token_sees_is_fresh_it_attends_all():
    step, q_ahead = ahead_case()
    for how in ({"budget": 5}, {"mass": 0.5, "floor": 1, "cap": 3}):
        p = FasaParams(chunks=3, sink=1, recent=1, **how)
        cells = R.decode_step(**step, p=p, q_ahead=q_ahead, fresh=np.ones(60, bool))[1]
        assert cells.tolist() == list(range(58))


def foreseen_case(seed=14):
    """True queries find a needle by chunk 5, foreseen ones have nothing there and half of it in chunk 2."""
    rng = np.random.default_rng(seed)
    d, n, needle = 16, 200, 77
    k = rng.standard_normal((n, d)).astype(np.float32) * 0.1
    q = rng.standard_normal((2, 4, d)).astype(np.float32) * 0.1
    dims = R.chunk_dims(d, d, "neox")
    k[needle, dims[5]] = q[:, :, dims[5]] = 6.0
    k[needle, dims[2]] = 6.0
    q_est = q.copy()
    q_est[:, :, dims[5]], q_est[:, :, dims[2]] = 0.0, 3.0
    return q, q_est, k, np.arange(n - 4, n), dims


def test_chunks_are_ranked_and_weighted_for_the_queries_that_score():
    q, q_est, k, pos, dims = foreseen_case()
    given = (q, k, pos, dims, 0.25, 0, 2, 20, 2, 4)
    assert R.rank_recall(*given)[0][0] == 5
    order, kept = R.rank_recall(*given, q_est=q_est)
    assert order[0] == 2 and kept[0] > 0.9
    assert all(np.array_equal(a, b) for a, b in zip(R.rank_recall(*given, q_est=q), R.rank_recall(*given), strict=True))
    # chunk 2 of the foreseen queries says half of what chunk 5 of the true ones does
    assert np.allclose(R.fit_weights(q, k, pos, dims, np.array([2]), 0.25, q_est=q_est), 2, atol=0.1)
    assert R.fit_weights(q, k, pos, dims, np.array([5]), 0.25)[0] == pytest.approx(1, abs=0.1)
    dd, w = R.dominant_dims(np.array([5]), 1, dims), np.ones(8)
    share = [R.kept_share(q, k, pos, dd, w, "f16", 0.25, 0, 20, 2, 4, by) for by in (None, q, q_est)]
    assert share[0] == share[1] > 0.9 > share[2]


def test_decode_step_with_default_settings_finds_a_needle():
    rng = np.random.default_rng(11)
    n, d, needle = 900, 80, 333
    q, k, v = (rng.standard_normal(s).astype(np.float32) * 0.1 for s in ((2, d), (n, d), (n, 4)))
    dims = R.chunk_dims(d, d, "neox")
    k[needle, dims[7]] = q[:, dims[7]] = 6.0
    k[222, dims[9]] = q[:, dims[9]] = 6.0
    ranking = np.array(
        [*range(20, 31), 7, 9, *range(7), 8, *range(10, 20), *range(31, 40)]
    )  # 7 is the 12th, 9 the 13th
    step = (q, k, v, np.arange(n), np.ones(n, bool), ranking, dims)
    for p in (FasaParams(budget=40), FasaParams(budget=40, chunks=12)):  # 3/8 of 40 chunks, in groups of 4: 12
        cells = R.decode_step(*step, p, 0.2)[1].tolist()
        assert needle in cells and 222 not in cells
    assert 222 in R.decode_step(*step, FasaParams(budget=40, chunks=13), 0.2)[1]
    assert len(R.decode_step(*step, FasaParams(budget=1), 0.2)[1]) == 4 + 32 + 1  # room for one beside the forced ones
    with pytest.raises(FasaError, match="decode_step: mean_budget 256 needs a profile's table"):
        R.decode_step(*step, FasaParams(mean_budget=256), 0.2)


def test_scores_out_of_reach_are_zero():
    est = np.full((1, 600), -80.0)  # in the second span 2^-115 of the head, out of the first's reach
    est[0, [3, 9, 300, 301, 599]] = 0.0, -65.0, -40.0, -109.0, -45.0
    score = R.group_score(est, np.arange(600) != 5)
    assert set(np.flatnonzero(score)) == {3, 9} | set(range(256, 512))  # -45 is 2^-65: the third span is not seen
    assert score[9] == np.float32(np.exp(-65.0) * 2.0**60).astype(float) * 2.0**-60
    assert (R.group_score(est, np.zeros(600, bool)) == 0).all()


def test_energy_ranks_by_the_product():
    assert R.rank_energy(np.array([1.0, 3.0, 2.0, 2.0]), np.array([5.0, 1.0, 2.0, 2.0])).tolist() == [0, 2, 3, 1]


def test_agreement_ranks_the_chunk_that_decides_first():
    rng = np.random.default_rng(8)
    dims = R.chunk_dims(16, 16, "norm")
    q = np.full((2, 3, 16), 0.1, np.float32)
    k = rng.standard_normal((120, 16)).astype(np.float32)
    q[:, :, dims[6]], q[:, :, dims[2]] = 5.0, 1.0
    assert R.rank_ca(q, k, np.arange(117, 120), dims, 0.25, 20)[:2].tolist() == [6, 2]


def test_weights_of_all_chunks_are_one_and_silent_partners_are_weighed_in():
    rng = np.random.default_rng(9)
    dims, pos = R.chunk_dims(8, 8, "norm"), np.arange(196, 200)
    q, k = rng.standard_normal((2, 4, 8)).astype(np.float32), rng.standard_normal((200, 8)).astype(np.float32)
    assert np.allclose(R.fit_weights(q, k, pos, dims, np.arange(4), 0.35), 1, atol=0.02)
    q[..., dims[1]], k[:, dims[1]] = (
        2 * q[..., dims[0]],
        k[:, dims[0]],
    )  # chunk 1 is twice chunk 0, so chunk 0 stands for both
    q[..., dims[2]] = -3 * q[..., dims[3]]
    k[:, dims[2]] = k[:, dims[3]]  # chunk 3 stands for -2 of itself: clipped to 0
    w = R.fit_weights(q, k, pos, dims, np.array([0, 3]), 0.35)
    assert np.allclose(w, [3, 0], atol=0.1)


def test_greedy_set_prefers_a_complement_over_a_twin():
    """Chunk 1 says the same as chunk 0; chunk 3 alone says less but finds the other needle."""
    n, pos = 100, np.array([99])
    dims = R.chunk_dims(8, 8, "norm")
    k = np.zeros((n, 8), np.float32)
    k[40, [0, 1, 2, 3]] = 4.0
    k[60, [6, 7]] = 5.0
    order, kept = R.rank_recall(np.ones((1, 1, 8), np.float32), k, pos, dims, 1.0, 0, 3, 2, 0, 0)
    assert order[:2].tolist() == [0, 3] and kept[0] < kept[1] and kept[1] > 0.99
    assert order[2] == 1  # nothing left to gain: the lowest id
