"""What policies know of a model beforehand, from one window of text: contextual agreement of the chunks, and Double
Sparsity's label channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .. import reference
from ..profile.profile import Profile
from .decoder import Decoder, Shape


@dataclass
class Knowledge:
    """What a policy may need; each part is there only when a policy of the comparison needs it."""

    profile: Profile | None = None  # FASA's
    ca: list[list[list[int]]] = field(
        default_factory=list
    )  # [n_layer, n_head, n_chunk] chunks by agreement, best first
    # [n_layer, n_head_kv, head_dim] dimensions by Double Sparsity's measure, largest first
    channels: list[list[list[int]]] = field(default_factory=list)


def rank_ca(q: torch.Tensor, k: torch.Tensor, start: int, shape: Shape, budget: int) -> list[list[int]]:
    """Chunks of every query head by contextual agreement (reference.rank_ca, one head a group).

    That is the share of the head's top `budget` cells that the chunk's top cells hit, mean over the queries
    q [n_head, n_query, d] at positions from start on; k [n_head_kv, n, d]. start >= budget - 1.
    """
    dims = torch.as_tensor(reference.chunk_dims(shape.head_dim, shape.n_rot, shape.layout), device=q.device).long()
    q, n_kv = q.reshape(shape.n_head_kv, -1, q.shape[-1]), k.shape[1]  # [n_head_kv, G*n_query, d]
    hidden = torch.arange(n_kv, device=q.device) > torch.arange(start, n_kv, device=q.device)[:, None]
    hidden = hidden.repeat(shape.group, 1)  # [G*n_query, n]

    def best(d: Any) -> torch.Tensor:
        return (q[..., d] @ k[..., d].transpose(1, 2)).masked_fill(hidden, -torch.inf).topk(budget, -1).indices

    hit = torch.zeros(len(k), q.shape[1], n_kv, dtype=torch.bool, device=q.device).scatter_(-1, best(slice(None)), True)
    agree = torch.stack(
        [hit.gather(-1, best(d)).sum(-1).view(shape.n_head, -1).sum(-1) for d in dims], -1
    )  # [n_head, n_chunk], hits
    return np.argsort(-agree.cpu().numpy(), axis=-1, kind="stable").tolist()  # [n_head, n_chunk]


def rank_channels(q: torch.Tensor, k: torch.Tensor, shape: Shape) -> list[list[int]]:
    """Double Sparsity's label channels of every KV head: dimensions by the mean of |q_d k_d|, largest first.

    The mean is over tokens, query and key of the same token, and over the group's query heads (one label cache a KV
    head). q [n_head, n, d], k [n_head_kv, n, d], post-RoPE.
    """
    both = (q.view(shape.n_head_kv, shape.group, *k.shape[1:]) * k[:, None]).abs().mean((1, 2))  # [n_head_kv, d]
    return both.argsort(dim=-1, descending=True, stable=True).tolist()


def read_text(decoder: Decoder, tokens: list[int], budget: int = 256, queries: int = 96) -> dict[str, Any]:
    """`ca` and `channels` of Knowledge from one window of tokens; the agreement over its last queries."""
    s = decoder.shape
    out: dict[str, Any] = {"ca": [], "channels": []}
    budget = max(1, min(budget, len(tokens) // 2))
    queries = min(queries, len(tokens) - budget)

    def observe(il: int, q: torch.Tensor, k: torch.Tensor) -> None:
        out["ca"].append(rank_ca(q[:, -queries:], k, len(tokens) - queries, s, budget))
        out["channels"].append(rank_channels(q, k, s))

    decoder.prefill(tokens, observe)
    return out
