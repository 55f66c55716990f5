"""llama.cpp's samplers on one row of logits, where they may find no token: with a grammar, or with logits of others.

llama.cpp ends the process when it accepts a token that a grammar hides, and samples any token when all are hidden.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def sample_checked(llama: Any, samplers: Sequence[Any], logits: np.ndarray) -> int | None:
    """The token that these samplers choose, one after the other, and accept; None when they leave none.

    samplers: pointers, of which the last one that chooses wins. logits: float32 [n_vocab], left as they are.
    """
    data = np.zeros(len(logits), [("id", np.int32), ("logit", np.float32), ("p", np.float32)])
    data["id"], data["logit"] = np.arange(len(logits)), logits
    found = llama.llama_token_data_array()
    found.data = data.ctypes.data_as(ctypes.POINTER(llama.llama_token_data))
    found.size, found.selected, found.sorted = len(data), -1, False
    for sampler in samplers:
        llama.llama_sampler_apply(sampler, ctypes.byref(found))
        if not np.isfinite(data["logit"][: found.size]).any():
            return None
    if not (0 <= found.selected < found.size and math.isfinite(data["logit"][found.selected])):
        return None
    token = int(data["id"][found.selected])
    for sampler in samplers:
        llama.llama_sampler_accept(sampler, token)
    return token


def chain_members(llama: Any, chain: Any) -> list[Any]:
    """The samplers of a llama_sampler_chain, in its order."""
    return [llama.llama_sampler_chain_get(chain, i) for i in range(llama.llama_sampler_chain_n(chain))]
