"""Printed tables."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def columns(lines: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """One text for each line, its cells in columns. The first `left` columns are aligned left, the others right."""
    width = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return [
        "  ".join(x.ljust(w) if i < left else x.rjust(w) for i, (x, w) in enumerate(zip(line, width, strict=True)))
        for line in lines
    ]


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]], left: Collection[str] = ()) -> str:
    """A Markdown table of text cells. The columns named in `left` are aligned left, the others right."""
    width = [max(map(len, cells)) for cells in zip(head, *lines, strict=True)]
    is_left = [name in left for name in head]

    def show(cells: Sequence[str]) -> str:
        parts = zip(cells, width, is_left, strict=True)
        return "| " + " | ".join(x.ljust(w) if to_left else x.rjust(w) for x, w, to_left in parts) + " |"

    rule = ["-" * w if to_left else "-" * (w - 1) + ":" for w, to_left in zip(width, is_left, strict=True)]
    return "\n".join(map(show, [head, rule, *lines]))
