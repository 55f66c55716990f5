"""FASA's policies: the project's own, as published, and what they are measured against."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch

from .. import reference
from ..errors import FasaError
from ..params import default_chunks
from .decoder import Shape, Tail
from .policy import Policy
from .selection import group_score, k_dom_bytes, mass_count, quantize_k_dom, quantize_query, take_dims, top


class Fasa(Policy):
    """The project's own (fasa_gguf/reference.py): the profile's chunks, one list per KV head.

    mass > 0: its own count, at least `floor` and at most `cap` tokens. 0 stands for a quarter of the budget and four
    times the budget; without a budget for 64 and 1,024.
    """

    name = "fasa"
    about = "K_dom of every token, scales included"
    options: ClassVar[dict[str, Any]] = {
        "k": 0,  # chunks; 0: 3/8 of the head's
        "k_dom": "q4",
        "mass": 0.0,
        "floor": 0,
        "cap": 0,
        "weights": True,
        "shared": True,
    }
    k: int
    k_dom: str
    mass: float
    floor: int
    cap: int
    weights: bool

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._known: dict[int, tuple[torch.Tensor, torch.Tensor] | None] = {}
        if (
            self.k_dom not in ("f16", "q8", "q4")
            or not 0 <= self.k <= self.shape.head_dim // 2
            or not 0 <= self.mass <= 1
        ):
            raise FasaError(
                f"method {self.name}: k_dom {self.k_dom}, k {self.k}, mass {self.mass}: expected f16, q8 or q4, up to "
                f"{self.shape.head_dim // 2} chunks, a mass from 0 to 1"
            )

    @classmethod
    def candidates(cls, shape: Shape) -> list[dict[str, Any]]:
        n = shape.head_dim // 2
        m = min(default_chunks(n), n)
        return [{"k": k, "k_dom": t} for k, t in ((n // 4, "q4"), (n // 4, "q8"), (m, "q4"), (m, "q8"), (n // 2, "q4"))]

    def bounds(self) -> tuple[int, int]:
        """floor and cap, in tokens."""
        if not self.budget:
            return self.floor or 64, self.cap or 1024
        return self.floor or max(self.budget // 4, 1), self.cap or 4 * self.budget

    def chunks(self) -> int:
        n = self.shape.head_dim // 2
        return self.k or min(default_chunks(n), n)

    def ranking(self, layer: int) -> np.ndarray | None:
        """Chunks, best first, [n_head_kv or n_head, n_chunk]; None: the layer has none and stays dense."""
        if self.knowledge.profile is None:
            raise FasaError(
                f"method {self.name} needs a FASA profile; run `fasa-gguf embed-profile MODEL`, or give --profile"
            )
        return self.knowledge.profile.ranking[layer] if self.knowledge.profile.n_chunk[layer] else None

    def _dominant(self, layer: int, device: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Dimensions and weights of the dominant chunks, both [n_head_kv or n_head, n_dom]; None: it stays dense."""
        if layer not in self._known:
            self._known[layer] = self._read_dominant(layer, device)
        return self._known[layer]

    def _read_dominant(self, layer: int, device: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
        ranking, s, n = self.ranking(layer), self.shape, self.chunks()
        if ranking is None:
            return None
        pairs = reference.chunk_dims(s.head_dim, s.n_rot, s.layout)
        dims = np.stack([reference.dominant_dims(np.asarray(row), n, pairs) for row in ranking])
        weight, p = np.ones(dims.shape, np.float32), self.knowledge.profile
        if self.weights and p is not None and p.weight is not None:
            known = np.repeat(np.asarray(p.weight[layer])[:, :n], 2, -1)
            weight[:, : known.shape[1]] = known
        return torch.as_tensor(dims, device=device).long(), torch.as_tensor(weight, device=device)

    def estimate(self, layer: int, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
        """TIP: estimated logits [n_head, n_query, n_kv]."""
        if (known := self._dominant(layer, q.device)) is None:
            return None
        dims, weight = known
        per = self.shape.n_head // len(dims)  # query heads that share a ranking
        k_dom = quantize_k_dom(take_dims(k.repeat_interleave(len(dims) // len(k), 0), dims), self.k_dom)
        q_dom = take_dims(q, dims.repeat_interleave(per, 0)) * weight.repeat_interleave(per, 0)[:, None]
        return self._logits(quantize_query(q_dom * self.shape.scale, self.k_dom), k_dom)

    def select(self, layer: int, q: torch.Tensor, k: torch.Tensor, tail: Tail) -> torch.Tensor:
        est = self.estimate(layer, q, k)
        if est is None:
            return tail.visible.expand(len(q), -1, -1)
        sets = self.shape.n_head_kv if self.shared else self.shape.n_head
        forced = tail.forced(self.sink, self.recent)
        score = group_score(est, tail.visible, sets) if self.shared or self.mass > 0 else est
        count: Any = self.budget
        if self.mass > 0:
            count = mass_count(score, tail.visible, forced, self.shape.n_head // sets, self.mass, *self.bounds())
        return top(score, tail.visible, forced, count).repeat_interleave(self.shape.n_head // sets, 0)

    def score_bytes(self, n: int) -> float:
        return self.index_bytes() * n

    def index_bytes(self) -> float:
        return k_dom_bytes(2 * self.chunks(), self.k_dom)


class FasaMass(Fasa):
    """The same with a target mass instead of a budget: tuned so that the mean is the budget, or given (`mass=0.96`)."""

    name = "fasa-mass"
    tuned = True

    @classmethod
    def candidates(cls, shape: Shape) -> list[dict[str, Any]]:
        return []

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if not self.mass > 0:
            raise FasaError("method fasa-mass: its mass comes from tuning; give --tune TEXT, or fasa-mass:mass=0.95")


class RandomChunks(Fasa):
    """FASA with chunks drawn at random for every KV head: what the ranking is worth."""

    name = "random"
    about = "K_dom of as many chunks as FASA has"
    options: ClassVar[dict[str, Any]] = {**Fasa.options, "weights": False, "seed": 0}
    seed: int

    @classmethod
    def candidates(cls, shape: Shape) -> list[dict[str, Any]]:
        return []

    def ranking(self, layer: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, layer])
        return np.stack([rng.permutation(self.shape.head_dim // 2) for _ in range(self.shape.n_head_kv)])


class Paper(Fasa):
    """FASA as published (arXiv 2602.03152): chunks by contextual agreement, a ranking and a list per query head.

    A quarter of the chunks, f16, nothing forced. The authors' code keeps layer 0 dense (dense_layers=1).
    """

    name = "paper"
    about = "the dominant chunks of the group's query heads, f16, a chunk that several of them use counted once"
    options: ClassVar[dict[str, Any]] = {
        **Fasa.options,
        "k_dom": "f16",
        "weights": False,
        "shared": False,
        "sink": 0,
        "recent": 0,
    }

    @classmethod
    def candidates(cls, shape: Shape) -> list[dict[str, Any]]:
        return []

    def chunks(self) -> int:
        return self.k or max(1, self.shape.head_dim // 8)

    def ranking(self, layer: int) -> np.ndarray:
        return np.asarray(self.knowledge.ca[layer])  # [n_head, n_chunk]

    def index_bytes(self) -> float:
        ranks = np.asarray(self.knowledge.ca)[..., : self.chunks()]  # [n_layer, n_head, k]
        ranks = ranks.reshape(len(ranks) * self.shape.n_head_kv, -1)
        return k_dom_bytes(1, self.k_dom) / 8 * 2 * float(np.mean([len(set(row)) for row in ranks.tolist()]))


class Borrowed(Fasa):
    """FASA in every `every`-th layer; the layers between attend the lists of the last one that selected."""

    name = "borrowed"
    about = "K_dom of the layers that select; the others read nothing to choose"
    options: ClassVar[dict[str, Any]] = {**Fasa.options, "every": 2}
    every: int
    lists: torch.Tensor  # bool [n_head, n_query, n_kv] of the last layer that selected

    @classmethod
    def candidates(cls, shape: Shape) -> list[dict[str, Any]]:
        return []

    def select(self, layer: int, q: torch.Tensor, k: torch.Tensor, tail: Tail) -> torch.Tensor:
        if (layer - self.dense_layers) % self.every == 0:
            self.lists = super().select(layer, q, k, tail)
        return self.lists

    def index_bytes(self) -> float:  # mean over the sparse layers
        n = max(self.shape.n_layer - self.dense_layers, 1)
        return super().index_bytes() * -(-n // self.every) / n
