"""The command `bench`."""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import replace
from typing import Any

from ..errors import FasaError
from ..params import FasaParams
from ..profile.find import require_profile
from ..profile.profile import Profile
from ..speed.random_model import SHAPES
from .arguments import (
    AddCommand,
    add_fasa_flags,
    add_model,
    add_rpc,
    add_shape_flags,
    bits,
    comma_list,
    given_fasa,
    mode,
    note,
    random_model,
    read_params,
    whole,
)
from .progress import progress_bar

CROSSOVER_DEPTHS = (256, 512, 768, 1024, 1536, 2048, 3072, 4096)  # of --find-crossover without -d


def _modes(text: str) -> list[str]:
    """An argparse type: a comma list of modes, without auto."""
    modes = [mode(part) for part in text.split(",")]
    if "auto" in modes:
        raise argparse.ArgumentTypeError("bench measures the modes that it is given; expected device, host or both")
    return modes


def _types(k: str, v: str | None) -> list[tuple[str, str]]:
    """(K, V) cache types: lists go in pairs, one type goes with all, V's are K's by default."""
    ks = k.split(",")
    vs = v.split(",") if v else ks
    if 1 not in (len(ks), len(vs)) and len(ks) != len(vs):
        raise FasaError(
            f"-ctk and -ctv: expected lists of one length, or one type for all, found {len(ks)} and {len(vs)}"
        )
    n = max(len(ks), len(vs))
    return list(zip(ks * (n // len(ks)), vs * (n // len(vs)), strict=True))


def _arms(a: argparse.Namespace, profile: Profile) -> tuple[dict[str, FasaParams], Profile]:
    """(FASA arms by name, the profile as the preset needs it).

    There is an arm for every combination of the flags' comma lists.
    """
    given = {name: text.split(",") for name, text in given_fasa(a).items()}
    several = [name for name, values in given.items() if len(values) > 1]
    arms = {}
    for values in itertools.product(*given.values()):
        one = dict(zip(given, values, strict=True))
        flags = {f"fasa_{name}": value for name, value in one.items()}
        params, used = read_params(argparse.Namespace(**vars(a) | flags), profile)
        arms[" ".join(["fasa", *(f"{name}={one[name]}" for name in several)])] = params
    return arms, used


def _settings(a: argparse.Namespace) -> Any:
    """BenchSettings from the flags; its own defaults where a flag is missing."""
    from ..speed.bench import BenchSettings

    given = {
        "depths": a.n_depth,
        "n_prompt": a.n_prompt,
        "n_parallel": a.n_parallel,
        "n_gpu_layers": a.n_gpu_layers,
        "no_kv_offload": a.no_kv_offload,
        "modes": a.fasa_mode,
    }
    return BenchSettings(
        **{k: v for k, v in given.items() if v is not None},
        n_gen=a.n_gen,
        repetitions=a.repetitions,
        n_threads=a.threads,
        types=_types(a.cache_type_k, a.cache_type_v),
        n_batch=a.batch_size,
        n_ubatch=a.ubatch_size,
        fill=a.fill,
        attention=a.attention,
        n_cpu_moe=a.n_cpu_moe,
    )


def cmd_bench(a: argparse.Namespace) -> None:
    from ..report.pictures import check_plot_path
    from ..speed.bench import bench
    from ..speed.crossover import crossover_text, find_crossover
    from ..speed.report import format_results, save_plot

    if a.plot:
        check_plot_path(a.plot)  # not after minutes
    if a.measured:
        return _plot_measured(a)
    model = random_model(a) if a.shape else a.model
    arms, profile = _arms(a, require_profile(model, a.profile, note))
    if a.shape and any(p.mass > 0 for p in arms.values()):
        raise FasaError(
            "--fasa-mass and --fasa-quality with --shape: the attention of random weights is spread evenly, so a "
            "target mass means nothing; give --fasa-budget"
        )
    settings = _settings(a)
    output = "json" if a.json else a.output
    results: list[Any] = []

    def emit(group: list[Any]) -> None:
        results.extend(group)
        if output == "jsonl":  # each as soon as it is measured
            print(format_results(group, model, output), flush=True)

    try:
        if a.find_crossover:
            if not settings.n_gen:
                raise FasaError("--find-crossover looks at decode steps; give -n 1 or more")
            if len(arms) > 1:
                raise FasaError("--find-crossover looks for one depth; give every --fasa setting one value")
            settings = settings if a.n_depth else replace(settings, depths=CROSSOVER_DEPTHS)
            params = next(iter(arms.values()))
            depth, _ = find_crossover(model, settings, params, profile=profile, progress=progress_bar(), emit=emit)
            print(crossover_text(depth, results), file=sys.stderr)
        else:
            bench(model, settings, arms, profile, progress_bar(), emit)
    finally:
        if results and output != "jsonl":  # those of an interrupted run too
            print(format_results(results, model, output))
        if a.plot and any(r.samples_ts for r in results if r.n_gen):
            save_plot(results, a.plot, model)
            print(f"picture: {a.plot}", file=sys.stderr)


def _plot_measured(a: argparse.Namespace) -> None:
    """Draw what an earlier run measured."""
    from ..speed.report import read_results, save_plot

    if not a.plot:
        raise FasaError("--from draws what was measured; give the picture's name with --plot")
    if a.model or a.shape:
        raise FasaError("--from draws what was measured, and no model is measured; omit MODEL and --shape")
    results, model = read_results(a.measured)
    save_plot(results, a.plot, model)
    print(f"picture: {a.plot}", file=sys.stderr)


def _add_measurement_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("-d", "--n-depth", type=comma_list(0), help="comma list of cache depths in tokens [0,4096,8192]")
    p.add_argument("-n", "--n-gen", type=whole(0), default=32, help="tokens per sequence and repetition; 0: none [32]")
    p.add_argument(
        "-p",
        "--n-prompt",
        type=comma_list(0),
        help="comma list of prompts whose prefill is timed, in tokens; 0: none [512]",
    )
    p.add_argument(
        "-np",
        "--n-parallel",
        type=comma_list(1),
        help="comma list of sequences that decode together, each at the depth [1]",
    )
    p.add_argument("-r", "--repetitions", type=whole(1), default=5, help="repetitions per arm [5]")
    p.add_argument(
        "-t", "--threads", type=whole(0), default=0, help="CPU threads; 0: the physical cores that this process may use"
    )
    p.add_argument("-ngl", "--n-gpu-layers", type=comma_list(-1), help="comma list of layers on the GPU; -1: all [0]")
    add_rpc(p)
    p.add_argument(
        "-nkvo", "--no-kv-offload", type=bits, help="comma list of 0 and 1; 1: dense with the cache in host memory [0]"
    )
    p.add_argument(
        "-ctk", "--cache-type-k", default="f16", help="comma list of types of the K cache: f16, q8_0, ... [f16]"
    )
    p.add_argument("-ctv", "--cache-type-v", help="comma list of types of the V cache, in pairs with K's [as -ctk]")
    p.add_argument("-b", "--batch-size", type=whole(1), default=2048, help="tokens per prefill batch [2048]")
    p.add_argument("-ub", "--ubatch-size", type=whole(1), default=512, help="tokens computed at once in prefill [512]")
    p.add_argument(
        "--fill",
        choices=("auto", "prefill", "random"),
        default="auto",
        help="how the cache gets its depth; auto: random from 2048 on",
    )
    p.add_argument(
        "-ncmoe", "--n-cpu-moe", type=whole(0), default=0, help="the experts of the first N layers stay on the CPU [0]"
    )
    p.add_argument("--attention", action="store_true", help="time steps without attention too: what attention adds")


def _add_output_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--find-crossover",
        action="store_true",
        help="find the depth from which FASA is no slower than dense: the best --fasa-min-context, with layers on a "
        "GPU the best --fasa-min-context-gpu",
    )
    p.add_argument(
        "-o",
        "--output",
        choices=("md", "json", "jsonl", "csv"),
        default="md",
        help="format of the results; jsonl: each as soon as it is measured",
    )
    p.add_argument("--json", action="store_true", help="the same as -o json")
    p.add_argument(
        "--plot", metavar="FILE", help="write a picture of tokens/s against depth: FILE.svg, FILE.png or FILE.pdf"
    )
    p.add_argument(
        "--from",
        dest="measured",
        metavar="FILE.json",
        help="measure nothing: --plot draws what an earlier `bench --json` printed into this file",
    )


def add_commands(command: AddCommand) -> None:
    p = command(
        "bench",
        cmd_bench,
        "Tokens per second of dense and FASA, taking turns in one process; columns: docs/reference/bench.md.",
        "model.gguf -d 0,4096,8192 -ctk f16,q8_0",
    )
    add_model(p)
    _add_measurement_flags(p)
    add_shape_flags(p, tuple(SHAPES))
    _add_output_flags(p)
    add_fasa_flags(p, "; a comma list makes an arm of each value", mode_flag=False)
    p.add_argument(
        "--fasa-mode",
        type=_modes,
        metavar="MODES",
        help="comma list of device and host: where K and V lie, on the device (FASA-C) or in pinned host memory "
        "(FASA-M, without a dense arm) [device]",
    )
