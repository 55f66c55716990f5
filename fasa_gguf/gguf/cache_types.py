"""The types of a KV cache by name."""

from __future__ import annotations

from ..errors import FasaError

CACHE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "bf16": 30}


def cache_type(name: str) -> int:
    """ggml's number of a cache type. Raises FasaError for an unknown name."""
    if name not in CACHE_TYPES:
        raise FasaError(f"cache type {name!r}: expected one of {', '.join(CACHE_TYPES)}")
    return CACHE_TYPES[name]
