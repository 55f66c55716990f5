"""fasa_fill_random on every kind of cache, the copy rate of a device, and the read rate of a cache."""

import numpy as np
import pytest
from tiny_gguf import N_LAYER, write_tiny

from fasa_gguf import FasaError, FasaParams, runtime
from fasa_gguf.session import Session
from fasa_gguf.speed.random_model import synthetic_profile

ROW = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}  # bytes of a value


def rows_of(s, n_cells, n_layer, bytes_per_value, seq=0):
    """uint8 [2 * n_layer, n_cells, bytes]: K, then V of every layer, as llama.cpp writes them into a state."""
    raw = s.state(seq)
    size = int(32 * bytes_per_value)  # 2 KV heads of 16
    at = (
        12 + 4 * (seq + 1) + 12 * n_cells + 8
    )  # magic, sequence, streams; cells of the streams up to this; the cells; transposed, layers
    out = []
    for _ in range(2 * n_layer):
        at += 12  # type, bytes of a row
        out.append(np.frombuffer(raw, np.uint8, n_cells * size, at).reshape(n_cells, size))
        at += n_cells * size
    assert at + 4 * (s.settings.n_seq_max - 1 - seq) == len(raw)  # the streams behind it have no cells of this sequence
    return np.stack(out)


def pos_max(s):
    return [s.llama.llama_memory_seq_pos_max(s.memory, seq) for seq in range(s.settings.n_seq_max)]


def test_rows_are_normal_and_none_is_like_another(library, tiny):
    with Session(tiny, n_ctx=3 * 20480, n_seq_max=3, n_threads=1) as s:
        s.fasa.fill_random(20000, seed=7)
        assert pos_max(s) == [19999] * 3
        rows = rows_of(s, 20000, N_LAYER, 2).view("<f2").astype(np.float32)  # [6, 20000, 32]
        assert abs(rows.mean()) < 0.01 and abs(rows.std() - 1) < 0.01
        for r in [*rows, rows[0][:, :16], rows[0][:, 16:]]:  # of a head too
            assert len(np.unique(r, axis=0)) == 20000
        assert not any(
            (rows[i] == rows[j]).all(-1).any() for i in range(6) for j in range(i)
        )  # K, V and layers begin elsewhere
        other = rows_of(s, 20000, N_LAYER, 2, seq=1).view("<f2").astype(np.float32)
        assert not (rows == other).all(-1).any()
        assert np.isfinite(s.decode([5], 20000, seq=2)).all()
        before = s.state(0)
        s.fasa.fill_random(20000, seed=7)
        assert s.state(0) == before  # seeded
        s.fasa.fill_random(20000, seed=8)
        assert s.state(0) != before
        s.fasa.fill_random(0)
        assert pos_max(s) == [-1] * 3


def test_no_two_rows_are_equal_beyond_the_pool(library, tmp_path):
    path, n = tmp_path / "m.gguf", 140000  # 512 bytes a row: 68 MiB, and the pool has 64
    write_tiny(path, n_layer=1, n_head=2, n_head_kv=2, head_dim=64, n_embd=128, n_ctx=n)
    with Session(path, n_ctx=n + 8, type_k="f32", type_v="f32") as s:
        s.fasa.fill_random(n)
        raw = s.state(0)
        k = np.frombuffer(raw, "V256", 2 * n, 16 + 12 * n + 8 + 12).reshape(n, 2)  # [n, KV head]
        assert all(len(np.unique(k[:, h])) == n for h in (0, 1))


@pytest.mark.parametrize("kind", ROW)
def test_every_cache_type(library, tmp_path, kind):
    path = tmp_path / "m.gguf"
    write_tiny(path, n_layer=1, n_head=2, n_head_kv=1, head_dim=32, n_embd=64)
    with Session(path, n_ctx=512, type_k=kind, type_v=kind) as s:
        s.fasa.fill_random(300)
        rows = rows_of(s, 300, 1, ROW[kind])
        if kind == "q8_0":
            blocks = np.ascontiguousarray(rows).reshape(-1, 34)
            values = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32) * blocks[:, 2:].view(np.int8)
        elif kind == "q4_0":
            blocks = np.ascontiguousarray(rows).reshape(-1, 18)
            nibbles = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], 1).astype(np.float32) - 8
            values = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32) * nibbles
        elif kind == "bf16":
            values = (np.ascontiguousarray(rows).view("<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.ascontiguousarray(rows).view("<f4" if kind == "f32" else "<f2").astype(np.float32)
        assert abs(values.mean()) < 0.05 and abs(values.std() - 1) < 0.05
        assert np.isfinite(s.decode([5], 300)).all()


def test_the_library_goes_on_from_a_filled_cache(library, tiny):
    profile = synthetic_profile([2] * 3, [8] * 3)
    with Session(tiny, n_ctx=1024, n_seq_max=2, n_threads=1) as s:
        s.fasa.set_profile(profile)
        s.fasa.fill_random(400)
        dense = [s.decode([5], 400, seq=seq) for seq in (0, 1)]
        s.remove(0, 400), s.remove(1, 400)
        s.fasa.set_params(
            FasaParams(chunks=8, budget=10**6, min_context=0, k_dom="f16")
        )  # all tokens: what dense attends
        assert all(np.allclose(s.decode([5], 400, seq=seq), dense[seq], atol=0.02) for seq in (0, 1))
        s.remove(0, 400), s.remove(1, 400)
        s.fasa.reset_counters()
        s.fasa.fill_random(400, seed=1)  # the dominant keys are stale now
        s.decode([5], 400)
        assert s.fasa.counters()["cells_refreshed"] == 401
        s.copy(0, 1)  # a copy that waits must not undo the next fill
        s.fasa.fill_random(400)
        assert np.allclose(s.decode([5], 400, seq=1), dense[1], atol=0.02)


@pytest.mark.parametrize("swa_full", [True, False])
def test_a_sliding_window(library, sliding, swa_full):
    with Session(sliding, n_ctx=2 * 1024, n_seq_max=2, n_batch=64, n_ubatch=64, swa_full=swa_full, n_threads=1) as s:
        s.fasa.fill_random(700)
        assert pos_max(s) == [699] * 2
        least = [s.llama.llama_memory_seq_pos_min(s.memory, seq) for seq in (0, 1)]
        assert least == ([0, 0] if swa_full else [700 - 256] * 2)  # the window's cache has 256 cells
        for j in range(70):  # around the ring
            s.decode_batch([(5, 700 + j, 0, True), (6, 700 + j, 1, True)])
        assert np.isfinite(s.logits(0)).all() and pos_max(s) == [769] * 2


def test_a_hybrid_cache(library, hybrid):
    with Session(hybrid, n_ctx=2 * 1024, n_seq_max=2, n_threads=1) as s:
        s.fasa.set_profile(synthetic_profile([0, 2, 0, 2], [0, 8, 0, 8]))
        s.fasa.set_params(FasaParams(chunks=4, budget=64, min_context=0))
        s.fasa.fill_random(700)
        for j in range(3):
            s.decode_batch([(5, 700 + j, 0, True), (6, 700 + j, 1, True)])
        c = s.fasa.counters()
        assert np.isfinite(s.logits(0)).all() and (c["steps_sparse"], c["lists"]) == (3, 3 * 2 * 2 * 2)
        assert c["tokens_attended"] == 64 * c["lists"] and pos_max(s) == [702] * 2


def test_fill_refuses(library, tiny):
    too_many = pytest.raises(FasaError, match="513 cells cannot be filled: a sequence of this context has 512")
    with Session(tiny, n_ctx=512, n_threads=1) as s, too_many:
        s.fasa.fill_random(513)
    no_flash = pytest.raises(FasaError, match="flash attention is off in this context, and its V cannot be filled")
    with Session(tiny, n_ctx=512, flash_attn=False) as s, no_flash:
        s.fasa.fill_random(5)


def test_a_session_reopens(library, tiny):
    with Session(tiny, n_ctx=512, n_threads=1) as s:
        first = s.decode([1, 2, 3], 0)
        with pytest.raises(FasaError, match="cannot make a context of"):
            s.reopen(type_k="q8_0")  # heads of 16 are no block
        with pytest.raises(FasaError, match="this session is closed"):
            s.decode([1], 0)
        s.reopen(type_k="f32", n_ctx=1024, n_seq_max=2, no_kv_offload=True)
        assert s.n_ctx == 1024 and np.allclose(s.decode([1, 2, 3], 0, seq=1), first, atol=0.01)
        s.copy(1, 0)
        assert pos_max(s) == [2, 2] and np.allclose(s.decode([4], 3), s.decode([4], 3, seq=1), atol=1e-4)


def test_devices_and_their_copy_rate(library):
    assert [d.is_gpu for d in runtime.devices.devices() if d.name == "CPU"] == [False]
    rate = runtime.devices.copy_rate("CPU", 8 << 20, 1)
    assert 1e8 < rate < 1e13 and runtime.devices.copy_rate("CPU", 8 << 20, 1) == rate  # measured once
    with pytest.raises(FasaError, match="there is no backend CUDA99"):
        runtime.devices.copy_rate("CUDA99", 1 << 20)
    with pytest.raises(FasaError, match="copy rate: expected 4 to 8589934588 bytes, found 0"):
        runtime.devices.copy_rate("CPU", 0)


def test_the_read_rate_of_a_cache(library, tiny):
    with Session(tiny, n_ctx=4096, n_seq_max=2, n_threads=2) as s:
        s.fasa.fill_random(2000)
        before = s.state(1)
        assert 1e7 < s.fasa.read_rate(2000) < 1e13 and s.fasa.read_rate(1) > 0
        assert s.fasa.read_rate(10**6) > 0 and s.state(1) == before  # no more cells than there are; nothing changed
        with pytest.raises(FasaError, match="read rate: expected a context with a KV cache, and at least one cell"):
            s.fasa.read_rate(0)
