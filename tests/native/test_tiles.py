"""The CPU ops of sparse prefill against reference_prefill.py: scores, lists, outputs."""

import numpy as np
import pytest
from tile_cases import HOWS, cells, tokens_of, ubatch_tiles

from fasa_gguf import FasaError
from fasa_gguf import reference as R
from fasa_gguf import reference_prefill as P


def garbage(x, cell_pos, type_x):
    """Empty cells hold whatever was there."""
    x = x.copy()
    if type_x in ("f16", "f32"):
        x[:, cell_pos < 0] = np.nan
    return x


def run(
    library,
    *,
    n_before=500,
    n_tokens=50,
    n_stream=1,
    n_head=6,
    n_head_kv=2,
    d=64,
    d_v=64,
    n_dom=24,
    k_dom="q4",
    type_k="f16",
    size=32,
    budget=200,
    mass=0.0,
    floor=80,
    cap=400,
    sink=4,
    band=16,
    n_hadamard=0,
    soft_cap=0.0,
    sinks=False,
    per_head=False,
    how="plain",
    n_threads=2,
    hot=3.0,
    seed=0,
):
    """A prompt's ubatch of n_tokens per stream, behind n_before cells; how: of tile_cases. Compares everything with the
    reference; returns what the ops gave."""
    rng = np.random.default_rng(seed)
    cell_pos, of, own, seq = cells(how, n_before, n_tokens, 7, rng)
    pos, n_kv = cell_pos[own], len(cell_pos)
    q = rng.standard_normal((n_stream, n_tokens, n_head, d)).astype(np.float32)
    k, v = (rng.standard_normal((n_stream, n_kv, n_head_kv, w)).astype(np.float32) for w in (d, d_v))
    q *= hot  # so that attention is not flat
    seen = of[seq] & (cell_pos <= pos[:, None])  # [n_tokens, n_kv]
    tiles, forced = ubatch_tiles(cell_pos, of, own, seq, n_stream, size, sink, band)
    chosen = np.stack([rng.permutation(d)[:n_dom] for _ in range(n_head_kv)]).astype(np.int32)
    if n_dom > 8:
        chosen[:, -1] = -1
    weight = rng.uniform(0.5, 1.5, (n_head_kv, n_dom)).astype(np.float32)
    learned = rng.standard_normal(n_head).astype(np.float32) * 5 if sinks else None
    if type_k == "f16":
        k, v = (x.astype(np.float16).astype(np.float32) for x in (k, v))
    scale = 1 / np.sqrt(d)
    got = library.ops.tile_run(
        q=q, k=garbage(k, cell_pos, type_k), v=garbage(v, cell_pos, type_k), dims=chosen, weight=weight, forced=forced,
        tiles=tiles, cell_pos=np.tile(cell_pos, (n_stream, 1)), own=of[seq[tiles[:, 2] % n_tokens]], budget=budget,
        mass=mass, floor=floor, cap=cap, scale=scale, soft_cap=soft_cap, k_dom=k_dom, type_k=type_k, type_v=type_k,
        n_hadamard=n_hadamard, sinks=learned, per_head=per_head, n_threads=n_threads,
    )  # fmt: skip
    g = n_head // n_head_kv
    plain = (lambda x: R.hadamard(x, n_hadamard)) if n_hadamard else (lambda x: x)
    for i, tile in enumerate(tiles):
        s, tokens = tile[0], tokens_of(tile) % n_tokens
        visible = seen[tokens]
        f = np.zeros(n_kv, bool)
        f[forced[i][forced[i] >= 0]] = True
        for h in range(n_head_kv):
            keys = R.quantize_k_dom(plain(k[s, :, h]), chosen[h], k_dom)
            qt = q[s, tokens, h * g : h * g + g]
            est = P.tile_estimate(plain(qt), keys, chosen[h], weight[h], scale, soft_cap)
            for m in range(g):
                score = P.tile_score(est[:, m : m + 1], visible)
                mine = got["score"][i, h * g + m]
                assert (mine[~visible.any(0)] == 0).all()
                # a value on a rounding boundary of K_dom or of 8 bits falls to either side, by a step
                if type_k == "f16":
                    assert np.abs(mine - score).max() < 0.02 * max(1, score.max())
                    assert np.abs(mine - score).sum() < 2e-3 * score.sum()
            shared = 1 if per_head else g
            for j in range(g // shared):
                part = slice(j * shared, (j + 1) * shared)
                score = got["score"][i, h * g + j * shared : h * g + (j + 1) * shared].sum(0)
                n_row = len(tokens) * shared
                best = R.select(score, visible.any(0), f, n_row, budget, mass, floor, cap)
                count = got["count"][i, h * g // shared + j]
                listed = got["list"][i, h * g // shared + j, :count]
                assert abs(count - len(best)) <= (1 if mass else 0)
                assert len(set(listed) ^ set(best)) <= (2 if g > 2 or mass else 0)  # the order of a sum's terms
                assert (np.diff(listed) > 0).all()
                sink_of = None if learned is None else learned[h * g :][part]
                out = P.tile_attend(qt[:, part], k[s, :, h], v[s, :, h], listed, visible, scale, soft_cap, sink_of)
                mine = got["out"][s, tokens][:, h * g : h * g + g][:, part]
                assert np.allclose(mine, out, atol=1e-4 if type_k == "f16" else 0.1)
    assert np.isfinite(got["out"]).all()
    return got


@pytest.mark.parametrize("k_dom", ["f16", "q8", "q4"])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1), (10, 2)])
def test_shapes_and_types(library, k_dom, heads):
    run(library, k_dom=k_dom, n_head=heads[0], n_head_kv=heads[1])


@pytest.mark.parametrize("d, d_v", [(16, 16), (64, 80), (80, 64), (128, 128), (256, 250)])
def test_head_dims(library, d, d_v):
    run(library, d=d, d_v=d_v, n_dom=8 if d == 16 else 24, hot=1.0)


@pytest.mark.parametrize("size, n_tokens", [(16, 3), (16, 61), (64, 64), (128, 200), (31, 45)])
def test_tile_sizes(library, size, n_tokens):
    run(library, size=size, n_tokens=n_tokens)


def test_target_mass(library):
    got = run(library, mass=0.7, floor=10)
    assert len(np.unique(got["count"])) > 1
    run(library, mass=0.999, cap=90)


def test_a_list_for_every_query_head(library):
    run(library, per_head=True, mass=0.6, n_head=9, n_head_kv=3)


def test_streams_and_sequences(library):
    run(library, n_stream=3)
    run(library, how="two")
    run(library, how="two", mass=0.5, floor=10)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("case", [{}, {"n_stream": 2, "size": 16}, {"n_before": 40, "n_tokens": 200, "budget": 60}])
def test_who_sees_which_cell(library, how, case):
    """Sequences that alternate or share cells, holes, positions that begin late, that repeat, or that lie behind."""
    run(library, how=how, **case)


def test_soft_cap_and_learned_sinks(library):
    run(library, soft_cap=3.0, sinks=True)


def test_quantised_cache_under_rotation(library):
    run(library, n_hadamard=64)
    run(library, type_k="q8_0", n_hadamard=64)


def test_a_budget_of_all_cells_is_dense_attention(library):
    got = run(library, budget=10**6)
    assert (got["count"] > 500).all()
    run(library, mass=1.0, floor=1, cap=10**6, budget=1)


def test_a_short_context(library):
    """Less than a span, and the first tile of a prompt, which sees nothing before it."""
    run(library, n_before=0, n_tokens=40)
    run(library, n_before=3, n_tokens=200, budget=20, band=0, sink=0)


def test_threads_change_nothing(library):
    a, b, c = (run(library, n_threads=n, n_tokens=100, mass=0.8) for n in (1, 2, 7))
    for name in a:
        assert (a[name] == b[name]).all() and (a[name] == c[name]).all()


def one_tile(size, n_kv):
    """What all queries of a tile see: every cell."""
    return {
        "tiles": np.array([[0, size, *range(size), *[n_kv] * size]]),
        "cell_pos": np.arange(n_kv)[None],
        "own": np.ones((1, n_kv)),
    }


def test_equal_scores_go_to_the_lower_cell(library):
    n_kv, size = 600, 32
    one = np.ones((1, 1, 1, 64), np.float32)
    got = library.ops.tile_run(
        q=one.repeat(size, 1), k=one.repeat(n_kv, 1), v=one.repeat(n_kv, 1), dims=np.arange(24)[None],
        weight=np.ones((1, 24)), forced=np.array([[599, 300]]), budget=50, scale=0.1, **one_tile(size, n_kv),
    )  # fmt: skip
    assert got["list"][0, 0].tolist() == [*range(48), 300, 599]


def test_one_query_is_enough(library):
    """A cell that one query of a tile needs is in the list, whichever query it is."""
    n_kv, size = 2000, 128
    rng = np.random.default_rng(3)
    k = rng.standard_normal((1, n_kv, 1, 64)).astype(np.float32)
    for at in (0, 1, 63, 100, 127):
        q = rng.standard_normal((1, size, 1, 64)).astype(np.float32)
        q[0, at, 0] = 12 * k[0, 777, 0]
        got = library.ops.tile_run(
            q=q, k=k, v=k, dims=np.arange(24)[None], weight=np.ones((1, 24)), forced=np.array([[0]]), budget=20,
            scale=0.125, **one_tile(size, n_kv),
        )  # fmt: skip
        assert 777 in got["list"][0, 0]


def test_bad_tiles_are_refused(library):
    x = np.zeros((1, 2, 1, 16), np.float32)
    case = {"q": x, "k": x, "v": x, "dims": np.arange(8)[None], "weight": np.ones((1, 8)), "forced": np.array([[0]])}
    case |= {"cell_pos": np.arange(2)[None], "own": np.ones((1, 2)), "budget": 2, "scale": 1.0}
    for tile in ([1, 1, 0, 0], [0, 3, 0, 1], [0, 1, 2, 0], [0, -1, 0, 0], [0, 1, -1, 0]):
        with pytest.raises(FasaError, match="tile 0 names a stream or a token that the case does not have"):
            library.ops.tile_run(**case, tiles=np.array([[*tile, 0, 1]]))
