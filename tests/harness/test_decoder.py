"""The harness' decoder against llama.cpp, and what policies know of a model beforehand."""

import numpy as np
import pytest

from fasa_gguf import FasaError
from fasa_gguf import reference as R
from fasa_gguf.speed.random_model import synthetic_profile

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'fasa_gguf[harness]'")

from policies import FIXED, N_KV, N_QUERY, SHAPE, policy_of, random_qk  # noqa: E402

from fasa_gguf.harness.calibrate import Knowledge, rank_ca, rank_channels, read_text  # noqa: E402
from fasa_gguf.harness.decoder import Decoder  # noqa: E402
from fasa_gguf.harness.policies import POLICIES  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")


# ---- calibration ----


def test_contextual_agreement_is_the_reference():
    q, k = random_qk(2)  # no two chunks of a head have as many hits
    got = rank_ca(q, k, N_KV - N_QUERY, SHAPE, 40)
    for h in range(4):
        want = R.rank_ca(
            q[h : h + 1].numpy(),
            k[h // 2].numpy(),
            np.arange(N_KV - N_QUERY, N_KV),
            R.chunk_dims(16, 16, "norm"),
            SHAPE.scale,
            40,
        )
        assert got[h] == want.tolist()


def test_label_channels_are_the_largest_products():
    q, k = 0.1 * torch.ones(4, 20, 16), 0.1 * torch.ones(2, 20, 16)
    k[0, :, 7], q[2:, :, 2], k[1, :, 9] = 5.0, -2.0, 1.0
    order = rank_channels(q, k, SHAPE)
    assert order[0][0] == 7 and order[1][:2] == [2, 9]


# ---- the decoder ----


@pytest.fixture(scope="module")
def decoder(tiny):
    return Decoder(tiny, kv_type="f32")


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(5).integers(3, 259, 401).tolist()


@pytest.mark.parametrize("rope_base, kv_type, most", [(None, "f32", 1e-3), (500000.0, "f16", 1e-2)])
def test_dense_logits_are_llama_cpps(library, tmp_path, tokens, rope_base, kv_type, most):
    """Weights in f32. With an f16 cache the difference is llama.cpp's: it rounds queries to f16."""
    from tiny_gguf import write_tiny

    from fasa_gguf.session import Session

    path = tmp_path / "t.gguf"
    write_tiny(path, rope_base=rope_base)
    with Session(path, n_ctx=512, n_threads=1, flash_attn=kv_type == "f16", type_k=kv_type, type_v=kv_type) as s:
        want = s.decode(tokens[:400], 0, logits="all")[300:]
    d = Decoder(path, kv_type=kv_type)
    got, counters = d.decode(d.prefill(tokens[:300]), tokens[300:400], POLICIES["dense"](d.shape, 0))
    assert want.std() > 1 and np.abs(got.numpy() - want).max() < most
    assert (
        counters["tokens_attended"] / counters["lists"] == 350.5
        and counters["bytes_fac"] == counters["bytes_dense"] == 3 * 2 * 35050 * 64
    )


def all_known(decoder, tokens):
    found = read_text(decoder, tokens[:300], 40, 16)
    return Knowledge(synthetic_profile([2] * 3, [8] * 3, seed=1), found["ca"], found["channels"])


def test_a_budget_of_the_whole_context_is_dense(decoder, tokens):
    prefix, know = decoder.prefill(tokens[:380]), all_known(decoder, tokens)
    dense, _ = decoder.decode(prefix, tokens[380:400], POLICIES["dense"](decoder.shape, 0))
    for spec in FIXED:
        got, counters = decoder.decode(prefix, tokens[380:400], policy_of(decoder, spec, 400, know))
        assert torch.equal(got, dense) and counters["tokens_attended"] == counters["tokens_visible"], spec


@pytest.mark.parametrize("spec", ["fasa", "quest:page=8", "snapkv", "sparq", "fasa:mass=0.7"])
def test_the_batched_tail_is_decoding_token_by_token(decoder, tokens, spec):
    """A later token changes nothing before it, and a token's keys come from its sparse hidden states."""
    prefix, know = decoder.prefill(tokens[:380]), all_known(decoder, tokens)
    whole, _ = decoder.decode(prefix, tokens[380:392], policy_of(decoder, spec, 60, know))
    part, _ = decoder.decode(prefix, tokens[380:386], policy_of(decoder, spec, 60, know))
    other, _ = decoder.decode(prefix, [7, *tokens[381:392]], policy_of(decoder, spec, 60, know))
    assert torch.allclose(whole[:6], part, atol=1e-4) and (whole[-1] - other[-1]).abs().max() > 1e-3


def test_bytes_and_tokens_are_counted(decoder, tokens):
    prefix, know = decoder.prefill(tokens[:380]), all_known(decoder, tokens)
    _, c = decoder.decode(prefix, tokens[380:400], policy_of(decoder, "fasa", 60, know))
    seen = sum(range(381, 401))
    assert (
        c["tokens_attended"] / c["lists"] == 60
        and c["bytes_fac"] == 3 * 2 * 20 * 60 * 64
        and c["bytes_tip"] == 3 * 2 * seen * 6
    )
    assert c["bytes_dense"] == 3 * 2 * seen * 64 and c["bytes_k_dom"] / c["bytes_kv"] == 6 / 64
    _, own = decoder.decode(prefix, tokens[380:400], policy_of(decoder, "oracle", 60, know))
    assert (
        own["tokens_attended"] / own["lists"] == 60 and 60 < own["bytes_fac"] / (3 * 2 * 20 * 64) <= 120
    )  # two heads' rows, each once
    paper = policy_of(decoder, "paper:dense_layers=1", 60, know)
    _, first = decoder.decode(prefix, tokens[380:400], paper)
    assert first["tokens_attended"] == 4 * (seen + 2 * 20 * 60)
    assert first["bytes_tip"] == pytest.approx(2 * 2 * seen * paper.index_bytes(), abs=40)  # layer 0 chose nothing


def test_the_decoder_refuses(tiny, tmp_path):
    from tiny_gguf import write_tiny

    write_tiny(tmp_path / "q.gguf", arch="qwen2")
    with pytest.raises(FasaError, match="architecture qwen2: the harness runs Llama-family models only"):
        Decoder(tmp_path / "q.gguf")
    if not torch.cuda.is_available():
        with pytest.raises(FasaError, match="--device cuda: torch finds no CUDA device here; use --device cpu"):
            Decoder(tiny, "cuda")
