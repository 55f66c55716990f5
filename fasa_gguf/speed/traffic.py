"""What `bench` measures of memory: bytes that a step must read, copy rates, the GPU's memory, and traffic over PCIe."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .. import runtime
from ..errors import FasaError
from ..gguf.file import U16, U32, GGUFFile
from ..runtime.devices import Device

PLAIN_READ_FROM = 1024  # tokens of depth from which dense attention is compared with a plain read of the cache
COPY_BYTES = 512 << 20  # of the copy that gives a device's rate: beyond its caches
SIZES = ("bytes_k_dom", "bytes_kv", "bytes_kv_host", "bytes_row_cache")  # counters that are sizes, not sums


# ---- weights and rates ----


def weight_bytes(model: GGUFFile) -> tuple[int | None, str]:
    """(bytes of weights that one decode step reads, "" or why that is not known).

    All tensors count, except that of an embedding only a row is read, unless it is the output matrix too.
    """
    if model.get(f"{model.arch}.expert_count", U32, default=0):
        return None, "mixture of experts: bytes of weights not counted"
    if model.get("split.count", U16, default=1) > 1:
        return None, "model in several files: bytes of weights not counted"
    tied = not any(t.name == "output.weight" for t in model.tensors)
    skip = {"per_layer_token_embd.weight"} | (set() if tied else {"token_embd.weight"})
    return sum(t.n_bytes for t in model.tensors if t.name not in skip), ""


def one_device(n_layer: int, n_gpu_layers: int, no_kv_offload: int, devices: Sequence[Device]) -> str | None:
    """The device that holds all weights and the whole cache; None when there are several."""
    gpus = [d.name for d in devices if d.is_gpu]
    if not gpus or n_gpu_layers == 0:
        return "CPU"
    whole = n_gpu_layers < 0 or n_gpu_layers > n_layer  # the output matrix is one layer more
    return gpus[0] if len(gpus) == 1 and whole and not no_kv_offload else None


def copy_rates(
    n_layer: int, n_gpu_layers: Sequence[int], no_kv_offload: Sequence[int], n_threads: int
) -> tuple[dict[tuple[int, int], float | None], str]:
    """(bytes/s that the one device copies by (n_gpu_layers, no_kv_offload), "" or why one could not be measured).

    None where there are several devices, or memory is short for the copy.
    """
    devices, why = runtime.devices.devices(), ""
    rates: dict[tuple[int, int], float | None] = {}
    for ngl, nkvo in itertools.product(n_gpu_layers, no_kv_offload):
        device = one_device(n_layer, ngl, nkvo, devices)
        try:
            rates[ngl, nkvo] = runtime.devices.copy_rate(device, COPY_BYTES, n_threads) if device else None
        except FasaError as e:
            rates[ngl, nkvo], why = None, f"copy rate not measured: {e}"
    return rates, why


def read_rate(context: runtime.context.Context, n_cells: int) -> float | None:
    """Bytes/s at which the context's threads read n_cells cells of its cache; None: it is not in host memory."""
    try:
        return context.read_rate(n_cells)
    except FasaError:
        return None


# ---- FASA-M ----


@dataclass
class Figures:
    """Of one result; None: not known, or there is no GPU. vram_before and vram_peak count all CUDA devices."""

    vram_before: int | None = None  # bytes in use with the model loaded, before its context was made
    vram_peak: int | None = None  # the most that was in use after a repetition
    pinned: int | None = None  # bytes of K and V in pinned host memory
    row_cache: int | None = None  # bytes of device memory that keep attended rows
    fetched: float | None = None  # bytes of rows over PCIe per decode step
    staged: float | None = None  # bytes of whole caches over PCIe per decode step, for dense layers
    reused: float | None = None  # share of the attended rows that the row cache had
    copy_rate: float | None = None  # bytes/s that the device takes from the pinned cache, as one copy
    gather_rate: float | None = None  # as random rows, after a layer's weights, by a kernel that does nothing else
    fetch_rate: float | None = None  # and by the kernel that fetches the attended rows

    def floor_s(self) -> float | None:
        """Seconds that a step's bytes take over PCIe: rows at the gather's rate, staged ones at the copy's."""
        if self.fetched is None or not self.gather_rate or not self.copy_rate:
            return None
        return self.fetched / self.gather_rate + (self.staged or 0.0) / self.copy_rate

    def take_counters(self, c: Mapping[str, int], steps: int) -> None:
        """Traffic from FASA's counters over `steps` decode steps (bytes_kv_host and bytes_row_cache are sizes)."""
        if not c.get("bytes_kv_host"):
            return
        self.pinned, self.row_cache = c["bytes_kv_host"], c["bytes_row_cache"]
        self.fetched, self.staged = c["bytes_fetched"] / steps, c["bytes_staged"] / steps
        rows = c["rows_fetched"] + c["rows_reused"]
        self.reused = c["rows_reused"] / rows if rows else None

    def take_rates(
        self, context: runtime.context.Context, n_cells: int, n_ctx: int, n_parallel: int, layer_bytes: int
    ) -> str:
        """PCIe rates for as many rows of the first n_cells as a token fetched. Returns "", or why there are none.

        Each layer reads layer_bytes of weights first. n_ctx: cells of all sequences.
        """
        if not self.fetched or not self.pinned:
            return ""
        rows = self.fetched / n_parallel / (self.pinned / n_ctx)
        try:
            rates = context.host_rates(n_cells, max(1, round(rows)), layer_bytes)
        except FasaError as e:  # the results are there: device memory may be short for this probe alone
            return f"PCIe rates not measured: {e}"
        self.copy_rate, self.gather_rate, self.fetch_rate = rates
        return ""


def vram() -> int | None:
    """Bytes in use on all CUDA devices by the driver's count, other processes' too. None: there is no such device."""
    devices = runtime.devices.cuda_devices()
    return sum(total - free for free, total in map(runtime.devices.device_memory, devices)) if devices else None


def merge(samples: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Counters of several repetitions: sums, but of sizes the largest."""
    return {k: (max if k in SIZES else sum)(x[k] for x in samples) for k in samples[0]}
