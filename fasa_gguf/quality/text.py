"""Texts to evaluate on: detokenised, and cut into windows of tokens."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import FasaError
from ..session import Session


def read_utf8(path: str | os.PathLike) -> str:
    """The text of a file. Raises FasaError."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as e:
        raise FasaError(f"{path}: cannot be read: {e.strerror or e}; check the path") from None
    except UnicodeDecodeError as e:
        raise FasaError(f"{path}: cannot be read as text: {e}") from None


def detokenize_wikitext(text: str) -> str:
    """Undo WikiText's word tokenisation, so that a model reads prose."""
    for a, b in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), (" <unk> ", " "), ("( ", "("), (" 's", "'s")):
        text = text.replace(a, b)
    return re.sub(r" ([,.;:!?)])", r"\1", text)


def cut_windows(session: Session, text: str, windows: int, window: int, score: int = 1) -> list[list[int]]:
    """Token windows of window + 1 tokens, spread evenly over the text; their last `score` tokens do not overlap.

    Raises FasaError when the text is too short.
    """
    span = max(1, len(text) - 8 * window)  # a token has at most 8 characters, in the mean over a window
    first = min(2000, span // 4)
    stride, out = (span - first) / windows, []
    for i in range(windows):
        part = text[first + int(i * stride) :][: 8 * window]
        tokens = session.tokenize(part)
        if len(tokens) < window + 1 or (windows > 1 and stride < score * len(part) / len(tokens)):
            raise FasaError(
                f"the text has {len(text)} characters, which is too short for {windows} windows of {window} tokens; "
                "use a longer -f TEXT, fewer --windows or a shorter --window"
            )
        out.append(tokens[: window + 1])
    return out
