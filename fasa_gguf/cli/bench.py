"""The command `bench` of the command line."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from ..errors import FasaError
from ..params import FasaParams
from ..profile.profile import Profile
from ..speed.random_model import SHAPES
from .main import _bar, _fasa_flags, _list, _model, _params, _whole


def _bits(text: str) -> list[int]:
    """An argparse type: a comma list of 0 and 1."""
    if set(text.split(",")) <= {"0", "1"}:
        return [int(part) for part in text.split(",")]
    raise argparse.ArgumentTypeError(f"expected a comma list of 0 and 1, found {text!r}")


def _types(k: str, v: str | None) -> list[tuple[str, str]]:
    """(K, V) cache types: lists go in pairs, one type goes with all, V's are K's by default."""
    ks = k.split(",")
    vs = v.split(",") if v else ks
    if 1 not in (len(ks), len(vs)) and len(ks) != len(vs):
        raise FasaError(
            f"-ctk and -ctv: expected lists of one length, or one type for all, found {len(ks)} and {len(vs)}"
        )
    n = max(len(ks), len(vs))
    return list(zip(ks * (n // len(ks)), vs * (n // len(vs))))


def _arms(a: argparse.Namespace, profile: Profile) -> tuple[dict[str, FasaParams], Profile]:
    """(FASA arms by name, the profile as the preset wants it): one for every combination of the settings' comma lists."""
    given = {
        f"fasa_{f.name}": text.split(",")
        for f in fields(FasaParams)
        if (text := getattr(a, f"fasa_{f.name}")) is not None
    }
    several = [name for name, values in given.items() if len(values) > 1]
    arms = {}
    for values in itertools.product(*given.values()):
        one = dict(zip(given, values))
        params, used = _params(argparse.Namespace(**vars(a) | one), profile)
        arms[" ".join(["fasa", *(f"{name[5:]}={one[name]}" for name in several)])] = params
    return arms, used


def _shape(a: argparse.Namespace) -> str:
    """The random model of --shape, written when it is not there."""
    from ..speed.random_model import cached_model, write_model

    say = lambda text: print(text, file=sys.stderr)
    if not a.output_model:
        return str(cached_model(a.shape, say))
    if not os.path.exists(a.output_model):
        say(f"writing a random {a.shape} model to {a.output_model}")
        write_model(a.output_model, a.shape)
    return a.output_model


def cmd_bench(a: argparse.Namespace) -> None:
    from ..speed.bench import Plan, bench
    from ..speed.crossover import crossover_text, find_crossover
    from ..speed.report import render, save_plot

    model = _shape(a) if a.shape else a.model
    arms, profile = _arms(a, Profile.load(a.profile or model))
    if a.shape and any(p.mass > 0 for p in arms.values()):
        raise FasaError(
            "--fasa-mass with --shape: the attention of random weights is spread evenly, so a target mass means nothing; give --fasa-budget"
        )
    given = {
        "depths": a.n_depth,
        "n_prompt": a.n_prompt,
        "n_parallel": a.n_parallel,
        "n_gpu_layers": a.n_gpu_layers,
        "no_kv_offload": a.no_kv_offload,
        "modes": a.fasa_mode and a.fasa_mode.split(","),
    }
    plan = Plan(
        **{k: v for k, v in given.items() if v is not None},
        n_gen=a.n_gen,
        repetitions=a.repetitions,
        n_threads=a.threads,
        types=_types(a.cache_type_k, a.cache_type_v),
        n_batch=a.batch_size,
        n_ubatch=a.ubatch_size,
        fill=a.fill,
    )
    output = "json" if a.json else a.output
    rows: list[Any] = []

    def emit(group: list[Any]) -> None:
        rows.extend(group)
        if output == "jsonl":  # each row as soon as it is there
            print(render(group, model, output), flush=True)

    try:
        if a.find_crossover:
            if len(arms) > 1:
                raise FasaError("--find-crossover looks for one depth; give every --fasa setting one value")
            plan = plan if a.n_depth else replace(plan, depths=(256, 512, 768, 1024, 1536, 2048, 3072, 4096))
            depth, _ = find_crossover(
                model, plan, next(iter(arms.values())), profile=profile, progress=_bar(), emit=emit
            )
            print(crossover_text(depth, rows), file=sys.stderr)
        else:
            bench(model, plan, arms, profile, _bar(), emit)
    finally:
        if rows and output != "jsonl":  # those of an interrupted run too
            print(render(rows, model, output))
        if a.plot and any(r.samples_ts for r in rows if r.n_gen):
            save_plot(rows, a.plot, model)
            print(f"picture: {a.plot}", file=sys.stderr)


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """`bench`, through cli.parser's own way to add one."""
    p: Any = command(
        "bench",
        cmd_bench,
        "Tokens per second of dense and FASA, taking turns in one process; columns: docs/reference/bench.md.",
        "model.gguf -d 0,4096,8192 -ctk f16,q8_0",
    )
    _model(p)
    p.add_argument("-d", "--n-depth", type=_list(0), help="comma list of cache depths in tokens [0,4096,8192]")
    p.add_argument("-n", "--n-gen", type=_whole(1), default=32, help="tokens per sequence and repetition [32]")
    p.add_argument(
        "-p", "--n-prompt", type=_list(0), help="comma list of prompts whose prefill is timed, in tokens; 0: none [512]"
    )
    p.add_argument(
        "-np", "--n-parallel", type=_list(1), help="comma list of sequences that decode together, each at the depth [1]"
    )
    p.add_argument("-r", "--repetitions", type=_whole(1), default=5, help="repetitions per arm [5]")
    p.add_argument("-t", "--threads", type=_whole(0), default=0, help="CPU threads; 0: all cores")
    p.add_argument("-ngl", "--n-gpu-layers", type=_list(-1), help="comma list of layers on the GPU; -1: all [0]")
    p.add_argument(
        "-nkvo", "--no-kv-offload", type=_bits, help="comma list of 0 and 1; 1: dense with the cache in host memory [0]"
    )
    p.add_argument(
        "-ctk", "--cache-type-k", default="f16", help="comma list of types of the K cache: f16, q8_0, ... [f16]"
    )
    p.add_argument("-ctv", "--cache-type-v", help="comma list of types of the V cache, in pairs with K's [as -ctk]")
    p.add_argument("-b", "--batch-size", type=_whole(1), default=2048, help="tokens per prefill batch [2048]")
    p.add_argument("-ub", "--ubatch-size", type=_whole(1), default=512, help="tokens computed at once in prefill [512]")
    p.add_argument(
        "--fill",
        choices=("auto", "prefill", "random"),
        default="auto",
        help="how the cache gets its depth; auto: random from 2048 on",
    )
    p.add_argument("--shape", choices=tuple(SHAPES), help="make and use a random model of this shape")
    p.add_argument("--output-model", help="where --shape writes its model; default: the user's cache folder")
    p.add_argument(
        "--find-crossover",
        action="store_true",
        help="the depth from which on FASA is no slower than dense: what --fasa-min-context, on a GPU --fasa-min-context-gpu, should be",
    )
    p.add_argument(
        "-o",
        "--output",
        choices=("md", "json", "jsonl", "csv"),
        default="md",
        help="format of the rows; jsonl: each as soon as it is measured",
    )
    p.add_argument("--json", action="store_true", help="the same as -o json")
    p.add_argument("--plot", metavar="FILE.png", help="write a picture of tokens/s against depth")
    _fasa_flags(p, "; a comma list makes an arm of each value", mode=False)
    p.add_argument(
        "--fasa-mode",
        metavar="c,m",
        help="comma list of c and m: where K and V lie, on the device or in pinned host memory (FASA only) [c]",
    )
