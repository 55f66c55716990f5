"""What `bench` returns: one Result for each arm, test and depth."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..params import FasaParams
from ..reasons import Reason
from .traffic import Figures

SLOW_READ = 1 / 3  # of the rate of a plain read: below it, dense attention is not bound by memory


@dataclass
class Result:
    """One arm at one depth: samples in tokens/s over all sequences; bytes per token."""

    arm: str  # dense, or the name of a FASA arm
    n_depth: int
    n_gen: int  # 0: prefill
    n_prompt: int = 0  # 0: decode
    n_parallel: int = 1
    samples_ts: list[float] = field(default_factory=list)  # empty: it could not be measured; see note
    kv_bytes: float | None = None  # of K, V and K_dom read per token; None: prefill
    weight_bytes: int | None = None  # of weights read per step; None: not known
    base_s: float | None = None  # dense: seconds of a decode step with an empty cache; None: not measured
    bare_s: float | None = None  # seconds of a decode step without attention; None: not measured
    read_rate: float | None = None  # dense: bytes/s at which the threads read K and V; None: not measured
    copy_rate: float | None = None  # bytes/s of the one device that holds weights and cache; None: there are several
    sparse_share: float = 0.0  # of the steps
    tokens_attended: float | None = None
    note: str = ""
    fill: str = ""  # how the cache got its depth: prefill or random
    ratio: float | None = None  # to dense in the same context; None: host mode, whose contexts have no dense arm
    ratio_best: float | None = None  # to the fastest dense result of this test, whatever its KV types and nkvo
    first_step_ms: float | None = None  # of the first decode step: with FASA it derives the dominant keys of all cells
    ttft_ms: float | None = None  # prefill of depth and prompt, and the first decode step; None: the depth is random
    params: FasaParams | None = None  # None: dense
    memory: Figures = field(default_factory=Figures)
    config: dict[str, Any] = field(default_factory=dict)  # n_threads, type_k, ... by llama-bench's names

    @property
    def test(self) -> str:
        """llama-bench's name: tg32 @ d4096."""
        return f"{f'tg{self.n_gen}' if self.n_gen else f'pp{self.n_prompt}'} @ d{self.n_depth}"

    @property
    def avg_ts(self) -> float | None:
        return statistics.fmean(self.samples_ts) if self.samples_ts else None

    @property
    def stddev_ts(self) -> float:
        return statistics.stdev(self.samples_ts) if len(self.samples_ts) > 1 else 0.0

    @property
    def token_bytes(self) -> float | None:
        """Bytes read for one token: its sequence's K, V and K_dom, and its share of the step's weights."""
        if self.kv_bytes is None or self.weight_bytes is None:
            return None
        return self.kv_bytes + self.weight_bytes / self.n_parallel

    @property
    def bytes_per_second(self) -> float | None:
        if self.token_bytes is None or self.avg_ts is None:
            return None
        return self.token_bytes * self.avg_ts

    @property
    def of_copy_rate(self) -> float | None:
        if self.bytes_per_second is None or self.copy_rate is None:
            return None
        return self.bytes_per_second / self.copy_rate

    @property
    def attention_ms(self) -> float | None:
        """What attention adds to a decode step: TIP, SELECT and FAC, or dense attention."""
        if self.bare_s is None or self.avg_ts is None:
            return None
        return 1000 * (self.n_parallel / self.avg_ts - self.bare_s)

    @property
    def kv_rate(self) -> float | None:
        """Bytes/s at which dense attention reads K and V: over the time by which the depth lengthens a step.

        None where that is less than a quarter of the step, which is noise.
        """
        if self.base_s is None or self.kv_bytes is None or self.avg_ts is None:
            return None
        step_s = self.n_parallel / self.avg_ts
        return self.n_parallel * self.kv_bytes / (step_s - self.base_s) if self.base_s < 0.75 * step_s else None

    @property
    def plain_ts(self) -> float | None:
        """Tokens/s if dense attention took no longer than a plain read of the same K and V."""
        if self.base_s is None or self.kv_bytes is None or not self.read_rate:
            return None
        return self.n_parallel / (self.base_s + self.n_parallel * self.kv_bytes / self.read_rate)

    @property
    def slow_read(self) -> str:
        """For the note of a dense result: that it reads the cache slowly, or ""."""
        if self.kv_rate is None or not self.read_rate or self.kv_rate >= SLOW_READ * self.read_rate:
            return ""
        return f"dense reads the cache at {self.kv_rate / 1e9:.2g} GB/s, a plain read at {self.read_rate / 1e9:.2g}"

    @property
    def of_pcie_floor(self) -> float | None:
        """The time that a step's bytes take over PCIe at the measured rates, divided by the step's time."""
        floor = self.memory.floor_s()
        return None if floor is None or self.avg_ts is None else floor * self.avg_ts / self.n_parallel


def dense_layers(reasons: Sequence[Reason], before: str = "") -> str:
    """How many attention layers are dense in a sparse step, and why; "" when none is."""
    why = Counter(x.text for x in reasons if x not in (Reason.NONE, Reason.NO_CACHE))
    if not why:
        return ""
    n = sum(x != Reason.NO_CACHE for x in reasons)
    each = "; ".join(f"{k}: {x}" for x, k in sorted(why.items()))
    return f"{before}{sum(why.values())} of {n} layers dense ({each})"


def set_ratios(group: Mapping[str, Result]) -> list[Result]:
    """Fill ratio: an arm's speed over that of dense in the same context. Returns the results."""
    dense = group["dense"].avg_ts if "dense" in group else None
    for r in group.values():
        r.ratio = r.avg_ts / dense if r.avg_ts is not None and dense is not None else None
    return list(group.values())


def set_ratio_best(results: Sequence[Result]) -> None:
    """Fill ratio_best: a speed over the fastest dense one with the same test, sequences and layers on the GPU."""

    def key(r: Result) -> tuple[Any, ...]:
        return r.test, r.n_parallel, r.config.get("n_gpu_layers")

    best: dict[Any, float] = {}
    for r in results:
        if r.params is None and r.avg_ts is not None:
            best[key(r)] = max(best.get(key(r), 0.0), r.avg_ts)
    for r in results:
        r.ratio_best = r.avg_ts / best[key(r)] if r.avg_ts is not None and key(r) in best else None
