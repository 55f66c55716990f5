"""The native library seen from Python."""

from . import context, devices, library, ops, pieces

__all__ = ["context", "devices", "library", "ops", "pieces"]
