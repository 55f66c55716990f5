"""What `bench` measured, as a table, JSON, CSV, or a picture; and read again from its JSON."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import FasaError
from ..params import FasaParams
from ..report.columns import markdown_table
from ..report.pictures import save_speed_plot
from ..runtime.machine import Machine
from .results import Result

FORMATS = ("md", "json", "jsonl", "csv")
MIB = 1 << 20


# ---- a table ----


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _attended(r: Result) -> str:
    if r.n_prompt or not r.samples_ts:
        return ""
    return "all" if r.params is None or r.tokens_attended is None else f"{r.tokens_attended:.0f}"


CONTEXT_KEYS = ("type_k", "type_v", "no_kv_offload", "fasa_mode")

# column: how a result shows it, and its default; None: it has none
COLUMNS: dict[str, tuple[Callable[[Result], str], str | None]] = {
    "arm": (lambda r: r.arm, None),
    "ngl": (lambda r: str(r.config.get("n_gpu_layers", 0)), "0"),
    "type_k": (lambda r: r.config.get("type_k", "f16"), "f16"),
    "type_v": (lambda r: r.config.get("type_v", "f16"), "f16"),
    "nkvo": (lambda r: str(int(r.config.get("no_kv_offload", 0))), "0"),
    "mode": (lambda r: r.config.get("fasa_mode", "device"), "device"),
    "np": (lambda r: str(r.n_parallel), "1"),
    "test": (lambda r: r.test, None),
    "t/s": (lambda r: f"{r.avg_ts:.2f} +- {r.stddev_ts:.2f}" if r.samples_ts else "", None),
    "ratio": (lambda r: "" if r.params is None else _number(r.ratio, "{:.2f}x"), ""),
    "vs best": (lambda r: _number(r.ratio_best, "{:.2f}x"), ""),
    "attention ms": (lambda r: _number(r.attention_ms, "{:.3f}"), ""),
    "attended": (_attended, ""),
    "KV MiB/token": (lambda r: _number(r.kv_bytes and r.kv_bytes / MIB, "{:.2f}"), ""),
    "MiB/token": (lambda r: _number(r.token_bytes and r.token_bytes / MIB, "{:.2f}"), ""),
    "GB/s": (lambda r: _number(r.bytes_per_second and r.bytes_per_second / 1e9, "{:.1f}"), ""),
    "of copy rate": (lambda r: _number(r.of_copy_rate and 100 * r.of_copy_rate, "{:.0f}%"), ""),
    "VRAM MiB": (lambda r: _number(r.memory.vram_peak and r.memory.vram_peak / MIB, "{:.0f}"), ""),
    "pinned MiB": (lambda r: _number(r.memory.pinned and r.memory.pinned / MIB, "{:.0f}"), ""),
    "PCIe MiB/step": (
        lambda r: _number(
            None if r.memory.fetched is None else (r.memory.fetched + (r.memory.staged or 0)) / MIB, "{:.2f}"
        ),
        "",
    ),
    "reused": (lambda r: _number(None if r.memory.reused is None else 100 * r.memory.reused, "{:.0f}%"), ""),
    "PCIe GB/s": (lambda r: _number(r.memory.fetch_rate and r.memory.fetch_rate / 1e9, "{:.1f}"), ""),
    "bare": (lambda r: _number(r.memory.gather_rate and r.memory.gather_rate / 1e9, "{:.1f}"), ""),
    "of PCIe floor": (lambda r: _number(None if r.of_pcie_floor is None else 100 * r.of_pcie_floor, "{:.0f}%"), ""),
    "note": (lambda r: r.note, ""),
}


def format_bench(results: Sequence[Result], model: str) -> str:
    """llama-bench's Markdown. Columns with only default values are hidden; `vs best` needs several dense contexts."""
    several = len({tuple(r.config.get(x) for x in CONTEXT_KEYS) for r in results}) > 1
    cells = {name: [show(r) for r in results] for name, (show, _) in COLUMNS.items() if name != "vs best" or several}
    cells = {name: column for name, column in cells.items() if any(x != COLUMNS[name][1] for x in column)}
    cells = {"model": [os.path.basename(model)[:40]] * len(results)} | cells
    lines = list(zip(*cells.values(), strict=True))
    return markdown_table(list(cells), lines, left=("model", "arm", "note"))


# ---- for programs ----


def as_dict(r: Result, model: str, build: str) -> dict[str, Any]:
    """llama-bench's names and ours; `fasa` holds the settings of a FASA arm. build: the libraries' versions."""
    return {
        "build_commit": build,
        "model_filename": str(model),
        **r.config,
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
        "attention_ms": r.attention_ms,
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
        "kv_bytes_per_second": r.kv_rate,
        "plain_read_bytes_per_second": r.read_rate,
        "plain_read_ts": r.plain_ts,
        **_memory(r),
        "fill": r.fill,
        "note": r.note,
        "fasa": asdict(r.params) if r.params else None,
    }


def _memory(r: Result) -> dict[str, Any]:
    """The fields of traffic.Figures; bytes, and per decode step where the name says so."""
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


def as_json(results: Sequence[Result], model: str) -> list[dict[str, Any]]:
    """Every result as a dict."""
    build = Machine.here().build
    return [as_dict(r, model, build) for r in results]


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


def format_results(results: Sequence[Result], model: str, output: str = "md") -> str:
    """The results as md (a table), json, jsonl or csv (settings as fasa_budget, ...; samples separated by spaces)."""
    if output == "md":
        return format_bench(results, model)
    if output == "json":
        return json.dumps(as_json(results, model), indent=1)
    if output == "jsonl":
        return "\n".join(json.dumps(e) for e in as_json(results, model))
    if output == "csv":
        return _csv(as_json(results, model))
    raise FasaError(f"-o {output!r}: expected one of {', '.join(FORMATS)}")


# ---- a picture ----


# what of a result's config names its line, when it is not the same for all
LINE_PARTS: dict[str, Callable[[Result], Any]] = {
    "ngl": lambda r: r.config.get("n_gpu_layers", 0),
    "KV": lambda r: "/".join(dict.fromkeys([r.config.get("type_k", "f16"), r.config.get("type_v", "f16")])),
    "np": lambda r: r.n_parallel,
}


def _line_name(r: Result, differ: Sequence[str]) -> str:
    name = [r.arm]
    if r.config.get("no_kv_offload"):
        name.append("-nkvo")
    elif r.config.get("fasa_mode") == "host":
        name.append("host")
    return " ".join([*name, *(f"{part} {LINE_PARTS[part](r)}" for part in differ)])


def plot_lines(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The measured decode results by line of the picture, each by ascending depth."""
    results = [r for r in results if r.n_gen and r.samples_ts]
    differ = [name for name, part in LINE_PARTS.items() if len({part(r) for r in results}) > 1]
    out: dict[str, list[Result]] = {}
    for r in sorted(results, key=lambda r: r.n_depth):
        out.setdefault(_line_name(r, differ), []).append(r)
    return out


def save_plot(results: Sequence[Result], path: str | os.PathLike, model: str) -> None:
    """tokens/s against depth, a line for each arm and context, with error bars of one standard deviation; a picture of
    the type that the end of its name says."""
    save_speed_plot(plot_lines(results), path, f"{os.path.basename(model)}: {_caches(results)}", _machine(results))


def _caches(results: Sequence[Result]) -> str:
    """The cache types of all results, unless the lines name them."""
    types = {LINE_PARTS["KV"](r) for r in results if r.n_gen and r.samples_ts}
    return f"K and V in {types.pop()}" if len(types) == 1 else "dense and FASA"


def _machine(results: Sequence[Result]) -> str:
    """CPU and threads, and the GPU where layers are on it."""
    config = next((r.config for r in results if r.config.get("cpu_info")), {})
    gpu = config.get("gpu_info") if any(r.config.get("n_gpu_layers") for r in results) else None
    cpu = f"{config['cpu_info']}, {config.get('n_threads', '?')} threads" if config else ""
    return " + ".join(filter(None, [gpu, cpu]))


# ---- read again ----


def read_results(path: str | os.PathLike) -> tuple[list[Result], str]:
    """(results, model) of a file that `bench -o json` or `-o jsonl` printed: what a picture needs of them.

    Raises FasaError naming the file, and the field that is not as `bench` writes it.
    """
    try:
        text = Path(path).read_text()
    except (OSError, ValueError) as e:
        raise FasaError(f"--from {path}: cannot be read: {getattr(e, 'strerror', None) or e}; check the path") from None
    try:
        entries = json.loads(text) if text.lstrip().startswith("[") else [json.loads(x) for x in text.splitlines() if x]
    except ValueError as e:
        raise FasaError(f"--from {path}: expected what `fasa-gguf bench --json` printed, found {e}") from None
    if not entries or not all(isinstance(e, dict) for e in entries):
        raise FasaError(f"--from {path}: expected results of `fasa-gguf bench --json`, found none")
    return [_from_dict(e, f"--from {path}: result {i}") for i, e in enumerate(entries)], str(
        entries[0]["model_filename"]
    )


FIELDS: dict[str, type | tuple[type, ...]] = {
    "model_filename": str,
    "arm": str,
    "n_depth": int,
    "n_gen": int,
    "n_prompt": int,
    "n_parallel": int,
    "samples_ts": list,
    "ratio": (int, float, type(None)),
    "sparse_share": (int, float),
    "fasa": (dict, type(None)),
}


def _from_dict(e: dict[str, Any], where: str) -> Result:
    for name, kind in FIELDS.items():
        if not isinstance(e.get(name, ...), kind):
            found = repr(e[name])[:40] if name in e else "nothing"
            expected = " or ".join("null" if k is type(None) else k.__name__ for k in _tuple(kind))
            raise FasaError(
                f"{where}: field {name}: expected {expected}, found {found}; measure anew with `bench --json`"
            )
    if not all(isinstance(x, (int, float)) for x in e["samples_ts"]):
        raise FasaError(f"{where}: field samples_ts: expected numbers, found {str(e['samples_ts'])[:40]}")
    params = None if e["fasa"] is None else FasaParams.from_mapping(e["fasa"], f"{where}: field fasa")
    own = {name: e[name] for name in FIELDS if name not in ("model_filename", "fasa")}
    return Result(**own, params=params, config={k: v for k, v in e.items() if k not in FIELDS})


def _tuple(kind: type | tuple[type, ...]) -> tuple[type, ...]:
    return kind if isinstance(kind, tuple) else (kind,)
