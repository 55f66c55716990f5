"""What `bench` measured, as a table, JSON, CSV, or a picture."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from .. import runtime
from ..errors import FasaError
from ..params import FasaParams
from .bench import Row

FORMATS = ("md", "json", "jsonl", "csv")
MIB = 1 << 20


# ---- a table ----


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _attended(r: Row) -> str:
    if r.n_prompt or not r.samples_ts:
        return ""
    return "all" if r.params is None or r.tokens_attended is None else f"{r.tokens_attended:.0f}"


# column: how a row shows it, and what is left away when every row has it
COLUMNS: dict[str, tuple[Callable[[Row], str], str | None]] = {
    "arm": (lambda r: r.arm, None),
    "ngl": (lambda r: str(r.setup.get("n_gpu_layers", 0)), "0"),
    "type_k": (lambda r: r.setup.get("type_k", "f16"), "f16"),
    "type_v": (lambda r: r.setup.get("type_v", "f16"), "f16"),
    "nkvo": (lambda r: str(int(r.setup.get("no_kv_offload", 0))), "0"),
    "mode": (lambda r: r.setup.get("fasa_mode", "c"), "c"),
    "np": (lambda r: str(r.n_parallel), "1"),
    "test": (lambda r: r.test, None),
    "t/s": (lambda r: f"{r.avg_ts:.2f} +- {r.stddev_ts:.2f}" if r.samples_ts else "", None),
    "ratio": (lambda r: "" if r.params is None else _number(r.ratio, "{:.2f}x"), ""),
    "vs best": (lambda r: _number(r.ratio_best, "{:.2f}x"), ""),
    "attended": (_attended, ""),
    "KV MiB/token": (lambda r: _number(r.kv_bytes and r.kv_bytes / MIB, "{:.2f}"), ""),
    "MiB/token": (lambda r: _number(r.token_bytes and r.token_bytes / MIB, "{:.2f}"), ""),
    "GB/s": (lambda r: _number(r.bytes_per_second and r.bytes_per_second / 1e9, "{:.1f}"), ""),
    "of copy rate": (lambda r: _number(r.of_copy_rate and 100 * r.of_copy_rate, "{:.0f}%"), ""),
    "VRAM MiB": (lambda r: _number(r.memory.vram_peak and r.memory.vram_peak / MIB, "{:.0f}"), ""),
    "pinned MiB": (lambda r: _number(r.memory.pinned and r.memory.pinned / MIB, "{:.0f}"), ""),
    "PCIe MiB/step": (
        lambda r: _number(None if r.memory.fetched is None else (r.memory.fetched + r.memory.staged) / MIB, "{:.2f}"),
        "",
    ),
    "reused": (lambda r: _number(None if r.memory.reused is None else 100 * r.memory.reused, "{:.0f}%"), ""),
    "PCIe GB/s": (lambda r: _number(r.memory.fetch_rate and r.memory.fetch_rate / 1e9, "{:.1f}"), ""),
    "bare": (lambda r: _number(r.memory.gather_rate and r.memory.gather_rate / 1e9, "{:.1f}"), ""),
    "of PCIe floor": (lambda r: _number(None if r.of_pcie_floor is None else 100 * r.of_pcie_floor, "{:.0f}%"), ""),
    "note": (lambda r: r.note, ""),
}


def table(rows: Sequence[Row], model: str) -> str:
    """llama-bench's markdown; a column that says the default everywhere is left away, as there. `vs best` needs several dense rows."""
    several = len({tuple(r.setup.get(x) for x in ("type_k", "type_v", "no_kv_offload", "fasa_mode")) for r in rows}) > 1
    lines = {name: [show(r) for r in rows] for name, (show, _) in COLUMNS.items() if name != "vs best" or several}
    lines = {name: cells for name, cells in lines.items() if any(x != COLUMNS[name][1] for x in cells)}
    lines = {"model": [os.path.basename(model)[:40]] * len(rows)} | lines
    width = [max(map(len, [name, *cells])) for name, cells in lines.items()]
    left = ("model", "arm", "note")
    show = lambda cells: (
        "| " + " | ".join(x.ljust(w) if name in left else x.rjust(w) for name, x, w in zip(lines, cells, width)) + " |"
    )
    rule = "| " + " | ".join("-" * w if name in left else "-" * (w - 1) + ":" for name, w in zip(lines, width)) + " |"
    return "\n".join([show(list(lines)), rule, *map(show, zip(*lines.values()))])


# ---- for programs ----


def as_dict(r: Row, model: str) -> dict[str, Any]:
    """llama-bench's names and ours; `fasa` holds the settings of a FASA arm."""
    return {
        "build_commit": f"fasa_gguf {runtime.library.version()}, llama-cpp-python {runtime.library.LLAMA_CPP_VERSION}",
        "model_filename": str(model),
        **r.setup,
        "n_prompt": r.n_prompt,
        "n_gen": r.n_gen,
        "n_depth": r.n_depth,
        "n_parallel": r.n_parallel,
        "test": r.test,
        "arm": r.arm,
        "avg_ts": r.avg_ts,
        "stddev_ts": r.stddev_ts,
        "samples_ts": r.samples_ts,
        "ratio": r.ratio,
        "ratio_best": r.ratio_best,
        "first_step_ms": r.first_step_ms,
        "ttft_ms": r.ttft_ms,
        "sparse_share": r.sparse_share,
        "tokens_attended": r.tokens_attended,
        "kv_bytes_per_token": r.kv_bytes,
        "weight_bytes_per_step": r.weight_bytes,
        "bytes_per_token": r.token_bytes,
        "bytes_per_second": r.bytes_per_second,
        "copy_bytes_per_second": r.copy_rate,
        "of_copy_rate": r.of_copy_rate,
        **_memory(r),
        "fill": r.fill,
        "note": r.note,
        "fasa": asdict(r.params) if r.params else None,
    }


def _memory(r: Row) -> dict[str, Any]:
    """The figures of bench_memory.Figures; bytes, and per decode step where the name says so."""
    f, floor = r.memory, r.memory.floor_s()
    return {
        "vram_before": f.vram_before,
        "vram_peak": f.vram_peak,
        "pinned_bytes": f.pinned,
        "row_cache_bytes": f.row_cache,
        "pcie_fetched_per_step": f.fetched,
        "pcie_staged_per_step": f.staged,
        "rows_reused_share": f.reused,
        "pcie_copy_bytes_per_second": f.copy_rate,
        "pcie_gather_bytes_per_second": f.gather_rate,
        "pcie_fetch_bytes_per_second": f.fetch_rate,
        "pcie_floor_ms": None if floor is None else 1000 * floor,
        "of_pcie_floor": r.of_pcie_floor,
    }


def as_json(rows: Sequence[Row], model: str) -> list[dict[str, Any]]:
    """Every row as a dict."""
    return [as_dict(r, model) for r in rows]


def _csv(entries: Sequence[dict[str, Any]]) -> str:
    flat = [
        {
            **{k: v for k, v in e.items() if k != "fasa"},
            "samples_ts": " ".join(f"{x:.6g}" for x in e["samples_ts"]),
            **{f"fasa_{k}": (e["fasa"] or {}).get(k) for k in FasaParams.__dataclass_fields__},
        }
        for e in entries
    ]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue().rstrip("\n")


def render(rows: Sequence[Row], model: str, output: str = "md") -> str:
    """The rows as md (a table), json, jsonl or csv (settings as fasa_budget, ...; samples separated by spaces)."""
    if output == "md":
        return table(rows, model)
    if output == "json":
        return json.dumps(as_json(rows, model), indent=1)
    if output == "jsonl":
        return "\n".join(json.dumps(e) for e in as_json(rows, model))
    if output == "csv":
        return _csv(as_json(rows, model))
    raise FasaError(f"-o {output!r}: expected one of {', '.join(FORMATS)}")


# ---- a picture ----


# what of a row's setup names its line, when it is not the same for all
LINE_PARTS: dict[str, Callable[[Row], Any]] = {
    "ngl": lambda r: r.setup.get("n_gpu_layers", 0),
    "KV": lambda r: "/".join(dict.fromkeys([r.setup.get("type_k", "f16"), r.setup.get("type_v", "f16")])),
    "np": lambda r: r.n_parallel,
}


def lines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Decode rows that were measured, by line of the picture, deeper ones last."""
    rows = [r for r in rows if r.n_gen and r.samples_ts]
    differ = [name for name, part in LINE_PARTS.items() if len({part(r) for r in rows}) > 1]
    out: dict[str, list[Row]] = {}
    for r in sorted(rows, key=lambda r: r.n_depth):
        place = ["-nkvo"] if r.setup.get("no_kv_offload") else ["mode m"] if r.setup.get("fasa_mode") == "m" else []
        out.setdefault(" ".join([r.arm, *place, *(f"{name} {LINE_PARTS[name](r)}" for name in differ)]), []).append(r)
    return out


def save_plot(rows: Sequence[Row], path: str | os.PathLike, model: str) -> None:
    """PNG: tokens/s against depth, a line for each arm and setup, with error bars of one standard deviation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from ..report.pictures import _save

    found = lines(rows)
    if not found:
        raise FasaError(f"{path}: no decode row was measured, so there is nothing to draw")
    fig, ax = plt.subplots(figsize=(10, 5), layout="constrained")
    for name, line in found.items():
        ax.errorbar(
            [r.n_depth for r in line],
            [r.avg_ts for r in line],
            [r.stddev_ts for r in line],
            marker="o",
            capsize=3,
            label=name,
            linestyle="--" if line[0].params is None else "-",
        )
    depths = sorted({r.n_depth for line in found.values() for r in line})
    above = [d for d in depths if d] or [1]
    if depths[0] == 0:  # a logarithm has no 0: linear up to the first depth
        ax.set_xscale("symlog", base=2, linthresh=above[0])
    else:
        ax.set_xscale("log", base=2)
    ax.set_xticks(depths, [f"{d:,}" for d in depths], rotation=30)
    ax.minorticks_off()
    ax.set_ylim(bottom=0)
    ax.set_xlabel("depth in tokens")
    ax.set_ylabel("decode, tokens/s")
    ax.set_title(os.path.basename(model))
    ax.grid(alpha=0.3)
    fig.legend(loc="outside right upper")
    _save(fig, path)
