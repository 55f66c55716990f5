"""Speed: dense and FASA taking turns in one process, one context, one library. What to measure, and the measurement.

The rows have llama-bench's names; bench_report.py prints and draws them, docs/reference/bench.md explains every column.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import runtime
from ..errors import FasaError
from ..gguf.cache_types import cache_type
from ..gguf.file import U16, U32, GGUFFile
from ..memory.placement import why_not_host
from ..params import FasaParams
from ..profile.profile import Profile
from ..reasons import Reason
from ..session import Session
from .traffic import Figures, merge, vram

RANDOM_FILL_FROM = 2048  # tokens of depth from which a cache is filled at random
COPY_BYTES = 512 << 20  # of the copy that gives a device's rate: beyond its caches
WARM_STEPS = 3  # untimed decode steps of a repetition: CUDA records a graph when it comes again
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Plan:
    """What to measure: every combination of the lists. There is one context for every (n_gpu_layers, types, no_kv_offload, mode,
    n_parallel), one at a time."""

    depths: Sequence[int] = (0, 4096, 8192)  # tokens in the cache of every sequence
    n_gen: int = 32  # tokens per sequence and repetition
    n_prompt: Sequence[int] = (512,)  # tokens of the prefill rows; empty or 0: none
    n_parallel: Sequence[int] = (1,)  # sequences that decode together
    n_gpu_layers: Sequence[int] = (0,)
    types: Sequence[tuple[str, str]] = (("f16", "f16"),)  # of the K and the V cache
    no_kv_offload: Sequence[int] = (0,)  # 1: the cache in host memory; dense only
    modes: Sequence[str] = ("c",)  # where K and V lie: c on the device, m in pinned host memory (FASA only)
    repetitions: int = 5
    n_threads: int = 0  # 0: all cores
    n_batch: int = 2048
    n_ubatch: int = 512
    fill: str = "auto"  # prefill, random, or auto: random from RANDOM_FILL_FROM on

    def check(self, arms: Mapping[str, FasaParams]) -> Plan:
        """Returns self, or raises FasaError in one sentence: values out of range, or nothing that FASA could run in."""
        if not self.depths or min(self.depths) < 0 or self.n_gen < 1 or self.repetitions < 1:
            raise FasaError("-d, -n and -r: expected depths from 0, and at least 1 token and 1 repetition")
        if min(self.n_parallel, default=0) < 1 or min(self.n_prompt, default=0) < 0:
            raise FasaError("-np and -p: expected at least 1 sequence, and prompts from 0 tokens")
        if self.fill not in ("auto", "prefill", "random"):
            raise FasaError(f"--fill {self.fill!r}: expected auto, prefill or random")
        for name in itertools.chain(*self.types):
            cache_type(name)
        if not self.modes or not set(self.modes) <= {"c", "m"}:
            raise FasaError(
                f"--fasa-mode: bench measures what it is told to; expected c, m or c,m, found {','.join(self.modes)}"
            )
        if all(self.no_kv_offload):
            raise FasaError("-nkvo 1 is measured dense only, and FASA has nothing to run in; give -nkvo 0,1")
        for arm, p in arms.items():
            if max(self.depths) < p.min_context:
                raise FasaError(
                    f"{arm}: every depth of -d is below min_context, and every step would be dense; use -d with {p.min_context} or more, "
                    "or a smaller --fasa-min-context"
                )
        why = (
            why_not_host(runtime.devices.cuda_devices(), min(self.n_gpu_layers, key=bool), False)
            if "m" in self.modes
            else ""
        )
        if why:
            raise FasaError(why)
        return self


@dataclass
class Row:
    """One arm at one depth: samples in tokens/s over all sequences; bytes per token."""

    arm: str  # dense, or the name of a FASA arm
    n_depth: int
    n_gen: int  # 0: a prefill row
    n_prompt: int = 0  # 0: a decode row
    n_parallel: int = 1
    samples_ts: list[float] = field(default_factory=list)  # empty: it could not be measured; see note
    kv_bytes: float | None = None  # of K, V and K_dom read per token; None: prefill
    weight_bytes: int | None = None  # of weights read per step; None: not known
    copy_rate: float | None = None  # bytes/s of the one device that holds weights and cache; None: there are several
    sparse_share: float = 0.0  # of the steps
    tokens_attended: float | None = None
    note: str = ""
    fill: str = ""  # how the cache got its depth: prefill or random
    ratio: float | None = None  # to dense in the same context; None: mode m, whose contexts have no dense arm
    ratio_best: float | None = None  # to the fastest dense row of this test, whatever its KV types and nkvo
    first_step_ms: float | None = None  # of the first decode step: with FASA it derives the dominant keys of all cells
    ttft_ms: float | None = None  # prefill of depth and prompt, and the first decode step; None: the depth is random
    params: FasaParams | None = None  # None: dense
    memory: Figures = field(default_factory=Figures)
    setup: dict[str, Any] = field(default_factory=dict)  # n_threads, type_k, ... by llama-bench's names

    @property
    def test(self) -> str:
        return f"{f'tg{self.n_gen}' if self.n_gen else f'pp{self.n_prompt}'} @ d{self.n_depth}"

    @property
    def avg_ts(self) -> float | None:
        return statistics.fmean(self.samples_ts) if self.samples_ts else None

    @property
    def stddev_ts(self) -> float:
        return statistics.stdev(self.samples_ts) if len(self.samples_ts) > 1 else 0.0

    @property
    def token_bytes(self) -> float | None:
        """Bytes that had to be read for one token: its sequence's K, V and K_dom, and its share of the step's weights."""
        if self.kv_bytes is None or self.weight_bytes is None:
            return None
        return self.kv_bytes + self.weight_bytes / self.n_parallel

    @property
    def bytes_per_second(self) -> float | None:
        return None if self.token_bytes is None or not self.samples_ts else self.token_bytes * self.avg_ts

    @property
    def of_copy_rate(self) -> float | None:
        return (
            None if self.bytes_per_second is None or self.copy_rate is None else self.bytes_per_second / self.copy_rate
        )

    @property
    def of_pcie_floor(self) -> float | None:
        """The time that a step's bytes take over PCIe at the measured rates, over the step's own."""
        floor = self.memory.floor_s()
        return None if floor is None or not self.samples_ts else floor * self.avg_ts / self.n_parallel


# ---- bytes ----


def weight_bytes(model: GGUFFile) -> tuple[int | None, str]:
    """(bytes of weights that one decode step reads, "" or why that is not known).

    All tensors, but of an embedding only a row is read, unless it is the output matrix too.
    """
    if model.get(f"{model.arch}.expert_count", U32, default=0):
        return None, "mixture of experts: bytes of weights not counted"
    if model.get("split.count", U16, default=1) > 1:
        return None, "model in several files: bytes of weights not counted"
    tied = not any(t.name == "output.weight" for t in model.tensors)
    skip = {"per_layer_token_embd.weight"} | (set() if tied else {"token_embd.weight"})
    return sum(t.n_bytes for t in model.tensors if t.name not in skip), ""


def one_device(
    n_layer: int, n_gpu_layers: int, no_kv_offload: int, devices: Sequence[runtime.devices.Device]
) -> str | None:
    """The device that holds all weights and the whole cache; None when it takes several."""
    gpus = [d.name for d in devices if d.is_gpu]
    if not gpus or n_gpu_layers == 0:
        return "CPU"
    whole = n_gpu_layers < 0 or n_gpu_layers > n_layer  # the output matrix is one layer more
    return gpus[0] if len(gpus) == 1 and whole and not no_kv_offload else None


def _model_setup(model: str | os.PathLike, plan: Plan) -> tuple[dict[str, Any], dict[tuple[int, int], float | None]]:
    """(llama-bench's fields of model and machine and the weights' bytes, copy rate by (n_gpu_layers, no_kv_offload))."""
    gguf, devices = GGUFFile(model), runtime.devices.devices()
    n_bytes, why = weight_bytes(gguf)
    n_layer = gguf.get(f"{gguf.arch}.block_count", U32, default=0)
    rates = {}
    for key in itertools.product(plan.n_gpu_layers, plan.no_kv_offload):
        device = one_device(n_layer, *key, devices)
        rates[key] = runtime.devices.copy_rate(device, COPY_BYTES, plan.n_threads) if device else None
    names = lambda gpu: ", ".join(d.description for d in devices if d.is_gpu == gpu)
    return {
        "model_size": sum(t.n_bytes for t in gguf.tensors),
        "cpu_info": names(False),
        "gpu_info": names(True),
        "n_threads": plan.n_threads or os.cpu_count() or 1,
        "n_batch": plan.n_batch,
        "n_ubatch": plan.n_ubatch,
        "flash_attn": 1,
        "weight_bytes": n_bytes,
        "weight_note": why,
    }, rates


# ---- one context ----


@dataclass
class Sample:
    """One repetition of one arm."""

    speed: float  # tokens/s over all sequences
    counters: dict[str, int]  # FASA's
    first_s: float  # of the first decode step
    reason: Reason  # why that step was dense
    layer_reasons: Sequence[Reason] = ()  # why layers were dense after the last step
    prompt_s: float = 0.0  # of the prefill that was timed


class Bench:
    """One context: brings its sequences to a depth, and times an arm behind it."""

    vram_peak: int | None = None  # the most bytes in use on the GPUs that were seen

    def __init__(self, s: Session, n_parallel: int, fill: str, report: Report) -> None:
        self.s, self.n, self.how, self.report = s, n_parallel, fill, report
        self.in_cache = 0  # tokens that sequence 0 has by prefill
        self.prefill_s = 0.0  # seconds that took
        self.tokens = np.random.default_rng(0).integers(0, s.n_vocab, s.n_ctx // n_parallel).tolist()

    def fill(self, depth: int) -> str:
        """Every sequence gets `depth` cells. Returns how: prefill or random."""
        self.s.fasa.set_params(None)
        if self.how == "random" or (self.how == "auto" and depth >= RANDOM_FILL_FROM):
            self.in_cache, self.prefill_s = 0, 0.0
            self.s.fasa.fill_random(depth)
            return "random"
        self.prefill(depth)
        for seq in range(1, self.n if depth else 1):  # a copy moves a whole stream, used or not
            self.s.copy(0, seq)
        return "prefill"

    def prefill(self, depth: int) -> None:
        """Decode tokens of sequence 0 until it has `depth`; those that it has by prefill stay."""
        if not self.in_cache:
            self.s.clear()
            self.prefill_s = 0.0
        start = time.perf_counter()
        for at in range(self.in_cache, depth, self.s.n_batch):
            part = self.tokens[at : min(at + self.s.n_batch, depth)]
            self.s.decode(part, at, logits="none")
            self.report(f"prefilling {depth}", at + len(part), depth)
        self.s.synchronize()
        self.prefill_s += time.perf_counter() - start
        self.in_cache = depth

    def rewind(self, depth: int) -> None:
        """Forget what lies behind `depth`. A recurrent memory cannot: it is filled again."""
        try:
            for seq in range(self.n):
                self.s.remove(seq, depth)
        except FasaError:
            self.in_cache = 0
            self.fill(depth)

    def look(self) -> None:
        """Remember the most GPU memory in use; what kernels take stays theirs, so nothing is missed between two looks."""
        self.vram_peak = max(filter(None, (self.vram_peak, vram())), default=None)

    def step(self, pos: int, j: int) -> None:
        """One token for every sequence, tokens that differ."""
        self.s.decode_batch(
            [(1 + (j * 7919 + seq * 104729) % (self.s.n_vocab - 1), pos, seq, True) for seq in range(self.n)]
        )
        self.s.synchronize()

    def generate(self, p: FasaParams | None, depth: int, n: int) -> Sample:
        """n decode steps behind `depth` cells and WARM_STEPS, of which the first derives the dominant keys and builds the graph."""
        self.s.fasa.set_params(p)
        start = time.perf_counter()
        self.step(depth, 0)
        first = time.perf_counter() - start
        reason = self.s.fasa.step_reason_code()
        for j in range(1, WARM_STEPS):
            self.step(depth + j, j)
        self.s.fasa.reset_counters()
        start = time.perf_counter()
        for j in range(WARM_STEPS, WARM_STEPS + n):
            self.step(depth + j, j)
        seconds = time.perf_counter() - start
        self.look()
        sample = Sample(self.n * n / seconds, self.s.fasa.counters(), first, reason, self.s.fasa.layer_reason_codes())
        self.rewind(depth)  # which may turn FASA off
        return sample

    def prompt(self, p: FasaParams | None, depth: int, n: int) -> Sample:
        """A prefill of n tokens of sequence 0 behind `depth` cells, and the first decode step after it."""
        self.s.fasa.set_params(p)
        start = time.perf_counter()
        self.s.decode(self.tokens[depth : depth + n], depth)
        self.s.synchronize()
        seconds = time.perf_counter() - start
        self.step(depth + n, 0)
        first = time.perf_counter() - start - seconds
        self.look()
        self.rewind(depth)
        return Sample(n / seconds, {}, first, Reason.NONE, prompt_s=seconds)


# ---- the measurement ----


def _places(plan: Plan) -> list[tuple[int, str]]:
    """(no_kv_offload, mode) of every context; a cache that is not offloaded at all has no mode."""
    return [(nkvo, mode) for nkvo in plan.no_kv_offload for mode in (plan.modes if not nkvo else ("c",))]


def _contexts(model: str | os.PathLike, plan: Plan) -> Iterator[tuple[dict[str, Any], Session | FasaError]]:
    """(settings by llama-bench's names and n_parallel, session) of every context, one after another; a context that cannot be
    made comes as its error."""
    room = max(plan.n_gen, max(plan.n_prompt, default=0) + 1) + 8
    per_sequence = -(-(max(plan.depths) + room) // 256) * 256  # llama.cpp rounds up too
    for ngl in plan.n_gpu_layers:
        with Session(
            model, n_ctx=256, n_batch=plan.n_batch, n_ubatch=plan.n_ubatch, n_threads=plan.n_threads, n_gpu_layers=ngl
        ) as s:
            for (k, v), (nkvo, mode), n in itertools.product(plan.types, _places(plan), plan.n_parallel):
                found: Session | FasaError = s
                if vram() is not None:
                    s.free_context()
                before = vram()
                try:
                    s.reopen(
                        n_ctx=per_sequence * n, n_seq_max=n, type_k=k, type_v=v, no_kv_offload=bool(nkvo), mode=mode
                    )
                except FasaError as e:
                    found = e
                yield (
                    {
                        "n_gpu_layers": ngl,
                        "type_k": k,
                        "type_v": v,
                        "no_kv_offload": bool(nkvo),
                        "fasa_mode": mode,
                        "n_parallel": n,
                        "vram_before": before,
                    },
                    found,
                )


def bench(
    model: str | os.PathLike,
    plan: Plan,
    arms: Mapping[str, FasaParams],
    profile: Profile | None = None,
    progress: Report | None = None,
    emit: Callable[[list[Row]], None] | None = None,
) -> list[Row]:
    """Rows of dense and every FASA arm (name: settings), which take turns; `emit` gets those of a depth when they are there.

    Raises FasaError when the profile does not fit, as soon as an arm turns out dense at a depth from its min_context on (with all layers
    on GPUs: min_context_gpu), and when no step of the whole run was sparse.
    """
    plan.check(arms)
    profile = profile or Profile.load(model)
    common, rates = _model_setup(model, plan)
    weights, why = common.pop("weight_bytes"), common.pop("weight_note")
    rows: list[Row] = []
    depths, report = sorted(set(plan.depths)), progress or (lambda what, n, total: None)
    n_contexts = len(plan.n_gpu_layers) * len(plan.types) * len(_places(plan)) * len(plan.n_parallel)
    for i, (settings, s) in enumerate(_contexts(model, plan)):
        n, before, host = settings.pop("n_parallel"), settings.pop("vram_before"), settings["fasa_mode"] == "m"
        here: dict[str, FasaParams | None] = {
            **({} if host else {"dense": None}),
            **({} if settings["no_kv_offload"] else arms),
        }
        shared = {"n_parallel": n, "setup": common | settings}
        if isinstance(s, FasaError):
            note = f"not measured: {str(s).removeprefix(f'{model}: ')}"
            group = [Row(arm, d, plan.n_gen, note=note, params=p, **shared) for d in depths for arm, p in here.items()]
            _add(rows, group, emit)
            continue
        if not settings["no_kv_offload"]:
            s.fasa.set_profile(profile)
        b = Bench(s, n, plan.fill, report)
        for j, depth in enumerate(depths):
            group = _measure(b, plan, here, depth)
            for row in group:
                row.setup, row.weight_bytes = shared["setup"], weights
                row.copy_rate = None if host else rates[settings["n_gpu_layers"], settings["no_kv_offload"]]
                row.memory.vram_before, row.memory.vram_peak = before, b.vram_peak
                row.memory.take_rates(
                    s.fasa, max(depth, 1), s.n_ctx, n, (weights or 0) // s.fasa.model_info()["n_layer"]
                )
                row.note = "; ".join(filter(None, [row.note, why if row.n_gen and row.params is None else ""]))
            _add(rows, group, emit)
            report("benchmarking", i * len(depths) + j + 1, n_contexts * len(depths))
    if not any(r.sparse_share for r in rows):
        note, least = next((r.note, r.params.min_context_gpu) for r in reversed(rows) if r.params is not None)
        more = (
            f"; with all layers on a GPU use -d with {least} or more, or a smaller --fasa-min-context-gpu"
            if note == f"dense (n < {least})"
            else ""
        )
        raise FasaError(f"FASA was asked for and no step used it: {note}{more}")
    set_ratio_best(rows)
    return rows


def _add(rows: list[Row], group: list[Row], emit: Callable[[list[Row]], None] | None) -> None:
    rows += group
    if emit:
        emit(group)


def _measure(b: Bench, plan: Plan, arms: Mapping[str, FasaParams | None], depth: int) -> list[Row]:
    """The rows of one depth: prefill (of one sequence alone), then decode."""
    filled = b.fill(depth)
    before = b.prefill_s if filled == "prefill" else None
    rows = []
    for n_prompt in [p for p in plan.n_prompt if p and b.n == 1]:
        group = {arm: Row(arm, depth, 0, n_prompt, fill=filled, params=p) for arm, p in arms.items()}
        for arm, samples in _turns(arms, plan.repetitions, lambda p, warm: b.prompt(p, depth, n_prompt)).items():
            _times(group[arm], samples, before)
        rows += _ratios(group)
    group = {arm: Row(arm, depth, plan.n_gen, n_parallel=b.n, fill=filled, params=p) for arm, p in arms.items()}
    last: dict[str, Sample] = {}

    def generate(p: FasaParams | None, warm: bool) -> Sample:
        sample = b.generate(p, depth, min(plan.n_gen, 4) if warm else plan.n_gen)
        if warm and p is not None and not p.least_above(depth, sample.reason) and not sample.counters["steps_sparse"]:
            raise FasaError(
                f"FASA was asked for and no step at depth {depth} used it: {sample.reason.text}{dense_layers(sample.layer_reasons, ': ')}"
            )
        return sample

    for arm, samples in _turns(arms, plan.repetitions, generate).items():
        row = group[arm]
        _times(row, samples, before)
        _count(row, samples, b)
    return rows + _ratios(group)


def _turns(
    arms: Mapping[str, FasaParams | None], repetitions: int, run: Callable[[FasaParams | None, bool], Sample]
) -> dict[str, list[Sample]]:
    """`repetitions` samples of every arm, the arms taking turns; a first round, which is not kept, warms up."""
    kept: dict[str, list[Sample]] = {arm: [] for arm in arms}
    for r in range(-1, repetitions):
        for arm, p in arms.items():
            sample = run(p, r < 0)
            if r >= 0:
                kept[arm].append(sample)
    return kept


def _times(row: Row, samples: list[Sample], prefill_s: float | None) -> None:
    row.samples_ts = [x.speed for x in samples]
    row.first_step_ms = 1000 * statistics.fmean(x.first_s for x in samples)
    if prefill_s is not None:
        row.ttft_ms = 1000 * (prefill_s + statistics.fmean(x.prompt_s + x.first_s for x in samples))


def _count(row: Row, samples: list[Sample], b: Bench) -> None:
    """Bytes and tokens of a decode row, from FASA's counters; what ran dense read all rows of its sequence."""
    row_bytes = samples[0].counters["bytes_kv"] / b.s.n_ctx  # K and V of one cell, all layers
    all_rows = row_bytes * (row.n_depth + WARM_STEPS + (row.n_gen + 1) / 2)
    if row.params is None:
        row.kv_bytes = all_rows
        return
    steps = row.n_gen * len(samples)  # of a batch of n tokens each
    c = merge([x.counters for x in samples])
    row.memory.take_counters(c, steps)
    executions = (c["layers_sparse"] + c["layers_dense"]) / max(c["steps_sparse"], 1) * steps  # layers x steps
    sparse = c["layers_sparse"] / max(executions, 1)
    row.sparse_share = c["steps_sparse"] / steps
    row.kv_bytes = (c["bytes_fac"] + c["bytes_tip"]) / (steps * row.n_parallel) + (1 - sparse) * all_rows
    if c["lists"]:
        row.tokens_attended = c["tokens_attended"] / c["lists"]
    if c["steps_sparse"] < steps:
        reason = next(x.reason for x in samples)
        least = row.params.least_above(row.n_depth, reason)
        row.note = f"dense (n < {least})" if least else f"dense ({reason.text})"
        if c["steps_sparse"]:
            row.note = f"{steps - c['steps_sparse']} of {steps} steps {row.note}"
    elif c["layers_dense"]:
        row.note = dense_layers(samples[-1].layer_reasons)


def dense_layers(reasons: Sequence[Reason], before: str = "") -> str:
    """How many attention layers are dense in a sparse step, and why; "" when none is."""
    why = Counter(x.text for x in reasons if x not in (Reason.NONE, Reason.NO_CACHE))
    n = sum(x != Reason.NO_CACHE for x in reasons)
    return (
        f"{before}{sum(why.values())} of {n} layers dense ({'; '.join(f'{k}: {x}' for x, k in sorted(why.items()))})"
        if why
        else ""
    )


def _ratios(group: Mapping[str, Row]) -> list[Row]:
    for row in group.values():
        row.ratio = row.avg_ts / group["dense"].avg_ts if "dense" in group else None
    return list(group.values())


def set_ratio_best(rows: Sequence[Row]) -> None:
    """Fill ratio_best: a row's speed over that of the fastest dense row with the same test, sequences and layers on the GPU."""
    key = lambda r: (r.test, r.n_parallel, r.setup.get("n_gpu_layers"))
    best: dict[Any, float] = {}
    for r in rows:
        if r.params is None and r.samples_ts:
            best[key(r)] = max(best.get(key(r), 0.0), r.avg_ts)
    for r in rows:
        r.ratio_best = r.avg_ts / best[key(r)] if r.samples_ts and key(r) in best else None
