"""The settings of a llama.cpp context: one object for Session, the memory plan, quality and speed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import FasaError
from ..gguf.cache_types import cache_type
from ..params import INT_MAX, parse_mode
from .cpus import usable_cores


def thread_count(n_threads: int = 0) -> int:
    """The number of threads that are really used. 0: one for each physical core that this process may use."""
    return n_threads or usable_cores()


_RANGES = {  # of the numbers of a context, both ends included
    "n_ctx": (0, INT_MAX),
    "n_batch": (1, INT_MAX),
    "n_ubatch": (1, INT_MAX),
    "n_seq_max": (1, 256),  # LLAMA_MAX_SEQ
    "n_threads": (0, 512),  # GGML_MAX_N_THREADS
    "n_gpu_layers": (-INT_MAX - 1, INT_MAX),
    "n_cpu_moe": (0, 512),  # LLAMA_MAX_LAYERS
}


@dataclass(frozen=True, kw_only=True)
class ContextSettings:
    """The settings of one context. Raises FasaError for an unknown cache type or mode, and a number out of range.

    n_ctx: tokens over all sequences, 0 for what the model was trained on.
    n_batch, n_ubatch: tokens per llama_decode, and per graph; a ubatch is never larger than a batch.
    n_seq_max: sequences. kv_unified: they share one buffer, instead of n_ctx / n_seq_max cells each.
    n_threads: 0 for all cores that the process may use. n_gpu_layers: the last layers of the model, -1 for all.
    n_cpu_moe: the experts of so many layers, the first ones, stay on the CPU; the memory plan does not know of it.
    type_k, type_v: names in gguf.cache_types.CACHE_TYPES. swa_full: layers with a sliding window keep all cells.
    no_kv_offload: K and V stay in host memory and the CPU attends.
    mode: where K and V of the GPU's layers lie: device (FASA-C), host (FASA-M: pinned host memory), or auto.
    """

    n_ctx: int = 4096
    n_batch: int = 512
    n_ubatch: int = 512
    n_seq_max: int = 1
    n_threads: int = 0
    n_gpu_layers: int = 0
    n_cpu_moe: int = 0
    type_k: str = "f16"
    type_v: str = "f16"
    flash_attn: bool = True
    kv_unified: bool = False
    swa_full: bool = True
    no_kv_offload: bool = False
    mode: str = "device"

    def __post_init__(self) -> None:
        cache_type(self.type_k)
        cache_type(self.type_v)
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)) or not low <= value <= high:
                raise FasaError(f"{name}: expected a whole number from {low} to {high}, found {value!r}")
        object.__setattr__(self, "mode", parse_mode(self.mode, "mode"))

    @property
    def threads(self) -> int:
        """The number of threads that are really used."""
        return thread_count(self.n_threads)

    def replace(self, **changes: Any) -> ContextSettings:
        """A copy with some settings changed. Raises FasaError as the constructor does."""
        return dataclasses.replace(self, **changes)
