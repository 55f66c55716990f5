"""Where the K and V of a context lie: mode device (FASA-C, on the GPU) or host (FASA-M, in pinned host memory).

The user asks for one of them, or for auto, which plans with what is free.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from .. import runtime
from ..errors import FasaError
from ..params import FasaParams, parse_mode
from ..runtime.settings import ContextSettings
from .gpu_limit import planned
from .host import CUDA_KERNELS, GIB, host_memory
from .model import Model
from .plan import Memory, estimate, too_small

NAMES = {"device": "mode device (FASA-C)", "host": "mode host (FASA-M)"}


def chosen_mode(given: str | None) -> str:
    """auto, device or host: `given`, or FASA_MODE of the environment, or auto. Raises FasaError for anything else."""
    if given is not None:
        return parse_mode(given, "fasa_mode")
    return parse_mode(os.environ.get("FASA_MODE") or "auto", "environment: FASA_MODE")


def why_not_host(cuda: Sequence[str], n_gpu_layers: int, no_kv_offload: bool) -> str:
    """Why a context cannot keep K and V in pinned host memory, with the way out; "" when it can.

    cuda: names of the CUDA devices.
    """
    if not cuda:
        return (
            "fasa_mode host keeps K and V in host memory that a CUDA device reads, and there is no CUDA device, or no "
            "CUDA in this build; use mode device, or a build with CMAKE_ARGS=-DGGML_CUDA=ON"
        )
    if n_gpu_layers == 0:
        return (
            "fasa_mode host needs layers on the GPU, and there is none; "
            "give n_gpu_layers (-ngl), -1 for all, or use mode device"
        )
    if no_kv_offload:
        return (
            "fasa_mode host needs attention on the GPU, and offload_kqv=False (-nkvo) keeps it on the CPU; "
            "omit it, or use mode device"
        )
    return ""


def gib(n: int) -> str:
    return f"{n / GIB:.2f}"


def _need(x: Memory, loaded: bool, n_devices: int) -> int:
    """Bytes on the devices; each has a scratch of its own."""
    return (x.context if loaded else x.device) + (n_devices - 1) * x.scratch + n_devices * CUDA_KERNELS


def pick(device: Memory, host: Memory, free: int, loaded: bool = False, n_devices: int = 1) -> str:
    """device when that fits `free` bytes of the GPUs (all together), else host. loaded: the weights are there."""
    return "device" if _need(device, loaded, n_devices) <= free else "host"


def sentence(
    mode: str,
    device: Memory,
    host: Memory,
    free: int,
    loaded: bool = False,
    n_devices: int = 1,
    host_free: int | None = None,
    tight: str = "",
) -> str:
    """One line for the user: the mode that auto picked, why, and what it takes.

    device, host: what the two modes take. free, host_free: bytes free on the GPUs and of host memory, None: not known.
    tight: which of several GPUs has no room for its layers in mode device.
    """
    x = host if mode == "host" else device
    need = _need(x, loaded, n_devices)
    parts = [
        (0 if loaded else x.weights, "weights"),
        (x.kv, "K and V"),
        (x.k_dom, "dominant keys"),
        (x.row_cache, "row cache"),
        (x.scratch, "scratch"),
    ]
    what = ", ".join(f"{gib(n)} {name}" for n, name in parts if n)
    takes = f"it takes {gib(need)} of {gib(free)} GiB free there ({what})"
    if mode == "device":
        return f"{NAMES[mode]}: K and V lie on the GPU; {takes}"
    line = (
        f"{NAMES[mode]}: K and V, {gib(host.kv_pinned)} GiB, lie in pinned host memory, because mode device needs "
        f"{gib(_need(device, loaded, n_devices))} GiB on the GPU{tight}; {takes}"
    )
    short = ""
    if need > free:
        short = "the GPU"
    elif host_free is not None and host.host > host_free:
        short = f"host memory, of which {gib(host_free)} GiB are free"
    return line + (f"; this may not fit {short}: `fasa-gguf plan` says which context does" if short else "")


def _estimate(model: Model, settings: ContextSettings, params: FasaParams) -> Memory:
    return estimate(model, settings, planned(model, settings, params)[0])


def choose_mode(
    settings: ContextSettings,
    model: Callable[[], Model],
    arms: Sequence[FasaParams],
    loaded: bool = False,
    only: int | None = None,
    split: Sequence[float] | None = None,
) -> tuple[str, str]:
    """(device or host, a line that says what auto found, or "").

    settings.mode: what was asked for. arms: the FASA settings that the context is for; auto plans for the largest of
    them, and is device without any. model: called only when auto has something to decide; where it raises FasaError,
    auto is device and the line says why. loaded: the weights are on the device already. only: the number of the one
    CUDA device that is used, None: all are, each with the layers that llama.cpp gives it. split: tensor_split, None: by
    free memory.
    Raises FasaError when host was asked for and cannot be.
    """
    if settings.mode == "device":
        return "device", ""
    cuda = runtime.devices.cuda_devices()
    why = why_not_host(cuda, settings.n_gpu_layers, settings.no_kv_offload)
    if settings.mode == "host":
        if why:
            raise FasaError(why)
        return "host", ""
    if why or not arms:
        return "device", ""
    if any(d.name.startswith("RPC") for d in runtime.devices.devices()):
        return "device", "mode device: some layers are on other machines, of which auto does not know"
    try:
        m = model()
        device, host = (
            max((_estimate(m, settings.replace(mode=mode), p) for p in arms), key=lambda x: x.device)
            for mode in ("device", "host")
        )
        cuda = cuda if only is None else cuda[only : only + 1] or cuda
        free = [runtime.devices.device_memory(name)[0] for name in cuda]
        tight = _tight(m, settings, arms, cuda, free, split, loaded) if len(cuda) > 1 else ""
    except FasaError as e:
        return "device", f"mode device, without a plan: {e}"
    total = sum(free)
    found = ("host" if tight else "device") if len(cuda) > 1 else pick(device, host, total, loaded)
    return found, sentence(found, device, host, total, loaded, len(cuda), host_memory(), tight)


def _tight(
    model: Model,
    settings: ContextSettings,
    arms: Sequence[FasaParams],
    cuda: Sequence[str],
    free: Sequence[int],
    split: Sequence[float] | None,
    loaded: bool,
) -> str:
    """Which of several devices has no room for its layers in mode device, in parentheses; "" when all have."""
    room = [n - CUDA_KERNELS for n in free]
    for params in arms:
        if short := too_small(model, settings.replace(mode="device"), params, room, split, loaded):
            i, need = short
            return f" ({cuda[i]} {gib(need + CUDA_KERNELS)} of {gib(free[i])})"
    return ""
