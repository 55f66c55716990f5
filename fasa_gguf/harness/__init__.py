"""The reference harness: selection policies beside FASA, at equal budget, in one small torch decoder.

    decoder.py    a Llama-family GGUF in torch, fp32: prefix dense in one pass, then the tail sparse, as decoding does
    selection.py  best cells with ties, shared scores, K_dom: reference.py again, in batches
    policy.py     the base class of a policy
    baselines.py  policies of other papers, and the bounds
    fasa.py       FASA's policies
    policies.py   the table of policies, and their specs
    calibrate.py  what policies know of a model beforehand: contextual agreement, Double Sparsity's channels
    trials.py     which policies run at which budgets, with which options; tuning on another text
    compare.py    windows x policies x budgets, resumable
    report.py     results.md, results.json and the curves

A policy of your own is one class:

    class Norm(Policy):
        name = "norm"
        about = "one f16 norm of every key"
        options = {"power": 1.0}

        def select(self, layer, q, k, tail):
            norm = k.norm(dim=-1) ** self.power                       # [n_head_kv, n_kv]
            return self._best(-norm[:, None].expand(-1, q.shape[1], -1), tail)

        def score_bytes(self, n):
            return self.index_bytes() * n                             # read per step and KV head

        def index_bytes(self):
            return 2.0                                                # kept per token and KV head

    decoder = Decoder("model.gguf")
    prefix = decoder.prefill(tokens[:4000])
    logits, counters = decoder.decode(prefix, tokens[4000:], Norm(decoder.shape, budget=256))

With a line in `policies.POLICIES` it has a spec (`norm:power=2`) and takes part in `fasa-gguf compare`. The lists that
`select` returns may have any source: `fasa.Borrowed` returns those of an earlier layer.

The harness is about selections, not speed: every policy runs as a mask on dense attention. Needs torch
(`pip install 'fasa_gguf[harness]'`).
"""

from ..errors import FasaError


def require_torch() -> None:
    """Raises FasaError when torch is not installed."""
    try:
        import torch  # noqa: F401
    except ImportError:
        raise FasaError("the comparison needs torch; run `pip install 'fasa_gguf[harness]'`") from None
