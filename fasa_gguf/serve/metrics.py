"""/metrics: the engine's counts and FASA's counters, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from ..counters import COUNTERS
from .engine import Engine
from .stats import Histogram

PREFIX = "fasa_gguf_"


def _histogram(name: str, help: str, h: Histogram) -> Any:
    family = HistogramMetricFamily(PREFIX + name, help)
    total, buckets = 0, []
    for bound, count in zip([*map(str, h.bounds), "+Inf"], h.counts, strict=True):
        total += count
        buckets.append((bound, total))
    family.add_metric([], buckets, h.sum)
    return family


class _Collector:
    """Reads the engine when it is asked."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Any]:
        e, s = self._engine, self._engine.stats
        requests = CounterMetricFamily(PREFIX + "requests", "requests that ended", labels=["outcome"])
        for outcome, n in s.requests.items():
            requests.add_metric([outcome], n)
        yield requests
        hits = CounterMetricFamily(PREFIX + "prefix_copies", "prefixes copied into a slot", labels=["source"])
        for source, n in s.prefix_hits.items():
            hits.add_metric([source], n)
        yield hits
        for name, help, n in (
            ("prompt_tokens", "tokens of prompts that were evaluated", s.prompt_tokens),
            ("reused_tokens", "tokens of prompts that were in a cache", s.reused_tokens),
            ("completion_tokens", "tokens written", s.written_tokens),
            ("steps", "decode steps", s.steps),
            ("step_sequences", "sequences in decode steps; by steps: how many are decoded together", s.step_sequences),
        ):
            yield CounterMetricFamily(PREFIX + name, help, n)
        for name, help, n in (
            ("slots", "sequences that are decoded at once at most", len(e.slots)),
            ("slots_busy", "slots with a request", e.n_busy),
            ("requests_waiting", "requests without a slot", e.n_waiting),
            ("prefix_cache_bytes", "host memory of the prefix cache", e.prefixes.n_bytes),
            ("prefix_cache_entries", "states in the prefix cache", len(e.prefixes)),
        ):
            yield GaugeMetricFamily(PREFIX + name, help, n)
        yield _histogram("first_token_seconds", "from the request to its first token", s.first_token)
        yield _histogram("step_seconds", "a decode step", s.step_seconds)
        found = e.session.fasa.counters()
        for row in COUNTERS:
            kind = GaugeMetricFamily if row.counted_by == "memory" else CounterMetricFamily
            yield kind(f"fasa_{row.name}", f"{row.help} [{row.unit}]", found[row.name])


class Metrics:
    """The page of one engine."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Collector(engine))

    def page(self) -> bytes:
        return bytes(generate_latest(self._registry))
