"""fasa_gguf/reference.py again, in torch and in batches. tests/harness holds their sets against each other."""

from __future__ import annotations

import math

import torch

from ..reference import SCORE_RANGE, SPAN, SPAN_RANGE

GROUP = 8  # dominant dimensions that share one scale (reference.GROUP)


def top(score: torch.Tensor, visible: torch.Tensor, forced: torch.Tensor, count: int | torch.Tensor) -> torch.Tensor:
    """The `count` best visible cells, bool [..., n_query, n_kv]: forced ones first and always in, ties to the lower
    cell.

    score f32 [..., n_query, n_kv] finite; visible, forced [n_query, n_kv]; count: one for all or int64 [..., n_query].
    """
    key = score.masked_fill(forced, torch.inf).masked_fill(~visible, -torch.inf)
    n = torch.as_tensor(count, device=score.device).expand(score.shape[:-1])
    n = torch.minimum(torch.maximum(n, forced.sum(-1)), visible.sum(-1))  # [..., n_query]
    best = key.topk(max(1, int(n.max())), -1).values  # [..., n_query, most], sorted
    threshold = best.gather(-1, (n - 1).clamp(min=0)[..., None])  # [..., n_query, 1]
    mask, equal = key > threshold, key == threshold
    room = (n - mask.sum(-1))[..., None]
    return mask | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))


def group_score(est: torch.Tensor, visible: torch.Tensor, n_head_kv: int) -> torch.Tensor:
    """Sum of the softmaxes of each KV head's query heads, f64 [n_head_kv, n_query, n_kv].

    est: estimated logits [n_head, n_query, n_kv]. Scores out of reach are 0 (reference.group_score); the others do not
    underflow.
    """
    x = est.float().masked_fill(~visible, -torch.inf)
    n_kv = x.shape[-1]
    log2 = torch.nn.functional.pad(x * math.log2(math.e), (0, -n_kv % SPAN), value=-torch.inf)
    cells = log2.unflatten(-1, (-1, SPAN))  # [n_head, n_query, n_span, SPAN]
    span = cells.amax(-1, keepdim=True).round()  # [n_head, n_query, n_span, 1]
    near = (cells - span > -SPAN_RANGE) & (span - span.amax(-2, keepdim=True) > -SCORE_RANGE)  # nan is not above
    share = torch.where(near.flatten(-2)[..., :n_kv], x.double().softmax(-1) * 2.0**60, 0.0)
    return share.view(n_head_kv, -1, *visible.shape).sum(1).float().double() * 2.0**-60


def mass_count(
    score: torch.Tensor, visible: torch.Tensor, forced: torch.Tensor, n_group: int, mass: float, floor: int, cap: int
) -> torch.Tensor:
    """How many cells hold `mass` of the estimated attention, int64 [n_set, n_query], from floor to cap
    (reference.select).

    score [n_set, n_query, n_kv]: sums of n_group softmaxes. Shares are summed as integers of 2^-40.
    """
    share = (score.double() * 2.0**40).floor().long()  # [n_set, n_query, n_kv]
    need = int(torch.tensor(mass, dtype=torch.float32).double() * 2.0**40) * n_group
    held = share.masked_fill(~forced, 0).sum(-1, keepdim=True)  # the forced ones come first
    rest = score.masked_fill(forced | ~visible, -1.0).topk(min(cap, score.shape[-1]), -1)
    sums = held + share.gather(-1, rest.indices).masked_fill(rest.values < 0, 0).cumsum(-1)
    n = forced.sum(-1) + torch.where(held[..., 0] >= need, 0, (sums < need).sum(-1) + 1)
    return n.clamp(floor, cap)


def take_dims(x: torch.Tensor, dims: torch.Tensor) -> torch.Tensor:
    """The dimensions dims [n_set, m] of x [n_set, n, head_dim]: [n_set, n, m]; -1 gives 0."""
    at = dims.clamp(min=0)[:, None].expand(-1, x.shape[1], -1)
    return torch.where(dims[:, None] >= 0, x.gather(-1, at), 0.0)


def quantize_k_dom(x: torch.Tensor, kind: str) -> torch.Tensor:
    """Dominant values f32 [..., n_dom] as they are read back (reference.quantize_k_dom), n_dom a multiple of 8."""
    if kind == "f16":
        return x.half().float()
    g = x.reshape(*x.shape[:-1], -1, GROUP)
    most = g.gather(-1, g.abs().argmax(-1, keepdim=True))  # signed, [..., n_group, 1]
    scale = (most.abs() / 127 if kind == "q8" else most / -8).half().float()
    inv = torch.where(scale != 0, 1 / scale, torch.zeros_like(scale))
    if kind == "q8":
        q = (g * inv + torch.copysign(torch.full_like(g, 0.5), g * inv)).trunc().clamp(-127, 127)
    else:
        q = (g * inv + 8.5).floor().clamp(0, 15) - 8
    return (q * scale).reshape(x.shape)


def quantize_query(x: torch.Tensor, kind: str) -> torch.Tensor:
    """Dominant values of the queries f32 [..., n_dom], times weight and scale, as TIP uses them
    (reference.quantize_query)."""
    if kind == "f16":
        return x
    g = x.reshape(*x.shape[:-1], -1, GROUP)
    scale = g.abs().amax(-1, keepdim=True) / 127
    inv = torch.where(scale != 0, 1 / scale, torch.zeros_like(scale))
    return ((g * inv + torch.copysign(torch.full_like(g, 0.5), g)).trunc().clamp(-127, 127) * scale).reshape(x.shape)


def k_dom_bytes(n_dom: int, kind: str) -> float:
    """Bytes of one token's dominant values (native/core/layout.h)."""
    n = -(-n_dom // GROUP) * GROUP
    return {"f16": 2.0 * n, "q8": 1.25 * n, "q4": 0.75 * n}[kind]
