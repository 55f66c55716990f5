"""The types of a KV cache by name."""

from __future__ import annotations

from gguf import GGMLQuantizationType

from ..errors import FasaError

# ggml's numbers; llama.cpp takes these types for K and V
CACHE_TYPES = {
    name: int(GGMLQuantizationType[name.upper()])
    for name in ("f32", "f16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "bf16")
}


def cache_type(name: str) -> int:
    """ggml's number of a cache type. Raises FasaError for an unknown name."""
    if name not in CACHE_TYPES:
        raise FasaError(f"cache type {name!r}: expected one of {', '.join(CACHE_TYPES)}")
    return CACHE_TYPES[name]
