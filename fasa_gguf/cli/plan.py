"""The command `plan` of the command line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from ..errors import FasaError
from ..profile.profile import Profile
from ..speed.random_model import SHAPES
from .arguments import add_context_flags, add_fasa_flags, add_model, add_shape_flags, random_model, read_params, whole


def _there_is(a: argparse.Namespace) -> tuple[int | None, int | None, int]:
    """(bytes of device memory for a plan, None when unknown; bytes of host memory; the driver's own, which are not in the first)."""
    from .. import runtime
    from ..memory.placement import host_memory
    from ..memory.plan import CUDA_CONTEXT, CUDA_KERNELS, size

    host = size(a.ram) if a.ram else host_memory()
    if a.vram:
        cuda = CUDA_CONTEXT + CUDA_KERNELS
        return max(size(a.vram) - cuda, 0), host, cuda
    try:
        devices = runtime.devices.cuda_devices()
    except FasaError:  # a plan needs no native library
        devices = []
    cuda = CUDA_KERNELS * len(devices)  # the context is taken when the memory is asked for
    if not devices:
        return None, host, CUDA_CONTEXT + CUDA_KERNELS
    return sum(runtime.devices.device_memory(d)[0] for d in devices) - cuda, host, cuda


def cmd_plan(a: argparse.Namespace) -> None:
    from ..gguf.file import GGUFFile
    from ..gguf.shape import model_shape
    from ..memory.plan import Setup, read_model, ways
    from ..memory.report import as_dict, table
    from ..speed.plan_check import check, check_table
    from ..speed.random_model import synthetic_profile

    path = random_model(a) if a.shape else a.model
    gguf = GGUFFile(path)
    profile = Profile.load(a.profile) if a.profile else Profile.from_gguf(gguf)
    if profile is None:
        print("no FASA profile in the model: planned as if it ranked every attention layer", file=sys.stderr)
        profile = synthetic_profile(*model_shape(gguf))
    params, profile = read_params(a, profile)
    m = read_model(path, profile)
    s = Setup(
        n_ctx=a.ctx_size,
        n_seq_max=a.n_parallel,
        n_batch=max(a.ubatch_size, 2048),
        n_ubatch=a.ubatch_size,
        n_gpu_layers=a.n_gpu_layers,
        type_k=a.cache_type_k,
        type_v=a.cache_type_v,
    )
    if a.check:
        rows = check(
            path, m, s, params, profile, ("device", "host") if a.fasa_mode in (None, "auto") else (a.fasa_mode,)
        )
        print(json.dumps(rows, indent=1) if a.json else check_table(rows))
        return
    device, host, cuda = _there_is(a)
    found = ways(m, s, params, device, host)
    print(
        json.dumps(as_dict(m, s, params, found, device, host, cuda), indent=1)
        if a.json
        else table(m, s, found, device, host, cuda)
    )
    if s.tokens(m) > m.n_ctx_train > 0:
        print(f"the model was trained on {m.n_ctx_train:,} tokens", file=sys.stderr)
    if s.n_gpu_layers and params.min_context and s.cells(m) < params.min_context_gpu:
        print(
            f"FASA-C: below min_context_gpu, {params.min_context_gpu:,} cells, layers on a GPU stay dense and have no dominant keys",
            file=sys.stderr,
        )
    if device is None:
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
    p.add_argument("--vram", metavar="12G", help="memory of the GPU; default: what is free on the GPUs here")
    p.add_argument("--ram", metavar="64G", help="host memory for K and V; default: what is available here")
    add_shape_flags(p, tuple(SHAPES))
    p.add_argument(
        "--check", action="store_true", help="load the model on the GPU, and print planned against measured memory"
    )
    p.add_argument("--json", action="store_true", help="bytes and tokens as JSON")
