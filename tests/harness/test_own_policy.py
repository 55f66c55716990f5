"""A policy of one's own: a class of a few lines, run by the decoder and by a comparison; lists of an earlier layer."""

from typing import Any, ClassVar

import numpy as np
import pytest

from fasa_gguf.calibrate.gguf import default_corpus
from fasa_gguf.speed.random_model import synthetic_profile

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'fasa_gguf[harness]'")

from fasa_gguf.harness.calibrate import Knowledge  # noqa: E402
from fasa_gguf.harness.compare import CompareSettings, compare  # noqa: E402
from fasa_gguf.harness.decoder import Decoder, Tail  # noqa: E402
from fasa_gguf.harness.fasa import Borrowed, Fasa  # noqa: E402
from fasa_gguf.harness.policies import POLICIES  # noqa: E402
from fasa_gguf.harness.policy import Policy  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")


class Norm(Policy):
    """The keys with the smallest norms."""

    name = "norm"
    about = "one f16 norm of every key"
    options: ClassVar[dict[str, Any]] = {"power": 1.0}

    def select(self, layer, q, k, tail):
        norm = k.norm(dim=-1) ** self.power  # [n_head_kv, n_kv]
        return self._best(-norm[:, None].expand(-1, q.shape[1], -1), tail)

    def score_bytes(self, n):
        return self.index_bytes() * n

    def index_bytes(self):
        return 2.0


@pytest.fixture(scope="module")
def decoder(tiny):
    return Decoder(tiny, kv_type="f32")


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(5).integers(3, 259, 401).tolist()


def test_it_runs_through_the_decoder(decoder, tokens):
    prefix = decoder.prefill(tokens[:380])
    dense, _ = decoder.decode(prefix, tokens[380:400], POLICIES["dense"](decoder.shape, 0))
    logits, counters = decoder.decode(prefix, tokens[380:400], Norm(decoder.shape, 60))
    assert counters["tokens_attended"] / counters["lists"] == 60 and (logits - dense).abs().max() > 1e-3
    seen = sum(range(381, 401))
    assert counters["bytes_tip"] == 3 * 2 * seen * 2  # layers, KV heads, one f16 number a token
    whole, _ = decoder.decode(prefix, tokens[380:400], Norm(decoder.shape, 400))
    assert torch.equal(whole, dense)


def test_it_attends_the_keys_with_the_smallest_norms(decoder):
    shape, tail = decoder.shape, Tail.make(decoder.shape, 99, 1)
    k = torch.ones(shape.n_head_kv, 100, shape.head_dim)
    k[0, 40:50], k[1, 50:60] = 0.1, 0.1
    mask = Norm(shape, 46).select(0, torch.ones(shape.n_head, 1, shape.head_dim), k, tail)
    forced = [*range(4), *range(68, 100)]
    assert mask[0, 0].nonzero()[:, 0].tolist() == [*forced[:4], *range(40, 50), *forced[4:]]
    assert mask[-1, 0].nonzero()[:, 0].tolist() == [*forced[:4], *range(50, 60), *forced[4:]]


def test_with_a_line_in_the_table_it_takes_part_in_comparisons(library, tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(POLICIES, "norm", Norm)
    out = compare(
        CompareSettings(
            model=str(tiny),
            text=default_corpus()[1][:40000],
            methods=["window", "norm:power=2"],
            budgets=[60],
            windows=1,
            window=300,
            score=20,
            threads=1,
        ),
        tmp_path,
    )
    own = out["rows"][2]
    assert (own["method"], own["spec"], own["tokens_attended"]) == ("norm", "norm:power=2", 60) and own["kl"] > 0
    assert "- norm: one f16 norm of every key" in (tmp_path / "results.md").read_text()


def test_borrowed_lists_are_those_of_the_last_layer_that_selected(decoder, tokens):
    know = Knowledge(synthetic_profile([2] * 3, [8] * 3, seed=1))
    prefix = decoder.prefill(tokens[:380])
    own, borrowed = (kind(decoder.shape, 60, know) for kind in (Fasa, Borrowed))
    q, tail = torch.randn(3, decoder.shape.n_head, 20, decoder.shape.head_dim), Tail.make(decoder.shape, 360, 20)
    lists = [borrowed.select(il, q[il], prefix.k[il], tail) for il in range(3)]
    assert torch.equal(lists[0], own.select(0, q[0], prefix.k[0], tail)) and torch.equal(lists[1], lists[0])
    assert torch.equal(lists[2], own.select(2, q[2], prefix.k[2], tail)) and not torch.equal(lists[2], lists[0])
    _, every = decoder.decode(prefix, tokens[380:400], Fasa(decoder.shape, 60, know))
    _, half = decoder.decode(prefix, tokens[380:400], Borrowed(decoder.shape, 60, know))
    assert half["bytes_tip"] == pytest.approx(every["bytes_tip"] * 2 / 3, rel=1e-6)  # two of three layers select
    assert half["tokens_attended"] == every["tokens_attended"]
    _, same = decoder.decode(prefix, tokens[380:400], Borrowed(decoder.shape, 60, know, every=1))
    assert same == every
