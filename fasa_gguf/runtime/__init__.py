"""The native library seen from Python."""

from . import context, devices, interrupt, library, ops, pieces, sampling

__all__ = ["context", "devices", "interrupt", "library", "ops", "pieces", "sampling"]
