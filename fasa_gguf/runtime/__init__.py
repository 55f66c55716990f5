"""The native library seen from Python."""

from . import context, devices, gpu_limit, interrupt, library, ops, overrides, pieces

__all__ = ["context", "devices", "gpu_limit", "interrupt", "library", "ops", "overrides", "pieces"]
