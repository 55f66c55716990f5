"""What `bench` measures of memory: the GPU's by the driver's count, pinned host memory, and what comes from there over PCIe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .. import runtime


@dataclass
class Figures:
    """Of one row; None: not known, or there is no GPU."""

    vram_before: int | None = (
        None  # bytes in use on all CUDA devices with the model loaded, before its context was made
    )
    vram_peak: int | None = None  # the most that was in use after a repetition
    pinned: int | None = None  # bytes of K and V in pinned host memory
    row_cache: int | None = None  # bytes of device memory that keep attended rows
    fetched: float | None = None  # bytes of rows over PCIe per decode step
    staged: float | None = None  # bytes of whole caches over PCIe per decode step, for dense layers
    reused: float | None = None  # share of the attended rows that the row cache had
    copy_rate: float | None = None  # bytes/s that the device takes from the pinned cache, as one copy
    gather_rate: float | None = None  # as random rows, behind a layer's weights, by a kernel that does nothing else
    fetch_rate: float | None = None  # and by the one that fetches the attended ones

    def floor_s(self) -> float | None:
        """Seconds that the bytes of a step take over PCIe at the measured rates: rows by the gather's, staged ones by the copy's."""
        if self.fetched is None or not self.gather_rate or not self.copy_rate:
            return None
        return self.fetched / self.gather_rate + (self.staged or 0.0) / self.copy_rate

    def take_counters(self, c: Mapping[str, int], steps: int) -> None:
        """Traffic from FASA's counters over `steps` decode steps (bytes_kv_host and bytes_row_cache are sizes, not sums)."""
        if not c.get("bytes_kv_host"):
            return
        self.pinned, self.row_cache = c["bytes_kv_host"], c["bytes_row_cache"]
        self.fetched, self.staged = c["bytes_fetched"] / steps, c["bytes_staged"] / steps
        rows = c["rows_fetched"] + c["rows_reused"]
        self.reused = c["rows_reused"] / rows if rows else None

    def take_rates(
        self, context: runtime.context.Context, n_cells: int, n_ctx: int, n_parallel: int, layer_bytes: int
    ) -> None:
        """PCIe rates for as many rows of the first n_cells as a token fetched, each layer behind layer_bytes of weights. n_ctx: cells of all
        sequences."""
        if self.fetched and self.pinned:
            rows = self.fetched / n_parallel / (self.pinned / n_ctx)
            self.copy_rate, self.gather_rate, self.fetch_rate = context.host_rates(
                n_cells, max(1, round(rows)), layer_bytes
            )


def vram() -> int | None:
    """Bytes in use on all CUDA devices, by the driver's count: those of other processes too. None: there is no such device."""
    devices = runtime.devices.cuda_devices()
    return sum(total - free for free, total in map(runtime.devices.device_memory, devices)) if devices else None


def merge(samples: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Counters of several repetitions: sums, but of sizes the largest."""
    sizes = ("bytes_k_dom", "bytes_kv", "bytes_kv_host", "bytes_row_cache")
    return {k: (max if k in sizes else sum)(x[k] for x in samples) for k in samples[0]}
