"""The plan as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..params import FasaParams
from .plan import MIB, Model, Setup, Way


def table(m: Model, s: Setup, found: Sequence[Way], device: int | None, host: int | None, cuda: int) -> str:
    """Markdown, in MiB; rows that are 0 for all are left away. device, host: bytes that there are for it; cuda: the driver's own."""
    mib = lambda n: f"{n / MIB:,.0f}"
    rows = {
        "weights": [x.memory.weights for x in found],
        "K and V": [x.memory.kv for x in found],
        "dominant keys": [x.memory.k_dom for x in found],
        "row cache": [x.memory.row_cache for x in found],
        "scratch": [x.memory.scratch for x in found],
        "CUDA itself": [cuda] * len(found),
        "**GPU memory**": [x.memory.device + cuda for x in found],
        "host memory, pinned": [x.memory.kv_pinned for x in found],
        "host memory, of layers on the CPU": [x.memory.kv_ram + x.memory.k_dom_ram for x in found],
    }
    cells = {name: [mib(n) for n in values] for name, values in rows.items() if any(values)}
    if device is not None:
        fits = lambda x: x.memory.device <= device and (host is None or x.memory.host <= host)
        cells[f"fits {mib(device + cuda)} MiB" + (f", host {mib(host)}" if host is not None else "")] = [
            "yes" if fits(x) else "no" for x in found
        ]
        cells["largest context, tokens"] = [
            f"{x.largest:,}" + (" (host memory)" if x.bound == "host" else "") for x in found
        ]
    head = f"MiB at {s.tokens(m):,} tokens"
    lines = [[head, *(x.name for x in found)], *([name, *values] for name, values in cells.items())]
    width = [max(map(len, column)) for column in zip(*lines)]
    show = lambda line: (
        "| " + " | ".join(x.rjust(w) if i else x.ljust(w) for i, (x, w) in enumerate(zip(line, width))) + " |"
    )
    rule = "| " + " | ".join("-" * (w - 1) + ":" if i else "-" * w for i, w in enumerate(width)) + " |"
    return "\n".join([show(lines[0]), rule, *map(show, lines[1:])])


def as_dict(
    m: Model, s: Setup, params: FasaParams, found: Sequence[Way], device: int | None, host: int | None, cuda: int
) -> dict[str, Any]:
    """Bytes and tokens; device_bytes and host_bytes: what there is for the plan, cuda_bytes: the driver's own beside it."""
    return {
        "model": m.name,
        "n_ctx_train": m.n_ctx_train,
        **asdict(s),
        "n_ctx": s.tokens(m),
        "fasa": asdict(params),
        "device_bytes": device,
        "host_bytes": host,
        "cuda_bytes": cuda,
        "ways": [
            {
                "name": x.name,
                **asdict(x.memory),
                "device": x.memory.device,
                "host": x.memory.host,
                "largest_context": x.largest,
                "bound": x.bound or None,
            }
            for x in found
        ],
    }
