"""Sparse attention methods at equal budget: which cached tokens each step and query head attends.

One class a method, all with `select(layer, q, k, tail) -> bool [n_head, n_query, n_kv]`. Every one gets the same forced tokens
(sinks and recent ones, counted in the budget); a fixed budget is met exactly by every query head, or by every KV head where the
heads share a selection. Bytes: what a step reads per KV head, f16 K and V; `score_bytes` to choose, then K and V of the chosen
rows, a row that several query heads of a KV head chose counted once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .. import reference
from ..errors import FasaError
from ..params import default_chunks
from .calibrate import Knowledge
from .decoder import N_LAST, Shape, Tail
from .selection import (
    group_score,
    k_dom_bytes,
    mass_count,
    quantize_k_dom,
    quantize_query,
    take_dims,
    top,
)


class Method:
    """What all have in common. budget: tokens attended per step and head, forced ones included; options: `options` by name."""

    name = ""
    about = ""  # what is read, for the report
    options: dict[str, Any] = {}  # defaults of this method's own options; their types are the options' types
    common = {"sink": 4, "recent": 32, "dense_layers": 0}
    budgeted = True  # the budget decides the count
    tuned = False  # an option depends on the budget and comes from tuning

    def __init__(self, shape: Shape, budget: int, knowledge: Knowledge | None = None, **options: Any) -> None:
        self.shape, self.budget, self.knowledge = shape, budget, knowledge or Knowledge()
        known = self.defaults()
        for name, value in options.items():
            if name not in known:
                raise FasaError(f"method {self.name}: unknown option {name!r}; known are {', '.join(known)}")
        for name, value in {**known, **options}.items():
            setattr(self, name, value)
        if self.budgeted and not getattr(self, "mass", 0) and budget < self.sink + self.recent + 1:
            raise FasaError(
                f"method {self.name}: budget {budget}: expected at least {self.sink + self.recent + 1}, {self.sink} sinks, "
                f"{self.recent} recent tokens and one more"
            )

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        return {**Method.common, **cls.options}

    @classmethod
    def candidates(cls, shape: Shape) -> list[dict[str, Any]]:
        """Option sets that tuning tries, beside what the user fixed; none: nothing to tune."""
        return []

    def prepare(self, layer: int, q: torch.Tensor, k: torch.Tensor) -> None:
        """The end of the prompt, before select: its last queries [n_head, N_LAST, d] and all its keys [n_head_kv, n, d]."""

    def select(self, layer: int, q: torch.Tensor, k: torch.Tensor, tail: Tail) -> torch.Tensor:
        """The cells that each query attends, bool [n_head, n_query, n_kv], from q [n_head, n_query, d], k [n_head_kv, n_kv, d]."""
        raise NotImplementedError

    def score_bytes(self, n: int) -> float:
        """Bytes read to choose among n cached tokens, per step and KV head."""
        return 0.0

    def index_bytes(self) -> float:
        """Memory beside K and V, bytes per cached token and KV head."""
        return 0.0

    # ---- for the methods ----

    def _best(self, score: torch.Tensor, tail: Tail) -> torch.Tensor:
        """The budget's worth of the best, per set of score [n_head or n_head_kv, n_query, n_kv], for every query head."""
        mask = top(score, tail.visible, tail.forced(self.sink, self.recent), self.budget)
        return mask.repeat_interleave(self.shape.n_head // len(mask), 0)

    def _logits(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Of every query head, [n_head, n_query, n_kv], from q [n_head, n_query, m], k [n_head_kv, n_kv, m]; unscaled."""
        return (q.reshape(len(k), -1, q.shape[-1]) @ k.transpose(1, 2)).view(*q.shape[:2], -1)

    def _by_logits(self, est: torch.Tensor, tail: Tail) -> torch.Tensor:
        """Selection from estimated logits [n_head, n_query, n_kv]: each head's own, or one per KV head (`shared`)."""
        return self._best(group_score(est, tail.visible, self.shape.n_head_kv) if self.shared else est, tail)


class Dense(Method):
    name = "dense"
    about = "all rows"
    budgeted = False

    def select(self, layer: int, q: torch.Tensor, k: torch.Tensor, tail: Tail) -> torch.Tensor:
        return tail.visible.expand(len(q), -1, -1)


class Window(Method):
    """The sinks and the most recent tokens (StreamingLLM, arXiv 2309.17453), positions as they were."""

    name = "window"
    about = "nothing to choose"

    def select(self, layer: int, q: torch.Tensor, k: torch.Tensor, tail: Tail) -> torch.Tensor:
        newest = torch.arange(k.shape[1], device=k.device, dtype=torch.float32)
        return self._best(newest.expand(1, *tail.visible.shape), tail)


class Oracle(Method):
    """The best tokens by the true scores: what no method that attends `budget` tokens can know."""

    name = "oracle"
    about = "all of K to choose: an upper bound, no method"
    options = {"shared": False}

    def select(self, layer: int, q: torch.Tensor, k: torch.Tensor, tail: Tail) -> torch.Tensor:
        return self._by_logits(self._logits(q, k) * self.shape.scale, tail)

    def score_bytes(self, n: int) -> float:
        return 2.0 * self.shape.head_dim * n


class OracleShared(Oracle):
    """The same, one selection for the query heads of a KV head: by the sum of their attention."""

    name = "oracle-shared"
    options = {"shared": True}


class Quest(Method):
    """Pages of neighbouring tokens, by the upper bound of q.k over the page's elementwise min and max of K (arXiv 2406.10774).
    The page that is still filling comes right behind the forced tokens; the last page taken is cut to the budget."""

    name = "quest"
    about = "min and max of every page, f16: 4*head_dim/page bytes a token"
    options = {"page": 16, "shared": False}

    @classmethod
    def candidates(cls, shape: Shape) -> list[dict[str, Any]]:
        return [{"page": p, "shared": s} for p in (8, 16, 32) for s in (False, True)]

    def select(self, layer: int, q: torch.Tensor, k: torch.Tensor, tail: Tail) -> torch.Tensor:
        n_kv, n_page = k.shape[1], -(-k.shape[1] // self.page)
        pages = F.pad(k, (0, 0, 0, n_page * self.page - n_kv)).unflatten(1, (n_page, self.page))
        low, high = pages.amin(2), pages.amax(2)  # [n_head_kv, n_page, d]
        bound = self._logits(q.clamp(min=0), high) + self._logits(q.clamp(max=0), low)  # [n_head, n_query, n_page]
        end = (torch.arange(n_page, device=k.device) + 1) * self.page  # [n_page] first cell behind it
        filling = end > tail.visible.sum(-1, keepdim=True)  # [n_query, n_page]
        est = (bound * self.shape.scale).repeat_interleave(self.page, -1)[..., :n_kv]
        filling = filling.repeat_interleave(self.page, -1)[..., :n_kv]  # [n_query, n_kv]
        if self.shared:
            est = group_score(est, tail.visible & ~filling, self.shape.n_head_kv)
        return self._best(est.masked_fill(filling, torch.finfo(est.dtype).max), tail)

    def score_bytes(self, n: int) -> float:
        return self.index_bytes() * n

    def index_bytes(self) -> float:
        return 4.0 * self.shape.head_dim / self.page


class DoubleSparsity(Method):
    """Label channels: the dimensions of each KV head whose |q_d k_d| is largest on a calibration text (arXiv 2408.07092)."""

    name = "double-sparsity"
    about = "the label channels of K, f16 or in the groups of K_dom"
    options = {"channels": 0, "labels": "f16", "shared": False}  # channels 0: a quarter of head_dim

    @classmethod
    def candidates(cls, shape: Shape) -> list[dict[str, Any]]:
        d = shape.head_dim
        return [
            {"channels": c, "labels": t, "shared": s}
            for c, t in ((d // 8, "f16"), (d // 4, "f16"), (d // 4, "q4"), (d // 2, "q4"))
            for s in (False, True)
        ]

    def _channels(self) -> int:
        return self.channels or self.shape.head_dim // 4

    def select(self, layer: int, q: torch.Tensor, k: torch.Tensor, tail: Tail) -> torch.Tensor:
        dims = torch.as_tensor(self.knowledge.channels[layer], device=q.device)[:, : self._channels()]
        dims = F.pad(dims, (0, -dims.shape[1] % 8), value=-1)  # [n_head_kv, m], whole groups
        labels = quantize_k_dom(take_dims(k, dims), self.labels)
        return self._by_logits(
            self._logits(take_dims(q, dims.repeat_interleave(self.shape.group, 0)), labels) * self.shape.scale, tail
        )

    def score_bytes(self, n: int) -> float:
        return self.index_bytes() * n

    def index_bytes(self) -> float:
        return 2.0 * self._channels() if self.labels == "f16" else k_dom_bytes(self._channels(), self.labels)


class SparQ(Method):
    """The r dimensions in which the step's query is largest (arXiv 2312.04985); shared: chosen by the sum of |q| over the group,
    as the authors do for grouped queries. Without their mean-V correction: here every method is its selection alone."""

    name = "sparq"
    about = "r dimensions of every key, f16; keeps a second, transposed copy of K"
    options = {"r": 0, "shared": True}  # r 0: a quarter of head_dim

    @classmethod
    def candidates(cls, shape: Shape) -> list[dict[str, Any]]:
        d = shape.head_dim
        return [{"r": r, "shared": s} for r in (d // 8, d // 4) for s in (False, True)]

    def select(self, layer: int, q: torch.Tensor, k: torch.Tensor, tail: Tail) -> torch.Tensor:
        n_kv_heads, group = self.shape.n_head_kv, self.shape.group
        size = q.abs().view(n_kv_heads, group, *q.shape[1:])  # [n_head_kv, G, n_query, d]
        size = size.sum(1, keepdim=True).expand_as(size) if self.shared else size
        at = size.topk(self.r or self.shape.head_dim // 4, -1).indices  # [n_head_kv, G, n_query, r]
        used = torch.zeros_like(size).scatter_(-1, at, 1.0)
        self.dims_read = float(used.amax(1).sum(-1).mean())  # distinct dimensions of a group, mean
        part = q * used.view(q.shape)
        temperature = (self.shape.head_dim * part.abs().sum(-1, keepdim=True) / q.abs().sum(-1, keepdim=True)).sqrt()
        return self._by_logits(self._logits(part / temperature, k), tail)

    def score_bytes(self, n: int) -> float:
        return 2.0 * self.dims_read * n

    def index_bytes(self) -> float:
        return 2.0 * self.shape.head_dim


class SnapKV(Method):
    """Prompt tokens by the attention that the prompt's last queries gave them, pooled over neighbours, chosen once (arXiv
    2404.14469). keep_new: the last queries' own tokens and every decoded one stay, as published, and the prompt's worst make room
    for them, so that the count stays the budget; else only sinks, recent tokens and the prompt's choice."""

    name = "snapkv"
    about = "nothing to choose: the rest of the prompt is gone"
    options = {"window": 32, "kernel": 5, "shared": False, "keep_new": True}

    @classmethod
    def candidates(cls, shape: Shape) -> list[dict[str, Any]]:
        return [
            {"window": w, "kernel": k, "shared": s, "keep_new": new}
            for w, k in ((32, 5), (32, 13), (64, 7))
            for s in (False, True)
            for new in (False, True)
        ]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if not 1 <= self.window <= N_LAST or self.kernel % 2 == 0:
            raise FasaError(
                f"method snapkv: window {self.window}, kernel {self.kernel}: expected a window up to {N_LAST} and an odd kernel"
            )

    def prepare(self, layer: int, q: torch.Tensor, k: torch.Tensor) -> None:
        w = min(self.window, q.shape[1], k.shape[1] - 1)
        tail = Tail.make(self.shape, k.shape[1] - w, w, k.device)
        weight = (self._logits(q[:, -w:], k) * self.shape.scale).masked_fill(~tail.visible, -torch.inf).softmax(-1)
        seen = weight[..., :-w].sum(1)  # [n_head, n_prompt - w]
        if self.shared:
            seen = seen.view(self.shape.n_head_kv, -1, seen.shape[-1]).sum(1)
        self.score = F.avg_pool1d(seen[:, None], self.kernel, 1, self.kernel // 2)[:, 0]

    def select(self, layer: int, q: torch.Tensor, k: torch.Tensor, tail: Tail) -> torch.Tensor:
        newer = torch.arange(self.score.shape[-1], k.shape[1], device=k.device, dtype=torch.float32)
        newer = newer + 1e3 if self.keep_new else newer * 0 - 1  # over, or under, every pooled weight
        score = torch.cat([self.score, newer.expand(len(self.score), -1)], -1)  # [sets, n_kv]
        return self._best(score[:, None].expand(-1, len(tail.visible), -1), tail)


class Fasa(Method):
    """The project's own (fasa_gguf/reference.py): the profile's chunks, one selection per KV head. mass > 0: its own count, at
    least `floor` and at most `cap` tokens (0: a quarter of, and four times the budget; without one 64 and 1,024)."""

    name = "fasa"
    about = "K_dom of every token, scales included"
    options = {
        "k": 0,
        "k_dom": "q4",
        "mass": 0.0,
        "floor": 0,
        "cap": 0,
        "weights": True,
        "shared": True,
    }  # k 0: 3/8 of the chunks

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._setup: dict[int, tuple[torch.Tensor, torch.Tensor] | None] = {}
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
        return [
            {"k": k, "k_dom": t}
            for k, t in ((n // 4, "q4"), (n // 4, "q8"), (3 * n // 8, "q4"), (3 * n // 8, "q8"), (n // 2, "q4"))
        ]

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

    def _layer(self, layer: int, device: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Dimensions and weights of the dominant chunks, both [n_head_kv or n_head, n_dom]."""
        if layer not in self._setup:
            ranking, s, n = self.ranking(layer), self.shape, self.chunks()
            if ranking is None:
                self._setup[layer] = None
            else:
                pairs = reference.chunk_dims(s.head_dim, s.n_rot, s.layout)
                dims = np.stack([reference.dominant_dims(np.asarray(row), n, pairs) for row in ranking])
                weight, p = np.ones(dims.shape, np.float32), self.knowledge.profile
                if self.weights and p is not None and p.weight is not None:
                    known = np.repeat(np.asarray(p.weight[layer])[:, :n], 2, -1)
                    weight[:, : known.shape[1]] = known
                self._setup[layer] = torch.as_tensor(dims, device=device).long(), torch.as_tensor(weight, device=device)
        return self._setup[layer]

    def estimate(self, layer: int, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
        """TIP: estimated logits [n_head, n_query, n_kv]."""
        if (setup := self._layer(layer, q.device)) is None:
            return None
        dims, weight = setup
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
    """The same with a target mass in place of the budget: tuned so that the mean is the budget, or given (`mass=0.96`)."""

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
    options = {**Fasa.options, "weights": False, "seed": 0}

    @classmethod
    def candidates(cls, shape: Shape) -> list[dict[str, Any]]:
        return []

    def ranking(self, layer: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, layer])
        return np.stack([rng.permutation(self.shape.head_dim // 2) for _ in range(self.shape.n_head_kv)])


class Paper(Fasa):
    """FASA as published (arXiv 2602.03152): chunks by contextual agreement, a ranking and a selection per query head, a quarter of
    the chunks, f16, nothing forced. The authors' code keeps layer 0 dense (dense_layers=1)."""

    name = "paper"
    about = "the dominant chunks of the group's query heads, f16, a chunk that several of them use counted once"
    options = {**Fasa.options, "k_dom": "f16", "weights": False, "shared": False, "sink": 0, "recent": 0}

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


METHODS: dict[str, type[Method]] = {
    m.name: m
    for m in (
        Dense,
        Window,
        RandomChunks,
        Quest,
        DoubleSparsity,
        SparQ,
        SnapKV,
        Oracle,
        OracleShared,
        Fasa,
        FasaMass,
        Paper,
    )
}


def parse_spec(text: str) -> tuple[type[Method], dict[str, Any]]:
    """`quest:page=8:shared=1` -> (Quest, {"page": 8, "shared": True}). Raises FasaError for an unknown name or an unreadable value."""
    name, *parts = text.split(":")
    if name not in METHODS:
        raise FasaError(f"--methods {name!r}: expected one of {', '.join(METHODS)}")
    known, options = METHODS[name].defaults(), {}
    for part in parts:
        key, _, value = part.partition("=")
        if key not in known:
            raise FasaError(f"method {name}: unknown option {key!r}; known are {', '.join(known)}")
        try:
            kind = type(known[key])
            options[key] = {"0": False, "1": True}[value] if kind is bool else kind(value)
        except (ValueError, KeyError):
            kind_name = {bool: "0 or 1", int: "a whole number", float: "a number"}[type(known[key])]
            raise FasaError(f"method {name}: option {key}: expected {kind_name}, found {value!r}") from None
    return METHODS[name], options


def spec_text(method: type[Method], options: dict[str, Any]) -> str:
    """The opposite of parse_spec; options that are the default are left away."""
    known = method.defaults()
    shown = {
        k: int(v) if isinstance(v, bool) else f"{v:.5g}" if isinstance(v, float) else v
        for k, v in options.items()
        if v != known[k]
    }
    return ":".join([method.name, *(f"{k}={v}" for k, v in shown.items())])
