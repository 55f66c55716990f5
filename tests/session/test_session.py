"""Session: settings in force, reopening, what it refuses. What it computes is in tests/native and tests/calibrate."""

import numpy as np
import pytest

from fasa_gguf import FasaError
from fasa_gguf.runtime.settings import ContextSettings
from fasa_gguf.session import Session


def test_keywords_are_short_for_settings(library, tiny):
    settings = ContextSettings(n_ctx=512, n_threads=1, n_batch=32)
    with Session(tiny, settings, n_ctx=1024) as a, Session(tiny, n_ctx=1024, n_threads=1, n_batch=32) as b:
        assert a.settings == b.settings == settings.replace(n_ctx=1024)
        assert (a.n_ctx, a.n_batch, a.mode) == (b.n_ctx, b.n_batch, b.mode) == (1024, 32, "device")
        assert np.array_equal(a.decode([1, 2, 3], 0), b.decode([1, 2, 3], 0))


def test_reopening_takes_settings_or_changes(library, tiny):
    settings = ContextSettings(n_ctx=512, n_threads=1)
    with Session(tiny, settings) as s:
        s.reopen(n_ctx=256, n_seq_max=2)
        assert s.settings == settings.replace(n_ctx=256, n_seq_max=2) and s.n_ctx == 512  # each is padded to 256 cells
        s.reopen(settings, type_k="f32")
        assert s.settings == settings.replace(type_k="f32")
        with pytest.raises(FasaError, match="cache type 'x'"):  # before the context is freed
            s.reopen(type_v="x")
        assert s.settings == settings.replace(type_k="f32") and s.decode([1], 0) is not None
        with pytest.raises(FasaError, match=r"tiny\.gguf: the model is loaded with n_gpu_layers 0, found 1"):
            s.reopen(n_gpu_layers=1)
        assert s.decode([1], 1) is not None


def test_what_cannot_be_opened(library, tiny, tmp_path):
    with pytest.raises(FasaError, match=r"none\.gguf: no such file"):
        Session(tmp_path / "none.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(FasaError, match=r"bad\.gguf: llama\.cpp cannot load this model: "):
        Session(tmp_path / "bad.gguf")
    with pytest.raises(TypeError, match="n_context"):
        Session(tiny, n_context=512)


def test_logits_of_all_tokens(library, tiny):
    tokens = [1, 5, 9, 13, 17]
    with Session(tiny, n_ctx=256, n_batch=2, n_threads=1) as s:
        every = s.decode(tokens, 0, logits="all")
        assert every.shape == (5, s.n_vocab) and every.dtype == np.float32
        s.clear()
        assert s.decode(tokens[:4], 0, logits="none") is None
        assert np.allclose(s.decode(tokens[4:], 4), every[4], atol=1e-4)


def test_a_state_goes_to_another_sequence(library, tiny):
    with Session(tiny, n_ctx=512, n_seq_max=2, n_threads=1) as s:
        s.decode([1, 2, 3], 0)
        s.set_state(s.state(0), 1)
        assert np.allclose(s.decode([4], 3), s.decode([4], 3, seq=1), atol=1e-4)
        with pytest.raises(FasaError, match=r"llama\.cpp does not take this state"):
            s.set_state(b"nothing", 1)


def test_a_batch_is_no_larger_than_the_context(library, tiny):
    tokens = [1 + i % 200 for i in range(256)]
    with (
        Session(tiny, n_ctx=256, n_batch=512, n_threads=1) as s,
        Session(tiny, n_ctx=256, n_batch=64, n_threads=1) as small,
    ):
        assert (s.n_ctx, s.n_batch, s.settings.n_batch) == (256, 256, 512)
        assert np.allclose(s.decode(tokens, 0), small.decode(tokens, 0), atol=1e-4)
        for n in (0, 257):
            with pytest.raises(FasaError, match=rf"expected a batch of 1 to 256 tokens .*, found {n}"):
                s.decode_batch([(1, i, 0, False) for i in range(n)])
        with pytest.raises(FasaError, match="the context of 256 tokens is full"):
            s.decode(tokens, 256)
        with pytest.raises(FasaError, match="item 7 of the last batch has no logits"):
            s.logits(7)


def test_paths_that_no_file_can_have(library, tmp_path):
    from fasa_gguf import Profile
    from fasa_gguf.gguf.file import GGUFFile
    from fasa_gguf.profile.embed import check_embeddable
    from fasa_gguf.quality.journal import Journal

    for path in ("a\0b", "a\ud800", tmp_path / "a\0b"):
        for use in (Session, GGUFFile, Profile.load, check_embeddable, lambda p: Journal(p, {})):
            with pytest.raises(FasaError, match="expected the path of a file, found characters that no path can have"):
                use(path)


def test_an_encoder_takes_one_ubatch(library, tmp_path):
    """llama.cpp ends the process where a batch of a model without a KV cache is larger than n_ubatch."""
    from tiny_archs import write_encoder

    write_encoder(tmp_path / "m.gguf")
    with Session(tmp_path / "m.gguf", n_ctx=256, n_batch=64, n_ubatch=32, n_threads=1) as s:
        assert s.n_batch == 32 and s.decode(list(range(1, 33)), 0, logits="all").shape == (32, 64)
        with pytest.raises(FasaError, match=r"1 to 32 tokens \(n_batch, at most n_ctx and n_ubatch\), found 40"):
            s.decode_batch([(1, i, 0, True) for i in range(40)])
        for logits in ("last", "all", "none"):
            with pytest.raises(FasaError, match=r"no KV cache.* at most 32 tokens, found 40; use a larger n_ubatch"):
                s.decode([1] * 40, 0, logits=logits)
