"""Policies of other papers, and the bounds: dense, a window, the oracle."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ..errors import FasaError
from .decoder import N_LAST, Shape, Tail
from .policy import Policy
from .selection import group_score, k_dom_bytes, quantize_k_dom, take_dims


class Dense(Policy):
    """Every visible cell."""

    name = "dense"
    about = "all rows"
    budgeted = False

    def select(self, layer: int, q: torch.Tensor, k: torch.Tensor, tail: Tail) -> torch.Tensor:
        return tail.visible.expand(len(q), -1, -1)


class Window(Policy):
    """The sinks and the most recent tokens (StreamingLLM, arXiv 2309.17453), positions as they were."""

    name = "window"
    about = "nothing to choose"

    def select(self, layer: int, q: torch.Tensor, k: torch.Tensor, tail: Tail) -> torch.Tensor:
        newest = torch.arange(k.shape[1], device=k.device, dtype=torch.float32)
        return self._best(newest.expand(1, *tail.visible.shape), tail)


class Oracle(Policy):
    """The best tokens by the true scores: what no method that attends `budget` tokens can know."""

    name = "oracle"
    about = "all of K to choose: an upper bound, no method"
    options: ClassVar[dict[str, Any]] = {"shared": False}

    def select(self, layer: int, q: torch.Tensor, k: torch.Tensor, tail: Tail) -> torch.Tensor:
        return self._by_logits(self._logits(q, k) * self.shape.scale, tail)

    def score_bytes(self, n: int) -> float:
        return 2.0 * self.shape.head_dim * n


class OracleShared(Oracle):
    """The same, one selection for the query heads of a KV head: by the sum of their attention."""

    name = "oracle-shared"
    options: ClassVar[dict[str, Any]] = {"shared": True}


class _Pages(Policy):
    """Pages of neighbouring tokens, taken by a score of two vectors a page.

    The page that is still filling comes right after the forced tokens; the last page taken is cut to the budget.
    """

    options: ClassVar[dict[str, Any]] = {"page": 16, "shared": False}
    page: int

    @classmethod
    def candidates(cls, shape: Shape) -> list[dict[str, Any]]:
        return [{"page": p, "shared": s} for p in (8, 16, 32) for s in (False, True)]

    def _page_score(self, q: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        """[n_head, n_query, n_page] of q [n_head, n_query, d] and pages of keys [n_head_kv, n_page, page, d]. The last
        page is filled up with zeros; its score is not used."""
        raise NotImplementedError

    def select(self, layer: int, q: torch.Tensor, k: torch.Tensor, tail: Tail) -> torch.Tensor:
        n_kv, n_page = k.shape[1], -(-k.shape[1] // self.page)
        pages = F.pad(k, (0, 0, 0, n_page * self.page - n_kv)).unflatten(1, (n_page, self.page))
        score = self._page_score(q, pages)
        end = (torch.arange(n_page, device=k.device) + 1) * self.page  # [n_page] first cell after it
        filling = end > tail.visible.sum(-1, keepdim=True)  # [n_query, n_page]
        est = (score * self.shape.scale).repeat_interleave(self.page, -1)[..., :n_kv]
        filling = filling.repeat_interleave(self.page, -1)[..., :n_kv]  # [n_query, n_kv]
        if self.shared:
            est = group_score(est, tail.visible & ~filling, self.shape.n_head_kv)
        return self._best(est.masked_fill(filling, torch.finfo(est.dtype).max), tail)

    def score_bytes(self, n: int) -> float:
        return self.index_bytes() * n

    def index_bytes(self) -> float:
        return 4.0 * self.shape.head_dim / self.page


class Quest(_Pages):
    """A page's score is the upper bound of q.k over its elementwise min and max of K (Quest, arXiv 2406.10774)."""

    name = "quest"
    about = "min and max of every page, f16: 4*head_dim/page bytes a token"

    def _page_score(self, q: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        return self._logits(q.clamp(min=0), pages.amax(2)) + self._logits(q.clamp(max=0), pages.amin(2))


class Unique(_Pages):
    """A page's score is q.mean + offset * |q|.deviation, of its keys dimension by dimension (UNIQUE, arXiv 2605.27740).

    The deviation is that of all keys of the page (divided by their number).
    """

    name = "unique"
    about = "mean and deviation of every page, f16: 4*head_dim/page bytes a token"
    options: ClassVar[dict[str, Any]] = {**_Pages.options, "offset": 1.0}
    offset: float

    @classmethod
    def candidates(cls, shape: Shape) -> list[dict[str, Any]]:
        return [{**c, "offset": x} for c in super().candidates(shape) for x in (0.25, 0.5, 1.0)]

    def _page_score(self, q: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        spread = pages.std(2, correction=0)
        return self._logits(q, pages.mean(2)) + self.offset * self._logits(q.abs(), spread)


class DoubleSparsity(Policy):
    """Label channels (arXiv 2408.07092): each KV head's dimensions with the largest |q_d k_d| on a calibration text."""

    name = "double-sparsity"
    about = "the label channels of K, f16 or in the groups of K_dom"
    options: ClassVar[dict[str, Any]] = {
        "channels": 0,
        "labels": "f16",
        "shared": False,
    }  # channels 0: a quarter of head_dim
    channels: int
    labels: str

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


class SparQ(Policy):
    """The r dimensions in which the step's query is largest (arXiv 2312.04985).

    shared: chosen by the sum of |q| over the group, as the authors do for grouped queries. Their mean-V
    correction is no part of a selection, and is not made.
    """

    name = "sparq"
    about = "r dimensions of every key, f16; keeps a second, transposed copy of K"
    options: ClassVar[dict[str, Any]] = {"r": 0, "shared": True}  # r 0: a quarter of head_dim
    r: int
    dims_read: float

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


class SnapKV(Policy):
    """Prompt tokens by the attention that the prompt's last queries gave them, chosen once (arXiv 2404.14469).

    The attention is pooled over neighbours. keep_new: the last queries' own tokens and every decoded one stay, as
    published, and the prompt's worst make room for them, so that the count stays the budget. Otherwise only sinks,
    recent tokens and the prompt's choice stay.
    """

    name = "snapkv"
    about = "nothing to choose: the rest of the prompt is gone"
    options: ClassVar[dict[str, Any]] = {"window": 32, "kernel": 5, "shared": False, "keep_new": True}
    window: int
    kernel: int
    keep_new: bool
    score: torch.Tensor  # [n_head or n_head_kv, n_prompt - window]

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
                f"method snapkv: window {self.window}, kernel {self.kernel}: expected a window up to {N_LAST} and an "
                "odd kernel"
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
