"""From queries and keys to a ranking: what a calibration keeps of a layer, and how that layer's chunks are ranked.

It is the same whether llama.cpp (gguf.py) or transformers (hf.py) shows the queries and keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import reference, runtime
from ..params import K_DOM_TYPES, default_chunks
from ..runtime.interrupt import in_threads

TOKENS = 1024  # whose pair lengths are taken at once


@dataclass(frozen=True)
class CalibrationParams:
    """What a calibration reads and how it ranks; units are tokens unless said otherwise."""

    method: str = "recall"  # recall, energy or ca
    context: int = 4096  # length of a window; shorter when the model's context is
    windows: int = 1  # windows read; energy and ca average over them, recall and the weights come from the first
    queries: int = 96  # last queries of a window that recall, ca and the weights see
    budget: int = 256  # tokens whose attention mass the ranking maximises
    sink: int = 4
    recent: int = 32
    rank_share: float = 0.5  # share of the chunks that are chosen greedily; the rest follows by energy
    chunks: int = 0  # dominant chunks that decoding will use, chosen as a set and weighted; 0: those of the setting 0
    window_layers: bool = False  # rank layers whose sliding window is not longer than what decoding attends, too
    memory: int = 512 << 20  # bytes that one pass over a GGUF may keep

    def counts(self, n_chunk: int) -> tuple[int, int]:
        """(chunks chosen greedily, chunks that get a weight) of a head's n_chunk."""
        n = min(self.chunks, n_chunk)
        return max(1, n, int(n_chunk * self.rank_share)), n or min(default_chunks(n_chunk), n_chunk)

    def budget_in(self, n_keys: int) -> int:
        """Tokens that the ranking keeps of n_keys; at most half of them, or there is nothing to choose."""
        return max(min(self.budget, n_keys // 2), 1)


class LayerSample:
    """What is kept of one layer, whatever the length of the text: sums over all windows, and the first window's end.

    For every window: `add` its tokens in order, `end` it with all its keys, then `fold`. n_head_kv heads; dims int32
    [n_chunk, 2]; context: tokens of a window.
    """

    def __init__(self, n_head_kv: int, dims: np.ndarray, context: int, params: CalibrationParams) -> None:
        self.dims, self.context, self.params = dims, context, params
        # float64 [n_head_kv, n_chunk]
        self.q_sum = np.zeros((n_head_kv, len(dims)))  # sum of the query pairs' lengths, mean of the group
        self.k_sum = np.zeros((n_head_kv, len(dims)))  # sum of the key pairs' lengths
        self.ca = np.zeros((n_head_kv, len(dims)))  # sum of the places by contextual agreement
        self.n = self.n_windows = 0  # tokens and windows seen
        self.scale, self.soft_cap = 1.0, 0.0  # of the logits
        self.window = 0  # last tokens that a query attends; 0: all
        self.q: np.ndarray | None = None  # float32 [n_query, n_head, head_dim], the first window's last queries
        self.q_ahead: np.ndarray | None = None  # the same, foreseen before the feed-forward; None: they cannot be
        self.k: np.ndarray | None = None  # float16 [context, n_head_kv, head_dim], the first window's keys
        self._tail: list[np.ndarray] = []  # queries at the end of the current window
        self._tail_ahead: list[np.ndarray] = []  # the same, foreseen
        self._keys: np.ndarray | None = None  # keys of the current window

    def add(self, q: np.ndarray, k: np.ndarray, at: int, q_ahead: np.ndarray | None = None) -> None:
        """Tokens from position `at` of a window on: q float32 [n, n_head, head_dim], k [n, n_head_kv, head_dim].

        q_ahead: as q, foreseen; None: they cannot be.
        """
        for i in range(0, len(q), TOKENS):
            pair = np.hypot(*np.moveaxis(q[i : i + TOKENS][:, :, self.dims], -1, 0))  # [n, n_head, n_chunk]
            self.q_sum += pair.sum(0, dtype=np.float64).reshape(len(self.q_sum), -1, len(self.dims)).mean(1)
            keys = k[i : i + TOKENS].astype(np.float32)
            pair = np.hypot(*np.moveaxis(keys[:, :, self.dims], -1, 0))  # [n, n_head_kv, n_chunk]
            self.k_sum += pair.sum(0, dtype=np.float64)
        self.n += len(q)
        first = self.context - self.params.queries
        if at + len(q) > first:
            self._tail.append(q[max(0, first - at) :].copy())
            if q_ahead is not None:
                self._tail_ahead.append(q_ahead[max(0, first - at) :].copy())

    def end(self, k: np.ndarray) -> None:
        """The window is complete: k [context, n_head_kv, head_dim] are its keys. Cheap; `fold` does the work."""
        if self.k is None or self.params.method == "ca":
            self._keys = k.astype(np.float16)  # as the KV cache has them

    def fold(self) -> None:
        """Take the window's end into the sample: the first is kept, a later one leaves its agreement only."""
        if self._keys is not None:
            q, k = np.concatenate(self._tail), self._keys
            if self.q is None:
                self.q, self.k = q, k
                if len(self._tail_ahead) == len(self._tail):
                    self.q_ahead = np.concatenate(self._tail_ahead)
            if self.params.method == "ca":
                for h in range(len(self.ca)):
                    heads, keys, pos = self.case(h, q, k)
                    order = reference.rank_ca(heads, keys, pos, self.dims, self.scale, self.params.budget_in(len(keys)))
                    self.ca[h] += np.argsort(order)
            self.n_windows += 1
        self._tail, self._tail_ahead, self._keys = [], [], None

    def case(
        self, h: int, q: np.ndarray | None = None, k: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """KV head h: queries float32 [G, n_query, head_dim], keys float32 [n, head_dim], cells of queries [n_query].

        Under a sliding window the keys are those that any of the queries attends; the first of them is cell 0.
        """
        q, k = self.q if q is None else q, self.k if k is None else k
        assert q is not None and k is not None  # a window was folded
        group = q.shape[1] // len(self.q_sum)
        first = max(self.context - len(q) - self.window + 1, 0) if self.window else 0
        heads = np.ascontiguousarray(q[:, h * group : (h + 1) * group].transpose(1, 0, 2))  # [G, n_query, head_dim]
        return heads, k[first:, h].astype(np.float32), np.arange(self.context - len(q), self.context) - first


def rank_layer(s: LayerSample, n_threads: int) -> dict[str, Any]:
    """Plain lists of one layer, a row for each KV head: ranking [n_chunk], weight [m], recall [n_rank], kept [3].

    Where queries can be foreseen also ahead_ranking and ahead_weight, for these, and ahead_kept [2]: the attention kept
    with own and with foreseen queries.
    """
    n_head = len(s.q_sum)
    n_beside = min(n_head, n_threads)  # heads side by side, which share the threads

    def rank(h: int) -> dict[str, Any]:
        return _rank_head(s, h, n_threads // n_beside + (h % n_beside < n_threads % n_beside))

    heads = in_threads(rank, n_head, n_beside)
    return {name: [head[name] for head in heads] for name in heads[0]}


def _rank_head(s: LayerSample, h: int, n_threads: int) -> dict[str, Any]:
    """The rows of KV head h."""
    order, recall = _order(s, h, None, n_threads)
    weight = _weights(s, h, order, None)
    kept = [_kept(s, h, order, weight, kind, most=8) for kind in K_DOM_TYPES]
    out: dict[str, Any] = {"ranking": order.tolist(), "weight": weight.tolist(), "recall": recall, "kept": kept}
    if s.q_ahead is not None:
        ahead = s.case(h, s.q_ahead)[0]
        order_ahead = _order(s, h, ahead, n_threads)[0] if s.params.method == "recall" else order
        weight_ahead = _weights(s, h, order_ahead, ahead)
        out["ahead_ranking"], out["ahead_weight"] = order_ahead.tolist(), weight_ahead.tolist()
        out["ahead_kept"] = [_kept(s, h, order, weight), _kept(s, h, order_ahead, weight_ahead, q_est=ahead)]
    return out


def _order(s: LayerSample, h: int, q_est: np.ndarray | None, n_threads: int) -> tuple[np.ndarray, list[float]]:
    """(ranking [n_chunk] of KV head h, recall [n_rank] or []); q_est: the queries that score, if not its own."""
    p, energy = s.params, reference.rank_energy(s.q_sum[h] / s.n, s.k_sum[h] / s.n)
    if p.method == "ca":
        return np.argsort(s.ca[h] / s.n_windows, kind="stable"), []
    if p.method != "recall":
        return energy, []
    heads, keys, pos = s.case(h)
    best, kept = runtime.ops.rank_recall(
        heads,
        keys,
        pos,
        s.dims,
        p.counts(len(s.dims))[0],
        p.budget_in(len(keys)),
        p.sink,
        p.recent,
        s.scale,
        s.soft_cap,
        n_threads=n_threads,
        q_est=q_est,
    )
    rest = [c for c in energy if c not in set(best.tolist())]
    return np.concatenate([best, np.asarray(rest, int)]), kept.tolist()


def _weights(s: LayerSample, h: int, order: np.ndarray, q_est: np.ndarray | None) -> np.ndarray:
    """float32 [m], of the leading chunks of `order`."""
    heads, keys, pos = s.case(h)
    chosen, est = order[: s.params.counts(len(s.dims))[1]], None if q_est is None else q_est[:, ::4]
    return reference.fit_weights(heads[:, ::4], keys, pos[::4], s.dims, chosen, s.scale, s.soft_cap, est)


# Share of the attention that rounding the dominant keys may cost the layer that loses most. SmolLM2-135M's loses 0.4%
# with 4 bits, Gemma3-270M's 2% to 14%, a sixth of its KL (docs/lab/sliding-windows.md).
MOST_LOST = 0.01


def k_dom_for(kept: Mapping[int, Sequence[Sequence[float]]]) -> tuple[str, str]:
    """(how to store the dominant keys, "" or why not as by default), from `kept` of every ranked layer.

    A group of 8 dimensions shares one scale, so a pair that is far larger than the others (a bias of the keys, as
    Qwen2 has) leaves nothing of these in 4 bits.
    """
    if not kept:
        return "q4", ""
    layers = {il: np.asarray(heads, float).mean(0) for il, heads in kept.items()}  # [3] each: f16, q8, q4
    lost = {kind: max((x[0] - x[i], il) for il, x in layers.items()) for i, kind in enumerate(K_DOM_TYPES)}
    little = {kind for kind, (share, _) in lost.items() if share < MOST_LOST + 1e-6}
    if "q4" in little:
        return "q4", ""
    kind, (share, il) = "q8" if "q8" in little else "f16", lost["q4"]
    return kind, (
        f"in 4 bits the dominant keys of layer {il} keep {100 * share:.0f}% of the attention less than in f16 (a few "
        f"dimensions are far larger than the others); the profile's default is k_dom {kind}"
    )


MOST_LOST_AHEAD = 0.02  # share of the attention that foreseen queries may keep less than a layer's own


def may_select_ahead(entry: Mapping[str, Any]) -> bool:
    """Whether a layer, of rank_layer, keeps about as much of the attention with foreseen queries as with its own."""
    if "ahead_kept" not in entry:
        return False
    own, ahead = np.mean(entry["ahead_kept"], 0)
    return bool(own - ahead <= MOST_LOST_AHEAD)


def _kept(
    s: LayerSample,
    h: int,
    order: np.ndarray,
    weight: np.ndarray,
    kind: str = "f16",
    q_est: np.ndarray | None = None,
    most: int = 24,
) -> float:
    """The attention that KV head h keeps with its dominant keys in `kind`, over about `most` of the queries."""
    p, (heads, keys, pos) = s.params, s.case(h)
    chunks = p.chunks or default_chunks(len(s.dims))
    dims = reference.dominant_dims(order, chunks, s.dims)  # [n_dom]
    w = np.ones(len(dims), np.float32)  # [n_dom]
    known = np.repeat(weight[:chunks], 2)
    w[: len(known)] = known
    some = slice(None, None, max(1, len(pos) // most))
    return reference.kept_share(
        heads[:, some],
        keys,
        pos[some],
        dims,
        w,
        kind,
        s.scale,
        s.soft_cap,
        p.budget_in(len(keys)),
        p.sink,
        p.recent,
        None if q_est is None else q_est[:, some],
    )
