import pytest

from fasa_gguf.gguf.file import GGUFFile
from fasa_gguf.gguf.shape import model_shape
from fasa_gguf.profile import embed
from fasa_gguf.speed import bench as b
from fasa_gguf.speed import random_model as synthetic


@pytest.fixture(autouse=True)
def small_copy(monkeypatch):
    monkeypatch.setattr(b, "COPY_BYTES", 8 << 20)


@pytest.fixture(scope="module")
def profile(tiny):
    return synthetic.synthetic_profile(*model_shape(GGUFFile(tiny)))


@pytest.fixture(scope="module")
def profiled(tiny, profile, tmp_path_factory):
    return embed.rewrite(tiny, profile, tmp_path_factory.mktemp("bench") / "tiny.gguf")
