"""The native library seen from Python."""

from . import context, devices, gate, gpu_limit, interrupt, library, loading, ops, overrides, pieces, sampling

__all__ = [
    "context",
    "devices",
    "gate",
    "gpu_limit",
    "interrupt",
    "library",
    "loading",
    "ops",
    "overrides",
    "pieces",
    "sampling",
]
