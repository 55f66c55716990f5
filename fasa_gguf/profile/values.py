"""Single values of a profile: whether a key may have them, and how they are written and shown."""

from __future__ import annotations

from typing import Any

import numpy as np

MAX_F32 = float(np.finfo(np.float32).max)


def brief(value: Any) -> str:
    """A value as it was found, in at most 60 characters; of long lists and numbers only the size is told."""
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return "a number of more than 64 bits"
    if isinstance(value, (list, dict)):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    text = ascii(value[:60] if isinstance(value, str) else value)
    return text if len(text) <= 60 else text[:57] + "..."


def is_u32(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 1 << 32


def is_i32(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and -(1 << 31) <= x < 1 << 31


def is_f32(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and -MAX_F32 <= x <= MAX_F32  # false for NaN


def as_text(value: Any) -> Any:
    """A string with `?` for what UTF-8 cannot hold, such as the odd bytes of a file name; anything else as it is."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def exact(value: Any) -> Any:
    """Floats with the fewest digits that give the same f32, also those of a list."""
    if isinstance(value, list):
        return [exact(x) for x in value]
    return float(str(np.float32(value))) if isinstance(value, float) and is_f32(value) else value


def short(value: Any) -> Any:
    """Floats with 5 digits, also those of a list."""
    if isinstance(value, list):
        return [short(x) for x in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
