from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2 = ROOT / "models" / "cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def library():
    """The native library; tests that use it skip, saying so, where it was not built."""
    from fasa_gguf import FasaError, native

    try:
        native.version()
    except FasaError as e:
        pytest.skip(str(e))
    return native


@pytest.fixture(scope="session")
def cuda(library):
    """The name of the first CUDA device; tests that use it skip, saying so, where there is none."""
    import numpy as np

    from fasa_gguf import FasaError

    z = np.zeros
    try:
        library.op_run(q=z((1, 1, 1, 8)), k=z((1, 8, 1, 8)), v=z((1, 8, 1, 8)), mask=z((1, 1, 8)), dims=z((1, 8)), weight=z((1, 8)),
                       forced=z((1, 1, 1)), budget=1, scale=1.0, backend="CUDA0")
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
    from fasa_gguf.embed import model_shape
    from fasa_gguf.gguf_file import GGUFFile
    from fasa_gguf.synthetic import synthetic_profile

    return synthetic_profile(*model_shape(GGUFFile(tiny)), seed=2)


@pytest.fixture(scope="session")
def text():
    """The start of the corpus that is calibrated on by default, for modules without a text of their own."""
    from fasa_gguf.calibrate import default_corpus

    return default_corpus()[1][:30000]
