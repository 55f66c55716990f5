"""What the fuzzer of tests/fuzz/files.py has made up, and what it begins with, once more."""

import importlib.util

import pytest
from paths import ROOT

FUZZ = ROOT / "tests" / "fuzz"


def load(name):
    spec = importlib.util.spec_from_file_location(f"fuzz_{name}", FUZZ / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files():
    return load("files")


def test_the_corpus(files):
    found = sorted((FUZZ / "corpus" / "files").iterdir())
    assert len(found) > 50 and sum(p.stat().st_size for p in (FUZZ / "corpus").rglob("*") if p.is_file()) < 200_000
    for path in found:
        files.one(path.read_bytes())


def test_the_seeds_are_read_and_written(files, tmp_path):
    """They reach what is behind all checks."""
    seeds = load("seeds")
    files.WRITTEN.unlink(missing_ok=True)
    for name, data in seeds.models():
        files.check_model(data)
        assert files.WRITTEN.exists() == (name != "none")
        files.WRITTEN.unlink(missing_ok=True)
    with pytest.raises(files.FasaError):
        files.check_model(b"GGUF" + bytes(100))
