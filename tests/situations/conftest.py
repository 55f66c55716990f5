import pytest

from fasa_gguf.gguf.file import GGUFFile
from fasa_gguf.gguf.shape import model_shape
from fasa_gguf.profile import embed
from fasa_gguf.speed.random_model import synthetic_profile


@pytest.fixture(scope="session")
def profiled(library, tiny, tmp_path_factory):
    """The tiny model with a profile."""
    profile = synthetic_profile(*model_shape(GGUFFile(tiny)))
    return str(embed.rewrite(tiny, profile, tmp_path_factory.mktemp("situations") / "tiny.gguf"))


@pytest.fixture
def make(library):
    """A Llama that decodes with FASA at any length; the test need not close it."""
    from reported import ON

    from fasa_gguf import Llama

    made = []

    def llama(path, **kwargs):
        made.append(Llama(path, verbose=False, **{"n_ctx": 512, "n_threads": 1, "fasa": ON, **kwargs}))
        return made[-1]

    yield llama
    for llm in made:
        llm.close()
