"""Speed: dense and FASA taking turns in one process, one context, one library. What to measure, and the measurement.

Results have llama-bench's names. report.py prints and draws them; docs/reference/bench.md explains every column.
"""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import runtime
from ..counters import bytes_read
from ..errors import FasaError
from ..gguf.cache_types import cache_type
from ..gguf.file import U32, GGUFFile
from ..memory.placement import why_not_host
from ..params import FasaParams
from ..profile.find import require_profile
from ..profile.profile import Profile
from ..reasons import Reason
from ..runtime.machine import Machine
from ..session import Session
from .results import Result, dense_layers, set_ratio_best, set_ratios
from .timing import Progress, Sample, Timer, take_turns
from .traffic import PLAIN_READ_FROM, copy_rates, merge, read_rate, vram, weight_bytes

Emit = Callable[[list[Result]], None]


@dataclass(frozen=True)
class BenchSettings:
    """What to measure: every combination of the lists.

    There is one context for every (n_gpu_layers, types, no_kv_offload, mode, n_parallel), one at a time.
    """

    depths: Sequence[int] = (0, 4096, 8192)  # tokens in the cache of every sequence
    n_gen: int = 32  # tokens per sequence and repetition; 0: prompts only
    n_prompt: Sequence[int] = (512,)  # tokens of the timed prefills; empty or 0: none
    n_parallel: Sequence[int] = (1,)  # sequences that decode together
    n_gpu_layers: Sequence[int] = (0,)
    n_cpu_moe: int = 0  # layers, the first ones, whose experts stay on the CPU
    types: Sequence[tuple[str, str]] = (("f16", "f16"),)  # of the K and the V cache
    no_kv_offload: Sequence[int] = (0,)  # 1: the cache in host memory; dense only
    modes: Sequence[str] = ("device",)  # where K and V lie: on the device, or in pinned host memory (FASA only)
    repetitions: int = 5
    n_threads: int = 0  # 0: the physical cores that this process may use
    n_batch: int = 2048
    n_ubatch: int = 512
    attention: bool = False  # time steps without attention too, which say what it adds
    fill: str = "auto"  # prefill, random, or auto: random from RANDOM_FILL_FROM on

    def check(self, arms: Mapping[str, FasaParams]) -> BenchSettings:
        """Returns self, or raises FasaError in one sentence: values out of range, or nothing that FASA could run in."""
        if not self.depths or min(self.depths) < 0 or self.n_gen < 0 or self.repetitions < 1:
            raise FasaError("-d, -n and -r: expected depths and tokens from 0, and at least 1 repetition")
        if not self.n_gen and not max(self.n_prompt, default=0):
            raise FasaError("-n 0 and -p 0: nothing to measure; give tokens to generate (-n), a prompt (-p), or both")
        if not self.n_gen and max(self.n_parallel, default=1) > 1:
            raise FasaError("-n 0 and -np: a prompt is timed in one sequence alone; give -np 1, or tokens to generate")
        if not self.n_gen and all(p.prefill == "off" for p in arms.values()):
            raise FasaError(
                "-n 0 and prefill off: every prompt would be dense; give --fasa-prefill auto, or tokens to decode (-n)"
            )
        if min(self.n_parallel, default=0) < 1 or min(self.n_prompt, default=0) < 0:
            raise FasaError("-np and -p: expected at least 1 sequence, and prompts from 0 tokens")
        if self.fill not in ("auto", "prefill", "random"):
            raise FasaError(f"--fill {self.fill!r}: expected auto, prefill or random")
        for name in itertools.chain(*self.types):
            cache_type(name)
        if not self.modes or not set(self.modes) <= {"device", "host"}:
            raise FasaError(
                "--fasa-mode: bench measures the modes that it is given; expected device, host or both, "
                f"found {','.join(self.modes)}"
            )
        if all(self.no_kv_offload):
            raise FasaError("-nkvo 1 is measured dense only, and FASA has nothing to run in; give -nkvo 0,1")
        for arm, p in arms.items():
            if self.n_gen and max(self.depths) < p.min_context:
                raise FasaError(
                    f"{arm}: every depth of -d is below min_context, and every step would be dense; use -d with "
                    f"{p.min_context} or more, or a smaller --fasa-min-context"
                )
        if "host" in self.modes:
            why = why_not_host(runtime.devices.cuda_devices(), min(self.n_gpu_layers, key=bool), False)
            if why:
                raise FasaError(why)
        return self

    def places(self) -> list[tuple[int, str]]:
        """(no_kv_offload, mode) of every context; a cache that is not offloaded at all has no mode."""
        return [(nkvo, mode) for nkvo in self.no_kv_offload for mode in (self.modes if not nkvo else ("device",))]

    def per_sequence(self) -> int:
        """Cells of a sequence: the greatest depth, what is decoded after it, and llama.cpp's padding."""
        room = max(self.n_gen, max(self.n_prompt, default=0) + 1) + 8
        return -(-(max(self.depths) + room) // 256) * 256


# ---- model, machine and contexts ----


@dataclass
class _Subject:
    """What all contexts of a run share."""

    config: dict[str, Any]  # llama-bench's fields of model and machine
    weight_bytes: int | None  # that a step reads; None: not known
    weight_note: str  # why not, and why a rate is missing
    rates: dict[tuple[int, int], float | None]  # bytes/s by (n_gpu_layers, no_kv_offload)

    @classmethod
    def read(cls, model: str | os.PathLike, settings: BenchSettings) -> _Subject:
        gguf, machine = GGUFFile(model), Machine.here(settings.n_threads)
        n_bytes, why = weight_bytes(gguf)
        n_layer = gguf.get(f"{gguf.arch}.block_count", U32, default=0)
        config = {
            "model_size": sum(t.n_bytes for t in gguf.tensors),
            "cpu_info": machine.cpu,
            "gpu_info": machine.gpu,
            "n_threads": machine.n_threads,
            "n_batch": settings.n_batch,
            "n_ubatch": settings.n_ubatch,
            "flash_attn": 1,
        }
        rates, unmeasured = copy_rates(n_layer, settings.n_gpu_layers, settings.no_kv_offload, settings.n_threads)
        return cls(config, n_bytes, "; ".join(filter(None, [why, unmeasured])), rates)


@dataclass
class _Opened:
    """One context: its session, or the error for which it could not be made."""

    config: dict[str, Any]  # by llama-bench's names
    n_parallel: int
    vram_before: int | None  # bytes in use on the GPUs before it was made
    session: Session | FasaError


def _contexts(model: str | os.PathLike, settings: BenchSettings) -> Iterator[_Opened]:
    """Every context, one after another."""
    for ngl in settings.n_gpu_layers:
        with Session(
            model,
            n_ctx=256,
            n_batch=settings.n_batch,
            n_ubatch=settings.n_ubatch,
            n_threads=settings.n_threads,
            n_gpu_layers=ngl,
            n_cpu_moe=settings.n_cpu_moe,
        ) as s:
            for (k, v), (nkvo, mode), n in itertools.product(settings.types, settings.places(), settings.n_parallel):
                found: Session | FasaError = s
                if vram() is not None:
                    s.free_context()
                before = vram()
                n_ctx = settings.per_sequence() * n
                try:
                    s.reopen(n_ctx=n_ctx, n_seq_max=n, type_k=k, type_v=v, no_kv_offload=bool(nkvo), mode=mode)
                except FasaError as e:
                    found = e
                config = {
                    "n_gpu_layers": ngl,
                    "n_cpu_moe": settings.n_cpu_moe,
                    "type_k": k,
                    "type_v": v,
                    "no_kv_offload": bool(nkvo),
                    "fasa_mode": mode,
                }
                yield _Opened(config, n, before, found)


# ---- the measurement ----


def bench(
    model: str | os.PathLike,
    settings: BenchSettings,
    arms: Mapping[str, FasaParams],
    profile: Profile | None = None,
    progress: Progress | None = None,
    emit: Emit | None = None,
) -> list[Result]:
    """Results of dense and every FASA arm (name: settings), which take turns; `emit` gets each depth's when it is done.

    Raises FasaError when the profile does not fit, as soon as an arm is dense at a depth from its min_context on (with
    all layers on GPUs: min_context_gpu), and when no step of the whole run was sparse.
    """
    settings.check(arms)
    profile = profile or require_profile(model)
    subject = _Subject.read(model, settings)
    results: list[Result] = []
    depths = sorted(set(settings.depths))
    n_contexts = len(settings.n_gpu_layers) * len(settings.types) * len(settings.places()) * len(settings.n_parallel)
    total, done = n_contexts * len(depths), 0
    for opened in _contexts(model, settings):
        for group in _measure_context(opened, settings, depths, arms, profile, subject, progress, str(model)):
            results += group
            if emit:
                emit(group)
            done += 1
            if progress and not isinstance(opened.session, FasaError):
                progress("benchmarking", done, total)
        if isinstance(opened.session, FasaError):
            done += len(depths) - 1
    _check_used(results)
    set_ratio_best(results)
    return results


def _measure_context(
    opened: _Opened,
    settings: BenchSettings,
    depths: Sequence[int],
    arms: Mapping[str, FasaParams],
    profile: Profile,
    subject: _Subject,
    progress: Progress | None,
    model: str,
) -> Iterator[list[Result]]:
    """The results of one context, depth by depth; one group for all depths when it could not be made."""
    config, s, n = subject.config | opened.config, opened.session, opened.n_parallel
    is_host, is_offloaded = config["fasa_mode"] == "host", not config["no_kv_offload"]
    here: dict[str, FasaParams | None] = {**({} if is_host else {"dense": None}), **(arms if is_offloaded else {})}
    if isinstance(s, FasaError):
        note = f"not measured: {str(s).removeprefix(f'{model}: ')}"
        n_prompt = 0 if settings.n_gen else max(settings.n_prompt)
        yield [
            Result(arm, d, settings.n_gen, n_prompt, note=note, params=p, n_parallel=n, config=config)
            for d in depths
            for arm, p in here.items()
        ]
        return
    if is_offloaded:
        s.fasa.set_profile(profile)
        here = {arm: p and s.fasa.measured(p) for arm, p in here.items()}
    timer = Timer(s, n, settings.fill, progress or (lambda what, done, total: None))
    has_read_rate = (
        settings.n_gen and not is_host and max(depths) >= PLAIN_READ_FROM and read_rate(s.fasa, 1) is not None
    )
    base_s = timer.empty_step(settings.n_gen) if has_read_rate else None
    for depth in depths:
        group = _measure(timer, settings, here, depth)
        for r in group:
            r.config, r.weight_bytes = config, subject.weight_bytes
            r.copy_rate = None if is_host else subject.rates[config["n_gpu_layers"], int(config["no_kv_offload"])]
            r.memory.vram_before, r.memory.vram_peak = opened.vram_before, timer.vram_peak
            layer_bytes = (subject.weight_bytes or 0) // s.fasa.model_info()["n_layer"]
            unmeasured = r.memory.take_rates(s.fasa, max(depth, 1), s.n_ctx, n, layer_bytes)
            r.note = "; ".join(filter(None, [r.note, unmeasured]))
            if r.n_gen and r.params is None:
                if base_s is not None and depth >= PLAIN_READ_FROM:
                    r.base_s, r.read_rate = base_s, read_rate(s.fasa, depth)
                r.note = "; ".join(filter(None, [r.note, subject.weight_note, r.slow_read]))
        yield group


def _check_used(results: Sequence[Result]) -> None:
    """Raises FasaError when no step was sparse."""
    if any(r.sparse_share for r in results):
        return
    note, params = next((r.note, r.params) for r in reversed(results) if r.params is not None)
    least, more = max(params.min_context_gpu, 0), ""
    if note == f"dense (n < {least})":
        more = f"; with all layers on a GPU use -d with {least} or more, or a smaller --fasa-min-context-gpu"
    raise FasaError(f"FASA was asked for and no step used it: {note}{more}")


def _measure(timer: Timer, settings: BenchSettings, arms: Mapping[str, FasaParams | None], depth: int) -> list[Result]:
    """The results of one depth: prefill (of one sequence alone), then decode."""
    filled = timer.fill(depth)
    before = timer.prefill_s if filled == "prefill" else None
    prompts = [n for n in settings.n_prompt if n and timer.n == 1]
    results = [r for n in prompts for r in _measure_prompt(timer, settings, arms, depth, n, filled, before)]
    if not settings.n_gen:
        return results
    group = {
        arm: Result(arm, depth, settings.n_gen, n_parallel=timer.n, fill=filled, params=p) for arm, p in arms.items()
    }

    def generate(p: FasaParams | None, warm: bool) -> Sample:
        sample = timer.generate(p, depth, min(settings.n_gen, 4) if warm else settings.n_gen)
        if warm and p is not None and not p.least_above(depth, sample.reason) and not sample.counters["steps_sparse"]:
            why = f"{sample.reason.text}{dense_layers(sample.layer_reasons, ': ')}"
            raise FasaError(f"FASA was asked for and no step at depth {depth} used it: {why}")
        return sample

    bare_s = timer.bare_step(depth, settings.n_gen, settings.repetitions) if settings.attention else None
    for arm, samples in take_turns(arms, settings.repetitions, generate).items():
        group[arm].bare_s = bare_s
        _set_times(group[arm], samples, before)
        _set_bytes(group[arm], samples)
    return results + set_ratios(group)


def _measure_prompt(
    timer: Timer,
    settings: BenchSettings,
    arms: Mapping[str, FasaParams | None],
    depth: int,
    n_prompt: int,
    filled: str,
    before: float | None,
) -> list[Result]:
    """The results of one prefill of n_prompt tokens."""
    group = {arm: Result(arm, depth, 0, n_prompt, fill=filled, params=p) for arm, p in arms.items()}

    def process(p: FasaParams | None, warm: bool) -> Sample:
        return timer.prompt(p, depth, min(n_prompt, settings.n_batch) if warm else n_prompt)

    for arm, mine in take_turns(arms, settings.repetitions, process).items():
        _set_times(group[arm], mine, before)
        _set_tiles(group[arm], merge([x.counters for x in mine]), mine[-1].reason)
    return set_ratios(group)


def _set_tiles(r: Result, c: Mapping[str, int], reason: Reason) -> None:
    """What a prompt's tiles attended, or why all of them were dense."""
    sparse, dense = c["tiles_sparse"], c["tiles_dense"]
    if not sparse:
        r.note = f"prompt dense: {reason.text}" if r.params is not None and reason != Reason.PREFILL_OFF else ""
        return
    r.sparse_share = sparse / (sparse + dense)
    r.note = f"{100 * c['prefill_attended'] / c['prefill_visible']:.0f}% of the cells attended"
    if dense:
        r.note += f", {dense} of {sparse + dense} tiles dense"


def _set_times(r: Result, samples: list[Sample], prefill_s: float | None) -> None:
    r.samples_ts = [x.speed for x in samples]
    r.first_step_ms = 1000 * statistics.fmean(x.first_s for x in samples)
    if prefill_s is not None:
        r.ttft_ms = 1000 * (prefill_s + statistics.fmean(x.prompt_s + x.first_s for x in samples))


def _set_bytes(r: Result, samples: list[Sample]) -> None:
    """Bytes and tokens of a decode result, from FASA's counters; a dense layer reads the cells that its mask shows."""
    steps = r.n_gen * len(samples)  # of a batch of n tokens each
    c = merge([x.counters for x in samples])
    r.kv_bytes = bytes_read(c) / (steps * r.n_parallel)
    if r.params is None:
        return
    r.memory.take_counters(c, steps)
    r.sparse_share = c["steps_sparse"] / steps
    if c["lists"]:
        r.tokens_attended = c["tokens_attended"] / c["lists"]
    if c["steps_sparse"] < steps:
        reason = samples[0].reason
        least = r.params.least_above(r.n_depth, reason)
        r.note = f"dense (n < {least})" if least else f"dense ({reason.text})"
        if c["steps_sparse"]:
            r.note = f"{steps - c['steps_sparse']} of {steps} steps {r.note}"
    elif c["layers_dense"]:  # of sparse steps, since all were
        r.note = dense_layers(samples[-1].layer_reasons)
