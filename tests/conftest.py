import pytest
from paths import SMOLLM2


@pytest.fixture(scope="session")
def library():
    """The native library; tests that use it skip, saying so, where it was not built."""
    from fasa_gguf import FasaError, runtime

    try:
        runtime.library.version()
    except FasaError as e:
        pytest.skip(str(e))
    return runtime


@pytest.fixture(scope="session")
def cuda(library):
    """The name of the first CUDA device; tests that use it skip, saying so, where there is none."""
    import numpy as np

    from fasa_gguf import FasaError

    z = np.zeros
    try:
        library.ops.op_run(
            q=z((1, 1, 1, 8)),
            k=z((1, 8, 1, 8)),
            v=z((1, 8, 1, 8)),
            mask=z((1, 1, 8)),
            dims=z((1, 8)),
            weight=z((1, 8)),
            forced=z((1, 1, 1)),
            budget=1,
            scale=1.0,
            backend="CUDA0",
        )
    except FasaError as e:
        if "no backend" not in str(e):
            raise
        pytest.skip("no CUDA device")
    return "CUDA0"


@pytest.fixture(scope="module")
def one_torch_thread():
    """Torch on one thread, for modules of small tensors."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def smollm2(library):
    if not SMOLLM2.exists():
        pytest.skip(f"{SMOLLM2} is missing; run `python models/fetch.py {SMOLLM2}`")
    return SMOLLM2


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random Llama-shaped model without a vocabulary, written by the test."""
    from tiny_gguf import write_tiny

    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_tiny(path)
    return path


@pytest.fixture(scope="session")
def profile(tiny):
    """A random ranking for the tiny model, for modules without a profile of their own."""
    from fasa_gguf.gguf.file import GGUFFile
    from fasa_gguf.gguf.shape import model_shape
    from fasa_gguf.speed.random_model import synthetic_profile

    return synthetic_profile(*model_shape(GGUFFile(tiny)), seed=2)


@pytest.fixture(scope="session")
def text():
    """The start of the corpus that is calibrated on by default, for modules without a text of their own."""
    from fasa_gguf.calibrate.gguf import default_corpus

    return default_corpus()[1][:30000]


@pytest.fixture(scope="session")
def sliding(tmp_path_factory):
    """A model of cohere2's shape: three layers of four have a window of 64."""
    from tiny_archs import write_sliding

    path = tmp_path_factory.mktemp("iswa") / "cohere2.gguf"
    write_sliding(path)
    return path


@pytest.fixture(scope="session")
def hybrid(tmp_path_factory):
    """A model of lfm2's shape: two layers of attention, two of short convolutions."""
    from tiny_archs import write_hybrid

    path = tmp_path_factory.mktemp("hybrid") / "lfm2.gguf"
    write_hybrid(path)
    return path


@pytest.fixture(scope="session")
def profiled(library, tiny, tmp_path_factory):
    """The tiny model with a profile."""
    from fasa_gguf.gguf.file import GGUFFile
    from fasa_gguf.gguf.shape import model_shape
    from fasa_gguf.profile import embed
    from fasa_gguf.speed.random_model import synthetic_profile

    profile = synthetic_profile(*model_shape(GGUFFile(tiny)))
    return str(embed.rewrite(tiny, profile, tmp_path_factory.mktemp("profiled") / "tiny.gguf"))


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
