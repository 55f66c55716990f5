"""Tables for people."""

from __future__ import annotations

from collections.abc import Sequence


def columns(lines: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Cells in columns; the first `left` columns are flush left."""
    width = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join(x.ljust(w) if i < left else x.rjust(w) for i, (x, w) in enumerate(zip(line, width))) for line in lines
    ]
