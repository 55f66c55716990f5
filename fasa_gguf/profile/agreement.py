"""How much two profiles of one model agree: rank correlation and the overlap of what they call dominant."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import FasaError
from ..params import default_chunks
from .profile import Profile


@dataclass
class Agreement:
    """How two profiles agree in the layers that both rank; the first k chunks are the dominant ones."""

    layers: list[int]  # their numbers
    k: list[int]  # chunks compared in each
    spearman: list[np.ndarray]  # float64 [n_head_kv] rank correlation: 1 the same order, 0 unrelated, -1 reversed
    overlap: list[np.ndarray]  # float64 [n_head_kv] share of the first k chunks that both have
    only: list[int]  # layers that only one of the two ranks

    def mean(self) -> tuple[float, float]:
        """(rank correlation, overlap) over all KV heads."""
        return float(np.concatenate(self.spearman).mean()), float(np.concatenate(self.overlap).mean())

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        spearman, overlap = self.mean()
        layers = [{"layer": il, "k": k, "spearman": s.tolist(), "overlap": o.tolist()} for il, k, s, o in self._each()]
        return {"spearman": spearman, "overlap": overlap, "layers": layers, "layers_in_one_only": self.only}

    def _each(self) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
        return zip(self.layers, self.k, self.spearman, self.overlap, strict=True)


def format_agreement(agreement: Agreement) -> str:
    """For people: one line a layer, then all of them."""
    spearman, overlap = agreement.mean()
    lines = [f"{'layer':>5} {'k':>4}  {'rank correlation':>16}  {'overlap':>7}  {'lowest overlap of a KV head':>27}"]
    for il, k, s, o in agreement._each():
        lines.append(f"{il:>5} {k:>4}  {s.mean():>16.3f}  {100 * o.mean():>6.1f}%  {100 * o.min():>26.1f}%")
    lowest = min(o.min() for o in agreement.overlap)
    lines.append(f"{'all':>5} {'':>4}  {spearman:>16.3f}  {100 * overlap:>6.1f}%  {100 * lowest:>26.1f}%")
    if agreement.only:
        lines.append(f"ranked by one of the two only: layers {', '.join(map(str, agreement.only))}")
    return "\n".join(lines)


def compare_profiles(a: Profile, b: Profile, k: int = 0) -> Agreement:
    """The agreement of two profiles of one model; k chunks count as dominant, 0: 3/8 of the head's.

    Raises FasaError naming both shapes when they are not of one model, or rank no layer in common.
    """
    pairs = list(enumerate(zip(a.n_chunk, b.n_chunk, strict=False)))
    both = [il for il, (x, y) in pairs if x and y]
    if len(a.n_chunk) != len(b.n_chunk) or any(a.ranking[il].shape != b.ranking[il].shape for il in both):
        raise FasaError(f"the profiles are of different models: one has {_shape_of(a)}, the other {_shape_of(b)}")
    if not both:
        raise FasaError("the profiles rank no layer in common")
    out = Agreement(both, [], [], [], [il for il, (x, y) in pairs if bool(x) != bool(y)])
    for il in both:
        n = a.n_chunk[il]
        top = min(k or default_chunks(n), n)
        place = [np.argsort(p.ranking[il].astype(int), axis=-1) for p in (a, b)]  # [n_head_kv, n_chunk] of each chunk
        d2 = ((place[0] - place[1]) ** 2).sum(-1)
        out.k.append(top)
        out.spearman.append(1 - 6 * d2 / (n * (n * n - 1)) if n > 1 else np.ones(len(d2)))
        out.overlap.append(((place[0] < top) & (place[1] < top)).sum(-1) / top)
    return out


def _shape_of(p: Profile) -> str:
    heads, chunks = (" or ".join(sorted({str(x) for x in values if x})) for values in (p.n_head_kv, p.n_chunk))
    return f"{len(p.n_chunk)} layers, {heads} KV heads, {chunks} chunks"
