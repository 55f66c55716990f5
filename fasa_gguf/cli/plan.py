"""The command `plan` of the command line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..params import FasaParams
from ..profile.find import find_profile
from ..speed.random_model import SHAPES
from .arguments import (
    add_context_flags,
    add_fasa_flags,
    add_model,
    add_shape_flags,
    note,
    random_model,
    read_params,
    whole,
)

if TYPE_CHECKING:
    from ..memory.host import Available
    from ..memory.model import Model
    from ..runtime.settings import ContextSettings


def cmd_plan(a: argparse.Namespace) -> None:
    from ..gguf.file import GGUFFile
    from ..gguf.shape import model_shape
    from ..memory.gpu_limit import planned
    from ..memory.host import Available
    from ..memory.model import read_model
    from ..memory.plan import ways
    from ..memory.report import format_plan, plan_as_dict
    from ..params import parse_mode
    from ..runtime.settings import ContextSettings
    from ..speed.plan_check import check, format_check
    from ..speed.random_model import synthetic_profile

    path = random_model(a) if a.shape else a.model
    gguf = GGUFFile(path)
    profile = find_profile(gguf, a.profile, note)
    if profile is None:
        print("no FASA profile in the model: planned as if it ranked every attention layer", file=sys.stderr)
        profile = synthetic_profile(*model_shape(gguf))
    params, profile = read_params(a, profile)
    model = read_model(gguf, profile)
    settings = ContextSettings(
        n_ctx=a.ctx_size,
        n_seq_max=a.n_parallel,
        n_batch=max(a.ubatch_size, 2048),
        n_ubatch=a.ubatch_size,
        n_gpu_layers=a.n_gpu_layers,
        type_k=a.cache_type_k,
        type_v=a.cache_type_v,
        swa_full=a.swa_full,
    )
    if a.check:
        mode = parse_mode(a.fasa_mode or "auto")
        modes = ("device", "host") if mode == "auto" else (mode,)
        results = check(path, model, settings, params, profile, modes)
        print(json.dumps(results, indent=1) if a.json else format_check(results))
        return
    available = Available.here(a.vram, a.ram)
    params, limit = planned(model, settings, params)
    if limit is not None:
        print(limit.text, file=sys.stderr)
    found = ways(model, settings, params, available)
    if a.json:
        print(json.dumps(plan_as_dict(model, settings, params, found, available), indent=1))
    else:
        print(format_plan(model, settings, found, available))
    _say_what_to_know(model, settings, params, available)


def _say_what_to_know(model: Model, settings: ContextSettings, params: FasaParams, available: Available) -> None:
    """Notes on stderr: what the figures do not say by themselves."""
    from ..gguf.shape import describe_windows
    from ..memory.plan import ContextShape

    shape = ContextShape(model, settings)
    if shape.n_ctx > model.n_ctx_train > 0:
        print(f"the model was trained on {model.n_ctx_train:,} tokens", file=sys.stderr)
    for line in describe_windows([x.window for x in model.layers]):
        kept = shape.cells(max(x.window for x in model.layers))
        print(f"{line}; their cache holds {kept:,} cells of a sequence (--swa-full, --no-swa-full)", file=sys.stderr)
    if settings.n_gpu_layers and params.min_context and shape.cells() < params.min_context_gpu:
        print(
            f"FASA-C: below min_context_gpu, {params.min_context_gpu:,} cells, layers on a GPU stay dense and have no "
            "dominant keys",
            file=sys.stderr,
        )
    if available.device is None:
        print("no CUDA device here: give --vram, such as 12G, for the largest context that fits it", file=sys.stderr)


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """`plan`, through cli.parser's own way to add one."""
    p: Any = command(
        "plan",
        cmd_plan,
        "What a context takes, dense and with FASA, and which one fits; nothing is loaded.",
        "model.gguf -c 131072 --vram 24G",
    )
    add_model(p)
    add_context_flags(p)
    p.set_defaults(n_gpu_layers=-1)
    add_fasa_flags(p)
    p.add_argument(
        "-c", "--ctx-size", type=whole(0), default=0, help="context in tokens, over all sequences; 0: the model's own"
    )
    p.add_argument(
        "-np", "--n-parallel", type=whole(1), default=1, help="sequences, each with its part of the context [1]"
    )
    p.add_argument("-ub", "--ubatch-size", type=whole(1), default=512, help="tokens computed at once in prefill [512]")
    p.add_argument(
        "--swa-full",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="layers with a sliding window keep all cells, as llama-cpp-python has it [yes]; --no-swa-full: only those "
        "of the window, as llama.cpp's own programs have it",
    )
    p.add_argument("--vram", metavar="12G", help="memory of the GPU; default: what is free on the GPUs here")
    p.add_argument("--ram", metavar="64G", help="host memory for K and V; default: what is available here")
    add_shape_flags(p, tuple(SHAPES))
    p.add_argument(
        "--check", action="store_true", help="load the model on the GPU, and print planned against measured memory"
    )
    p.add_argument("--json", action="store_true", help="bytes and tokens as JSON")
