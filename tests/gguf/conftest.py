"""The pinned llama.cpp's own copy of gguf-py."""

import importlib.util
import sys

import pytest
from paths import ROOT


@pytest.fixture(scope="session")
def pinned():
    """gguf.constants of the pinned source in a build tree; skips when there is none."""
    found = sorted((ROOT / "build").glob("*/llama.cpp-src/gguf-py/gguf/constants.py"))
    if not found:
        pytest.skip("no source of llama.cpp in build/*/llama.cpp-src; run `make build`")
    spec = importlib.util.spec_from_file_location("pinned_gguf_constants", found[0])
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
