import shutil

import pytest


@pytest.fixture
def model(tiny, tmp_path):
    """A copy of the tiny model that may be changed, alone in its folder."""
    folder = tmp_path / "models"
    folder.mkdir()
    return shutil.copy(tiny, folder / "m.gguf")
