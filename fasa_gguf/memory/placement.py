"""Where the K and V of a context lie: on the device (FASA-C), or in pinned host memory (FASA-M). Asked for, or found by the plan."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from .. import runtime
from ..errors import FasaError
from ..params import MODE_ALIASES, MODES, FasaParams
from ..profile.profile import Profile
from .plan import CUDA_KERNELS, GIB, Memory, Model, Setup, memory, read_model


def chosen_mode(given: str | None) -> str:
    """`given`, or FASA_MODE of the environment, or auto. Raises FasaError for anything but auto, c and m."""
    mode, where = (
        (given, "fasa_mode") if given is not None else (os.environ.get("FASA_MODE") or "auto", "environment: FASA_MODE")
    )
    if mode not in (*MODES, *MODE_ALIASES):
        raise FasaError(f"{where}: expected one of {', '.join(MODES)}, found {mode!r}")
    return mode


def why_not_m(cuda: Sequence[str], n_gpu_layers: int, no_kv_offload: bool) -> str:
    """Why a context cannot keep K and V in pinned host memory, with the way out; "" when it can. cuda: names of the CUDA devices."""
    if not cuda:
        return (
            "fasa_mode m keeps K and V in host memory that a CUDA device reads, and there is no CUDA device, or no CUDA in this build; "
            "use mode c, or a build with CMAKE_ARGS=-DGGML_CUDA=ON"
        )
    if n_gpu_layers == 0:
        return (
            "fasa_mode m: no layer is on the GPU, which m is for; give n_gpu_layers (-ngl), -1 for all, or use mode c"
        )
    if no_kv_offload:
        return "fasa_mode m: offload_kqv=False (-nkvo) keeps attention on the CPU, away from the GPU that m is for; leave it away, or use mode c"
    return ""


def decide(c: Memory, m: Memory, free: int, loaded: bool = False, n_devices: int = 1) -> str:
    """c when FASA-C fits `free` bytes of the devices (all together), else m. loaded: the weights are on them already."""
    return "c" if _need(c, loaded, n_devices) <= free else "m"


def _need(x: Memory, loaded: bool, n_devices: int = 1) -> int:
    """Bytes on the devices; each has a scratch of its own."""
    return (x.context if loaded else x.device) + (n_devices - 1) * x.scratch + n_devices * CUDA_KERNELS


def sentence(
    mode: str, c: Memory, m: Memory, free: int, loaded: bool = False, n_devices: int = 1, host: int | None = None
) -> str:
    """One line for the user: what was picked, and what it takes. host: bytes of host memory that there are."""
    x = m if mode == "m" else c
    gib = lambda n: f"{n / GIB:.2f}"
    parts = [
        (x.weights, "weights"),
        (x.kv, "K and V"),
        (x.k_dom, "dominant keys"),
        (x.row_cache, "row cache"),
        (x.scratch, "scratch"),
    ]
    what = ", ".join(f"{gib(n)} {name}" for n, name in parts[loaded:] if n)
    line = f"mode {mode}: {gib(_need(x, loaded, n_devices))} of {gib(free)} GiB free on the GPU ({what})"
    if mode == "m":
        line += f", {gib(m.kv_pinned)} GiB of host memory pinned; mode c needs {gib(_need(c, loaded, n_devices))} GiB"
        if _need(m, loaded, n_devices) > free or (host is not None and m.host > host):
            short = (
                "the GPU"
                if _need(m, loaded, n_devices) > free
                else f"host memory, of which {gib(host or 0)} GiB are free"
            )
            line += f"; this may not fit {short}: `fasa-gguf plan` says which context does"
    return line


def place(
    mode: str,
    model: Model | None,
    setup: Setup,
    arms: Sequence[FasaParams],
    loaded: bool = False,
    only: int | None = None,
) -> tuple[str, str]:
    """(c or m, a line that says what auto found, or ""). arms: the settings that the context is for; auto plans for the largest of them.

    model None: what auto would plan with is not known, and it is c. loaded: the weights are on the device already. only: the number of
    the one CUDA device that is used; None: all are.
    Raises FasaError when m was asked for and cannot be.
    """
    if mode == "c":
        return "c", ""
    cuda = runtime.devices.cuda_devices()
    why = why_not_m(cuda, setup.n_gpu_layers, setup.no_kv_offload)
    if mode == "m":
        if why:
            raise FasaError(why)
        return "m", ""
    if why or model is None or not arms:
        return "c", ""
    both = [max((memory(model, setup, p, way) for p in arms), key=lambda x: x.device) for way in ("c", "m")]
    cuda = cuda if only is None else cuda[only : only + 1] or cuda
    free = sum(runtime.devices.device_memory(name)[0] for name in cuda)
    found = decide(*both, free, loaded, len(cuda))
    return found, sentence(found, *both, free, loaded, len(cuda), host_memory())


def place_model(
    mode: str,
    path: str | os.PathLike,
    profile: Profile | None,
    setup: Setup,
    arms: Sequence[FasaParams],
    loaded: bool = False,
    only: int | None = None,
) -> tuple[str, str]:
    """As `place`, for the model of a file, which is read only when auto has something to decide. Where it has no plan, auto is c and says why."""
    if mode != "auto" or not arms or why_not_m(runtime.devices.cuda_devices(), setup.n_gpu_layers, setup.no_kv_offload):
        return place(mode, None, setup, arms)
    try:
        return place(mode, read_model(path, profile), setup, arms, loaded, only)
    except FasaError as e:
        return "c", f"mode c, without a plan: {e}"


def host_memory() -> int | None:
    """Bytes of host memory that are free for a process, under the limits of its control groups; None where that is not known."""
    free = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024)
        top = Path("/sys/fs/cgroup")
        own = next(
            (line[4:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::/")), ""
        )
        for group in (top / own, *(top / own).parents):  # as far as there are limits to read
            limit = group / "memory.max"
            if limit.exists() and (most := limit.read_text().strip()) != "max":
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                held = int((group / "memory.current").read_text()) - int(
                    stat.get("inactive_file", 0)
                )  # files that may be dropped are no load
                free.append(max(int(most) - max(held, 0), 0))
    except (OSError, ValueError, IndexError):
        pass
    return min(free) if free else None
