"""Every architecture of the pinned source, as tiny random models that its own test-llama-archs writes.

With all chunks ranked and a budget beyond the context, the sparse path agrees with dense, or is dense with its reason.
`make upstream-tests` writes the models.
"""

import numpy as np
import pytest
from paths import ROOT

from fasa_gguf import FasaError, FasaParams
from fasa_gguf.speed.random_model import synthetic_profile

MODELS = sorted((ROOT / "build" / "archs").glob("*.gguf"))
ALL = FasaParams(chunks=4096, budget=10**6, min_context=0, max_tokens=10**6, k_dom="f16")
NMSE = 1e-4  # test-llama-archs' own bound between two backends


def check_counts(s, params, tokens):
    """Every ubatch has one kind, and as many layers are counted of a decode step as of a prompt."""
    s.clear()
    s.fasa.set_params(params)
    s.fasa.reset_counters()
    s.decode(tokens, 0)
    c = s.fasa.counters()
    n_layer = c["layers_prefill"]
    assert (c["steps_sparse"], c["steps_dense"], c["steps_prefill"]) == (0, 0, 1) and n_layer > 0
    s.decode([tokens[0]], len(tokens))
    s.decode([tokens[1]], len(tokens) + 1)
    c = s.fasa.counters()
    assert c["steps_sparse"] + c["steps_dense"] == 2 and c["steps_prefill"] == 1
    assert c["layers_sparse"] + c["layers_dense"] == 2 * n_layer and c["layers_prefill"] == n_layer


@pytest.mark.skipif(not MODELS, reason="no models in build/archs; run `make upstream-tests`")
@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_architecture(library, path):
    from fasa_gguf.session import Session

    try:
        s = Session(path, n_ctx=256, n_threads=2)
    except FasaError as e:
        pytest.skip(str(e))
    with s:
        if s.llama.llama_model_has_encoder(s.model) or not s.memory:
            pytest.skip("not a decoder")
        tokens = np.random.default_rng(1).integers(0, s.n_vocab, 48).tolist()
        dense = s.decode(tokens, 0, logits="all")
        shapes = [s.fasa.layer_shape(il) for il in range(s.fasa.model_info()["n_layer"])]
        profile = synthetic_profile([h[1] for h in shapes], [h[2] // 2 if h[1] else 0 for h in shapes])
        try:
            s.fasa.set_profile(profile)
            s.fasa.set_params(ALL)
        except FasaError as e:
            assert "FASA" in str(e)
            pytest.skip(f"dense: {e}")
        for params in (None, ALL):
            check_counts(s, params, tokens)
        s.clear()
        s.fasa.reset_counters()
        with s.fasa.step_kind("decode"):
            sparse = s.decode(tokens, 0, logits="all")
        reasons, counters = s.fasa.layer_reasons(), s.fasa.counters()
        assert counters["layers_sparse"] > 0 or all(reasons), "dense without a reason"
        if not counters["layers_sparse"]:
            pytest.skip(f"dense: {reasons[0]}")
        assert ((sparse - dense) ** 2).mean() / (dense**2).mean() < NMSE


@pytest.mark.skipif(not MODELS, reason="no models in build/archs; run `make upstream-tests`")
def test_the_page_of_architectures(library):
    """docs/reference/architectures.md says what these models do: tests/helpers/list_architectures.py writes it."""
    import list_architectures

    page = list_architectures.PAGE.read_text()
    assert page == list_architectures.HEAD + list_architectures.table()
    known = (
        "llama",
        "qwen2",
        "qwen3",
        "qwen3moe",
        "gpt-oss",
        "gemma2",
        "gemma3",
        "phi3",
        "mistral3",
        "granite",
        "lfm2",
    )
    for name in (*known, "qwen3next"):
        assert f"| {name} | yes | yes |" in page
