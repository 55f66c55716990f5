"""FASA-M end to end: K and V in pinned host memory give what they give in the device's. They need a device."""

import ctypes
import os
from contextlib import contextmanager

import numpy as np
import pytest
from graph_nodes import on_nodes
from tiny_gguf import write_tiny

from fasa_gguf import FasaError, FasaParams, runtime
from fasa_gguf.gguf.file import GGUFFile
from fasa_gguf.gguf.shape import model_shape
from fasa_gguf.reasons import Reason
from fasa_gguf.session import Session
from fasa_gguf.speed.random_model import synthetic_profile

ON = FasaParams(chunks=4, budget=64, min_context=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model whose head dimension every cache type takes."""
    path = tmp_path_factory.mktemp("host") / "model.gguf"
    write_tiny(path, head_dim=64)
    return path


@pytest.fixture
def make(cuda, model):
    """make(mode, params, ...): a session of the model, all layers on the device."""
    sessions = []

    def build(mode, params=ON, **settings):
        s = Session(model, **{"n_ctx": 1024, "n_threads": 1, "n_gpu_layers": 99, "mode": mode, **settings})
        sessions.append(s)
        s.fasa.set_profile(synthetic_profile(*model_shape(GGUFFile(model)), seed=2))
        s.fasa.set_params(params and params.replace(min_context_gpu=0))
        return s

    yield build
    for s in sessions:
        s.close()


def prompt(s, n=600, seed=0):
    return np.random.default_rng(seed).integers(0, s.n_vocab, n).tolist()


def greedy(s, n_prompt=600, steps=100):
    """(tokens, logits) of `steps` steps behind a random prompt."""
    logits = s.decode(prompt(s, n_prompt), 0)
    tokens, rows = [], []
    for pos in range(n_prompt, n_prompt + steps):
        tokens.append(int(np.argmax(logits)))
        logits = s.decode([tokens[-1]], pos)
        rows.append(logits)
    return tokens, np.array(rows)


@pytest.mark.parametrize("types", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("row_cache", [0, 1])
def test_the_same_text_as_on_the_device(make, types, row_cache):
    kv = {"type_k": types, "type_v": types}
    there, here = make("c", **kv), make("m", ON.replace(row_cache=row_cache), **kv)
    (a, x), (b, y) = greedy(there), greedy(here)
    assert a == b and np.abs(x - y).max() < 1e-4 * np.abs(x).max()
    c, d = here.fasa.counters(), there.fasa.counters()
    assert d["bytes_kv_host"] == d["rows_fetched"] == d["bytes_staged"] == 0
    assert c["bytes_kv_host"] == c["bytes_kv"] == d["bytes_kv"] and c["bytes_staged"] > 0
    assert c["rows_fetched"] + c["rows_reused"] == c["tokens_attended"] == d["tokens_attended"] > 0
    assert (c["rows_reused"] > c["tokens_attended"] / 2) == bool(row_cache) and (c["bytes_row_cache"] > 0) == bool(
        row_cache
    )


def test_dense_reads_a_copy(make):
    (a, x), (b, y) = greedy(make("c", None)), greedy(make("m", None))
    assert a == b and (x == y).all()


def test_rows_follow_a_context_shift_and_a_loaded_state(make):
    got = []
    for mode in ("c", "m"):
        s = make(mode, ON.replace(row_cache=1))
        greedy(s)
        state = s.state()
        s.remove(0, 100, 200)
        s.llama.llama_memory_seq_add(s.memory, 0, 200, -1, -100)
        rows = [s.decode([5], 600), s.decode([6], 601)]
        s.clear()
        s.decode(prompt(s, 600, seed=1), 0)
        rows.append(s.decode([7], 600))
        s.set_state(state)
        rows += [s.decode([8], 700), s.decode([9], 701)]
        got.append(np.array(rows))
    assert np.abs(got[0] - got[1]).max() < 1e-4 * np.abs(got[0]).max()


@pytest.mark.parametrize("types", ["f16", "q8_0", "q4_0"])
def test_prefill_in_pieces(make, types):
    got = []
    for mode in ("c", "m"):  # in m the layers' copies are made ahead, for the cells that were there
        s = make(
            mode, None, n_batch=64, n_ubatch=64, type_k=types, type_v=types, n_seq_max=2, kv_unified=False, n_ctx=2048
        )
        s.decode(prompt(s, 700), 0, 0, "none")
        s.decode(prompt(s, 300, 1), 0, 1, "none")
        s.remove(0, 200, 400)
        s.decode(prompt(s, 150, 2), 700, 0, "none")
        s.decode_batch([(3, 850, 0, True), (4, 300, 1, True)])
        got.append(np.array([s.logits(0), s.logits(1)]))
    assert (got[0] == got[1]).all()


@pytest.mark.parametrize("mode", ["c", "m"])
@pytest.mark.parametrize("n_prompt", [300, 5000, 20000])
def test_dense_and_sparse_steps_take_turns(make, mode, n_prompt):
    s = make(mode, None, n_ctx=n_prompt + 1000)
    s.decode(prompt(s, n_prompt), 0, 0, "none")

    def run(params):  # enough steps for the captured graph to run, and be updated
        s.fasa.set_params(params)
        s.remove(0, n_prompt)
        return np.array([s.decode([1 + i % 50], n_prompt + i) for i in range(12)])

    on = ON.replace(min_context_gpu=0)
    dense, sparse = run(None), run(on)
    assert np.isfinite(dense).all() and np.isfinite(sparse).all()
    for _ in range(3):
        assert (run(None) == dense).all()
        assert (run(on) == sparse).all()
    longer = run(on.replace(budget=200))
    assert np.isfinite(longer).all() and (run(None) == dense).all()


@pytest.mark.parametrize("unified", [False, True])
def test_sequences(make, unified):
    got = []
    for mode in ("c", "m"):
        s = make(mode, ON.replace(row_cache=1), n_ctx=2048, n_seq_max=3, kv_unified=unified)
        for seq in range(3):
            s.decode(prompt(s, 300, seq), 0, seq, "none")
        rows = []
        for pos in range(300, 320):
            s.decode_batch([(pos % 50 + seq, pos, seq, True) for seq in range(3)])
            rows.append([s.logits(i) for i in range(3)])
        s.remove(2, 0)
        s.copy(0, 2)
        s.decode_batch([(3 + seq, 320, seq, True) for seq in range(3)])
        rows.append([s.logits(i) for i in range(3)])
        got.append(np.array(rows))
    assert np.abs(got[0] - got[1]).max() < 1e-4 * np.abs(got[0]).max()


# ---- rows that the side stream fetches ----

AHEAD = ON.replace(ahead="on")
ROW_BYTES = {"f16": 256, "q8_0": 136, "q4_0": 72}  # K and V of a cell and KV head


@pytest.mark.parametrize("types", list(ROW_BYTES))
@pytest.mark.parametrize(("budget", "row_cache"), [(64, 0), (64, 1), (600, 0), (600, 1), (600, -1)])
def test_a_layer_ahead_gives_what_it_gives_on_the_device(make, types, budget, row_cache):
    """Of 1,500 tokens. In 1 MiB of row cache some rows of a list of 600 (f16) find all their slots taken."""
    kv, on = {"type_k": types, "type_v": types, "n_ctx": 2048}, AHEAD.replace(budget=budget, row_cache=row_cache)
    there, here = make("c", on, **kv), make("m", on, **kv)
    (a, x), (b, y) = greedy(there, 1500, 60), greedy(here, 1500, 60)
    assert a == b and (x == y).all()
    c, d = here.fasa.counters(), there.fasa.counters()
    assert c["layers_ahead"] == d["layers_ahead"] == 2 * 60 and c["tokens_attended"] == d["tokens_attended"]
    assert c["rows_fetched"] + c["rows_reused"] == c["tokens_attended"] == 60 * 3 * 2 * budget
    assert c["bytes_fetched"] == c["rows_fetched"] * ROW_BYTES[types]
    assert (c["rows_reused"] > 0) == (row_cache != 0)


def test_lists_of_every_head_and_a_mass(make):
    for how in ({"per_head": 1}, {"mass": 0.9, "cap": 200}):
        runs = [greedy(make(mode, AHEAD.replace(row_cache=1, **how)), steps=40) for mode in ("c", "m")]
        assert runs[0][0] == runs[1][0] and (runs[0][1] == runs[1][1]).all()


def rewrite(s):
    """Logits of steps that write cells anew whose rows the row cache has."""
    rows = list(greedy(s, steps=20)[1])
    s.remove(0, 590)
    rows += [s.decode([20 + i], 590 + i) for i in range(30)]
    s.remove(0, 600)
    with s.fasa.step_kind("prompt"):  # dense
        rows += [s.decode([60 + i], 600 + i) for i in range(3)]
    rows += [s.decode([80 + i], 603 + i) for i in range(5)]
    s.remove(0, 300)
    s.decode(prompt(s, 305, seed=4), 300, logits="none")
    rows += [s.decode([90 + i], 605 + i) for i in range(5)]
    s.remove(0, 100, 200)
    s.llama.llama_memory_seq_add(s.memory, 0, 200, -1, -100)
    rows += [s.decode([5 + i], 510 + i) for i in range(3)]
    state = s.state()
    s.clear()
    s.decode(prompt(s, 600, seed=1), 0)
    rows += [s.decode([7 + i], 600 + i) for i in range(3)]
    s.set_state(state)
    rows += [s.decode([8 + i], 513 + i) for i in range(5)]
    return np.array(rows)


@pytest.mark.parametrize("row_cache", [0, 1])
def test_rows_of_a_layer_ahead_are_never_stale(make, row_cache):
    on = AHEAD.replace(row_cache=row_cache)
    there, here = rewrite(make("c", on)), rewrite(make("m", on))
    assert (there == here).all()


def test_steps_with_and_without_drafts_ahead(make):
    """Rows are fetched by turns on the side stream and, for drafts, behind it."""
    got = []
    for mode in ("c", "m"):
        s = make(mode, AHEAD.replace(row_cache=1, budget=300), n_ctx=2048)
        s.decode(prompt(s, 1500), 0, logits="none")
        rows, pos = [], 1500
        for i in range(30):
            draft = [3 + i, 9 + i, 5 + i][: 1 + 2 * (i % 3 == 2)]
            rows += list(s.decode(draft, pos, logits="all"))
            pos += len(draft)
            if i % 6 == 5:  # rejected drafts
                s.remove(0, pos - 2)
                pos -= 2
        c = s.fasa.counters()
        assert mode == "c" or c["rows_fetched"] + c["rows_reused"] == c["tokens_attended"]
        got.append(np.array(rows))
    assert np.abs(got[0] - got[1]).max() < 1e-4 * np.abs(got[0]).max()  # FAC splits lists of one and three otherwise


@pytest.mark.parametrize("how", [{"budget": 40}, {"mass": 0.9, "cap": 36, "floor": 1}])
def test_a_list_of_all_drafts_has_no_room(make, how):
    """Sinks, recent tokens and drafts are more than a list was to hold: the layers select with their own queries."""
    got = []
    for ahead in ("off", "on"):
        s = make("m", AHEAD.replace(ahead=ahead, **how))
        s.decode(prompt(s), 0, logits="none")
        got.append(s.decode(list(range(3, 11)), 600, logits="all"))
        codes = s.fasa.layer_ahead_codes()
        assert codes[1:] == [Reason.AHEAD_ROOM if ahead == "on" else Reason.AHEAD_OFF] * 2
        c = s.fasa.counters()
        assert c["steps_sparse"] == 1 and c["layers_ahead"] == 0
        assert c["rows_fetched"] + c["rows_reused"] == c["tokens_attended"]
    assert (got[0] == got[1]).all()


@pytest.mark.parametrize("unified", [False, True])
def test_sequences_one_by_one_ahead(make, unified):
    got = []
    for mode in ("c", "m"):
        s = make(mode, AHEAD.replace(row_cache=1), n_ctx=2048, n_seq_max=3, kv_unified=unified)
        for seq in range(3):
            s.decode(prompt(s, 300, seq), 0, seq, "none")
        got.append(np.array([s.decode([i % 50], 300 + i // 3, i % 3) for i in range(60)]))
        assert s.fasa.counters()["layers_ahead"] == 2 * 60
    assert (got[0] == got[1]).all()


@pytest.fixture
def watch(monkeypatch, library):
    """(names of the nodes as they are computed, names of nodes behind which a call of graph_compute ends)."""
    seen, last = [], set()

    def see(tensor, ask, name_of):
        name = name_of(tensor)
        if ask:
            seen.append(name)
        return not ask or name in last

    on_nodes(monkeypatch, see)
    return seen, last


def test_fetch_is_the_end_of_the_side_stream(make, watch):
    seen, _ = watch
    layer = {
        "c": ["fasa_fork", "fasa_select", "fasa_join"],
        "m": ["fasa_fork", "fasa_select", "fasa_fetch", "fasa_join"],
    }
    for mode in ("c", "m"):
        s = make(mode, AHEAD)
        s.decode(prompt(s), 0, logits="none")
        for tokens, chain in (([7], layer[mode]), ([8, 9], layer["c"])):  # the rows of two tokens have no room
            seen.clear()
            s.decode(tokens, 599 + len(tokens), logits="all")
            ours = [n for n in seen if n in layer["m"] or n.startswith("fasa-")]
            ours = [n for i, n in enumerate(ours) if n != "fasa_join" or ours[i - 1] != n]
            assert ours == ["fasa_select", "fasa-0", *chain, "fasa-1", *chain, "fasa-2"]


@pytest.mark.parametrize("end", ["fasa_select", "fasa_fetch", "fasa_join", "fasa-1"])
def test_a_call_that_ends_within_the_side_stream(make, watch, end):
    """The nodes then run in the main stream."""
    seen, last = watch
    on = AHEAD.replace(row_cache=1)
    whole = greedy(make("m", on), steps=20)
    last.add(end)
    parts = greedy(make("m", on), steps=20)
    assert end in seen and whole[0] == parts[0] and (whole[1] == parts[1]).all()


def test_memory_that_cannot_be_pinned(make, model):
    row = 2 * 2 * 64 * sum(model_shape(GGUFFile(model))[0])  # bytes of a cell: K and V of its KV heads in f16
    with pytest.raises(
        FasaError, match=r"GiB of pinned host memory: only .* GiB of host memory are free; use a smaller context"
    ):
        make("m", n_ctx=1 << (os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // row).bit_length())
    greedy(make("m"), steps=4)  # nothing is left behind that hinders the next one


@contextmanager
def device_memory_left(device, n_bytes):
    """Of the device's memory all but n_bytes is taken."""
    cudart = ctypes.CDLL("libcudart.so.13")
    taken = ctypes.c_void_p()
    assert (
        cudart.cudaMalloc(ctypes.byref(taken), ctypes.c_size_t(runtime.devices.device_memory(device)[0] - n_bytes)) == 0
    )
    try:
        yield
    finally:
        assert cudart.cudaFree(taken) == 0


def test_a_row_cache_that_does_not_fit(make, cuda):
    s = make("m", None, n_ctx=1 << 18)
    s.decode(prompt(s, 300), 0)
    with (
        device_memory_left(cuda, 100 << 20),
        pytest.raises(FasaError, match="cannot be allocated; use a smaller context, fewer chunks, a smaller row_cache"),
    ):
        s.fasa.set_params(ON.replace(row_cache=1 << 20))
    assert s.fasa.params() is None
    s.decode([1], 300)  # the context lives on, dense
    s.fasa.set_params(ON)
    s.decode([1], 301)
    assert s.fasa.counters()["steps_sparse"] == 1


def test_a_device_without_memory_for_the_context(make, cuda):
    greedy(make("m"), steps=4)  # what CUDA itself takes is there
    with (
        device_memory_left(cuda, 100 << 20),
        pytest.raises(FasaError, match=r"cannot make a context|cannot be allocated"),
    ):
        make("m", n_ctx=1 << 18)
    greedy(make("m"), steps=4)


def test_a_device_without_memory_for_the_prefill(make, cuda):
    s = make("m", n_ctx=4096, n_batch=2048, n_ubatch=2048)
    s.decode([1], 0)
    with (
        device_memory_left(cuda, 8 << 20),
        pytest.raises(FasaError, match=r"has . MiB of memory free, and computing 1500 tokens together takes about"),
    ):
        s.decode(prompt(s, 1500), 1)
    rows = [s.decode(prompt(s, 1500), 1), s.decode([2], 1501)]
    other = make("m", n_ctx=4096, n_batch=2048, n_ubatch=2048)
    other.decode([1], 0)
    assert (np.array(rows) == np.array([other.decode(prompt(other, 1500), 1), other.decode([2], 1501)])).all()


def test_an_interrupted_prefill(make, cuda):
    """Interrupted between two batches, with copies of the next layer under way.

    The context goes on, or is closed, and no memory is left.
    """
    whole = greedy(make("m"), steps=20)
    make("m").close()
    before = runtime.devices.device_memory(cuda)[0]
    s = make("m")
    s.decode(prompt(s, 500, seed=3), 0, logits="none")
    s.clear()
    tokens, rows = greedy(s, steps=20)
    assert tokens == whole[0] and (rows == whole[1]).all()
    s.close()
    for _ in range(5):
        s = make("m")
        s.decode(prompt(s, 500), 0, logits="none")
        s.close()
    assert before - runtime.devices.device_memory(cuda)[0] < 4 << 20


def test_rates_of_the_pinned_cache(make):
    s = make("m", type_k="q8_0", type_v="f16")
    copy, gather, fetch = s.fasa.host_rates(1000, 300, 1 << 22)
    assert 1e8 < min(copy, gather, fetch) <= max(copy, gather, fetch) < 1e12
    for cells, rows in ((0, 1), (1025, 1), (10, 0)):
        with pytest.raises(FasaError, match="host rates: expected 1 to 1024 cells and at least one row"):
            s.fasa.host_rates(cells, rows, 0)
    with pytest.raises(FasaError, match="no K and V in pinned host memory"):
        make("c").fasa.host_rates(10, 1, 0)


def test_nothing_is_left_on_the_device(make, cuda):
    make("m").close()
    before = runtime.devices.device_memory(cuda)[0]
    for _ in range(5):
        s = make("m", ON.replace(row_cache=16))
        s.decode(prompt(s, 600), 0)
        s.decode([1], 600)
        s.close()
    assert before - runtime.devices.device_memory(cuda)[0] < 4 << 20
