"""Timing in one context: bring its sequences to a depth, and time an arm from there."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import FasaError
from ..params import FasaParams
from ..reasons import Reason
from ..session import Session
from .traffic import vram

RANDOM_FILL_FROM = 2048  # tokens of depth from which a cache is filled at random
WARM_STEPS = 3  # untimed decode steps of a repetition: CUDA records a graph when it comes again
Progress = Callable[[str, int, int], None]  # what, done, total


@dataclass
class Sample:
    """One repetition of one arm."""

    speed: float  # tokens/s over all sequences
    counters: dict[str, int]  # FASA's
    first_s: float  # of the first decode step
    reason: Reason  # why that step was dense
    layer_reasons: Sequence[Reason] = ()  # why layers were dense after the last step
    prompt_s: float = 0.0  # of the prefill that was timed


class Timer:
    """One context with n sequences. `how`: prefill, random or auto, as BenchSettings.fill."""

    vram_peak: int | None = None  # the most bytes in use on the GPUs that were seen

    def __init__(self, s: Session, n: int, how: str, progress: Progress) -> None:
        self.s, self.n, self.how, self.progress = s, n, how, progress
        self.in_cache = 0  # tokens that sequence 0 has by prefill
        self.prefill_s = 0.0  # seconds that took
        self.tokens = np.random.default_rng(0).integers(0, s.n_vocab, s.n_ctx // n).tolist()

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
            self.progress(f"prefilling {depth}", at + len(part), depth)
        self.s.synchronize()
        self.prefill_s += time.perf_counter() - start
        self.in_cache = depth

    def rewind(self, depth: int) -> None:
        """Forget what comes after `depth`. A recurrent memory cannot: it is filled again."""
        try:
            for seq in range(self.n):
                self.s.remove(seq, depth)
        except FasaError:
            self.in_cache = 0
            self.fill(depth)

    def look(self) -> None:
        """Remember the most GPU memory in use. Kernels keep what they take, so nothing is missed between two looks."""
        self.vram_peak = max(filter(None, (self.vram_peak, vram())), default=None)

    def step(self, pos: int, j: int) -> None:
        """One token for every sequence, tokens that differ."""
        self.s.decode_batch(
            [(1 + (j * 7919 + seq * 104729) % (self.s.n_vocab - 1), pos, seq, True) for seq in range(self.n)]
        )
        self.s.synchronize()

    def generate(self, p: FasaParams | None, depth: int, n: int) -> Sample:
        """n timed decode steps after `depth` cells and WARM_STEPS; the first of these derives the dominant keys and
        builds the graph."""
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

    def empty_step(self, n: int) -> float:
        """Seconds of a dense decode step with an empty cache: the mean of n, after WARM_STEPS. Leaves it empty."""
        self.s.fasa.set_params(None)
        self.s.clear()
        self.in_cache = 0
        for j in range(WARM_STEPS):
            self.step(j, j)
        start = time.perf_counter()
        for j in range(WARM_STEPS, WARM_STEPS + n):
            self.step(j, j)
        seconds = (time.perf_counter() - start) / n
        self.s.clear()
        return seconds

    def bare_step(self, depth: int, n: int, repetitions: int) -> float:
        """Seconds of a decode step after `depth` cells without attention: the mean of n in each repetition."""
        self.s.fasa.set_params(None)
        seconds = 0.0
        with self.s.fasa.without_attention():
            for _ in range(repetitions):
                for j in range(WARM_STEPS):
                    self.step(depth + j, j)
                start = time.perf_counter()
                for j in range(WARM_STEPS, WARM_STEPS + n):
                    self.step(depth + j, j)
                seconds += time.perf_counter() - start
                self.rewind(depth)
        return seconds / (n * repetitions)

    def prompt(self, p: FasaParams | None, depth: int, n: int) -> Sample:
        """A prefill of n tokens of sequence 0 after `depth` cells, and the first decode step after it."""
        self.s.fasa.set_params(p)
        self.s.fasa.reset_counters()
        start = time.perf_counter()
        self.s.decode(self.tokens[depth : depth + n], depth)
        self.s.synchronize()
        seconds = time.perf_counter() - start
        counters, reason = self.s.fasa.counters(), self.s.fasa.prefill_reason_code()
        now = time.perf_counter()
        self.step(depth + n, 0)
        first = time.perf_counter() - now
        self.look()
        self.rewind(depth)
        return Sample(n / seconds, counters, first, reason, prompt_s=seconds)


def take_turns(
    arms: Mapping[str, FasaParams | None], repetitions: int, run: Callable[[FasaParams | None, bool], Sample]
) -> dict[str, list[Sample]]:
    """`repetitions` samples of every arm, the arms taking turns. run(settings, warm) runs one.

    A first round, which is not kept, warms up.
    """
    kept: dict[str, list[Sample]] = {arm: [] for arm in arms}
    for r in range(-1, repetitions):
        for arm, p in arms.items():
            sample = run(p, r < 0)
            if r >= 0:
                kept[arm].append(sample)
    return kept
