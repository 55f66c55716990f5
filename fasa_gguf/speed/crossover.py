"""The depth from which FASA is no slower than dense."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..errors import FasaError
from ..params import FasaParams
from .bench import BenchSettings, bench
from .results import Result

NOISE = 0.02  # share of dense's speed that counts as equal


def crossover(results: Sequence[Result], noise: float = NOISE) -> int | None:
    """The smallest measured depth from which FASA is no slower than dense at every measured depth; None: there is none.

    Only results that ran sparse count. "No slower": at most `noise` (a share) below dense's mean.
    """
    found = None
    for r in sorted((r for r in results if r.params is not None), key=lambda r: -r.n_depth):
        if not r.sparse_share or r.ratio is None or r.ratio < 1 - noise:
            break
        found = r.n_depth
    return found


def find_crossover(
    model: str | os.PathLike, settings: BenchSettings, params: FasaParams, **kw: Any
) -> tuple[int | None, list[Result]]:
    """(depth, results): `bench` with FASA at every depth, decode only. kw: as bench's.

    The depth is the best `min_context`, with layers on a GPU the best `min_context_gpu`. Raises FasaError when the
    settings have several contexts, each of which would have a crossover of its own.
    """
    lists = {
        "-np": settings.n_parallel,
        "-ngl": settings.n_gpu_layers,
        "-ctk": settings.types,
        "-nkvo": settings.no_kv_offload,
        "--fasa-mode": settings.modes,
    }
    several = [flag for flag, values in lists.items() if len(values) > 1]
    if several:
        raise FasaError(f"--find-crossover looks for one depth; give {' and '.join(several)} one value")
    if "host" in settings.modes:
        raise FasaError(
            "--find-crossover compares with dense in the same context, which --fasa-mode host does not have; "
            "use --fasa-mode device"
        )
    results = bench(model, replace(settings, n_prompt=()), {"fasa": params.replace(min_context=0)}, **kw)
    return crossover(results), results


def crossover_text(depth: int | None, results: Sequence[Result]) -> str:
    """One sentence for the user, with the flag to set."""
    config, depths = results[0].config, [r.n_depth for r in results]
    on_gpu = config.get("n_gpu_layers") and config.get("gpu_info")
    flag = "--fasa-min-context-gpu" if on_gpu else "--fasa-min-context"
    if depth is None:
        return f"FASA is slower than dense at depth {max(depths)}: no crossover among the depths measured."
    if depth == min(depths):
        return (
            f"FASA is no slower than dense from depth {depth} on, the smallest one measured: {flag} {depth}, or less."
        )
    return f"FASA is no slower than dense from depth {depth} on: {flag} {depth}."
