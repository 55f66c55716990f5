"""Which cells a sparse prompt's queries see: with room for all of them it is dense attention, whatever lies in the
cache. Its graph has no mask."""

import ctypes

import numpy as np
import pytest
from graph_nodes import on_nodes
from tiny_archs import write_two_dimensional

from fasa_gguf import FasaParams
from fasa_gguf.reasons import Reason
from fasa_gguf.session import Session
from fasa_gguf.speed.random_model import synthetic_profile

ALL = FasaParams(prefill="on", prefill_mass=0.0, prefill_budget=10**6, min_context=0, prefill_tile=32)
OFF = ALL.replace(prefill="off")
F32 = {"type_k": "f32", "type_v": "f32"}


def tokens_of(n, seed=3):
    return np.random.default_rng(seed).integers(1, 60, n).tolist()


def open_session(model, layers, **kw):
    s = Session(model, **{"n_ctx": 2048, "n_threads": 1, **F32, **kw})
    s.fasa.set_profile(synthetic_profile([2] * layers, [8] * layers, seed=2))
    return s


def both(model, do, layers=3, **kw):
    """What do(session) returns in a sparse and in a dense context agree."""
    rows = []
    for params in (ALL, OFF):
        with open_session(model, layers, **kw) as s:
            s.fasa.set_params(params)
            rows.append(np.array(do(s)))
            c = s.fasa.counters()
            assert (c["steps_prefill_sparse"] > 0) == (params is ALL)
            assert c["prefill_attended"] == c["prefill_visible"]
    assert np.isfinite(rows[0]).all()
    assert np.abs(rows[0] - rows[1]).mean() < 2e-3 * rows[1].std()


def alternating(s, n=300, first=0):
    items = [(tokens_of(first + n, seq)[i], i, seq, True) for i in range(first, first + n) for seq in (0, 1)]
    out = []
    with s.fasa.step_kind("prompt"):
        for at in range(0, len(items), s.n_batch):
            part = items[at : at + s.n_batch]
            s.decode_batch(part)
            out += [s.logits(i) for i in range(len(part))]
    return out


@pytest.mark.parametrize("unified", [True, False])
def test_two_sequences_that_alternate(tiny, unified):
    both(tiny, lambda s: alternating(s) + alternating(s, 100, 300), n_seq_max=2, kv_unified=unified)


@pytest.mark.parametrize("unified", [True, False])
def test_cells_shared_by_two_sequences(tiny, unified):
    def do(s):
        s.decode(tokens_of(300), 0, 0, logits="none")
        s.copy(0, 1)
        rows = [s.decode(tokens_of(100, seq), 300, seq, logits="all") for seq in (0, 1)]
        return np.concatenate([*rows, alternating(s, 60, 400)])

    both(tiny, do, n_seq_max=2, kv_unified=unified)


def test_holes(tiny):
    """Some are left behind, others hold later tokens."""

    def do(s):
        s.decode(tokens_of(900), 0, logits="none")
        s.remove(0, 100, 217)
        s.remove(0, 300, 500)
        return np.concatenate([s.decode(tokens_of(100, i), 900 + 100 * i, logits="all") for i in range(4)])

    both(tiny, do, n_ctx=1024)


def test_positions_that_begin_late(tiny):
    both(tiny, lambda s: s.decode(tokens_of(500), 1000, logits="all"))


def test_a_shifted_context(tiny):
    def do(s):
        s.decode(tokens_of(500), 0, logits="none")
        s.remove(0, 10, 110)
        s.llama.llama_memory_seq_add(s.memory, 0, 110, -1, -100)
        return s.decode(tokens_of(200, 5), 400, logits="all")

    both(tiny, do)


def test_a_loaded_state(tiny):
    def do(s):
        s.decode(tokens_of(500), 0, logits="none")
        saved = s.state()
        s.clear()
        s.decode(tokens_of(700, 9), 0, logits="none")
        s.clear()
        s.set_state(saved)
        return s.decode(tokens_of(200, 5), 500, logits="all")

    both(tiny, do)


@pytest.mark.parametrize("model, layers", [("tiny", 3), ("sliding", 4), ("hybrid", 4)])
def test_graphs_that_are_used_again(request, model, layers):
    """Ubatches of one shape, while the cells that they see become more."""
    path = request.getfixturevalue(model)
    with Session(path, n_ctx=512) as s:
        shapes = [s.fasa.layer_shape(il)[1:] for il in range(layers)]

    rows = []
    for params in (ALL, OFF):
        with Session(path, n_ctx=2048, n_threads=1, n_ubatch=64, swa_full=False, **F32) as s:
            s.fasa.set_profile(synthetic_profile([h[0] for h in shapes], [8 if h[0] else 0 for h in shapes], seed=2))
            s.fasa.set_params(params)
            rows.append(s.decode(tokens_of(800), 0, logits="all"))
            assert (s.fasa.counters()["layers_prefill_sparse"] > 0) == (params is ALL)
    assert np.abs(rows[0] - rows[1]).mean() < 2e-3 * rows[1].std()


def test_a_layer_that_is_dense_for_its_own_reason(tiny):
    rows = []
    for params in (ALL, OFF):
        with Session(tiny, n_ctx=2048, n_batch=1024, n_threads=1, **F32) as s:
            s.fasa.set_profile(synthetic_profile([2] * 3, [8, 0, 8], seed=2))
            s.fasa.set_params(params)
            rows.append(s.decode(tokens_of(700), 0, logits="all"))
            c = s.fasa.counters()
            assert c["layers_prefill_sparse"] == (4 if params is ALL else 0) and c["layers_prefill"] == 6
            if params is ALL:  # nor does a short end hide the reason, except of a prompt that is no longer
                s.decode(tokens_of(520), 700, logits="none")
                assert s.fasa.prefill_reason_code() == Reason.NOT_RANKED
                s.decode(tokens_of(20), 1220, logits="none")
                assert s.fasa.prefill_reason_code() == Reason.PREFILL_SHORT
    assert np.abs(rows[0] - rows[1]).mean() < 2e-3 * rows[1].std()


# ---- the mask ----


@pytest.fixture
def sources(monkeypatch, library):
    """The names of all tensors that a graph's nodes read, filled as graphs are computed."""
    seen: set[str] = set()

    def see(tensor, ask, name_of):
        if ask:  # src of struct ggml_tensor
            for src in (ctypes.c_void_p * 10).from_address(tensor + 152):
                seen.update([name_of(src)] if src else [])
        return False

    on_nodes(monkeypatch, see)
    return seen


def test_a_graph_without_dense_layers_has_no_mask(tiny, sources):
    for profile, params, masks in (([8] * 3, ALL, False), ([8, 0, 8], ALL, True), ([8] * 3, OFF, True)):
        with Session(tiny, n_ctx=2048, n_threads=1) as s:
            s.fasa.set_profile(synthetic_profile([2] * 3, profile, seed=2))
            s.fasa.set_params(params)
            sources.clear()
            s.decode(tokens_of(300), 0, logits="none")
            assert ("fasa_cell_pos" in sources) == (params is ALL)
            assert any("kq_mask" in name for name in sources) == masks


# ---- positions in 2D ----


@pytest.fixture(scope="module")
def two_dimensional(tmp_path_factory):
    path = tmp_path_factory.mktemp("mrope") / "qwen2vl.gguf"
    write_two_dimensional(path)
    return path


def decode_image(s, rows, pos, width):
    """One llama_decode of embeddings [n, n_embd] that share a position, in lines of `width`: logits of the last."""
    n, n_embd = rows.shape
    batch = s.llama.llama_batch_init(n, n_embd, 1)
    kind, plain = type(batch.pos), ctypes.cast(batch.pos, ctypes.c_void_p).value  # the field itself changes
    where = (ctypes.c_int32 * (4 * n))(*[pos] * n)
    where[n : 2 * n], where[2 * n : 3 * n] = [pos + i // width for i in range(n)], [pos + i % width for i in range(n)]
    try:
        ctypes.memmove(batch.embd, np.ascontiguousarray(rows, np.float32).ctypes.data, rows.nbytes)
        batch.n_tokens, batch.pos = n, ctypes.cast(where, kind)
        for i in range(n):
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, i == n - 1
        assert s.llama.llama_decode(s.ctx, batch) == 0
    finally:
        batch.pos = ctypes.cast(plain, kind)
        s.llama.llama_batch_free(batch)
    return s.logits(n - 1)


def test_text_of_a_model_with_positions_in_2d(two_dimensional):
    both(two_dimensional, lambda s: s.decode(tokens_of(700), 0, logits="all"), layers=4)


def test_an_image_is_dense_and_says_why(two_dimensional):
    image = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    rows = []
    for params in (ALL, OFF, None):
        with open_session(two_dimensional, 4) as s:
            s.fasa.set_params(params)
            s.decode(tokens_of(300), 0, logits="none")
            rows.append([decode_image(s, image, 300, 8)])
            if params is ALL:
                assert s.fasa.prefill_reason_code() == Reason.PREFILL_POSITIONS
                assert s.fasa.counters()["steps_prefill_sparse"] == 1
            rows[-1].append(s.decode(tokens_of(100, 5), 308))  # text behind it, which sees all of it
            if params is ALL:
                assert s.fasa.prefill_reason_code() == Reason.NONE
                assert s.fasa.counters()["steps_prefill_sparse"] == 2
    assert np.allclose(rows[1], rows[2])
    assert np.abs(np.array(rows[0]) - rows[2]).mean() < 2e-3 * np.std(rows[2])
