"""Single needles over a grid of depths and lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..report.columns import columns
from .answers import format_answers
from .questions import PLACES
from .tasks import Question


def needle_questions(
    lengths: Sequence[int],
    n_depths: int = 5,
    samples: int = 1,
    task: str = "niah_single_2",
    places: Sequence[str] = (),
    tile: int = 0,
) -> list[Question]:
    """A grid of single needles: n_depths depths from 0 to 1, `samples` in every cell.

    places: the questions stand there in the prompt (questions.PLACES), which has tiles of `tile` tokens.
    """
    depths = [0.5] if n_depths == 1 else [round(i / (n_depths - 1), 4) for i in range(n_depths)]
    cells = [(length, depth, i) for length in lengths for depth in depths for i in range(samples)]
    if not places:
        return [Question(task, length, i, depth) for length, depth, i in cells]
    return [Question(PLACES[p], length, i, depth, place=p, tile=tile) for p in places for length, depth, i in cells]


def needle_grid(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """lengths, depths, n (samples per cell) and, by arm, found: shares [depth][length]."""
    lengths, depths = sorted({r["length"] for r in samples}), sorted({r["depth"] for r in samples})
    cells = {(d, n): [r for r in samples if r["depth"] == d and r["length"] == n] for d in depths for n in lengths}

    def found(i: int) -> list[list[float]]:
        return [[float(np.mean([r["arms"][i]["score"] for r in cells[d, n]])) for n in lengths] for d in depths]

    return {
        "lengths": lengths,
        "depths": depths,
        "n": len(next(iter(cells.values()))),
        "arms": [{"arm": a["arm"], "found": found(i)} for i, a in enumerate(samples[0]["arms"])],
    }


def format_needles(results: Sequence[dict[str, Any]], grid: dict[str, Any]) -> str:
    """For people: how many were found, by length and arm, in all and at each depth; then the paired figures."""
    lines = [["length", "arm", "found", *(f"{100 * d:.0f}%" for d in grid["depths"])]]
    for j, length in enumerate(grid["lengths"]):
        for i, arm in enumerate(grid["arms"]):
            cells = [share[j] * grid["n"] for share in arm["found"]]
            found = f"{sum(cells):.0f}/{len(cells) * grid['n']}"
            lines.append([str(length) if i == 0 else "", arm["arm"], found, *(f"{c:.0f}" for c in cells)])
    return "\n".join(columns(lines, 2)) + "\n\n" + format_answers(results)
