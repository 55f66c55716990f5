"""The CUDA kernels of sparse prefill against the CPU ops: scores, lists index for index on equal scores, outputs.

They need a device. Tolerances: a score 3% of itself and 1% of the largest, and 1.5% of all on average (exponentials are
linear between powers of two, tests/native/test_tile_exponentials.py; a row alone may be off by 7%); the sum of all
0.2%; a list of such scores holds 0.998 of what it could by the CPU's, and is within 1% as long where a mass decides;
outputs 5e-3 of the largest (llama.cpp's flash attention, in f16; 2e-2 where logits are hundreds). A key whose value
lies on a rounding boundary may fall to either side.
"""

import numpy as np
import pytest
from tile_cases import HOWS, cells, tokens_of, ubatch_tiles
from tiny_gguf import write_tiny

from fasa_gguf import FasaParams
from fasa_gguf.gguf.file import GGUFFile
from fasa_gguf.gguf.shape import model_shape
from fasa_gguf.reasons import Reason
from fasa_gguf.session import Session
from fasa_gguf.speed.random_model import synthetic_profile


def case(
    *,
    n_before=900,
    n_tokens=70,
    n_stream=1,
    n_head=8,
    n_head_kv=2,
    d=64,
    n_dom=24,
    size=32,
    sink=4,
    band=16,
    how="plain",
    hot=3.0,
    empty=7,
    equal=False,
    sinks=False,
    seed=0,
    **settings,
):
    """A prompt's ubatch of n_tokens per stream, behind n_before cells; how: of tile_cases; equal: all keys are."""
    rng = np.random.default_rng(seed)
    cell_pos, of, own, seq = cells(how, n_before, n_tokens, empty, rng)
    n_kv = len(cell_pos)
    q = rng.standard_normal((n_stream, n_tokens, n_head, d)).astype(np.float32) * np.float32(hot)
    k, v = (rng.standard_normal((n_stream, n_kv, n_head_kv, d)).astype(np.float32) for _ in range(2))
    if equal:
        k[:] = k[:, :1]
    quantised = settings.get("type_k", "f16") in ("q8_0", "q4_0")
    k[:, cell_pos < 0] = v[:, cell_pos < 0] = 0 if quantised else np.inf  # empty: whatever it is
    tiles, forced = ubatch_tiles(cell_pos, of, own, seq, n_stream, size, sink, band)
    dims = np.stack([rng.permutation(d)[:n_dom] for _ in range(n_head_kv)]).astype(np.int32)
    dims[0, -3:] = -1
    weight = rng.uniform(0.5, 1.5, (n_head_kv, n_dom)).astype(np.float32)
    return dict(
        q=q, k=k, v=v, dims=dims, weight=weight, forced=forced, tiles=tiles, scale=d**-0.5,
        cell_pos=np.tile(cell_pos, (n_stream, 1)), own=of[seq[tiles[:, 2] % n_tokens]],
        sinks=rng.standard_normal(n_head).astype(np.float32) * 3 if sinks else None,
        **{"budget": 200, **settings},
    )  # fmt: skip


def compare(library, cuda, **kw):
    """One case on both; returns what CUDA gave on the CPU's scores."""
    c = case(**kw)
    cpu = library.ops.tile_run(**c)
    own = library.ops.tile_run(**c, backend=cuda)
    got = library.ops.tile_run(**c, backend=cuda, tip_backend="CPU")

    n_list = cpu["count"].shape[1]
    shared = [x["score"].reshape(x["score"].shape[0], n_list, -1, x["score"].shape[-1]).sum(2) for x in (cpu, own)]
    far = np.abs(shared[0] - shared[1])
    assert np.isfinite(shared[1]).all()
    assert (shared[1][shared[0] == 0] < 1e-6).all()
    assert (far <= 0.03 * shared[0] + 0.01 * shared[0].max()).all()
    assert far.sum() <= 0.015 * shared[0].sum()
    assert abs(shared[1].sum() / shared[0].sum() - 1) <= 2e-3
    for i, j in np.ndindex(*cpu["count"].shape):
        held = [shared[0][i, j, x["list"][i, j, : x["count"][i, j]]].sum() for x in (cpu, own)]
        assert held[1] >= 0.998 * held[0]
    assert (np.abs(own["count"] - cpu["count"]) <= (0.01 * cpu["count"] + 1 if c.get("mass") else 0)).all()
    if kw.get("equal"):  # whatever column a cell is in
        for i, tile in enumerate(c["tiles"]):
            size = (len(tile) - 2) // 2
            seen = c["own"][i] & (c["cell_pos"][tile[0]] <= tile[2 + size : 2 + size + tile[1]].min())  # by all
            scores = shared[1][i][:, seen]
            assert (scores == scores[:, :1]).all()

    assert (got["count"] == cpu["count"]).all()
    assert (got["list"] == cpu["list"]).all()
    for a, n in zip(own["list"].reshape(-1, own["list"].shape[-1]), own["count"].ravel(), strict=True):
        assert (np.diff(a[:n]) > 0).all() and (a[:n] >= 0).all() and (a[n:] == -1).all()
    assert np.isfinite(got["out"]).all()
    assert np.abs(got["out"] - cpu["out"]).max() <= (2e-2 if kw.get("hot", 0) > 5 else 5e-3) * max(
        1, np.abs(cpu["out"]).max()
    )
    return got


@pytest.mark.parametrize("k_dom", ["f16", "q8", "q4"])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (8, 1), (9, 3)])
def test_shapes(library, cuda, k_dom, heads):
    compare(library, cuda, k_dom=k_dom, n_head=heads[0], n_head_kv=heads[1])


@pytest.mark.parametrize("d", [64, 80, 96, 112, 128, 256])
@pytest.mark.parametrize("n_dom", [8, 16, 24, 32, 40, 64, 72, 104, 136])
def test_dimensions(library, cuda, d, n_dom):
    if n_dom <= d:
        compare(library, cuda, d=d, n_dom=n_dom, hot=1.0)


@pytest.mark.parametrize(
    "type_k,type_v", [("f16", "q8_0"), ("bf16", "bf16"), ("q8_0", "q8_0"), ("q4_0", "q4_0"), ("f32", "f32")]
)
@pytest.mark.parametrize("d", [64, 128])
def test_cache_types(library, cuda, type_k, type_v, d):
    n_hadamard = 64 if type_k.startswith("q") else 0
    compare(library, cuda, type_k=type_k, type_v=type_v, d=d, n_hadamard=n_hadamard, hot=1.5)


@pytest.mark.parametrize("size, n_tokens", [(16, 3), (16, 61), (64, 64), (128, 200), (31, 45), (1024, 1100)])
def test_tile_sizes(library, cuda, size, n_tokens):
    compare(library, cuda, size=size, n_tokens=n_tokens, budget=2 * size + 100)


@pytest.mark.parametrize(
    "how",
    [
        {"n_stream": 3},
        {"how": "two"},
        {"per_head": True},
        {"soft_cap": 30.0},
        {"equal": True},
        {"sinks": True},
        {"sinks": True, "per_head": True, "n_tokens": 20},
    ],
)
@pytest.mark.parametrize("mass", [0.0, 0.9])
def test_situations(library, cuda, how, mass):
    if how.get("soft_cap"):  # llama.cpp's flash attention caps heads of 128 and 256 dimensions alone
        how = {**how, "d": 128}
    compare(library, cuda, mass=mass, cap=400, floor=80, **how)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(
    "settings", [{}, {"n_stream": 2, "size": 16}, {"soft_cap": 30.0, "d": 128}, {"n_before": 3000, "n_tokens": 300}]
)
def test_who_sees_which_cell(library, cuda, how, settings):
    compare(library, cuda, how=how, **settings)


@pytest.mark.parametrize("n_before", [0, 1, 31, 150, 255, 256, 5000, 40000])
@pytest.mark.parametrize("empty", [0, 1, 300])
def test_numbers_of_cells(library, cuda, n_before, empty):
    compare(library, cuda, n_before=n_before, empty=empty, n_tokens=40)


@pytest.mark.parametrize(
    "mass,floor,cap", [(0.5, 1, 5000), (0.95, 64, 1024), (1.0, 1, 5000), (0.9, 600, 700), (0.01, 1, 50)]
)
def test_target_mass(library, cuda, mass, floor, cap):
    for seed in range(3):
        compare(library, cuda, mass=mass, floor=floor, cap=cap, n_before=3000, seed=seed)


@pytest.mark.parametrize("hot", [0.01, 30.0])
def test_even_and_peaked_attention(library, cuda, hot):
    compare(library, cuda, hot=hot, n_before=9000, budget=7000)
    compare(library, cuda, hot=hot, n_before=9000, mass=0.9, cap=8000)


def test_host_memory(library, cuda):
    """FASA-M: K and V in pinned host memory."""
    for row_slots in (0, 64):
        compare(library, cuda, mode=1, row_slots=row_slots)


def test_a_list_of_all_is_dense(library, cuda):
    """The identity law: with room for every cell, attention is dense."""
    c = case(n_before=1500, d=128, budget=10**6)
    got = library.ops.tile_run(**c, backend=cuda)
    k, v = (np.nan_to_num(c[x].astype(np.float16).astype(np.float32), posinf=0) for x in ("k", "v"))
    g, pos = c["q"].shape[2] // k.shape[2], c["cell_pos"][0]
    for tile, own, count in zip(c["tiles"], c["own"], got["count"], strict=True):
        tokens = tokens_of(tile)
        seen = own & (pos <= tile[2 + (len(tile) - 2) // 2 :][: tile[1], None])  # [T, n_kv]
        assert (count == seen.any(0).sum()).all()
        for head in range(c["q"].shape[2]):
            logits = np.where(seen, c["q"][0, tokens, head] @ k[0, :, head // g].T * c["scale"], -np.inf)
            w = np.exp(logits - logits.max(-1, keepdims=True))
            out = (w / w.sum(-1, keepdims=True)) @ v[0, :, head // g]
            assert np.abs(got["out"][0, tokens, head] - out).max() <= 2e-3 * max(1, np.abs(out).max())


# ---- whole models ----

ON = FasaParams(chunks=8, budget=64, min_context=1, min_context_gpu=0, prefill="on", prefill_budget=200, prefill_mass=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model whose head dimension every cache type takes."""
    path = tmp_path_factory.mktemp("tiles") / "model.gguf"
    write_tiny(path, head_dim=64)
    return path


@pytest.fixture
def logits(cuda, model):
    """logits(params, ...): those of the last tokens of a prompt, and the session, all layers on the device."""
    sessions = []

    def run(params, n=900, **settings):
        settings = {"n_ctx": 2048, "n_threads": 1, "n_gpu_layers": 99, "n_ubatch": 256, **settings}
        s = Session(model, **settings)
        sessions.append(s)
        s.fasa.set_profile(synthetic_profile(*model_shape(GGUFFile(model)), seed=2))
        s.fasa.set_params(params)
        tokens = np.random.default_rng(0).integers(0, s.n_vocab, n).tolist()
        rows = [s.decode(tokens, 0)]
        for pos in range(n, n + 4):
            rows.append(s.decode([7 + pos % 100], pos))
        return np.array(rows), s

    yield run
    for s in sessions:
        s.close()


@pytest.mark.parametrize("settings", [{}, {"mode": "host"}, {"type_k": "q8_0", "type_v": "q8_0"}, {"n_ubatch": 200}])
def test_a_prompt_with_room_for_every_cell_is_dense(logits, settings):
    dense, _ = logits(ON.replace(prefill="off", budget=4096), **settings)
    for changes in ({"prefill_budget": 4096}, {"prefill_mass": 1.0, "prefill_cap": 4096}):
        got, s = logits(ON.replace(budget=4096, **changes), **settings)
        c = s.fasa.counters()
        assert c["steps_prefill_sparse"] == c["steps_prefill"] > 0
        assert c["prefill_visible"] > 0
        if "prefill_budget" in changes:
            assert c["prefill_attended"] == c["prefill_visible"]
        assert np.abs(got - dense).max() <= 0.02 * max(1, np.abs(dense).max())


def test_a_prompt_attends_to_its_budget(logits):
    _, s = logits(ON)
    c = s.fasa.counters()
    assert 0 < c["prefill_attended"] < c["prefill_visible"] / 1.5
    assert c["steps_prefill_sparse"] == c["steps_prefill"]


def test_the_same_on_the_cpu(logits):
    """Lists differ where estimates do, by a cell or two of a hundred."""
    on = ON.replace(budget=4096)
    got, gpu = logits(on)
    expected, cpu = logits(on, n_gpu_layers=0)
    a, b = gpu.fasa.counters(), cpu.fasa.counters()
    assert a["prefill_attended"] == b["prefill_attended"] and a["prefill_visible"] == b["prefill_visible"]
    assert np.median(np.abs(got - expected)) <= 0.02 * np.abs(expected).max()


def test_auto_begins_at_prefill_min_context_gpu(logits):
    off, _ = logits(ON.replace(prefill="off"))
    auto = ON.replace(prefill="auto", prefill_min_context=1)
    dense, s = logits(auto)
    assert (off == dense).all()
    assert s.fasa.counters()["steps_prefill_sparse"] == 0
    assert s.fasa.prefill_reason_code() == Reason.PREFILL_MIN_CONTEXT_GPU
    sparse, s = logits(auto.replace(prefill_min_context_gpu=600))
    assert s.fasa.counters()["steps_prefill_sparse"] == 2  # of 256 tokens each, the third sees 768
    assert (off != sparse).any() and s.fasa.prefill_reason_code() == Reason.NONE
    _, s = logits(auto.replace(prefill_min_context_gpu=300), mode="host")
    assert s.fasa.counters()["steps_prefill_sparse"] == 2


def test_several_sequences_in_a_ubatch(cuda, model):
    """Alternating in one stream, and in streams of their own: each is nearly what it is alone."""
    tokens = np.random.default_rng(1).integers(0, 256, (2, 500)).tolist()

    def run(sequences, **settings):
        with Session(model, n_ctx=4096, n_threads=1, n_gpu_layers=99, n_ubatch=512, **settings) as s:
            s.fasa.set_profile(synthetic_profile(*model_shape(GGUFFile(model)), seed=2))
            s.fasa.set_params(ON)
            items = [(tokens[q][i], i, q, i == 499) for i in range(500) for q in sequences]
            with s.fasa.step_kind("prompt"):
                for at in range(0, len(items), 500):
                    s.decode_batch(items[at : at + 500])
            assert s.fasa.counters()["steps_prefill_sparse"] > 0
            return [s.decode([5], 500, q) for q in sequences]

    alone = run([0], n_seq_max=2)
    for unified in (True, False):
        got = run([0, 1], n_seq_max=2, kv_unified=unified)
        assert np.abs(got[0] - alone[0]).max() <= 0.05 * np.abs(alone[0]).max()
        assert np.abs(got[1] - alone[0]).max() > 0.05 * np.abs(alone[0]).max()
