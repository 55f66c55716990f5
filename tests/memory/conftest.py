"""A large model without its weights."""

import os

import gguf
import numpy as np
import pytest

from fasa_gguf.memory.host import MIB
from fasa_gguf.speed import random_model as synthetic


@pytest.fixture(scope="module")
def shape_8b(tmp_path_factory):
    """The 8B shape with a hole in place of its weights: some KB on the disk."""
    path = tmp_path_factory.mktemp("plan") / "8b.gguf"

    class Hollow(gguf.GGUFWriter):
        def write_tensor_data(self, tensor, **kw):
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", Hollow)
        patch.setattr(synthetic, "_q4_0", lambda rng, rows, cols: np.zeros(0))
        synthetic.write_model(path, "8b")
    os.truncate(path, path.stat().st_size + synthetic.model_bytes("8b") + MIB)
    return path
