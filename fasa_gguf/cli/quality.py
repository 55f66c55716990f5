"""The commands `compare`, `sweep` and `calibrate-layers`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..profile.find import find_profile, require_profile
from .arguments import (
    AddCommand,
    add_context_flags,
    add_fasa_flags,
    add_model,
    comma_list,
    note,
    percent,
    read_context,
    read_params,
    read_text,
    shares,
    whole,
)
from .progress import progress_bar

METHODS = (  # of `compare` without --methods
    "window",
    "random",
    "quest",
    "unique",
    "double-sparsity",
    "sparq",
    "snapkv",
    "oracle",
    "oracle-shared",
    "fasa",
    "paper",
    "paper:dense_layers=1",
)


def _add_text_flags(p: argparse.ArgumentParser, windows: int, score: int = 384) -> None:
    p.add_argument("-f", "--file", required=True, help="text")
    p.add_argument("--detokenize", choices=("wikitext",), help="undo a corpus' word tokenisation")
    p.add_argument("--windows", type=whole(1), default=windows, help=f"windows [{windows}]")
    p.add_argument("--window", type=whole(2), default=4096, help="tokens per window [4096]")
    p.add_argument(
        "--score", type=whole(1), default=score, help=f"last tokens of a window that are decoded and scored [{score}]"
    )


# ---- compare ----


def cmd_compare(a: argparse.Namespace) -> None:
    from ..harness import require_torch

    require_torch()
    from ..harness.compare import CompareSettings, compare
    from ..harness.report import format_comparison

    methods = a.methods.split(",") if a.methods else [*METHODS, *(["fasa-mass"] if a.tune else [])]
    settings = CompareSettings(
        model=a.model,
        text=read_text(a.file, a.detokenize),
        methods=methods,
        budgets=a.budgets,
        windows=a.windows,
        window=a.window,
        score=a.score,
        tune=read_text(a.tune, a.detokenize) if a.tune else None,
        tune_windows=a.tune_windows,
        sink=a.sink,
        recent=a.recent,
        device=a.device,
        profile=find_profile(a.model, a.profile, note),
        threads=a.threads,
        texts={"text": Path(a.file).name, **({"tune": Path(a.tune).name} if a.tune else {})},
    )
    result = compare(settings, a.output, a.prepare, a.library, progress_bar())
    if result is None:
        print(f"the windows are in {a.output}; run the same command without --prepare to compare", file=sys.stderr)
        return
    print(json.dumps(result, indent=1) if a.json else format_comparison(result["rows"]))
    print(f"{a.output}: results.md, results.json, budget.png, bytes.png", file=sys.stderr)


def _add_compare(command: AddCommand) -> None:
    p = command(
        "compare",
        cmd_compare,
        "Sparse attention methods at equal budget in a small reference decoder (needs torch).",
        "model.gguf -f test.txt --tune valid.txt --budgets 128,256,512,1024 -o compare",
    )
    add_model(p)
    _add_text_flags(p, 10)
    p.add_argument(
        "--methods",
        metavar="LIST",
        help=f"comma list, options as in quest:page=8; dense always runs [{','.join(METHODS)}, "
        "and fasa-mass with --tune]",
    )
    p.add_argument(
        "--budgets", type=comma_list(1), default=[128, 256, 512, 1024], help="comma list of tokens [128,256,512,1024]"
    )
    p.add_argument(
        "--tune",
        metavar="TEXT",
        help="choose every method's options on this text, at equal budget; calibrate on it too",
    )
    p.add_argument("--tune-windows", type=whole(1), default=2, help="windows of --tune")
    p.add_argument("--sink", type=whole(0), default=4, help="first tokens that every method attends, in the budget")
    p.add_argument("--recent", type=whole(0), default=32, help="last tokens that every method attends, in the budget")
    p.add_argument("--profile", help="FASA's profile, a JSON or GGUF file, instead of the one in the model")
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument(
        "--library", action="store_true", help="FASA through the shipped library too, beside the harness' own"
    )
    p.add_argument(
        "--prepare",
        action="store_true",
        help="only cut the windows into DIR; the rest then runs without the native library",
    )
    p.add_argument("--plan", dest="prepare", action="store_true", help=argparse.SUPPRESS)  # its former name
    p.add_argument("-t", "--threads", type=whole(0), default=0, help="CPU threads; 0: as torch and the library choose")
    p.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        required=True,
        help="folder of the results; finished windows there are not run again",
    )
    p.add_argument("--json", action="store_true", help="print results.json")


# ---- sweep ----


def cmd_sweep(a: argparse.Namespace) -> None:
    from ..quality.perplexity import WindowSettings
    from ..quality.sweep import Grid, format_sweep, sweep

    params, profile = read_params(a, require_profile(a.model, a.profile, note))
    result = sweep(
        a.model,
        read_text(a.file, a.detokenize),
        a.output,
        Grid(a.chunks or (), a.budgets or (() if a.masses else Grid.budgets), a.masses or ()),
        a.max_loss,
        params,
        profile,
        WindowSettings(a.windows, a.window, a.score),
        read_context(a),
        progress_bar(),
    )
    print(json.dumps(result, indent=1) if a.json else format_sweep(result))
    print(f"{a.output}: sweep.json, sweep.png", file=sys.stderr)


def _add_sweep(command: AddCommand) -> None:
    p: Any = command(
        "sweep",
        cmd_sweep,
        "Find the cheapest chunks and budget within a perplexity loss.",
        "model.gguf -f text.txt --max-loss 1% -o sweep",
    )
    add_model(p)
    add_context_flags(p)
    add_fasa_flags(p)
    _add_text_flags(p, 5)
    p.add_argument("--chunks", type=comma_list(1), help="comma list [1/8, 1/4, 3/8 and 1/2 of the head's]")
    p.add_argument(
        "--budgets", type=comma_list(1), help="comma list of tokens [128,256,512,1024; none with --masses alone]"
    )
    p.add_argument("--masses", type=shares, help="comma list of target masses")
    p.add_argument(
        "--max-loss",
        type=percent,
        default=0.01,
        metavar="PERCENT",
        help="perplexity that may be lost, in percent of dense's [1%%]",
    )
    p.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        required=True,
        help="folder of sweep.json and sweep.png; finished windows there are not run again",
    )
    p.add_argument("--json", action="store_true", help="print sweep.json")


# ---- calibrate-layers ----


def cmd_calibrate_layers(a: argparse.Namespace) -> None:
    from ..calibrate.layers import LayerGrid, calibrate_layers, format_layers
    from ..memory.placement import chosen_mode

    params, profile = read_params(a, require_profile(a.model, a.profile, note))
    grid = LayerGrid(() if a.table_only else a.masses or LayerGrid.masses, a.budgets or LayerGrid.budgets, a.group)
    out = a.output or str(Path(a.model).with_suffix(".fasa.json"))
    _, result = calibrate_layers(
        a.model,
        read_text(a.file, a.detokenize),
        out,
        grid,
        params,
        profile,
        a.windows,
        a.window,
        a.score,
        progress_bar(),
        a.resume,
        n_threads=a.threads,
        n_gpu_layers=a.n_gpu_layers,
        type_k=a.cache_type_k,
        type_v=a.cache_type_v,
        mode=chosen_mode(a.fasa_mode),
    )
    print(json.dumps(result, indent=1) if a.json else format_layers(result))
    print(f"{out}: the profile", file=sys.stderr)


def _add_calibrate_layers(command: AddCommand) -> None:
    p: Any = command(
        "calibrate-layers",
        cmd_calibrate_layers,
        "Find how much of the attention each layer may miss, and the masses of mean budgets.",
        "model.gguf -f text.txt -o profile.json",
    )
    add_model(p)
    add_context_flags(p)
    add_fasa_flags(p)
    _add_text_flags(p, 3, 128)
    p.add_argument("--masses", type=shares, help="comma list of masses, of one sparse layer at a time [0.5,0.75,0.9]")
    p.add_argument(
        "--budgets",
        type=comma_list(1),
        help="comma list of mean budgets whose masses are looked for [128,256,512,1024]",
    )
    p.add_argument(
        "--group", type=whole(1), default=1, help="neighbouring layers that share a factor: fewer runs, less noise [1]"
    )
    p.add_argument("--table-only", action="store_true", help="only the masses of mean budgets")
    p.add_argument(
        "--resume",
        metavar="FILE.jsonl",
        help="keep finished runs here instead of in OUTPUT.partial.jsonl, for other --masses too",
    )
    p.add_argument("-o", "--output", help="profile to write [MODEL's name.fasa.json]")
    p.add_argument("--json", action="store_true", help="figures as JSON")


def add_commands(command: AddCommand) -> None:
    _add_compare(command)
    _add_sweep(command)
    _add_calibrate_layers(command)
