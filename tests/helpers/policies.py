"""Planted queries, keys and knowledge for policies. Needs torch."""

import numpy as np
import torch

from fasa_gguf.harness.calibrate import Knowledge
from fasa_gguf.harness.decoder import Shape, Tail
from fasa_gguf.harness.policies import parse_spec
from fasa_gguf.profile.profile import Profile

SHAPE = Shape(n_layer=1, n_head=4, n_head_kv=2, head_dim=16, n_rot=16)
N_KV, N_QUERY, BUDGET = 300, 6, 60
TAIL = Tail.make(SHAPE, N_KV - N_QUERY, N_QUERY)

# specs of policies that meet a budget exactly
FIXED = [
    "window",
    "random",
    "quest",
    "quest:page=32:shared=1",
    "double-sparsity",
    "double-sparsity:labels=q4:shared=1",
    "sparq",
    "sparq:shared=0",
    "snapkv",
    "snapkv:keep_new=0:shared=1",
    "oracle",
    "oracle-shared",
    "fasa",
    "paper",
]


def random_qk(seed=0):
    """q [n_head, N_QUERY, 16] and f16-rounded k [n_head_kv, N_KV, 16], as a cache gives them back."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(4, N_QUERY, 16, generator=g), torch.randn(2, N_KV, 16, generator=g).half().float()


def ranked(seed=0, weights=True):
    """A profile of one layer with shuffled chunks and weights."""
    rng = np.random.default_rng(seed)
    weight = [rng.uniform(0.5, 1.5, (2, 3)).astype(np.float32)] if weights else None
    return Profile(
        [2],
        [8],
        [np.stack([rng.permutation(8) for _ in range(2)]).astype(np.uint16)],
        weight=weight,
        weight_k=3 if weights else 0,
    )


def knowledge(seed=0, **kw):
    rng = np.random.default_rng(seed + 100)
    return Knowledge(
        ranked(seed, **kw),
        [[rng.permutation(8).tolist() for _ in range(4)]],
        [[rng.permutation(16).tolist() for _ in range(2)]],
    )


def masks(spec, q, k, budget=BUDGET, know=None):
    kind, options = parse_spec(spec)
    policy = kind(SHAPE, budget, know or knowledge(), **options)
    policy.prepare(0, q, k[:, : TAIL.start])
    return policy.select(0, q, k, TAIL)


def policy_of(decoder, spec, budget, know=None):
    """A policy by its spec, for a decoder's model."""
    kind, options = parse_spec(spec)
    return kind(decoder.shape, budget, know, **options)
