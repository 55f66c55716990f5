"""The commands `compare`, `sweep` and `calibrate-layers` of the command line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .main import (
    _bar,
    _fasa_flags,
    _list,
    _model,
    _params,
    _run_flags,
    _shares,
    _text,
    _whole,
)

METHODS = (
    "window",
    "random",
    "quest",
    "double-sparsity",
    "sparq",
    "snapkv",
    "oracle",
    "oracle-shared",
    "fasa",
    "paper",
    "paper:dense_layers=1",
)


def _percent(text: str) -> float:
    """An argparse type: 1% is 0.01."""
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = -1.0
    if not text.endswith("%") or not 0 <= value < 1000:
        raise argparse.ArgumentTypeError(f"expected a percentage such as 1%, found {text!r}")
    return value / 100


def _read(path: str, detokenize: str | None) -> str:
    from ..quality.perplexity import detokenize_wikitext

    text = _text(path)[1]
    return detokenize_wikitext(text) if detokenize == "wikitext" else text


def _text_flags(p: argparse.ArgumentParser, windows: int, score: int = 384) -> None:
    p.add_argument("-f", "--file", required=True, help="text")
    p.add_argument("--detokenize", choices=("wikitext",), help="undo a corpus' word tokenisation")
    p.add_argument("--windows", type=_whole(1), default=windows, help=f"windows [{windows}]")
    p.add_argument("--window", type=_whole(2), default=4096, help="tokens per window [4096]")
    p.add_argument(
        "--score", type=_whole(1), default=score, help=f"last tokens of a window that are decoded and scored [{score}]"
    )


def cmd_compare(a: argparse.Namespace) -> None:
    from ..harness import require_torch

    require_torch()
    from ..harness.compare import Setup, compare, find_profile
    from ..harness.report import table

    methods = a.methods.split(",") if a.methods else [*METHODS, *(["fasa-mass"] if a.tune else [])]
    setup = Setup(
        a.model,
        _read(a.file, a.detokenize),
        methods,
        a.budgets,
        a.windows,
        a.window,
        a.score,
        _read(a.tune, a.detokenize) if a.tune else None,
        a.tune_windows,
        a.sink,
        a.recent,
        a.device,
        find_profile(a.profile, a.model),
        a.threads,
        {"text": Path(a.file).name, **({"tune": Path(a.tune).name} if a.tune else {})},
    )
    result = compare(setup, a.output, a.plan, a.library, _bar())
    if result is None:
        print(f"the windows are in {a.output}; the same command without --plan runs them", file=sys.stderr)
        return
    print(json.dumps(result, indent=1) if a.json else table(result["rows"]))
    print(f"{a.output}: results.md, results.json, budget.png, bytes.png", file=sys.stderr)


def cmd_sweep(a: argparse.Namespace) -> None:
    from ..memory.placement import chosen_mode
    from ..profile.profile import Profile
    from ..quality.sweep import Grid, sweep, table

    params, profile = _params(a, Profile.load(a.profile or a.model))
    grid = Grid(a.chunks or (), a.budgets or (() if a.masses else Grid.budgets), a.masses or ())
    result = sweep(
        a.model,
        _read(a.file, a.detokenize),
        a.output,
        grid,
        a.max_loss,
        params,
        profile,
        a.windows,
        a.window,
        a.score,
        _bar(),
        n_threads=a.threads,
        n_gpu_layers=a.n_gpu_layers,
        type_k=a.cache_type_k,
        type_v=a.cache_type_v,
        mode=chosen_mode(a.fasa_mode),
    )
    print(json.dumps(result, indent=1) if a.json else table(result))
    print(f"{a.output}: sweep.json, sweep.png", file=sys.stderr)


def cmd_calibrate_layers(a: argparse.Namespace) -> None:
    from ..calibrate.layers import LayerGrid, calibrate_layers, format_layers
    from ..memory.placement import chosen_mode
    from ..profile.profile import Profile

    params, profile = _params(a, Profile.load(a.profile or a.model))
    grid = LayerGrid(() if a.table_only else a.masses or LayerGrid.masses, a.budgets or LayerGrid.budgets, a.group)
    out = a.output or str(Path(a.model).with_suffix(".fasa.json"))
    _, result = calibrate_layers(
        a.model,
        _read(a.file, a.detokenize),
        out,
        grid,
        params,
        profile,
        a.windows,
        a.window,
        a.score,
        _bar(),
        a.resume,
        n_threads=a.threads,
        n_gpu_layers=a.n_gpu_layers,
        type_k=a.cache_type_k,
        type_v=a.cache_type_v,
        mode=chosen_mode(a.fasa_mode),
    )
    print(json.dumps(result, indent=1) if a.json else format_layers(result))
    print(f"{out}: the profile", file=sys.stderr)


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """All three, through cli.parser's own way to add one."""
    p: Any = command(
        "compare",
        cmd_compare,
        "Sparse attention methods at equal budget in a small reference decoder (needs torch).",
        "model.gguf -f test.txt --tune valid.txt --budgets 128,256,512,1024 -o compare",
    )
    _model(p)
    _text_flags(p, 10)
    p.add_argument(
        "--methods",
        metavar="LIST",
        help=f"comma list, options as in quest:page=8; dense always runs [{','.join(METHODS)}, "
        "and fasa-mass with --tune]",
    )
    p.add_argument(
        "--budgets", type=_list(1), default=[128, 256, 512, 1024], help="comma list of tokens [128,256,512,1024]"
    )
    p.add_argument(
        "--tune",
        metavar="TEXT",
        help="choose every method's options on this text, at equal budget; calibrate on it too",
    )
    p.add_argument("--tune-windows", type=_whole(1), default=2, help="windows of --tune")
    p.add_argument("--sink", type=_whole(0), default=4, help="first tokens that every method attends, in the budget")
    p.add_argument("--recent", type=_whole(0), default=32, help="last tokens that every method attends, in the budget")
    p.add_argument("--profile", help="FASA's profile, a JSON or GGUF file, instead of the one in the model")
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument(
        "--library", action="store_true", help="FASA through the shipped library too, beside the harness' own"
    )
    p.add_argument(
        "--plan",
        action="store_true",
        help="only cut the windows into DIR; the rest then runs without the native library",
    )
    p.add_argument("-t", "--threads", type=_whole(0), default=0, help="CPU threads; 0: as torch and the library choose")
    p.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        required=True,
        help="folder of the results; finished windows there are not run again",
    )
    p.add_argument("--json", action="store_true", help="print results.json")
    p = command(
        "sweep",
        cmd_sweep,
        "Find the cheapest chunks and budget within a perplexity loss.",
        "model.gguf -f text.txt --max-loss 1% -o sweep",
    )
    _model(p)
    _run_flags(p)
    _fasa_flags(p)
    _text_flags(p, 5)
    p.add_argument("--chunks", type=_list(1), help="comma list [1/8, 1/4, 3/8 and 1/2 of the head's]")
    p.add_argument("--budgets", type=_list(1), help="comma list of tokens [128,256,512,1024; none with --masses alone]")
    p.add_argument("--masses", type=_shares, help="comma list of target masses")
    p.add_argument(
        "--max-loss",
        type=_percent,
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
    p = command(
        "calibrate-layers",
        cmd_calibrate_layers,
        "Find how much of the attention each layer may miss, and the masses of mean budgets.",
        "model.gguf -f text.txt -o profile.json",
    )
    _model(p)
    _run_flags(p)
    _fasa_flags(p)
    _text_flags(p, 3, 128)
    p.add_argument(
        "--masses", type=_shares, help="comma list of masses at which a layer is sparse alone [0.5,0.75,0.9]"
    )
    p.add_argument(
        "--budgets", type=_list(1), help="comma list of mean budgets whose masses are looked for [128,256,512,1024]"
    )
    p.add_argument(
        "--group", type=_whole(1), default=1, help="neighbouring layers that share a factor: fewer runs, less noise [1]"
    )
    p.add_argument("--table-only", action="store_true", help="only the masses of mean budgets")
    p.add_argument(
        "--resume",
        metavar="FILE.jsonl",
        help="keep finished runs here instead of in OUTPUT.partial.jsonl, for other --masses too",
    )
    p.add_argument("-o", "--output", help="profile to write [MODEL's name.fasa.json]")
    p.add_argument("--json", action="store_true", help="figures as JSON")
