"""Where a model's weights lie, other than by its layers: experts on the CPU, as llama.cpp's --n-cpu-moe has it."""

from __future__ import annotations

import ctypes
from typing import Any

from .library import find_library

_EXPERTS = r"blk\.{}\.ffn_(up|down|gate|gate_up)_(ch|)exps"  # LLM_FFN_EXPS_REGEX of common/common.h


class _Override(ctypes.Structure):
    """struct llama_model_tensor_buft_override"""

    _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))


def experts_on_cpu(n_layer: int) -> Any:
    """The array for llama_model_params.tensor_buft_overrides; it must live while the model is loaded from its file."""
    buffer_type = ctypes.CDLL(str(find_library("ggml-base"))).ggml_backend_cpu_buffer_type
    buffer_type.restype = ctypes.c_void_p
    found = [_Override(_EXPERTS.format(il).encode(), buffer_type()) for il in range(n_layer)]
    return (_Override * (n_layer + 1))(*found)  # the last one is NULL
