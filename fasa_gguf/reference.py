"""FASA in plain numpy: the definition that the CPU ops, the CUDA kernels and the calibration are tested against.

RoPE turns a head's dimensions into frequency chunks: pairs that rotate together. A few of them, the dominant ones, rank
the cached tokens almost as the whole head does. One decode step of one KV head with its G query heads:

    K_dom    the dominant dimensions of every cached key, in few bits          quantize_k_dom
    TIP      token importance prediction: logits from those dimensions alone   estimate, group_score
    select   the best `budget` tokens; sinks and recent ones always in         forced_cells, select
    FAC      focused attention computation: exact, over the selected tokens    attend

`decode_step` is the four in a row. A layer that selects ahead makes its list (TIP and select) before its queries and
the newest keys are known, by queries that are foreseen from the residual in front of the feed-forward before it.

Source: FASA, arXiv 2602.03152, sections 3 and 4; what differs from it (one selection per KV head, forced tokens, the
ranking of chunks as a set) is explained in docs/reference/method.md.
"""

from __future__ import annotations

import numpy as np

from .errors import FasaError
from .params import FasaParams, default_chunks

GROUP = 8  # dominant dimensions that share one scale
SPAN = 256  # cells whose scores are kept relative to one power of two
SPAN_RANGE, SCORE_RANGE = 100, 64  # powers of two that scores reach down to: in a span, and of a span in the head


def chunk_dims(head_dim: int, n_rot: int, layout: str) -> np.ndarray:
    """The two dimensions of every chunk, int32 [head_dim/2, 2].

    Chunk i < n_rot/2 is the RoPE pair of frequency i (0 is the fastest): (2i, 2i+1) under "norm", (i, i + n_rot/2)
    under "neox". The chunks behind are pairs that do not rotate.
    """
    i = np.arange(head_dim // 2)  # [n_chunk]
    dims = np.stack([2 * i, 2 * i + 1], -1)  # [n_chunk, 2]
    if layout == "neox":
        dims[: n_rot // 2] = np.stack([i, i + n_rot // 2], -1)[: n_rot // 2]
    return dims.astype(np.int32)


def dominant_dims(ranking: np.ndarray, chunks: int, dims: np.ndarray) -> np.ndarray:
    """The dimensions of the best chunks, int32 [n_dom], in rank order, padded with -1 to whole groups.

    ranking [n_chunk], dims [n_chunk, 2].
    """
    d = dims[ranking[:chunks].astype(int)].ravel()  # [2*chunks]
    return np.append(d, np.full(-len(d) % GROUP, -1)).astype(np.int32)  # [n_dom]


def hadamard(x: np.ndarray, block: int) -> np.ndarray:
    """Orthonormal Walsh-Hadamard transform of each block of the last axis; its own inverse.

    llama.cpp stores quantised K under it.
    """
    y = x.reshape(*x.shape[:-1], -1, block).astype(np.float32)  # [..., n_block, block]
    h = 1
    while h < block:
        y = y.reshape(*x.shape[:-1], -1, block // (2 * h), 2, h)  # pairs at distance h
        y = np.stack([y[..., 0, :] + y[..., 1, :], y[..., 0, :] - y[..., 1, :]], -2)
        h *= 2
    return (y.reshape(x.shape) / np.sqrt(np.float32(block))).astype(np.float32)


def quantize_k_dom(k: np.ndarray, dims: np.ndarray, kind: str) -> np.ndarray:
    """The dominant values as they are read back, f32 [n_kv, n_dom], from keys [n_kv, head_dim]; padding is 0.

    A group of 8 shares one f16 scale: q8 is absmax/127, q4 the value of largest magnitude over -8 (as ggml's q4_0).
    """
    x = np.where(dims >= 0, k[:, np.maximum(dims, 0)], 0).astype(np.float32)  # [n_kv, n_dom]
    if kind == "f16":
        return x.astype(np.float16).astype(np.float32)
    g = x.reshape(len(x), -1, GROUP)  # [n_kv, n_group, 8]
    most = np.take_along_axis(g, np.abs(g).argmax(-1)[..., None], -1)  # [n_kv, n_group, 1], signed
    scale = np.abs(most) / np.float32(127) if kind == "q8" else most / np.float32(-8)
    scale = scale.astype(np.float16).astype(np.float32)
    inv = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    if kind == "q8":
        q = np.clip(np.trunc(g * inv + np.copysign(np.float32(0.5), g * inv)), -127, 127)
    else:
        q = np.clip(np.floor(g * inv + np.float32(8.5)), 0, 15) - 8
    return (q * scale).reshape(x.shape).astype(np.float32)  # [n_kv, n_dom]


def capped(x: np.ndarray, soft_cap: float) -> np.ndarray:
    """Logit soft-capping, as some models have it; 0: none."""
    return soft_cap * np.tanh(x / soft_cap) if soft_cap > 0 else x


def quantize_query(x: np.ndarray, kind: str) -> np.ndarray:
    """The dominant part of the queries, f32 [G, n_dom], as TIP uses it.

    Against q8 and q4 keys the queries have 8 bits, with a scale for every 8 dimensions.
    """
    if kind == "f16":
        return x
    g = x.reshape(len(x), -1, GROUP)  # [G, n_group, 8]
    scale = np.abs(g).max(-1, keepdims=True) / np.float32(127)  # [G, n_group, 1]
    inv = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    q = np.clip(np.trunc(g * inv + np.copysign(np.float32(0.5), g)), -127, 127)
    return (q * scale).reshape(x.shape).astype(np.float32)  # [G, n_dom]


def estimate(
    q: np.ndarray,
    k_dom: np.ndarray,
    dims: np.ndarray,
    weight: np.ndarray,
    scale: float,
    soft_cap: float = 0,
    kind: str = "f16",
) -> np.ndarray:
    """TIP: estimated logits f32 [G, n_kv] of the query heads q [G, head_dim].

    weight [n_dom], k_dom [n_kv, n_dom] of `kind`.
    """
    x = np.where(dims >= 0, q[:, np.maximum(dims, 0)], 0) * weight * np.float32(scale)  # [G, n_dom]
    return capped((quantize_query(x.astype(np.float32), kind) @ k_dom.T).astype(np.float32), soft_cap)  # [G, n_kv]


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis; -inf counts as 0."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def group_score(est: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """The group's shared score [n_kv]: the sum of its query heads' softmaxes. visible: bool [n_kv].

    A score that is out of reach is 0, and such cells are taken from the lowest on. Out of reach is what is not above
    2^-100 of its span of 256 cells, and a span that is not above 2^-64 of the head; spans count by the power of two
    nearest to their largest exponential. A score has the precision of f32, without f32's underflow, so it is an f64.
    """
    x = np.where(visible, est, -np.inf)  # [G, n_kv]
    log2 = x.astype(np.float32) * np.float32(np.log2(np.e))  # [G, n_kv]
    first = np.arange(0, x.shape[-1], SPAN)  # [n_span]
    span = np.rint(np.maximum.reduceat(log2, first, -1))  # [G, n_span]
    head = span.max(-1, keepdims=True)  # [G, 1]
    with np.errstate(invalid="ignore"):  # -inf of a head or span that sees nothing
        near = np.repeat(span - head > -SCORE_RANGE, SPAN, -1)[:, : x.shape[-1]]  # [G, n_kv]
        near &= log2 - np.repeat(span, SPAN, -1)[:, : x.shape[-1]] > -SPAN_RANGE
        share = softmax(x.astype(np.float64))  # [G, n_kv]
    scaled = np.where(near, share * 2.0**60, 0).sum(0)  # [n_kv]
    return scaled.astype(np.float32).astype(np.float64) * 2.0**-60


def forced_cells(positions: np.ndarray, visible: np.ndarray, sink: int, recent: int) -> np.ndarray:
    """bool [n_kv]: the visible cells with the `sink` lowest and the `recent` highest positions, ties to the lower cell.
    positions: int [n_kv] of the sequence; a position is not a cell index."""
    cells = np.flatnonzero(visible)  # [n_visible]
    order = cells[np.argsort(positions[cells], kind="stable")]  # [n_visible]
    newest = cells[np.argsort(-positions[cells], kind="stable")]  # [n_visible]
    forced = np.zeros(len(visible), bool)  # [n_kv]
    forced[order[:sink]] = forced[newest[:recent]] = True
    return forced


def select(
    score: np.ndarray,
    visible: np.ndarray,
    forced: np.ndarray,
    n_group: int,
    budget: int,
    mass: float = 0.0,
    floor: int = 64,
    cap: int = 1024,
) -> np.ndarray:
    """The cells to attend, ascending: forced cells first, then by score, ties to the lower cell.

    `budget` of them; with mass > 0 as many as hold that share of the estimated attention, between floor and cap. Forced
    cells are always in. Shares are summed as integers of 2^-40, so that every order of summation takes the same count.
    """
    forced = forced & visible
    order = np.lexsort((np.arange(len(score)), -score, ~forced, ~visible))[: visible.sum()]  # [n_visible]
    n = budget
    if mass > 0:
        share = np.floor(score[order].astype(np.float64) * 2.0**40).astype(np.int64)  # [n_visible]
        n = int(np.searchsorted(np.cumsum(share), int(np.floor(np.float32(mass) * 2.0**40)) * n_group)) + 1
        n = min(max(n, floor), cap)
    return np.sort(order[: max(n, forced.sum())])


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    cells: np.ndarray,
    scale: float,
    soft_cap: float = 0,
    sink: np.ndarray | None = None,
) -> np.ndarray:
    """FAC: attention of q [G, head_dim] over the listed cells of k [n_kv, head_dim] and v [n_kv, d_v]: f32 [G, d_v].
    sink: learned attention sinks [G], logits that take mass and give nothing."""
    logits = capped(q @ k[cells].T * scale, soft_cap)  # [G, n]
    if sink is not None:
        logits = np.concatenate([logits, sink[:, None]], -1)  # [G, n+1]
    return (softmax(logits)[:, : len(cells)] @ v[cells]).astype(np.float32)  # [G, d_v]


def decode_step(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    positions: np.ndarray,
    visible: np.ndarray,
    ranking: np.ndarray,
    dims: np.ndarray,
    p: FasaParams,
    scale: float,
    soft_cap: float = 0,
    weight: np.ndarray | None = None,
    sink: np.ndarray | None = None,
    q_ahead: np.ndarray | None = None,
    fresh: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """One token, one KV head: (output f32 [G, d_v], the cells attended, ascending).

    q [G, head_dim], k [n_kv, head_dim], v [n_kv, d_v], positions and visible [n_kv], ranking [n_chunk], dims
    [n_chunk, 2]; weight [m] of the m leading chunks, the others have 1. With per_head every query head selects for
    itself: call it for each, G = 1.

    Of a layer that selects ahead q_ahead [G, head_dim], the foreseen queries, make the list, and fresh bool [n_kv] are
    the cells that this ubatch writes, whose K is not stored yet: a token attends all of them that it sees, whatever
    `recent` is, and the estimate is one over the other cells, so that a fresh one has the score 0.
    """
    if p.mean_budget > 0:
        raise FasaError(
            f"decode_step: mean_budget {p.mean_budget} needs a profile's table; give the mass, floor and cap that "
            "mean_budget_mass and mean_budget_bounds find"
        )
    chunks = p.chunks or default_chunks(len(ranking))
    budget = max(p.budget, p.sink + p.recent + 1)
    chosen = dominant_dims(ranking, chunks, dims)  # [n_dom]
    w = np.ones(len(chosen), np.float32)  # [n_dom]
    if weight is not None:
        known = np.repeat(weight[:chunks], 2)  # [2*m]
        w[: len(known)] = known
    by = q if q_ahead is None else q_ahead  # [G, head_dim]
    est = estimate(by, quantize_k_dom(k, chosen, p.k_dom), chosen, w, scale, soft_cap, p.k_dom)  # [G, n_kv]
    stored = visible if fresh is None else visible & ~fresh  # [n_kv]
    forced = forced_cells(positions, visible, p.sink, p.recent) | (visible & ~stored)  # [n_kv]
    cells = select(group_score(est, stored), visible, forced, len(q), budget, p.mass, p.floor, p.cap)
    return attend(q, k, v, cells, scale, soft_cap, sink), cells


# ---- from a profile to a layer's mass ----

MASS_LEAST = 2.0**-20  # 0 would be a fixed budget


def layer_mass(mass: float, miss: float) -> np.float32:
    """The target mass of a layer that may miss `miss` times what others miss (fasa.layer_miss): 1 - (1 - mass)*miss.

    It is kept above 0, which would mean a fixed budget.
    """
    return np.float32(
        min(max(1 - (1 - float(np.float32(mass))) * float(np.float32(miss)), MASS_LEAST), 1.0) if mass > 0 else 0.0
    )


def mean_budget_mass(tokens: np.ndarray, mass: np.ndarray, n: int) -> np.float32:
    """The target mass that takes n tokens on average, by a table (fasa.mean_budget, fasa.mean_budget_mass).

    Both columns [n_entry] are ascending; between two entries log(1 - mass) is linear in log(tokens). 0 when n lies
    outside.
    """
    tokens, missed = np.asarray(tokens, np.float64), np.log(1 - np.asarray(mass, np.float32).astype(np.float64))
    if not len(tokens) or not tokens[0] <= n <= tokens[-1]:
        return np.float32(0)
    return np.float32(1 - np.exp(np.interp(np.log(n), np.log(tokens), missed)))


def mean_budget_bounds(n: int) -> tuple[int, int]:
    """(floor, cap) of a mean budget: fewest and most tokens of a step."""
    return max(min(n, 64), n // 4), 2 * n


# ---- ranking the chunks (calibration) ----


def rank_energy(q_energy: np.ndarray, k_energy: np.ndarray) -> np.ndarray:
    """By the pair energy E|q| * E|k|; both [n_chunk]: mean length of the query pair and of the key pair. Best first."""
    return np.argsort(-(q_energy * k_energy), kind="stable")


def chunk_scores(q: np.ndarray, k: np.ndarray, dims: np.ndarray, scale: float) -> np.ndarray:
    """Logits of each chunk alone, f32 [n_chunk, G, n_query, n_kv]; q [G, n_query, head_dim], k [n_kv, head_dim]."""
    return np.einsum("gqcd,ncd->cgqn", q[..., dims], k[:, dims]).astype(np.float32) * np.float32(scale)


def rank_ca(q: np.ndarray, k: np.ndarray, q_pos: np.ndarray, dims: np.ndarray, scale: float, budget: int) -> np.ndarray:
    """Chunks, best first, as published, by contextual agreement.

    That is the share of the head's top `budget` tokens that the chunk's top tokens hit, mean over the group's heads and
    the queries.
    """
    agree = np.zeros(len(dims))  # [n_chunk]
    for i, pos in enumerate(q_pos):
        seen, n = k[: pos + 1], min(budget, pos + 1)  # [n_visible, head_dim]
        true = np.argpartition(-(q[:, i] @ seen.T), n - 1, -1)[:, :n]  # [G, n]
        hit = np.zeros((len(q), pos + 1), bool)  # [G, n_visible]
        np.put_along_axis(hit, true, True, -1)
        for c, part in enumerate(chunk_scores(q[:, i : i + 1], seen, dims, scale)[:, :, 0]):
            top = np.argpartition(-part, n - 1, -1)[:, :n]  # [G, n]
            agree[c] += np.take_along_axis(hit, top, -1).mean()
    return np.argsort(-agree, kind="stable")


def rank_recall(
    q: np.ndarray,
    k: np.ndarray,
    q_pos: np.ndarray,
    dims: np.ndarray,
    scale: float,
    soft_cap: float,
    n_rank: int,
    budget: int,
    sink: int,
    recent: int,
    q_est: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Chunks as a set, by recall: each time the one is added that raises most the true attention mass kept.

    The mass is that of the top `budget` tokens of the chosen set's shared score, sinks and recent ones forced. Ties:
    the lower id. Returns (order int32 [n_rank], share of the mass kept after each choice f32 [n_rank]).
    Cell = position. q_est, of q's shape: the queries that score, such as foreseen ones; the attention is q's.
    """
    n_kv = len(k)
    parts = chunk_scores(q if q_est is None else q_est, k, dims, scale)  # [n_chunk, G, n_query, n_kv]
    full = capped(np.einsum("gqd,nd->gqn", q, k) * scale, soft_cap)  # [G, n_query, n_kv]
    cell = np.arange(n_kv)  # [n_kv]

    def plain_score(est: np.ndarray, visible: np.ndarray) -> np.ndarray:  # [n_kv], 0 below e^-87 of a head's best
        x = np.where(visible, est, -np.inf)  # [G, n_kv]
        return np.where(x - x.max(-1, keepdims=True) > -87, softmax(x), 0).sum(0).astype(np.float32)

    def kept(est: np.ndarray) -> float:
        total = 0.0
        for i, pos in enumerate(q_pos):
            visible = cell <= pos  # [n_kv]
            mass = plain_score(full[:, i], visible)  # [n_kv]
            score = plain_score(capped(est[:, i], soft_cap), visible)  # [n_kv]
            total += mass[select(score, visible, forced_cells(cell, visible, sink, recent), len(q), budget)].sum()
        return total / (len(q_pos) * len(q))

    order: list[int] = []
    recall: list[float] = []
    est = np.zeros_like(full)  # [G, n_query, n_kv]
    for _ in range(n_rank):
        gains = {c: kept(est + parts[c]) for c in range(len(dims)) if c not in order}
        best = max(gains, key=lambda c: (gains[c], -c))
        order.append(best)
        recall.append(gains[best])
        est = est + parts[best]
    return np.array(order, np.int32), np.array(recall, np.float32)


def kept_share(
    q: np.ndarray,
    k: np.ndarray,
    q_pos: np.ndarray,
    dims: np.ndarray,
    weight: np.ndarray,
    kind: str,
    scale: float,
    soft_cap: float,
    budget: int,
    sink: int,
    recent: int,
    q_est: np.ndarray | None = None,
) -> float:
    """Share of the true attention that the budget's tokens hold when the dominant keys are stored as `kind`.

    q [G, n_query, head_dim], k [n_kv, head_dim], q_pos [n_query]; dims, weight [n_dom]. Cell = position. It is the mean
    over heads and queries. q_est: as in rank_recall.
    """
    by = q if q_est is None else q_est  # [G, n_query, head_dim]
    cell, k_dom, total = np.arange(len(k)), quantize_k_dom(k, dims, kind), 0.0
    for i, pos in enumerate(q_pos):
        visible = cell <= pos  # [n_kv]
        mass = group_score(capped(q[:, i] @ k.T * scale, soft_cap), visible)  # [n_kv]
        score = group_score(estimate(by[:, i], k_dom, dims, weight, scale, soft_cap, kind), visible)  # [n_kv]
        total += mass[select(score, visible, forced_cells(cell, visible, sink, recent), len(q), budget)].sum()
    return float(total / (len(q_pos) * len(q)))


def fit_weights(
    q: np.ndarray,
    k: np.ndarray,
    q_pos: np.ndarray,
    dims: np.ndarray,
    chosen: np.ndarray,
    scale: float,
    soft_cap: float = 0,
    q_est: np.ndarray | None = None,
) -> np.ndarray:
    """A weight per chosen chunk, f32 [len(chosen)], >= 0.

    Weighted least squares of the true logits (before soft-capping) on the chunks' logits, each centred per query and
    head; the weight of a cell is the root of its true attention. q_est: as in rank_recall, for the chunks' logits.
    """
    by = q if q_est is None else q_est  # [G, n_query, head_dim]
    a = np.zeros((len(chosen), len(chosen)))  # [m, m]
    b = np.zeros(len(chosen))  # [m]
    for i, pos in enumerate(q_pos):
        x = chunk_scores(by[:, i : i + 1], k[: pos + 1], dims[chosen], scale)[:, :, 0]  # [m, G, n]
        y = np.einsum("gd,nd->gn", q[:, i], k[: pos + 1]) * scale  # [G, n]
        w = np.sqrt(softmax(capped(y, soft_cap)))  # [G, n]
        w /= w.sum(-1, keepdims=True)
        x = x - (x * w).sum(-1, keepdims=True)
        y = y - (y * w).sum(-1, keepdims=True)
        a += np.einsum("mgn,kgn,gn->mk", x, x, w, optimize=True)
        b += np.einsum("mgn,gn,gn->m", x, y, w, optimize=True)
    ridge = 1e-3 * np.trace(a) / len(chosen)
    return np.maximum(np.linalg.solve(a + ridge * np.eye(len(chosen)), b), 0).astype(np.float32)
