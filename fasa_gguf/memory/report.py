"""The plan as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..params import FasaParams
from ..runtime.settings import ContextSettings
from .host import MIB, Available
from .model import Model
from .plan import ContextShape, Way


def mib(n: float) -> str:
    return f"{n / MIB:,.0f}"


def format_plan(model: Model, settings: ContextSettings, found: Sequence[Way], available: Available) -> str:
    """Markdown, in MiB, one column for each way. Lines that are 0 for all ways are omitted."""
    figures = {
        "weights": [x.memory.weights for x in found],
        "K and V": [x.memory.kv for x in found],
        "dominant keys": [x.memory.k_dom for x in found],
        "row cache": [x.memory.row_cache for x in found],
        "scratch": [x.memory.scratch for x in found],
        "CUDA itself": [available.cuda] * len(found),
        "**GPU memory**": [x.memory.device + available.cuda for x in found],
        "host memory, pinned": [x.memory.kv_pinned for x in found],
        "host memory, of layers on the CPU": [x.memory.kv_ram + x.memory.k_dom_ram for x in found],
    }
    cells = {name: [mib(n) for n in values] for name, values in figures.items() if any(values)}
    if available.device is not None:
        room = f"fits {mib(available.device + available.cuda)} MiB"
        room += f", host {mib(available.host)}" if available.host is not None else ""
        cells[room] = ["yes" if x.memory.fits(available) else "no" for x in found]
        cells["largest context, tokens"] = [
            f"{x.largest:,}" + (" (host memory)" if x.bound == "host" else "") for x in found
        ]
    head = f"MiB at {ContextShape(model, settings).n_ctx:,} tokens"
    return _markdown([[head, *(x.name for x in found)], *([name, *values] for name, values in cells.items())])


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    """The first column to the left, the others to the right."""
    width = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def show(line: Sequence[str]) -> str:
        padded = [x.rjust(w) if i else x.ljust(w) for i, (x, w) in enumerate(zip(line, width, strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = "| " + " | ".join("-" * (w - 1) + ":" if i else "-" * w for i, w in enumerate(width)) + " |"
    return "\n".join([show(lines[0]), rule, *map(show, lines[1:])])


def plan_as_dict(
    model: Model, settings: ContextSettings, params: FasaParams, found: Sequence[Way], available: Available
) -> dict[str, Any]:
    """For JSON, in bytes and tokens. device_bytes, host_bytes: what is available; cuda_bytes: what CUDA takes."""
    decides = {k: v for k, v in asdict(settings).items() if k not in ("n_threads", "flash_attn", "mode", "n_cpu_moe")}
    return {
        "model": model.name,
        "n_ctx_train": model.n_ctx_train,
        **decides,
        "n_ctx": ContextShape(model, settings).n_ctx,
        "windows": [x.window for x in model.layers],
        "fasa": asdict(params),
        "device_bytes": available.device,
        "host_bytes": available.host,
        "cuda_bytes": available.cuda,
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
