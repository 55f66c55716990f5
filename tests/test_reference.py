import numpy as np
import pytest

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
    assert len(R.select(score, every, none, 1, 99, 0.5, 3, 99)) == 3   # floor
    assert len(R.select(score, every, none, 1, 99, 1.0, 1, 2)) == 2    # cap


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
