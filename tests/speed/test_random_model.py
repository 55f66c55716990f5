"""Random models of real shapes, and the profile that knows nothing."""

import numpy as np
import pytest

from fasa_gguf import FasaError
from fasa_gguf.gguf.file import GGUFFile
from fasa_gguf.gguf.shape import model_shape
from fasa_gguf.profile.profile import Profile
from fasa_gguf.speed import random_model as synthetic


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("random") / "random-tiny.gguf"
    synthetic.write_model(path, "tiny")
    return path


def test_a_random_model_decodes(library, random_model):
    from fasa_gguf.session import Session

    model = GGUFFile(random_model)
    heads, chunks = model_shape(model)
    assert (heads, chunks) == ([2] * 8, [64] * 8) and not list(random_model.parent.glob("*.tmp-*"))
    assert sum(t.n_bytes for t in model.tensors) == synthetic.model_bytes("tiny")
    profile = Profile.load(random_model)
    assert profile.ranking_method == "synthetic" and profile.rope == {"layout": "norm", "dims": 128, "base": 500000.0}
    assert (
        all(sorted(row) == list(range(64)) for layer in profile.ranking for row in layer.tolist())
        and profile.ranking[0].tolist() != profile.ranking[1].tolist()
    )
    with Session(random_model, n_ctx=256) as s:
        s.fasa.set_profile(profile)
        assert s.n_vocab == 32000
        logits = s.decode([1, 2, 3], 0)
        assert np.isfinite(logits).all() and logits.std() > 0


def test_attention_of_a_random_model_is_neither_even_nor_a_single_token(library, random_model):
    from fasa_gguf.session import Session

    seen = {}

    def observe(o):
        logits = np.einsum("hd,nhd->nh", o.q[-1, ::4], np.asarray(o.k[:1024], np.float32)) * o.scale
        seen[o.il] = logits.std(axis=0).min(), logits.max()

    with Session(random_model, n_ctx=1280) as s:
        s.fasa.fill_random(1024)
        s.fasa.observe(observe)
        s.decode([5], 1024)
    assert sorted(seen) == list(range(8))
    assert all(std > 0.5 and most < 10 for std, most in seen.values()), seen


def test_sizes_of_the_shapes():
    assert {k: round(synthetic.model_bytes(k) / 1e9, 2) for k in synthetic.SHAPES} == {
        "8b": 4.52,
        "3b": 2.03,
        "1b": 0.84,
        "tiny": 0.09,
    }


def test_a_random_model_is_whole_or_not_there(tmp_path):
    with pytest.raises(FasaError, match="shape '70b': expected one of 8b, 3b, 1b, tiny"):
        synthetic.write_model(tmp_path / "x.gguf", "70b")
    with pytest.raises(FasaError, match=r"cannot be written: No such file or directory; a tiny model takes 0.1 GB"):
        synthetic.write_model(tmp_path / "none" / "x.gguf", "tiny")
    assert list(tmp_path.iterdir()) == []


def test_the_cached_model_is_written_once(tmp_path, monkeypatch):
    written, said = [], []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(synthetic, "write_model", lambda path, shape: (written.append(shape), path.write_bytes(b"")))
    path = synthetic.cached_model("1b", said.append)
    assert path == tmp_path / "fasa_gguf" / "random-1b.fasa.gguf" == synthetic.cached_model("1b", said.append)
    assert written == ["1b"] and said == [f"writing a random 1b model, 0.8 GB, to {path}"]


def test_a_synthetic_profile_is_marked():
    p = synthetic.synthetic_profile([2, 0, 2], [8, 0, 8])
    assert (
        p.ranking_method == "synthetic"
        and p.ranking[0].tolist() == [list(range(8))] * 2
        and p.ranking[1].shape == (0, 0)
    )
    shuffled = synthetic.synthetic_profile([2], [8], seed=1)
    assert (
        all(sorted(r) == list(range(8)) for r in shuffled.ranking[0].tolist())
        and shuffled.ranking[0].tolist() != p.ranking[0].tolist()
    )
    assert Profile.from_flat(p.to_flat(), "t").ranking_method == "synthetic"
