import pytest


@pytest.fixture(scope="session")
def calibrated(smollm2, tmp_path_factory):
    """A small profile of SmolLM2."""
    from fasa_gguf.calibrate.gguf import CalibrationParams, calibrate

    path = tmp_path_factory.mktemp("apps") / "smollm2.fasa.json"
    calibrate(smollm2, params=CalibrationParams(context=512, queries=16, budget=40)).save(path)
    return path
