"""The CUDA kernels against the CPU ops: estimated logits, lists index for index on equal scores, outputs.

They need a device. Tolerances, of the largest value: logits 2e-5 for keys in f16 and 2e-4 for keys in 8 and 4 bits (a
key times its scale is rounded to f16), except for cells whose dominant value lies on a rounding boundary; outputs 1e-4
(f32 sums in another order).
"""

import numpy as np
import pytest

from fasa_gguf import FasaParams
from fasa_gguf.reasons import Reason
from fasa_gguf.session import Session


def case(
    *,
    n_kv=1500,
    n_head=8,
    n_head_kv=2,
    d=64,
    n_tokens=2,
    n_stream=1,
    n_dom=24,
    hidden=30,
    n_hadamard=0,
    sinks=False,
    equal=False,
    infinite=False,
    spread=2.0,
    fresh=None,
    seed=0,
    **settings,
):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((n_stream, n_tokens, n_head, d)).astype(np.float32) * np.float32(spread)
    k = rng.standard_normal((n_stream, n_kv, n_head_kv, d)).astype(np.float32)
    v = rng.standard_normal((n_stream, n_kv, n_head_kv, d)).astype(np.float32)
    if equal:
        k[:] = k[:, :1]
    if infinite:  # logits so far apart that all of the mass lies in few cells
        k[:, ::97] *= 200
    mask = np.zeros((n_stream, n_tokens, n_kv), np.float32)
    mask[rng.random(mask.shape) < 0.1] = -np.inf
    mask[:, :, n_kv - hidden :] = -np.inf
    dims = np.stack([rng.permutation(d)[:n_dom] for _ in range(n_head_kv)]).astype(np.int32)
    dims[0, -3:] = -1
    weight = rng.random((n_head_kv, n_dom)).astype(np.float32) + 0.5
    forced = rng.integers(-1, n_kv, (n_stream, n_tokens, 36)).astype(np.int32)
    if fresh is not None:
        fresh = np.broadcast_to(np.asarray(fresh, np.int32), (n_stream, np.shape(fresh)[-1])).copy()
        forced = np.concatenate([forced, fresh[:, None].repeat(n_tokens, 1)], -1)
    return dict(
        q=q,
        k=k,
        v=v,
        mask=mask,
        dims=dims,
        weight=weight,
        forced=forced,
        fresh=fresh,
        scale=d**-0.5,
        n_hadamard=n_hadamard,
        sinks=rng.standard_normal(n_head).astype(np.float32) if sinks else None,
        **{"budget": 200, **settings},
    )


def compare(library, cuda, **kw):
    """One case on both; returns what CUDA gave on the CPU's scores."""
    c = case(**kw)
    cpu = library.ops.op_run(**c)
    own = library.ops.op_run(**c, backend=cuda)
    got = library.ops.op_run(**c, backend=cuda, tip_backend="CPU")

    seen = np.isfinite(cpu["est"])
    assert (np.isfinite(own["est"]) == seen).all()
    near = 2e-5 if c.get("k_dom") == "f16" else 2e-4
    bad = np.abs(own["est"][seen] - cpu["est"][seen]) > near * max(1, np.abs(cpu["est"][seen]).max(initial=0))
    assert bad.sum() <= max(2 * c["q"].shape[2], 0.003 * bad.size)

    assert (got["count"] == cpu["count"]).all()
    assert (got["list"] == cpu["list"]).all()
    assert np.abs(own["count"] - cpu["count"]).max() <= (2 if c.get("mass") else 0)
    for a, n in zip(own["list"].reshape(-1, own["list"].shape[-1]), own["count"].ravel(), strict=True):
        assert (np.diff(a[:n]) > 0).all() and (a[:n] >= 0).all() and (a[n:] == -1).all()

    assert np.isfinite(got["out"]).all()
    assert np.abs(got["out"] - cpu["out"]).max() <= 1e-4 * max(1, np.abs(cpu["out"]).max())
    return got


@pytest.mark.parametrize("k_dom", ["f16", "q8", "q4"])
@pytest.mark.parametrize("d", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (9, 3), (32, 1)])
def test_shapes(library, cuda, k_dom, d, heads):
    compare(library, cuda, k_dom=k_dom, d=d, n_head=heads[0], n_head_kv=heads[1], n_dom=d * 3 // 8 // 8 * 8)


@pytest.mark.parametrize(
    "types",
    [(a, b) for a in ("f16", "bf16", "q8_0", "q4_0") for b in ("f16", "bf16", "q8_0", "q4_0")] + [("f32", "f32")],
)
@pytest.mark.parametrize("d", [64, 128, 256])
def test_cache_types(library, cuda, types, d):
    compare(library, cuda, type_k=types[0], type_v=types[1], d=d, n_hadamard=64 if types[0].startswith("q") else 0)


@pytest.mark.parametrize("tokens,streams", [(1, 1), (8, 1), (1, 4), (3, 3), (16, 8)])
def test_tokens_and_streams(library, cuda, tokens, streams):
    compare(library, cuda, n_tokens=tokens, n_stream=streams, n_head=9, n_head_kv=3)


@pytest.mark.parametrize("k_dom", ["f16", "q4"])
@pytest.mark.parametrize("n_kv", [1, 31, 33, 256, 257, 5000, 40000])
def test_numbers_of_cells(library, cuda, n_kv, k_dom):
    compare(library, cuda, n_kv=n_kv, hidden=0, n_tokens=1, k_dom=k_dom)
    compare(library, cuda, n_kv=n_kv, hidden=0, n_tokens=1, k_dom=k_dom, budget=10**6)


@pytest.mark.parametrize(
    "mass,floor,cap",
    [(0.5, 1, 5000), (0.9, 64, 1024), (0.99, 64, 1024), (1.0, 1, 5000), (0.9, 900, 1000), (0.01, 1, 50)],
)
@pytest.mark.parametrize("per_head", [False, True])
def test_target_mass(library, cuda, mass, floor, cap, per_head):
    for seed in range(3):
        compare(library, cuda, mass=mass, floor=floor, cap=cap, per_head=per_head, seed=seed, n_kv=3000)


@pytest.mark.parametrize("k_dom", ["f16", "q8", "q4"])
@pytest.mark.parametrize("mass", [0.0, 0.7])
@pytest.mark.parametrize(
    "fresh",
    [[700], [17, 255, 256, -1, 1200, 1201, 1490, -1, 1499], np.arange(256, 512), np.arange(100, 250, 3), [-1]],
    ids=["one", "several", "a span", "more than a warp", "none"],
)
def test_fresh_cells(library, cuda, fresh, mass, k_dom):
    for how in ({}, {"per_head": True}, {"n_tokens": 5}, {"n_stream": 3}, {"n_kv": 1499}):
        compare(library, cuda, k_dom=k_dom, mass=mass, cap=900, fresh=fresh, **how)


@pytest.mark.parametrize("mass", [0.0, 0.7])
def test_all_cells_fresh(library, cuda, mass):
    for n_kv in (33, 300, 1500):
        got = compare(library, cuda, mass=mass, n_kv=n_kv, fresh=np.arange(n_kv), n_tokens=1)
        assert (got["count"] == got["count"][0, 0, 0]).all()


@pytest.mark.parametrize("n_kv", [1500, 20000])
@pytest.mark.parametrize("mass", [0.0, 0.6])
def test_equal_scores_go_to_the_lowest_cells(library, cuda, n_kv, mass):
    got = compare(library, cuda, equal=True, hidden=0, n_kv=n_kv, mass=mass, floor=10, cap=10**6)
    if mass == 0:
        assert got["count"].min() == 200


@pytest.mark.parametrize("spread", [0.03, 1e-3, 1e-5, 0.0])
@pytest.mark.parametrize("mass,floor,cap", [(0.0, 1, 1), (0.6, 1, 10**6), (0.6, 9000, 10**6), (0.6, 1, 300)])
def test_even_attention(library, cuda, spread, mass, floor, cap):
    compare(library, cuda, spread=spread, n_kv=20000, budget=3000, mass=mass, floor=floor, cap=cap, n_tokens=1)


@pytest.mark.parametrize("mass", [0.0, 0.9])
def test_adversarial(library, cuda, mass):
    compare(library, cuda, infinite=True, mass=mass)
    compare(library, cuda, n_kv=64, hidden=63, mass=mass)  # one visible cell, or none
    compare(library, cuda, n_kv=64, hidden=64, mass=mass)  # an empty stream
    compare(library, cuda, budget=10**6, cap=10**6, mass=mass)  # more than there is
    compare(library, cuda, budget=1, floor=1, cap=1, mass=mass)  # less than is forced
    compare(library, cuda, soft_cap=3.0, sinks=True, mass=mass)


@pytest.mark.parametrize("budget", [64, 1024, 4096])
def test_long_lists(library, cuda, budget):
    compare(library, cuda, n_kv=40000, budget=budget, n_tokens=1, n_head=32, n_head_kv=8, d=128, n_dom=32)


def test_runs_give_the_same_bits(library, cuda):
    c = case(n_kv=9000, mass=0.9)
    first = library.ops.op_run(**c, backend=cuda)
    for _ in range(5):
        again = library.ops.op_run(**c, backend=cuda)
        assert all((first[name] == again[name])[np.isfinite(first[name])].all() for name in first)


HOST = {"mode": 1}  # FASA-M: k and v in pinned host memory


@pytest.mark.parametrize("types", [("f16", "f16"), ("q8_0", "q8_0"), ("q4_0", "f16"), ("bf16", "q4_0"), ("f32", "f32")])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("row_slots", [0, 64, 800])
def test_rows_from_host_memory(library, cuda, types, d, row_slots):
    compare(library, cuda, d=d, type_k=types[0], type_v=types[1], row_slots=row_slots, sinks=True, **HOST)


@pytest.mark.parametrize("tokens,streams", [(1, 1), (8, 1), (3, 3)])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("row_slots", [0, 8, 2000])
def test_tokens_and_streams_from_host_memory(library, cuda, tokens, streams, per_head, row_slots):
    compare(library, cuda, n_tokens=tokens, n_stream=streams, per_head=per_head, row_slots=row_slots, d=96, **HOST)


def test_long_lists_from_host_memory(library, cuda):
    compare(library, cuda, n_kv=20000, budget=4096, d=128, row_slots=3000, **HOST)


@pytest.mark.parametrize("type_k", ["f16", "q8_0"])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("place", [{}, HOST, {**HOST, "row_slots": 64}])
def test_a_given_list(library, cuda, type_k, per_head, place):
    c = case(n_tokens=2, n_stream=2, n_head=8, n_head_kv=2, hidden=0, sinks=True)
    rng = np.random.default_rng(1)
    n_list, length, n_kv = 8 if per_head else 2, 150, c["k"].shape[1]
    lists = np.full((2, 2, n_list, 1 + length), -1, np.int32)
    for at in np.ndindex(lists.shape[:3]):
        n = rng.integers(0, length + 1)
        lists[at][0] = n
        lists[at][1 : 1 + n] = rng.permutation(n_kv)[:n]  # in any order
    lists[0, 0, 0, 0], lists[1, 1, -1] = 0, [length, *rng.permutation(n_kv)[:length]]
    given = {name: c[name] for name in ("q", "k", "v", "mask", "scale", "sinks")}
    given |= {"list": lists, "type_k": type_k, "per_head": per_head}
    cpu, got = library.ops.op_run(**given), library.ops.op_run(**given, **place, backend=cuda)
    assert (got["count"] == lists[..., 0]).all() and (got["list"] == cpu["list"]).all()
    assert np.isfinite(got["out"]).all()
    assert np.abs(got["out"] - cpu["out"]).max() <= 1e-4 * max(1, np.abs(cpu["out"]).max())


def test_layers_that_waited_derive_what_the_others_had(library, cuda, tiny, profile):
    on = FasaParams(chunks=4, budget=64, min_context=1, min_context_gpu=512)  # of 3 layers 2 are on the GPU
    with Session(tiny, n_ctx=1024, n_threads=1, n_gpu_layers=3) as s:
        s.fasa.set_profile(profile)

        def run(invalidate):
            s.fasa.set_params(None)
            s.clear()
            s.decode(np.random.default_rng(0).integers(0, s.n_vocab, 240).tolist(), 0, logits="none")
            s.fasa.set_params(on)
            for pos in range(240, 256):
                s.decode([pos % 200 + 1], pos)
            before = s.fasa.counters()
            assert sorted(s.fasa.layer_reason_codes()) == [Reason.NONE] + [Reason.MIN_CONTEXT_GPU] * 2
            if invalidate:
                s.fasa.invalidate()
            logits = s.decode([7], 256)  # the first step that sees 512 cells
            return before, s.fasa.counters(), logits

        before, after, logits = run(False)
        assert (
            before["layers_sparse"] == before["layers_dense"] / 2 > 0
            and after["layers_sparse"] - before["layers_sparse"] == 3
        )
        assert np.abs(logits - run(True)[2]).max() < 1e-3
