"""Speed: a cache filled at random, arms that alternate, figures, formats; and random models."""

import csv
import io
import json
import struct

import numpy as np
import pytest

from fasa_gguf import FasaError, FasaParams, bench as b, synthetic
from fasa_gguf.embed import model_shape
from fasa_gguf.gguf_file import GGUFFile
from fasa_gguf.profile import Profile

ON = FasaParams(chunks=4, budget=64, min_context=0)


@pytest.fixture(scope="module")
def profile(tiny):
    return synthetic.synthetic_profile(*model_shape(GGUFFile(tiny)))


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("random") / "random-tiny.gguf"
    synthetic.write_model(path, "tiny")
    return path


def one_token_state(n_layer=2, kind=1, size=64, v_trans=0, n_stream=1):
    """The state of a sequence with one token, as llama_kv_cache::state_write lays it out."""
    head = struct.pack("<II", 0xAF143CD8, 0) + struct.pack("<II", n_stream, 1) + struct.pack("<iIi", 0, 1, 0) + struct.pack("<II", v_trans, n_layer)
    return head + b"".join(struct.pack("<iQ", kind, size) + bytes(size) for _ in range(2 * n_layer))


# ---- the cache ----


def test_the_layout_of_a_state():
    head, caches = b.state_layout(one_token_state(), "m.gguf")
    assert head == struct.pack("<II", 0xAF143CD8, 0)
    assert [(c.n_layer, c.rows) for c in caches] == [(2, [(1, 64)] * 4)]
    two = one_token_state() + one_token_state(n_layer=1, size=32)[8:]                 # a model with a sliding-window cache
    assert [(c.n_layer, c.rows) for c in b.state_layout(two, "m.gguf")[1]] == [(2, [(1, 64)] * 4), (1, [(1, 32)] * 2)]


@pytest.mark.parametrize("raw", [one_token_state()[:-1], one_token_state(v_trans=1), one_token_state(n_stream=2), b"", one_token_state() + b"\0",
                                 one_token_state(n_layer=0)[:-4] + struct.pack("<IiQ", 1, 1, 2**63)])
def test_another_layout_is_refused(raw):
    with pytest.raises(FasaError, match="m.gguf: the state of this model's cache has a layout .*; use --fill prefill"):
        b.state_layout(raw, "m.gguf")


def test_a_random_state_has_the_layout_and_no_two_equal_cells():
    raw, depth = one_token_state(n_layer=1, size=64), 9000                             # more cells than the pool has
    state = b.random_state(raw, depth, "m.gguf").tobytes()
    assert struct.unpack_from("<IIII", state) == (0xAF143CD8, 0, 1, depth)
    cells = np.frombuffer(state, "<i4", 3 * depth, 16).reshape(depth, 3)
    assert np.array_equal(cells[:, 0], np.arange(depth)) and (cells[:, 1] == 1).all() and (cells[:, 2] == 0).all()
    at = 16 + cells.nbytes
    assert struct.unpack_from("<IIiQ", state, at) == (0, 1, 1, 64)
    k = np.frombuffer(state, "<f2", 32 * depth, at + 20).reshape(depth, 32)
    at += 20 + k.nbytes
    assert struct.unpack_from("<iQ", state, at) == (1, 64)
    v = np.frombuffer(state, "<f2", 32 * depth, at + 12).reshape(depth, 32)
    assert at + 12 + v.nbytes == len(state)
    assert len(np.unique(k, axis=0)) == depth and not np.array_equal(k, v)
    assert abs(float(k.astype(np.float32).mean())) < 0.01 and abs(float(k.astype(np.float32).std()) - 1) < 0.01
    assert np.array_equal(b.random_state(raw, depth, "m.gguf"), np.frombuffer(state, np.uint8))   # seeded
    with pytest.raises(FasaError, match="m.gguf: a random cache is made in f16 and q8_0, this one is ggml type 2; use --fill prefill"):
        b.random_state(one_token_state(kind=2), 10, "m.gguf")


def test_random_q8_0_cells_are_normal():
    state = b.random_state(one_token_state(n_layer=1, kind=8, size=68), 100, "m.gguf")
    rows = state[16 + 1200 + 20 :][:6800].reshape(100, 2, 34)
    scale = np.ascontiguousarray(rows[..., :2]).view("<f2").astype(np.float32)
    values = scale * rows[..., 2:].view(np.int8).astype(np.float32)
    assert abs(values.mean()) < 0.05 and abs(values.std() - 1) < 0.05


@pytest.mark.parametrize("kind, ggml", [("f16", 1), ("q8_0", 8)])
def test_the_library_returns_the_cells_it_was_given(library, random_model, kind, ggml):
    from fasa_gguf.session import Session

    with Session(random_model, n_ctx=512, type_k=kind, type_v=kind) as s:
        s.decode([0], 0, logits="none")
        assert {row[0] for row in b.state_layout(s.state(0), "m")[1][0].rows} == {ggml}
        wanted = b.random_state(s.state(0), 300, "m")
        b.fill_state(s, 300)
        assert s.llama.llama_memory_seq_pos_max(s.memory, 0) == 299
        assert s.state(0) == wanted.tobytes()
        assert np.isfinite(s.decode([5], 300)).all()
        b.fill_state(s, 0)
        assert s.llama.llama_memory_seq_pos_max(s.memory, 0) == -1


def test_prefill_goes_on_from_what_is_there(library, tiny):
    from fasa_gguf.session import Session

    with Session(tiny, n_ctx=512, n_batch=64, n_ubatch=64) as s:
        seen = []
        b.prefill(s, 128, report=seen.append)
        b.prefill(s, 192, start=128, report=seen.append)
        parts = s.decode([5], 192)
        assert seen == [64, 128, 192]
        b.prefill(s, 192)
        assert np.array_equal(s.decode([5], 192), parts)


# ---- the measurement ----


def test_bytes_and_tokens_of_a_row(library, tiny, profile):
    dense, fasa = b.bench(tiny, [300], ON, n_gen=4, repetitions=2, profile=profile)
    cell = 3 * 2 * 2 * 16 * 2                                                        # layers, K and V, KV heads, head_dim, bytes
    assert dense.kv_bytes == cell * (300 + 1 + 2.5) and dense.tokens_attended is None and dense.sparse_share == 0
    fac, tip = cell * 64, 3 * 2 * 320 * (8 // 2 + 2)                                 # 10 tiles of 32 cells; 8 dims in 4 bits and a scale
    assert fac + tip <= fasa.kv_bytes <= fac + tip * 512 / 320                        # the view is padded to 512 cells at most
    assert fasa.tokens_attended == 64 and fasa.sparse_share == 1 and fasa.note == ""
    assert fasa.ratio == pytest.approx(fasa.avg_ts / dense.avg_ts) and (dense.fill, fasa.fill) == ("prefill", "prefill")
    assert len(fasa.samples_ts) == 2 and min(fasa.samples_ts) > 0


def test_arms_alternate(library, tiny, profile, monkeypatch):
    seen, time_arm = [], b._time_arm

    def spy(s, p, depth, n):
        seen.append((p is not None, depth, n))
        assert s.llama.llama_memory_seq_pos_max(s.memory, 0) == depth - 1             # the tail is gone
        return time_arm(s, p, depth, n)

    monkeypatch.setattr(b, "_time_arm", spy)
    told = []
    b.bench(tiny, [40, 20, 20], ON, n_gen=6, repetitions=2, profile=profile, progress=lambda *x: told.append(x))
    warm, real = [(False, 4), (True, 4)], [(False, 6), (True, 6)]
    assert [(arm, n) for arm, depth, n in seen if depth == 20] == warm + real + real
    assert [depth for _, depth, _ in seen] == [20] * 6 + [40] * 6
    assert told[-1] == ("benchmarking", 8, 8) and ("prefilling 40", 40, 40) in told


def test_what_stays_dense_says_so(library, tiny, profile):
    # the view of the cache grows from 256 to 512 cells in the middle of the run at depth 250
    rows = b.bench(tiny, [0, 250, 300], ON.replace(min_context=300), n_gen=10, repetitions=1, profile=profile)
    notes = {r.n_depth: r.note for r in rows if r.arm == "fasa"}
    assert notes == {0: "dense (n < 300)", 250: "5 of 10 steps dense (n < 300)", 300: ""}
    shallow = [r for r in rows if r.n_depth == 0]
    assert shallow[0].kv_bytes == shallow[1].kv_bytes and shallow[1].sparse_share == 0
    half = Profile(profile.n_head_kv, [8, 0, 8], [profile.ranking[0], np.zeros((0, 0), np.uint16), profile.ranking[2]], "synthetic")
    dense, fasa = b.bench(tiny, [300], ON, n_gen=4, repetitions=2, profile=half)
    assert fasa.note.startswith("1 layers dense (") and fasa.sparse_share == 1
    assert dense.kv_bytes / 3 < fasa.kv_bytes < dense.kv_bytes                        # the dense layer reads all of its third


def test_bench_refuses(library, tiny, profile):
    with pytest.raises(FasaError, match="no step of the run used it: the context is shorter than min_context; use deeper -d DEPTHS"):
        b.bench(tiny, [0, 10], ON.replace(min_context=4096), n_gen=2, repetitions=1, profile=profile)
    with pytest.raises(FasaError, match="there is no FASA profile in this model; run `fasa-gguf embed-profile"):
        b.bench(tiny, [10], ON)
    with pytest.raises(FasaError, match="-d, -n and -r: expected depths from 0"):
        b.bench(tiny, [-1], ON, profile=profile)
    with pytest.raises(FasaError, match="--fill 'air': expected auto, prefill or state"):
        b.bench(tiny, [1], ON, profile=profile, fill="air")


def test_auto_fills_by_state_where_it_can(library, tiny, profile, monkeypatch):
    monkeypatch.setattr(b, "STATE_FILL_FROM", 64)
    filled = lambda **kw: [r.fill for r in b.bench(tiny, [32, 128], ON, n_gen=2, repetitions=1, profile=profile, **kw)]
    assert filled() == ["prefill", "prefill", "state", "state"]
    assert filled(fill="state") == ["state"] * 4

    def refuse(*a):
        raise FasaError("another layout")

    monkeypatch.setattr(b, "fill_state", refuse)
    assert filled() == ["prefill"] * 4
    with pytest.raises(FasaError, match="another layout"):
        filled(fill="state")


def planted(*ratios):
    """Rows at depths 0, 100, 200, ...: FASA at `ratio` times dense's 50 tokens/s; None: it stayed dense."""
    rows = []
    for i, ratio in enumerate(ratios):
        rows.append(b.Row("dense", 100 * i, 8, [49.0, 51.0], kv_bytes=2e6, ratio=1.0, fill="prefill"))
        rows.append(b.Row("fasa", 100 * i, 8, [50 * (ratio or 1)] * 2, kv_bytes=2e6 if ratio is None else 5e5, sparse_share=float(ratio is not None),
                          tokens_attended=None if ratio is None else 64.0, note="dense (n < 64)" if ratio is None else "", ratio=ratio or 1.0, fill="prefill"))
    return rows


@pytest.mark.parametrize("ratios, depth", [((0.8, 0.9, 1.1, 2.0), 200), ((1.2, 0.9, 0.985, 2.0), 200), ((1.1, 1.2), 0), ((0.9, 0.8), None),
                                           ((1.5, 0.9), None), ((None, None, 1.2), 200)])
def test_crossover(ratios, depth):
    rows = planted(*ratios)
    assert b.crossover(rows) == depth
    text = b.crossover_text(depth, rows)
    assert "no crossover among the depths measured" in text if depth is None else f"from depth {depth} on" in text


def test_find_crossover_measures_every_depth(library, tiny, profile):
    depth, rows = b.find_crossover(tiny, ON.replace(min_context=4096), [16, 300], profile=profile, n_gen=3, repetitions=1)
    assert [(r.n_depth, r.sparse_share) for r in rows if r.arm == "fasa"] == [(16, 1.0), (300, 1.0)]
    assert depth == b.crossover(rows)


# ---- output ----


def test_the_table():
    assert b.table(planted(None, 1.5), "dir/model.gguf") == """\
| model      |       test |   arm |           t/s | KV MB/token |       attended | ratio |
| ---------- | ---------: | ----: | ------------: | ----------: | -------------: | ----: |
| model.gguf |   tg8 @ d0 | dense | 50.00 +- 1.41 |        2.00 |            all |       |
| model.gguf |   tg8 @ d0 |  fasa | 50.00 +- 0.00 |        2.00 | dense (n < 64) | 1.00x |
| model.gguf | tg8 @ d100 | dense | 50.00 +- 1.41 |        2.00 |            all |       |
| model.gguf | tg8 @ d100 |  fasa | 75.00 +- 0.00 |        0.50 |             64 | 1.50x |"""


def test_the_formats(library):
    rows = planted(None, 1.5)
    entries = json.loads(b.render(rows, "model.gguf", ON, "json"))
    last = entries[3]
    assert (last["test"], last["arm"], last["n_prompt"], last["n_gen"], last["n_depth"]) == ("tg8 @ d100", "fasa", 0, 8, 100)
    assert (last["avg_ts"], last["stddev_ts"], last["samples_ts"], last["ratio"]) == (75.0, 0.0, [75.0, 75.0], 1.5)
    assert last["fasa"]["budget"] == 64 and entries[2]["fasa"] is None and last["model_filename"] == "model.gguf" and "0.3.36" in last["build_commit"]
    assert [json.loads(line) for line in b.render(rows, "model.gguf", ON, "jsonl").splitlines()] == entries
    flat = list(csv.DictReader(io.StringIO(b.render(rows, "model.gguf", ON, "csv"))))
    assert len(flat) == 4 and flat[3]["samples_ts"] == "75 75" and flat[3]["fasa_budget"] == "64" and flat[2]["fasa_budget"] == "" and flat[1]["note"] == "dense (n < 64)"
    assert b.render(rows, "model.gguf", ON) == b.table(rows, "model.gguf")
    with pytest.raises(FasaError, match="-o 'sql': expected one of md, json, jsonl, csv"):
        b.render(rows, "model.gguf", ON, "sql")


# ---- random models ----


def test_a_random_model_decodes(library, random_model):
    from fasa_gguf.session import Session

    model = GGUFFile(random_model)
    heads, chunks = model_shape(model)
    assert (heads, chunks) == ([2] * 8, [64] * 8) and not list(random_model.parent.glob("*.tmp-*"))
    assert sum(t.n_bytes for t in model.tensors) == synthetic.model_bytes("tiny")
    with Session(random_model, n_ctx=256) as s:
        assert s.n_vocab == 32000
        logits = s.decode([1, 2, 3], 0)
        assert np.isfinite(logits).all() and logits.std() > 0


def test_sizes_of_the_shapes():
    assert {k: round(synthetic.model_bytes(k) / 1e9, 2) for k in synthetic.SHAPES} == {"8b": 4.52, "3b": 2.03, "1b": 0.84, "tiny": 0.09}


def test_a_random_model_is_whole_or_not_there(tmp_path):
    with pytest.raises(FasaError, match="shape '70b': expected one of 8b, 3b, 1b, tiny"):
        synthetic.write_model(tmp_path / "x.gguf", "70b")
    with pytest.raises(FasaError, match="cannot be written: No such file or directory; a tiny model takes 0.1 GB"):
        synthetic.write_model(tmp_path / "none" / "x.gguf", "tiny")
    assert list(tmp_path.iterdir()) == []


def test_the_cached_model_is_written_once(tmp_path, monkeypatch):
    written, said = [], []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(synthetic, "write_model", lambda path, shape: (written.append(shape), path.write_bytes(b"")))
    path = synthetic.cached_model("1b", said.append)
    assert path == tmp_path / "fasa_gguf" / "random-1b.gguf" == synthetic.cached_model("1b", said.append)
    assert written == ["1b"] and said == [f"writing a random 1b model, 0.8 GB, to {path}"]


def test_a_synthetic_profile_is_marked():
    p = synthetic.synthetic_profile([2, 0, 2], [8, 0, 8])
    assert p.ranking_method == "synthetic" and p.ranking[0].tolist() == [list(range(8))] * 2 and p.ranking[1].shape == (0, 0)
    shuffled = synthetic.synthetic_profile([2], [8], seed=1)
    assert all(sorted(r) == list(range(8)) for r in shuffled.ranking[0].tolist()) and shuffled.ranking[0].tolist() != p.ranking[0].tolist()
    assert Profile.from_flat(p.to_flat(), "t").ranking_method == "synthetic"
