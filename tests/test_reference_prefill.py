"""The definition of sparse prefill: its laws, in numpy."""

import numpy as np
import pytest

from fasa_gguf import FasaParams
from fasa_gguf import reference as R
from fasa_gguf import reference_prefill as P

T, G, D, N = 32, 2, 32, 400
P0 = FasaParams(prefill_mass=0.0, prefill_budget=100, prefill_band=20, prefill_tile=T, sink=4)
DIMS = R.chunk_dims(D, D, "neox")


def tile(p, seed=0, n_before=N - T, hot=None, **kw):
    """One tile behind n_before cells; hot: (query, cell) that it needs. Returns (out, cells, dense out)."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in ((T, G, D), (N, D), (N, D)))
    if hot:
        q[hot[0]] = 12 * k[hot[1]]
    cell = np.arange(N)
    visible = cell <= n_before + np.arange(T)[:, None]
    own = (cell >= n_before) & (cell < n_before + T)
    rank, scale = rng.permutation(D // 2), 1 / np.sqrt(D)
    out, cells = P.prefill_tile(q, k, v, cell, visible, own, n_before, rank, DIMS, p, scale, **kw)
    return out, cells, P.tile_attend(q, k, v, cell, visible, scale, kw.get("soft_cap", 0), kw.get("sink"))


@pytest.mark.parametrize("p", [P0.replace(prefill_budget=N), P0.replace(prefill_mass=1.0, prefill_cap=N)])
def test_all_cells_are_dense_attention(p):
    for kw in ({}, {"soft_cap": 5.0}, {"sink": np.array([1.0, 3.0], np.float32)}):
        out, cells, dense = tile(p, **kw)
        assert cells.tolist() == list(range(N)) and np.allclose(out, dense, atol=1e-6)


def test_a_tile_is_causal_inside():
    """Its first query sees nothing of what comes after it."""
    out, cells, dense = tile(P0.replace(prefill_budget=N), n_before=200)
    assert cells.tolist() == list(range(232)) and np.allclose(out, dense, atol=1e-6)


def test_forced_cells_and_the_budget():
    _, cells, _ = tile(P0)
    forced = {*range(4), *range(N - T - 20, N)}
    assert len(cells) == 100 and forced <= set(cells.tolist())
    _, cells, _ = tile(P0.replace(prefill_budget=1))
    assert set(cells.tolist()) == forced


def test_mass_floor_and_cap():
    counts = [len(tile(P0.replace(prefill_mass=m, prefill_floor=60, prefill_cap=300))[1]) for m in (0.1, 0.6, 0.9, 1)]
    assert counts[0] == 60 < counts[1] < counts[2] <= counts[3] == 300


@pytest.mark.parametrize("at", [0, 1, 15, T - 1])
def test_every_query_scores(at):
    _, cells, _ = tile(P0.replace(prefill_budget=60), hot=(at, 123))
    assert 123 in cells


def test_tiles_follow_positions_and_sequences():
    pos, seq = np.array([30, 31, 32, 33, 31, 32, 64]), np.array([0, 0, 0, 0, 1, 1, 1])
    assert P.tile_numbers(pos, seq, 32).tolist() == [0, 0, 1, 1, 2, 3, 4]
    assert P.tile_numbers(np.full(5, 7), np.zeros(5, int), 2).tolist() == [0, 0, 1, 1, 2]  # that share a position
    many, zeros = np.arange(100, 300), np.zeros(200, int)
    alone = P.tile_numbers(many, zeros, 64)
    for cut in (128 - 100, 192 - 100):  # a prompt cut at multiples of 64 has the same tiles
        parts = [P.tile_numbers(many[x], zeros[x], 64) for x in (slice(cut), slice(cut, 200))]
        assert np.concatenate([parts[0], parts[1] + parts[0].max() + 1]).tolist() == alone.tolist()


def test_forced_cells_go_by_position():
    positions = np.array([5, 0, 3, 1, 2, 4, 6, 7])
    own = positions >= 6
    got = P.tile_forced(positions, own, 6, np.ones(8, bool), 1, 2)
    assert np.flatnonzero(got).tolist() == [0, 1, 5, 6, 7]
