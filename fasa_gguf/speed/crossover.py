"""From which depth on FASA is no slower than dense."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..errors import FasaError
from ..params import FasaParams
from .bench import Plan, Row, bench

NOISE = 0.02  # share of dense's speed that counts as equal


def crossover(rows: Sequence[Row], noise: float = NOISE) -> int | None:
    """The smallest measured depth from which on FASA, at every measured depth, is no slower than dense; None: there is none.

    Only rows that ran sparse count. "No slower": at most `noise` (a share) below dense's mean.
    """
    found = None
    for r in sorted((r for r in rows if r.params is not None), key=lambda r: -r.n_depth):
        if not r.sparse_share or r.ratio is None or r.ratio < 1 - noise:
            break
        found = r.n_depth
    return found


def find_crossover(model: str | os.PathLike, plan: Plan, params: FasaParams, **kw: Any) -> tuple[int | None, list[Row]]:
    """(depth, rows): `bench` with FASA at every depth, decode rows only; the depth is what `min_context`, with layers on a GPU
    `min_context_gpu`, should be. kw: as bench's.

    Raises FasaError when the plan has several contexts: each would have a crossover of its own.
    """
    lists = {
        "-np": plan.n_parallel,
        "-ngl": plan.n_gpu_layers,
        "-ctk": plan.types,
        "-nkvo": plan.no_kv_offload,
        "--fasa-mode": plan.modes,
    }
    several = [flag for flag, values in lists.items() if len(values) > 1]
    if several:
        raise FasaError(f"--find-crossover looks for one depth; give {' and '.join(several)} one value")
    if "m" in plan.modes:
        raise FasaError(
            "--find-crossover compares with dense in the same context, which --fasa-mode m has not; use --fasa-mode c"
        )
    rows = bench(model, replace(plan, n_prompt=()), {"fasa": params.replace(min_context=0)}, **kw)
    return crossover(rows), rows


def crossover_text(depth: int | None, rows: Sequence[Row]) -> str:
    """One sentence."""
    on_gpu = rows[0].setup.get("n_gpu_layers") and rows[0].setup.get("gpu_info")
    flag = "--fasa-min-context-gpu" if on_gpu else "--fasa-min-context"
    if depth is None:
        return f"FASA is slower than dense at depth {max(r.n_depth for r in rows)}: no crossover among the depths measured."
    if depth == min(r.n_depth for r in rows):
        return (
            f"FASA is no slower than dense from depth {depth} on, the smallest one measured: {flag} {depth}, or less."
        )
    return f"FASA is no slower than dense from depth {depth} on: {flag} {depth}."
