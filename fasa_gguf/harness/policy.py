"""Policies: which cached tokens each step and query head attends.

A policy is one class with `select(layer, q, k, tail) -> bool [n_head, n_query, n_kv]`. All get the same forced tokens
(sinks and recent ones, counted in the budget). Every query head meets a fixed budget exactly, or every KV head when its
query heads share a list.

Bytes are what a step reads per KV head, K and V in f16: `score_bytes` to choose, then K and V of the chosen cells. A
cell that several query heads of a KV head chose counts once.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ..errors import FasaError
from .calibrate import Knowledge
from .decoder import Shape, Tail
from .selection import group_score, top


class Policy:
    """One way to choose the cells that a step attends. A subclass needs `name` and `select`, and the bytes it reads.

    budget: tokens attended per step and head, forced ones included. Every option becomes an attribute. Raises FasaError
    for an unknown option and for a budget that has no room for the forced tokens.
    """

    name = ""
    about = ""  # what is read, for the report
    options: ClassVar[dict[str, Any]] = {}  # defaults of this method's own options; their types are the options' types
    common: ClassVar[dict[str, Any]] = {"sink": 4, "recent": 32, "dense_layers": 0}
    budgeted = True  # the budget decides the count
    tuned = False  # an option depends on the budget and comes from tuning
    sink: int
    recent: int
    dense_layers: int  # first layers that stay dense
    shared: bool  # of policies that have the option: one list for the query heads of a KV head

    def __init__(self, shape: Shape, budget: int, knowledge: Knowledge | None = None, **options: Any) -> None:
        self.shape, self.budget, self.knowledge = shape, budget, knowledge or Knowledge()
        known = self.defaults()
        for name in options:
            if name not in known:
                raise FasaError(f"method {self.name}: unknown option {name!r}; known are {', '.join(known)}")
        for name, value in {**known, **options}.items():
            setattr(self, name, value)
        if self.budgeted and not getattr(self, "mass", 0) and budget < self.sink + self.recent + 1:
            raise FasaError(
                f"method {self.name}: budget {budget}: expected at least {self.sink + self.recent + 1}, "
                f"{self.sink} sinks, {self.recent} recent tokens and one more"
            )

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Every option with its default."""
        return {**Policy.common, **cls.options}

    @classmethod
    def candidates(cls, shape: Shape) -> list[dict[str, Any]]:
        """Option sets that tuning tries, besides what the user fixed; none: nothing to tune."""
        return []

    def prepare(self, layer: int, q: torch.Tensor, k: torch.Tensor) -> None:
        """Called before select: the prompt's last queries q [n_head, N_LAST, d], all its keys k [n_head_kv, n, d]."""

    def select(self, layer: int, q: torch.Tensor, k: torch.Tensor, tail: Tail) -> torch.Tensor:
        """The lists of a layer: the cells that each query attends, bool [n_head, n_query, n_kv].

        q [n_head, n_query, d], k [n_head_kv, n_kv, d]. Layers come in order, so a list may be an earlier layer's.
        """
        raise NotImplementedError

    def score_bytes(self, n: int) -> float:
        """Bytes read to choose among n cached tokens, per step and KV head."""
        return 0.0

    def index_bytes(self) -> float:
        """Memory beside K and V, bytes per cached token and KV head."""
        return 0.0

    # ---- for subclasses ----

    def _best(self, score: torch.Tensor, tail: Tail) -> torch.Tensor:
        """The `budget` best cells of each set of score [n_head or n_head_kv, n_query, n_kv], for every query head."""
        mask = top(score, tail.visible, tail.forced(self.sink, self.recent), self.budget)
        return mask.repeat_interleave(self.shape.n_head // len(mask), 0)

    def _logits(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Unscaled logits [n_head, n_query, n_kv] of q [n_head, n_query, m] and k [n_head_kv, n_kv, m]."""
        return (q.reshape(len(k), -1, q.shape[-1]) @ k.transpose(1, 2)).view(*q.shape[:2], -1)

    def _by_logits(self, est: torch.Tensor, tail: Tail) -> torch.Tensor:
        """Selection from estimated logits [n_head, n_query, n_kv]: each head's own, or one per KV head (`shared`)."""
        return self._best(group_score(est, tail.visible, self.shape.n_head_kv) if self.shared else est, tail)
