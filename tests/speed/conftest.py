import pytest

from fasa_gguf.gguf.file import GGUFFile
from fasa_gguf.gguf.shape import model_shape
from fasa_gguf.profile import embed
from fasa_gguf.speed import traffic
from fasa_gguf.speed.random_model import synthetic_profile


@pytest.fixture(autouse=True)
def small_copy(monkeypatch):
    monkeypatch.setattr(traffic, "COPY_BYTES", 8 << 20)


@pytest.fixture(scope="module")
def profile(tiny):
    return synthetic_profile(*model_shape(GGUFFile(tiny)))


@pytest.fixture(scope="module")
def profiled(tiny, profile, tmp_path_factory):
    return embed.rewrite(tiny, profile, tmp_path_factory.mktemp("bench") / "tiny.gguf")
