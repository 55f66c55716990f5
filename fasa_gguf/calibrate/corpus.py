"""The text that a calibration reads."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import FasaError

Corpus = tuple[str, "str | Sequence[int]"]  # name, and a text or token ids


def default_corpus() -> tuple[str, str]:
    """(name, text): the pydoc topics, prose that comes with Python. Raises FasaError where they are missing."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise FasaError("this Python carries no pydoc topics to calibrate on; give a text with -f TEXT") from None
    return "python pydoc topics", "\n\n".join(topics[name] for name in sorted(topics))
