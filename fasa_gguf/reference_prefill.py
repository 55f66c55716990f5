"""Sparse prefill in plain numpy: the definition that its CPU ops are tested against. Decode is in reference.py.

A prompt is processed in tiles of queries. A tile and a KV head with its G query heads share one list of cells:

    score    every query of the tile scores every cell that it sees, by 8-bit     tile_estimate, tile_score
             products of the dominant dimensions; the softmaxes are added up
    list     sinks, a band before the tile and the tile itself always; then the   tile_forced, select (reference.py)
             best cells, up to a share of the score (mass) or a number (budget)
    attend   exact attention over the list; inside the tile by the causal mask    tile_attend

A query that did not score would be blind to what it alone needs, so there is no sampling of queries.
"""

from __future__ import annotations

import numpy as np

from .params import FasaParams, default_chunks
from .reference import capped, dominant_dims, group_score, quantize_k_dom, select, softmax


def tile_numbers(positions: np.ndarray, sequences: np.ndarray, size: int) -> np.ndarray:
    """The tile of every token of a ubatch, int [n_tokens], numbered in the order of their first tokens.

    Tokens of one sequence whose positions have the same quotient by `size` are a tile; of more than `size` of them,
    which share positions, every `size` are one. So tiles do not depend on how a prompt is cut at multiples of `size`.
    """
    found: dict[tuple[int, int, int], int] = {}
    count: dict[tuple[int, int], int] = {}
    out = []
    for pos, seq in zip(positions.tolist(), sequences.tolist(), strict=True):
        at = (seq, pos // size)
        count[at] = count.get(at, 0) + 1
        out.append(found.setdefault((*at, (count[at] - 1) // size), len(found)))
    return np.array(out)


def quantize_rows(x: np.ndarray) -> np.ndarray:
    """Rows f32 [n, n_dom] in 8 bits with one scale a row, as they are read back."""
    scale = np.abs(x).max(-1, keepdims=True).astype(np.float32) / np.float32(127)  # [n, 1]
    inv = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    return (np.rint(x * inv) * scale).astype(np.float32)  # [n, n_dom]


def tile_estimate(
    q: np.ndarray, k_dom: np.ndarray, dims: np.ndarray, weight: np.ndarray, scale: float, soft_cap: float = 0
) -> np.ndarray:
    """Estimated logits f32 [T, G, n_kv] of the queries q [T, G, head_dim].

    k_dom [n_kv, n_dom], dims and weight [n_dom].
    """
    x = np.where(dims >= 0, q[..., np.maximum(dims, 0)], 0) * weight * np.float32(scale)  # [T, G, n_dom]
    rows = quantize_rows(x.reshape(-1, x.shape[-1]).astype(np.float32)).reshape(x.shape)  # [T, G, n_dom]
    return capped((rows @ quantize_rows(k_dom).T).astype(np.float32), soft_cap)  # [T, G, n_kv]


def tile_score(est: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """The list's shared score [n_kv]: the softmaxes of all queries of est [T, G, n_kv], added up.

    visible: bool [T, n_kv].
    """
    score = np.zeros(est.shape[-1])  # [n_kv]
    for t, seen in enumerate(visible):
        for row in est[t]:  # [n_kv]
            score += group_score(row[None], seen)
    return score


def tile_forced(
    positions: np.ndarray, own: np.ndarray, first: int, sequence: np.ndarray, sink: int, band: int
) -> np.ndarray:
    """bool [n_kv]: the tile's own cells, and of the cells of its sequence before position `first` the `sink` with the
    lowest and the `band` with the highest positions. own, sequence: bool [n_kv]."""
    cells = np.flatnonzero(sequence & (positions < first))  # [n_before]
    order = cells[np.argsort(positions[cells], kind="stable")]  # [n_before]
    newest = cells[np.argsort(-positions[cells], kind="stable")]  # [n_before]
    forced = own.copy()  # [n_kv]
    forced[order[:sink]] = forced[newest[:band]] = True
    return forced


def tile_attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    cells: np.ndarray,
    visible: np.ndarray,
    scale: float,
    soft_cap: float = 0,
    sink: np.ndarray | None = None,
) -> np.ndarray:
    """Exact attention of q [T, G, head_dim] over the listed cells, each query over those that it sees: f32 [T, G, d_v].

    k [n_kv, head_dim], v [n_kv, d_v], visible bool [T, n_kv]; sink [G]: as in attend.
    """
    logits = capped(q @ k[cells].T * scale, soft_cap)  # [T, G, n]
    logits = np.where(visible[:, None, cells], logits, -np.inf)  # [T, G, n]
    if sink is not None:
        logits = np.concatenate([logits, np.broadcast_to(sink[:, None], (*logits.shape[:2], 1))], -1)  # [T, G, n+1]
    return (softmax(logits)[..., : len(cells)] @ v[cells]).astype(np.float32)  # [T, G, d_v]


def prefill_tile(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    positions: np.ndarray,
    visible: np.ndarray,
    own: np.ndarray,
    first: int,
    ranking: np.ndarray,
    dims: np.ndarray,
    p: FasaParams,
    scale: float,
    soft_cap: float = 0,
    weight: np.ndarray | None = None,
    sink: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """One tile, one KV head: (output f32 [T, G, d_v], the cells attended, ascending).

    q [T, G, head_dim], k [n_kv, head_dim] and v [n_kv, d_v] with the tile's own rows; positions [n_kv], visible bool
    [T, n_kv], own bool [n_kv]: the tile's cells; first: its lowest position. The cells that any query sees are those of
    its sequence. ranking, dims, weight: as in decode_step.
    """
    chosen = dominant_dims(ranking, p.chunks or default_chunks(len(ranking)), dims)  # [n_dom]
    w = np.ones(len(chosen), np.float32)  # [n_dom]
    if weight is not None:
        known = np.repeat(weight[: p.chunks or default_chunks(len(ranking))], 2)  # [2*m]
        w[: len(known)] = known
    est = tile_estimate(q, quantize_k_dom(k, chosen, p.k_dom), chosen, w, scale, soft_cap)  # [T, G, n_kv]
    seen = visible.any(0)  # [n_kv]
    forced = tile_forced(positions, own, first, seen, p.sink, p.prefill_band)  # [n_kv]
    score, n_row = tile_score(est, visible), est.shape[0] * est.shape[1]
    cells = select(score, seen, forced, n_row, p.prefill_budget, p.prefill_mass, p.prefill_floor, p.prefill_cap)
    return tile_attend(q, k, v, cells, visible, scale, soft_cap, sink), cells
