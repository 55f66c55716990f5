"""What the engine counts about itself; written by its thread, read by any."""

from __future__ import annotations

from bisect import bisect_left

OUTCOMES = ("stop", "length", "cancelled", "failed")


class Histogram:
    """Values in buckets; bounds are the upper ends, and one more bucket is for all above."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Stats:
    """Counts since the server started."""

    def __init__(self) -> None:
        self.requests = dict.fromkeys(OUTCOMES, 0)
        self.prompt_tokens = self.reused_tokens = self.written_tokens = 0
        self.steps = self.step_sequences = 0
        self.prefix_hits = {"slot": 0, "memory": 0}
        self.first_token = Histogram((0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120))
        self.step_seconds = Histogram((0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2))

    def first(self, seconds: float) -> None:
        self.first_token.add(seconds)

    def step(self, n_sequences: int, seconds: float) -> None:
        self.steps += 1
        self.step_sequences += n_sequences
        self.step_seconds.add(seconds)
