"""The native library seen from Python."""

from . import context, devices, gate, interrupt, library, loading, ops, pieces, sampling

__all__ = ["context", "devices", "gate", "interrupt", "library", "loading", "ops", "pieces", "sampling"]
