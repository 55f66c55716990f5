"""The CPU ops against reference.py: logits, lists index for index, outputs.

Tolerance, 2e-5 relative: f32 sums in another order.
"""

import numpy as np
import pytest

from fasa_gguf import reference as R


def run(
    library,
    *,
    n_kv=333,
    n_head=6,
    n_head_kv=2,
    d=64,
    d_v=64,
    n_tokens=2,
    n_stream=1,
    n_dom=24,
    k_dom="q4",
    type_k="f16",
    budget=40,
    n_hadamard=0,
    soft_cap=0.0,
    mass=0.0,
    floor=10,
    cap=100,
    hidden=30,
    sinks=False,
    equal=False,
    per_head=False,
    distinct=0,
    n_threads=2,
    fresh=None,
    seed=0,
):
    """fresh: cells of every stream that the ubatch writes, int [n_fresh] or [n_stream, n_fresh]; -1: none."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((n_stream, n_tokens, n_head, d)).astype(np.float32) * 2
    k = rng.standard_normal((n_stream, n_kv, n_head_kv, d)).astype(np.float32)
    v = rng.standard_normal((n_stream, n_kv, n_head_kv, d_v)).astype(np.float32)
    if equal:
        k[:] = k[:, :1]
    if distinct:  # so many different keys: the others tie with one of them
        k[:] = k[:, rng.integers(0, distinct, n_kv)]
    k, v = (x.astype(np.float16).astype(np.float32) for x in (k, v))
    mask = np.zeros((n_stream, n_tokens, n_kv), np.float32)
    mask[rng.random(mask.shape) < 0.1] = -np.inf
    mask[:, :, n_kv - hidden :] = -np.inf
    dims = np.stack([rng.permutation(d)[:n_dom] for _ in range(n_head_kv)]).astype(np.int32)
    dims[0, -3:] = -1
    weight = rng.random((n_head_kv, n_dom)).astype(np.float32) + 0.5
    forced = rng.integers(-1, n_kv, (n_stream, n_tokens, 9)).astype(np.int32)
    if fresh is not None:  # the caller of SELECT forces all of them
        fresh = np.broadcast_to(np.asarray(fresh, np.int32), (n_stream, np.shape(fresh)[-1])).copy()
        forced = np.concatenate([forced, fresh[:, None].repeat(n_tokens, 1)], -1)
    learned = rng.standard_normal(n_head).astype(np.float32) if sinks else None
    scale = d**-0.5
    got = library.ops.op_run(
        q=q,
        k=k,
        v=v,
        mask=mask,
        dims=dims,
        weight=weight,
        forced=forced,
        budget=budget,
        scale=scale,
        mass=mass,
        floor=floor,
        cap=cap,
        per_head=per_head,
        soft_cap=soft_cap,
        k_dom=k_dom,
        type_k=type_k,
        n_hadamard=n_hadamard,
        sinks=learned,
        n_threads=n_threads,
        fresh=fresh,
    )
    g = n_head // n_head_kv
    for s in range(n_stream):
        for h in range(n_head_kv):
            plain = R.hadamard(k[s, :, h], n_hadamard) if n_hadamard else k[s, :, h]
            keys = R.quantize_k_dom(plain, dims[h], k_dom)
            for t in range(n_tokens):
                heads = slice(h * g, h * g + g)
                visible = np.isfinite(mask[s, t])
                qt = q[s, t, heads]
                est = R.estimate(
                    R.hadamard(qt, n_hadamard) if n_hadamard else qt, keys, dims[h], weight[h], scale, soft_cap, k_dom
                )
                mine = got["est"][s, t, heads]
                stored = visible.copy()
                if fresh is not None:
                    stored[fresh[s][fresh[s] >= 0]] = False
                assert (np.isfinite(mine) == stored).all()  # a fresh cell has the logit of the score 0
                if type_k == "f16":
                    # a value on a rounding boundary of K_dom may fall to the other side, by one step: few of them, one
                    # cell in a short row
                    bad = np.abs(mine - est)[:, stored] > 2e-5 * max(1, np.abs(est).max())
                    assert bad.sum() <= max(len(bad), 0.002 * bad.size)
                f = np.zeros(n_kv, bool)
                f[forced[s, t][forced[s, t] >= 0]] = True
                shared = 1 if per_head else g  # query heads of a list
                for i in range(g // shared):
                    part = slice(i * shared, (i + 1) * shared)  # of the group
                    of = slice(h * g + i * shared, h * g + (i + 1) * shared)  # of all heads
                    cells = R.select(R.group_score(mine[part], stored), visible, f, shared, budget, mass, floor, cap)
                    count = got["count"][s, t, h * g // shared + i]
                    listed = got["list"][s, t, h * g // shared + i, :count]
                    assert abs(count - len(cells)) <= (1 if mass else 0)
                    assert (np.diff(listed) > 0).all()
                    # softmax differs in the last bit, so only near-equal scores may swap at the edge
                    assert len(set(listed) ^ set(cells)) <= (2 if not distinct else abs(count - len(cells)))
                    out = R.attend(
                        qt[part],
                        k[s, :, h],
                        v[s, :, h],
                        listed,
                        scale,
                        soft_cap,
                        None if learned is None else learned[of],
                    )
                    assert np.allclose(got["out"][s, t, of], out, atol=1e-4 if type_k == "f16" else 0.05)
    return got


@pytest.mark.parametrize("k_dom", ["f16", "q8", "q4"])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1), (10, 2)])
def test_shapes_and_types(library, k_dom, heads):
    run(library, k_dom=k_dom, n_head=heads[0], n_head_kv=heads[1])


@pytest.mark.parametrize("d", [16, 64, 80, 128, 256])
def test_head_dims(library, d):
    run(library, d=d, d_v=d, n_dom=8 if d == 16 else 24)


def test_a_list_for_every_query_head(library):
    got = run(library, per_head=True)
    assert (got["list"][0, 0, 0] != got["list"][0, 0, 1]).any()
    run(library, per_head=True, mass=0.7, n_stream=2, n_tokens=3, n_head=9, n_head_kv=3)


def test_streams_and_tokens(library):
    run(library, n_stream=3, n_tokens=4)


def test_soft_cap_and_learned_sinks(library):
    run(library, soft_cap=3.0, sinks=True)


def test_quantised_cache_under_rotation(library):
    run(library, type_k="q8_0", n_hadamard=64)
    run(library, n_hadamard=64)


def test_target_mass(library):
    run(library, mass=0.7)


@pytest.mark.parametrize("mass", [0.05, 0.5, 0.9, 0.995, 1.0])
def test_target_mass_of_many_cells(library, mass):
    """Few cells are looked at first, then four times as many."""
    for cap in (300, 1500, 5000):
        run(library, n_kv=3000, mass=mass, cap=cap)
    run(library, n_kv=3000, distinct=5, hidden=0, mass=mass, cap=2900)


FRESH = {
    "one": [200],
    "several, some hidden, some of them none": [17, 255, 256, -1, 300, 301, 302, 310, -1, 332],
    "hidden alone": [304, 332],
    "none": [-1, -1],
    "a span": np.arange(256),
    "the last span": np.arange(256, 333),
    "more than a warp": np.arange(100, 250, 3),
    "all": np.arange(333),
}


@pytest.mark.parametrize("k_dom", ["f16", "q8", "q4"])
@pytest.mark.parametrize("fresh", FRESH.values(), ids=FRESH)
def test_fresh_cells_are_left_out_of_the_estimate(library, fresh, k_dom):
    """They are attended, since they are forced, and what lies in their K is not looked at."""
    for how in ({}, {"mass": 0.7, "cap": 400}, {"per_head": True}, {"n_tokens": 5, "soft_cap": 3.0}):
        got = run(library, k_dom=k_dom, fresh=fresh, **how)
        if len(fresh) == 333:
            assert (got["count"] > 200).all()
    run(library, k_dom=k_dom, fresh=[fresh, np.asarray(fresh)[::-1], np.full(len(fresh), -1)], n_stream=3, mass=0.6)


def test_what_lies_in_fresh_cells_is_not_looked_at(library):
    rng = np.random.default_rng(8)
    x = rng.standard_normal((3, 1, 700, 2, 64)).astype(np.float32)
    fresh = np.array([[3, 300, 301, 555, 699]], np.int32)
    case = {"q": x[0, :, :1].repeat(3, 2), "v": x[2], "mask": np.zeros((1, 1, 700), np.float32), "scale": 0.125}
    case |= {"dims": np.tile(np.arange(24), (2, 1)), "weight": np.ones((2, 24)), "forced": np.full((1, 1, 4), 7)}
    for k_dom in ("f16", "q8", "q4"):
        got = []
        for there in (0.0, 1.0, np.inf, np.nan):
            k = x[1].copy()
            k[0, fresh[0]] = there
            got.append(library.ops.op_run(**case, k=k, fresh=fresh, budget=60, k_dom=k_dom))
        for other in got[1:]:
            assert np.array_equal(other["list"], got[0]["list"]) and np.array_equal(other["est"], got[0]["est"])
            assert not set(fresh[0]) & set(other["list"].ravel())  # they are not forced here


def test_budget_beyond_the_cells_attends_all(library):
    got = run(library, budget=10**6)
    assert (got["count"] == np.array(got["count"])).all() and got["count"].max() > 200


def test_equal_scores_go_to_the_lowest_cells(library):
    got = run(library, equal=True, hidden=0)
    assert got["count"].min() == 40


@pytest.mark.parametrize("mass", [0.0, 0.6])
def test_ties_at_the_threshold_go_to_the_lower_cells(library, mass):
    run(library, n_kv=1500, distinct=7, hidden=0, mass=mass, cap=1000)
    run(library, n_kv=700, distinct=3, budget=300, mass=mass, n_head=9, n_head_kv=3)


@pytest.mark.parametrize("mass", [0.0, 0.7])
@pytest.mark.parametrize("tokens", [1, 3])
def test_the_number_of_threads_changes_nothing(library, mass, tokens):
    one, *others = [
        run(library, n_kv=2007, n_head=9, n_head_kv=3, n_tokens=tokens, mass=mass, budget=200, n_threads=n)
        for n in (1, 2, 3, 5)
    ]
    for other in others:
        for name in one:
            assert (one[name] == other[name]).all(), name


def test_one_visible_cell(library):
    got = run(library, n_kv=64, hidden=63)
    assert set(got["count"].ravel()) <= {0, 1}


@pytest.mark.parametrize("n_kv", [1, 31, 32, 33, 256])
def test_odd_numbers_of_cells(library, n_kv):
    run(library, n_kv=n_kv, hidden=0)


def list_case(rng, *, n_stream, n_tokens, n_list, n_kv, length):
    """Lists of distinct cells in random order, one of them empty and one full; what is behind a count is no cell."""
    lists = np.full((n_stream, n_tokens, n_list, 1 + length), -1, np.int32)
    for at in np.ndindex(lists.shape[:3]):
        n = rng.integers(0, length + 1)
        lists[at][0] = n
        lists[at][1 : 1 + n] = rng.permutation(n_kv)[:n]
    lists[0, 0, 0, :1] = 0
    lists[-1, -1, -1] = [length, *rng.permutation(n_kv)[:length]]
    return lists


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("type_k", ["f16", "q8_0"])
def test_a_given_list(library, per_head, type_k):
    rng = np.random.default_rng(3)
    n_stream, n_tokens, n_head, n_head_kv, n_kv, d, length = 2, 3, 6, 2, 300, 64, 70
    group, n_list = n_head // n_head_kv, n_head if per_head else n_head_kv
    q = rng.standard_normal((n_stream, n_tokens, n_head, d)).astype(np.float32) * 2
    k, v = (rng.standard_normal((n_stream, n_kv, n_head_kv, d)).astype(np.float16).astype(np.float32) for _ in range(2))
    lists = list_case(rng, n_stream=n_stream, n_tokens=n_tokens, n_list=n_list, n_kv=n_kv, length=length)
    sinks = rng.standard_normal(n_head).astype(np.float32)
    mask = np.zeros((n_stream, n_tokens, n_kv), np.float32)
    case = {"q": q, "k": k, "v": v, "mask": mask, "list": lists, "scale": 0.2, "soft_cap": 5.0, "sinks": sinks}
    got = library.ops.op_run(**case, type_k=type_k, per_head=per_head)
    assert set(got) == {"count", "list", "out"} and (got["count"] == lists[..., 0]).all()
    for s, t, head in np.ndindex(n_stream, n_tokens, n_head):
        i, h = head if per_head else head // group, head // group
        n = lists[s, t, i, 0]
        cells = lists[s, t, i, 1 : 1 + n]
        assert (got["list"][s, t, i, :n] == cells).all() and (got["list"][s, t, i, n:] == -1).all()
        one = slice(head, head + 1)
        out = (
            np.zeros((1, d)) if n == 0 else R.attend(q[s, t, one], k[s, :, h], v[s, :, h], cells, 0.2, 5.0, sinks[one])
        )
        assert np.allclose(got["out"][s, t, one], out, atol=1e-4 if type_k == "f16" else 0.05)


@pytest.mark.parametrize("n_threads", [1, 3])
def test_the_list_of_select_gives_the_same_bits(library, n_threads):
    rng = np.random.default_rng(4)
    x = rng.standard_normal((3, 1, 500, 3, 64)).astype(np.float32)
    base = {"q": x[0, :, :2].repeat(3, 2), "k": x[1], "v": x[2], "mask": np.zeros((1, 2, 500), np.float32)}
    base |= {"scale": 0.125, "n_threads": n_threads}
    selects = {"dims": np.tile(np.arange(24), (3, 1)), "weight": np.ones((3, 24)), "forced": np.full((1, 2, 4), 7)}
    own = library.ops.op_run(**base, **selects, budget=60)
    lists = np.concatenate([own["count"][..., None], own["list"]], -1)
    given = library.ops.op_run(**base, list=lists)
    assert all((given[name] == own[name]).all() for name in given)


def test_bad_lists_are_refused(library):
    from fasa_gguf import FasaError

    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 8, 1, 16)).astype(np.float32)
    case = {"q": x[:, :1], "k": x, "v": x, "mask": np.zeros((1, 1, 8), np.float32), "scale": 1.0}

    def run_list(*values, **more):
        library.ops.op_run(**case, list=np.array(values, np.int32).reshape(1, 1, 1, -1), **more)

    run_list(2, 0, 7, -1)
    for message, values in [
        ("list 0 names cell 8, outside of 0 to 7", (2, 0, 8)),
        ("list 0 names cell -1, outside of 0 to 7", (2, 3, -1)),
        ("list 0 has a count of 3, outside of 0 to list_length 2", (3, 0, 1)),
        ("list 0 has a count of -1, outside of 0 to list_length 2", (-1, 0, 1)),
        (r"expected a list of shape \[1, 1, 1, 1 \+ length\], found \[1, 1, 1, 1\]", (0,)),
    ]:
        with pytest.raises(FasaError, match=message):
            run_list(*values)
    with pytest.raises(FasaError, match=r"expected a list of shape \[1, 1, 1, 1 \+ length\], found \[1, 1, 2, 3\]"):
        library.ops.op_run(**case, list=np.zeros((1, 1, 2, 3), np.int32))
    with pytest.raises(
        FasaError, match="expected a list, or dims, weight, forced, budget; dims, weight, forced missing"
    ):
        library.ops.op_run(**case, budget=3)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("nats", [60, 120, 300])
def test_scores_that_underflow(library, nats, per_head):
    """Logits over `nats` nats: scores beyond f32, and beyond the reach of a span or a head (reference.group_score)."""
    rng = np.random.default_rng(nats)
    n_kv, n_dom = 1100, 8
    k = np.zeros((1, n_kv, 1, 16), np.float32)
    k[0, :, 0, 0] = -rng.permutation(np.linspace(0, 60, n_kv))
    k[0, :, 0, 1] = -rng.permutation(np.linspace(0, 60, n_kv))
    k = k.astype(np.float16).astype(np.float32)
    q = np.zeros((1, 1, 2, 16), np.float32)
    q[0, 0, 0, 0] = q[0, 0, 1, 1] = nats / 60
    base = {"q": q, "k": k, "v": k, "mask": np.zeros((1, 1, n_kv)), "dims": np.arange(n_dom)[None]}
    base |= {"weight": np.ones((1, n_dom)), "forced": np.full((1, 1, 1), -1), "scale": 1.0, "k_dom": "f16"}
    every, none = np.ones(n_kv, bool), np.zeros(n_kv, bool)
    est = q[0, 0] @ k[0, :, 0].T  # [2, n_kv]
    for budget in (100, 400, 700, 1000):
        got = library.ops.op_run(**base, budget=budget, per_head=per_head)
        for i, part in enumerate([est[:1], est[1:]] if per_head else [est]):
            cells = R.select(R.group_score(part, every), every, none, len(part), budget)
            assert got["list"][0, 0, i].tolist() == cells.tolist()


def test_native_ranking_is_the_reference_where_scores_underflow(library):
    rng = np.random.default_rng(6)
    q = np.abs(rng.standard_normal((2, 3, 16)).astype(np.float32)) * 12
    k = -np.abs(rng.standard_normal((300, 16)).astype(np.float32)) * 12
    dims, pos = R.chunk_dims(16, 16, "norm"), np.arange(297, 300)
    order, kept = R.rank_recall(q, k, pos, dims, 0.25, 0.0, 4, 150, 2, 3)
    mine, mine_kept = library.ops.rank_recall(q, k, pos, dims, 4, 150, 2, 3, 0.25)
    assert mine.tolist() == order.tolist() and np.allclose(mine_kept, kept, atol=1e-5)


def test_native_ranking_is_the_reference(library):
    rng = np.random.default_rng(5)
    for soft_cap in (0.0, 5.0):
        q = rng.standard_normal((2, 5, 16)).astype(np.float32) * 2
        k = rng.standard_normal((90, 16)).astype(np.float32) * 2
        dims, pos = R.chunk_dims(16, 16, "norm"), np.arange(85, 90)
        order, kept = R.rank_recall(q, k, pos, dims, 0.25, soft_cap, 6, 12, 2, 3)
        mine, mine_kept = library.ops.rank_recall(q, k, pos, dims, 6, 12, 2, 3, 0.25, soft_cap)
        assert mine.tolist() == order.tolist() and np.allclose(mine_kept, kept, atol=1e-5)


def test_native_ranking_by_other_queries_is_the_reference(library):
    from fasa_gguf import FasaError

    rng = np.random.default_rng(15)
    q, q_est = rng.standard_normal((2, 2, 5, 16)).astype(np.float32) * 2
    k = rng.standard_normal((90, 16)).astype(np.float32) * 2
    dims, pos = R.chunk_dims(16, 16, "norm"), np.arange(85, 90)
    for soft_cap in (0.0, 5.0):
        order, kept = R.rank_recall(q, k, pos, dims, 0.25, soft_cap, 6, 12, 2, 3, q_est)
        mine, mine_kept = library.ops.rank_recall(q, k, pos, dims, 6, 12, 2, 3, 0.25, soft_cap, q_est=q_est)
        assert mine.tolist() == order.tolist() and np.allclose(mine_kept, kept, atol=1e-5)
        own = library.ops.rank_recall(q, k, pos, dims, 6, 12, 2, 3, 0.25, soft_cap)
        assert own[0].tolist() != mine.tolist()
        same = library.ops.rank_recall(q, k, pos, dims, 6, 12, 2, 3, 0.25, soft_cap, q_est=q)
        assert all(np.array_equal(a, b) for a, b in zip(own, same, strict=True))
    with pytest.raises(FasaError, match=r"expected q_est of shape \[2, 5, 16\], found \[2, 4, 16\]"):
        library.ops.rank_recall(q, k, pos, dims, 6, 12, 2, 3, 0.25, q_est=q_est[:, 1:])
    q_est[1, 2, 3] = np.nan
    with pytest.raises(FasaError, match="q, q_est, k, scale or soft_cap is not finite"):
        library.ops.rank_recall(q, k, pos, dims, 6, 12, 2, 3, 0.25, q_est=q_est)


def test_bad_cases_are_refused(library):
    from fasa_gguf import FasaError

    with pytest.raises(FasaError, match="no backend NONE"):
        z = np.zeros
        library.ops.op_run(
            q=z((1, 1, 1, 8)),
            k=z((1, 8, 1, 8)),
            v=z((1, 8, 1, 8)),
            mask=z((1, 1, 8)),
            dims=z((1, 8)),
            weight=z((1, 8)),
            forced=z((1, 1, 1)),
            budget=1,
            scale=1.0,
            backend="NONE",
        )
    with pytest.raises(FasaError, match="outside of the 3 cells"):
        library.ops.rank_recall(np.zeros((1, 1, 4)), np.zeros((3, 4)), [3], np.array([[0, 1], [2, 3]]), 1, 1, 0, 0, 1.0)


def test_times_of_a_layer(library):
    from fasa_gguf import FasaError

    rng = np.random.default_rng(0)

    def rows(n):
        return rng.standard_normal((1, n, 1, 16)).astype(np.float32)

    case = {
        "q": rows(1),
        "k": rows(16384),
        "v": rows(16384),
        "dims": np.arange(8)[None],
        "weight": np.ones((1, 8)),
        "forced": np.full((1, 1, 4), -1),
        "budget": 64,
        "scale": 0.25,
        "n_kv": 2000,
        "n_threads": 1,
    }
    names = {"dense", "select", "fasa", "beside", "ahead"}
    times = library.ops.op_time(n_layer=2, n_rep=1, **case)
    assert {name for name, t in times.items() if t > 0} == names - {"beside", "ahead"} and set(times) == names
    times = library.ops.op_time(n_layer=3, n_rep=5, beside=16 << 10, **case)  # so little that attention shows
    assert min(times.values()) > 0 and times["ahead"] > times["beside"]
    for message, wrong in [
        (r"op_time: expected k of shape \[1, 16384, n_head_kv, head_dim\], found \[1, 100, 1, 16\]", {"k": rows(100)}),
        ("n_layer .1 to 100. or n_rep .from 1. is out of range", {"n_rep": 0}),
        ("there is no backend NONE", {"backend": "NONE"}),
        ("is timed with one token, in mode device", {"beside": 1, "q": np.zeros((1, 2, 1, 16))}),
    ]:
        with pytest.raises(FasaError, match=message):
            library.ops.op_time(**{**case, **wrong})
