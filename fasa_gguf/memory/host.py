"""The memory that there is: of the GPUs, by the driver's count, and of the host, under the limits of control groups."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from .. import runtime
from ..errors import FasaError

MIB, GIB = 1 << 20, 1 << 30
CUDA_CONTEXT = 500 * MIB  # what the driver counts for a process that has begun to use the device
CUDA_KERNELS = 100 * MIB  # and for kernels, which are loaded when they first run


@dataclass(frozen=True)
class Available:
    """Bytes that there are for a model and its context, None: not known. cuda: what CUDA itself takes besides.

    devices: of each GPU, where there are several; device is their sum.
    """

    device: int | None = None
    host: int | None = None
    cuda: int = 0
    devices: tuple[int, ...] = ()

    @classmethod
    def here(cls, vram: str | None = None, ram: str | None = None) -> Available:
        """Of this machine. vram, ram: other amounts, such as "12G". Raises FasaError for an amount that is none."""
        host = parse_size(ram) if ram else host_memory()
        if vram:
            cuda = CUDA_CONTEXT + CUDA_KERNELS
            return cls(max(parse_size(vram) - cuda, 0), host, cuda)
        try:
            devices = runtime.devices.cuda_devices()
        except FasaError:  # a plan needs no native library
            devices = []
        if not devices:
            return cls(None, host, CUDA_CONTEXT + CUDA_KERNELS)
        cuda = CUDA_KERNELS * len(devices)  # asking for the free memory has made the driver's context
        free = tuple(runtime.devices.device_memory(d)[0] - CUDA_KERNELS for d in devices)
        return cls(sum(free), host, cuda, free)


def parse_size(text: str) -> int:
    """Bytes of "12G", "900M" or "11.5G" (powers of 1024). Raises FasaError."""
    unit = {"K": 10, "M": 20, "G": 30, "T": 40}
    body = text.strip().upper().removesuffix("B").removesuffix("I")
    try:
        value = float(body[:-1]) * (1 << unit[body[-1]])
        if not 0 < value < math.inf:
            raise ValueError
    except (ValueError, KeyError, IndexError):
        raise FasaError(f"{text!r}: expected an amount of memory such as 12G or 900M") from None
    return int(value)


def _group_free(group: Path) -> int | None:
    """Bytes that a control group may still take; None without a limit. Files that may be dropped do not count."""
    try:
        most = int((group / "memory.max").read_text())
        held = int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no such controller, or "max"
        return None
    try:
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        held -= int(stat.get("inactive_file", 0))
    except (OSError, ValueError):
        pass
    return max(most - max(held, 0), 0)


def host_memory(root: str | Path = "/") -> int | None:
    """Bytes of host memory that are free for this process, under the limits of its control group and those above it.

    None where that is not known. root: where /proc and /sys are. native/cuda/pinned.cu counts the same before it pins.
    """
    root, free = Path(root), []
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024)
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except (OSError, ValueError, IndexError):
        groups = []
    top = root / "sys/fs/cgroup"
    own = top / next((line[4:] for line in groups if line.startswith("0::/")), "")
    for group in (own, *own.parents):
        if group.is_relative_to(top) and (room := _group_free(group)) is not None:
            free.append(room)
    return min(free) if free else None
