"""min_context_gpu when it is -1: from how many cells on a layer on a GPU is faster with FASA than dense.

The library measures it on the device and keeps it in the user's cache (measure/probe.cpp).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..params import INT_MAX, K_DOM_TYPES
from .interrupt import in_thread
from .library import api, check, struct

SOURCES = ("none", "setting", "probe", "kept", "default", "short")  # in the order of enum fasa_limit_source
_HOW = {
    "setting": "set",
    "probe": "by a probe of the GPU, kept for the next time",
    "kept": "by an earlier probe of the GPU",
    "default": "not measured",
    "short": "the context is shorter than any that a probe measures",
}
Timer = Callable[[int], "tuple[float, float] | None"]  # cells -> seconds of (dense, FASA); None: it cannot be measured


@dataclass(frozen=True)
class GpuLimit:
    """What min_context_gpu is in a context, and where that came from: one of SOURCES."""

    cells: int
    source: str
    note: str = ""  # what the user should know

    @property
    def is_never(self) -> bool:
        """FASA does not get faster than dense there."""
        return self.cells == INT_MAX

    @property
    def text(self) -> str:
        """One sentence; "" where no layer is on a GPU in mode device."""
        if self.source == "none":
            return ""
        cells = "never" if self.is_never else f"from {self.cells:,} cells"
        how = _HOW[self.source] if not (self.source == "probe" and self.note) else "by a probe of the GPU"
        return f"min_context_gpu: layers on a GPU use FASA {cells} ({'; '.join(filter(None, [how, self.note]))})"

    @classmethod
    def of(cls, limit: Any) -> GpuLimit:
        """From struct fasa_gpu_limit."""
        return cls(limit.cells, SOURCES[limit.source], api()[0].string(limit.note).decode("utf-8", "replace"))


def find_gpu_limit(
    backend: str,
    *,
    n_head: int,
    n_head_kv: int,
    head_dim: int,
    n_dom: int,
    attended: int,
    type_k: str = "f16",
    type_v: str = "f16",
    k_dom: str = "q4",
    n_forced: int = 36,
    per_head: int = 0,
    beside: int = 0,
    n_threads: int = 1,
    max_bytes: int = 0,
    timer: Timer | None = None,
) -> GpuLimit:
    """The limit of a layer of this shape. beside > 0: it selects ahead, beside a feed-forward of so many bytes.

    Measures the device, up to 2 s, unless the user's cache has what an earlier probe found. timer replaces the device.
    Raises FasaError.
    """
    ffi, lib = api()
    names = [ffi.new("char[]", name.encode()) for name in (backend, type_k, type_v)]

    def call(n_cells: int, dense: Any, fasa: Any, _user: Any) -> int:
        found = timer(n_cells) if timer else None
        if found is None:
            return -1
        dense[0], fasa[0] = found
        return 0

    callback = ffi.callback("fasa_timer", call, error=-1) if timer else ffi.NULL
    case = struct(
        "fasa_gpu_case",
        backend=names[0],
        n_threads=n_threads,
        n_head=n_head,
        n_head_kv=n_head_kv,
        n_embd_head=head_dim,
        type_k=names[1],
        type_v=names[2],
        k_dom=K_DOM_TYPES.index(k_dom),
        n_dom=n_dom,
        attended=attended,
        n_forced=n_forced,
        per_head=per_head,
        ahead=int(beside > 0),
        beside=beside,
        max_bytes=max_bytes,
        timer=callback,
    )
    limit = struct("fasa_gpu_limit")
    in_thread(lambda: check(lib.fasa_find_gpu_limit(case, limit)))
    return GpuLimit.of(limit)
