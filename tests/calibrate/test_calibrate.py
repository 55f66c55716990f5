"""Calibration from the GGUF: what the observer hands out, bounded memory, refusals. Resuming is in test_apps.py."""

import json

import numpy as np
import pytest

from fasa_gguf import FasaError, reference, runtime
from fasa_gguf.calibrate import ranking
from fasa_gguf.calibrate.gguf import (
    Calibration,
    CalibrationParams,
    calibrate,
    default_corpus,
)
from fasa_gguf.gguf.file import GGUFFile
from fasa_gguf.params import default_chunks
from fasa_gguf.profile.profile import Profile
from fasa_gguf.session import Session

SMALL = CalibrationParams(context=512, queries=16, budget=40)


@pytest.fixture
def session(library, tiny):
    with Session(tiny, n_ctx=512) as s:
        yield s


def test_the_sample_is_the_end_of_the_window(session):
    """Queries and keys kept are those of a plain observer, and the energies are means over every token."""
    c = Calibration(session, default_corpus(), SMALL)
    q, k = np.zeros((512, 4, 16), np.float32), {}

    def keep(o):
        if o.il == 1:
            q[:] = o.q
            k[1] = o.k[:512].copy()

    session.fasa.observe(keep)
    session.decode(c.tokens[0], 0, logits="none")  # 512 tokens: one ubatch
    session.fasa.observe(None)
    session.clear()
    seen = c._pass([1], lambda n: None)
    assert list(seen) == [1] and seen[1].n == 512 and seen[1].q.shape == (16, 4, 16)
    assert np.array_equal(seen[1].q, q[-16:]) and np.array_equal(seen[1].k, k[1]) and k[1].any(-1).all()
    dims = reference.chunk_dims(16, 16, "norm")
    length = np.linalg.norm(q[:, :, dims], axis=-1)  # [512, 4, 8]
    assert np.allclose(seen[1].q_sum / 512, length.reshape(512, 2, 2, 8).mean((0, 2)), rtol=1e-5)
    assert np.allclose(
        seen[1].k_sum / 512, np.linalg.norm(k[1].astype(np.float32)[:, :, dims], axis=-1).mean(0), rtol=1e-5
    )


def test_a_ubatch_smaller_than_the_batch_gives_the_same_sample(library, tiny):
    rows = []
    for n_batch, n_ubatch in ((512, 512), (200, 56)):
        with Session(tiny, n_ctx=512, n_batch=n_batch, n_ubatch=n_ubatch) as s:
            rows.append(Calibration(s, default_corpus(), SMALL)._pass([0, 2], lambda n: None))
    for il in (0, 2):
        assert np.allclose(rows[0][il].q, rows[1][il].q, atol=0.1) and rows[1][il].q.shape == (16, 4, 16)
        assert np.allclose(rows[0][il].k_sum, rows[1][il].k_sum, rtol=1e-3)
        assert np.allclose(rows[0][il].k.astype(np.float32), rows[1][il].k.astype(np.float32), atol=0.1)


def test_the_ranking_is_the_references(session, tiny):
    profile = calibrate(tiny, params=SMALL)
    c = Calibration(session, default_corpus(), SMALL)
    s = c._pass([1], lambda n: None)[1]
    dims, pos = reference.chunk_dims(16, 16, "norm"), np.arange(496, 512)
    order, kept = reference.rank_recall(
        s.q[:, 2:4].transpose(1, 0, 2), s.k[:, 1].astype(np.float32), pos, dims, s.scale, s.soft_cap, 4, 40, 4, 32
    )
    assert profile.ranking[1][1][:4].tolist() == order.tolist() and np.allclose(profile.recall[1][1], kept, atol=1e-5)
    energy = reference.rank_energy(s.q_sum[1], s.k_sum[1])
    assert profile.ranking[1][1][4:].tolist() == [x for x in energy if x not in order]
    assert (profile.recall_k, profile.recall_budget, profile.weight_k) == (4, 40, default_chunks(8))


def test_foreseen_queries_have_a_ranking_of_their_own(session, tiny, monkeypatch):
    """The references', with the foreseen queries as those that score; the first layer has none."""
    monkeypatch.setattr(ranking, "MOST_LOST_AHEAD", 1.0)
    profile = calibrate(tiny, params=SMALL)
    c = Calibration(session, default_corpus(), SMALL)
    seen = c._pass([0, 1], lambda n: None)
    s = seen[1]
    assert seen[0].q_ahead is None and s.q_ahead.shape == s.q.shape and not np.allclose(s.q, s.q_ahead, atol=0.1)
    assert profile.ahead.tolist() == [0, 1, 1] and np.array_equal(profile.ahead_ranking[0], profile.ranking[0])
    assert np.array_equal(profile.ahead_weight[0], profile.weight[0])
    dims, pos = reference.chunk_dims(16, 16, "norm"), np.arange(496, 512)
    q, ahead = (x[:, 2:4].transpose(1, 0, 2) for x in (s.q, s.q_ahead))
    keys = s.k[:, 1].astype(np.float32)
    order, _ = reference.rank_recall(q, keys, pos, dims, s.scale, s.soft_cap, 4, 40, 4, 32, ahead)
    assert profile.ahead_ranking[1][1][:4].tolist() == order.tolist()
    assert sorted(profile.ahead_ranking[1][1]) == list(range(8))
    weight = reference.fit_weights(
        q[:, ::4], keys, pos[::4], dims, profile.ahead_ranking[1][1][:4], s.scale, s.soft_cap, ahead[:, ::4]
    )
    assert np.allclose(profile.ahead_weight[1][1], weight, atol=1e-5)
    entry = ranking.rank_layer(s, 1)
    assert len(entry["ahead_kept"]) == 2 and np.all(np.diff(entry["ahead_kept"]) < 0)
    assert ranking.rank_layer(s, 5) == entry  # heads side by side


def test_a_layer_that_would_lose_much_keeps_its_own_queries(library, tiny, tmp_path, monkeypatch):
    for kept, may in (([[0.9, 0.88], [0.8, 0.79]], True), ([[0.9, 0.85], [0.8, 0.8]], False)):
        assert ranking.may_select_ahead({"ahead_kept": kept}) is may
    assert not ranking.may_select_ahead({"ranking": []})  # its queries cannot be foreseen
    monkeypatch.setattr(ranking, "MOST_LOST_AHEAD", -1.0)
    profile = calibrate(tiny, params=SMALL, out=tmp_path / "p.json")
    assert profile.ahead.tolist() == [0, 0, 0] and profile.ahead_ranking is profile.ahead_weight is None
    assert Profile.load(tmp_path / "p.json").ahead.tolist() == [0, 0, 0]


@pytest.mark.parametrize("method", ["energy", "ca"])
def test_rankings_of_single_chunks_serve_foreseen_queries_with_other_weights(library, tiny, monkeypatch, method):
    monkeypatch.setattr(ranking, "MOST_LOST_AHEAD", 1.0)
    p = calibrate(tiny, params=CalibrationParams(context=512, queries=16, budget=40, method=method))
    assert all(np.array_equal(a, b) for a, b in zip(p.ranking, p.ahead_ranking, strict=True))
    assert not np.allclose(p.weight[1], p.ahead_weight[1], atol=1e-3)


def test_memory_is_bounded_by_passes_and_they_change_nothing(library, tiny, monkeypatch):
    whole = calibrate(tiny, params=SMALL)
    passes, run = [], Calibration._pass
    monkeypatch.setattr(
        Calibration, "_pass", lambda self, layers, tick: passes.append(layers) or run(self, layers, tick)
    )
    one = 512 * 2 * 16 * 2  # bytes of the keys of one layer of the window
    small = calibrate(tiny, params=CalibrationParams(context=512, queries=16, budget=40, memory=2 * one))
    assert passes == [[0, 1], [2]] and small.to_flat() == whole.to_flat()


def test_a_longer_text_keeps_no_more(session):
    name, text = default_corpus()
    short, long = (Calibration(session, (name, t), SMALL) for t in (text[:20000], text))
    assert short.tokens == long.tokens and len(long.tokens[0]) == 512


def test_several_windows(library, tiny):
    p = calibrate(tiny, params=CalibrationParams(context=512, queries=16, budget=40, windows=2, method="energy"))
    assert p.calibration["tokens"] == 1024 and p.calibration["context"] == 512 and p.recall is None
    one = calibrate(tiny, params=CalibrationParams(context=512, queries=16, budget=40, windows=2))
    assert [r[0][:4].tolist() for r in one.ranking] == [
        r[0][:4].tolist() for r in calibrate(tiny, params=SMALL).ranking
    ]


def test_a_partial_of_another_run_is_not_used(library, tiny, tmp_path):
    out, partial = tmp_path / "p.json", tmp_path / "p.json.partial"
    fresh = calibrate(tiny, params=SMALL).to_flat()
    wrong = {"ranking": [list(range(8))] * 2, "weight": [[1.0] * 3] * 2, "recall": [[1.0] * 4] * 2}
    for text in (json.dumps({"key": "00000000", "layers": {"0": wrong}}), '{"key":', "[]"):
        partial.write_text(text)
        assert calibrate(tiny, params=SMALL, out=out).to_flat() == fresh and not partial.exists()
    assert Profile.load(out).calibration == fresh_calibration(fresh)


def fresh_calibration(flat):
    return {k.split(".", 1)[1]: v for k, v in flat.items() if k.startswith("calibration.")}


def test_metadata(library, tiny):
    name, text = default_corpus()
    c = calibrate(tiny, params=SMALL).calibration
    assert c["corpus"] == name and c["source"] == "gguf" and c["context"] == 512
    assert c["corpus_sha256"] != calibrate(tiny, (name, text + "."), SMALL).calibration["corpus_sha256"]


def test_progress_reaches_the_end(library, tiny):
    seen = []
    calibrate(tiny, params=SMALL, progress=lambda *step: seen.append(step))
    assert seen[0] == ("reading", 512, 512) and seen[1:] == [("ranking", i, 3) for i in (1, 2, 3)]


@pytest.mark.parametrize(
    "info, message",
    [
        ({"rope_layout": -1}, "architecture llama has no RoPE"),
        ({"is_mla": 1}, "architecture llama has multi-head latent attention"),
    ],
)
def test_models_out_of_scope_are_named(library, tiny, monkeypatch, info, message):
    real = runtime.context.Context.model_info
    monkeypatch.setattr(runtime.context.Context, "model_info", lambda self: {**real(self), **info})
    with pytest.raises(FasaError, match=message):
        calibrate(tiny, params=SMALL)


def test_a_model_without_attention_is_named(library, tiny, monkeypatch):
    monkeypatch.setattr(runtime.context.Context, "layer_shape", lambda self, il: (0, 0, 0, 0))
    with pytest.raises(FasaError, match="architecture llama has no attention layer with a KV cache"):
        calibrate(tiny, params=SMALL)


def test_layers_that_show_nothing_have_no_ranking(library, tiny, monkeypatch):
    real = runtime.context.Context.observe

    def hide(hidden):
        def observe(self, fn):
            real(self, fn and (lambda o: fn(o) if o.il not in hidden else None))

        monkeypatch.setattr(runtime.context.Context, "observe", observe)

    hide({1})
    p = calibrate(tiny, params=SMALL)
    assert p.n_chunk == [8, 0, 8] and p.ranking[1].size == 0
    assert Profile.from_flat(p.to_flat(), "t").n_chunk == [8, 0, 8]
    hide({0, 1, 2})
    with pytest.raises(FasaError, match="no layer of architecture llama showed its queries and keys"):
        calibrate(tiny, params=SMALL)


def test_refusals(library, tiny, tmp_path):
    with pytest.raises(FasaError, match=r"a few words: the text has .* tokens; calibration needs at least 256"):
        calibrate(tiny, ("a few words", "a few words"), SMALL)
    with pytest.raises(
        FasaError,
        match=r"a window of 100 tokens .asked for 100, .*needs at least 300; "
        r"use a larger -c",
    ):
        calibrate(tiny, params=CalibrationParams(context=100, queries=150))
    with pytest.raises(FasaError, match="ranking method 'magic': expected one of recall, energy, ca"):
        calibrate(tiny, params=CalibrationParams(method="magic"))
    with pytest.raises(FasaError, match="the folder does not exist"):
        calibrate(tiny, params=SMALL, out=tmp_path / "none" / "p.json")
    (tmp_path / "p.json.partial.tmp").mkdir()
    with pytest.raises(FasaError, match=r"p.json.partial: cannot be written"):
        calibrate(tiny, params=SMALL, out=tmp_path / "p.json")


def test_a_header_is_read_once(tiny, monkeypatch):
    model, parsed, parse = GGUFFile(tiny), [], GGUFFile._parse
    monkeypatch.setattr(GGUFFile, "_parse", lambda self, r: parsed.append(self.path) or parse(self, r))
    small = CalibrationParams(context=512, queries=16, budget=40, method="energy")
    assert calibrate(model, params=small).to_flat() == calibrate(tiny, params=small).to_flat()
    assert parsed == [tiny]  # once by its path, not at all by its header
