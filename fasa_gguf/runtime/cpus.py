"""How many threads serve this process: the cores that it may use, not the CPUs that the machine has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")  # of /proc and /sys


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _parse_list(text: str) -> set[int]:
    """The kernel's lists, such as 0-3,8."""
    out: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        out |= set(range(int(first), int(last or first) + 1))
    return out


def _allowed() -> set[int]:
    """The CPUs that the scheduler may run this process on (taskset, a container's cpuset)."""
    try:
        return os.sched_getaffinity(0)
    except (AttributeError, OSError):  # not Linux
        return set(range(os.cpu_count() or 1))


def _cores(cpus: set[int]) -> int:
    """Physical cores among these CPUs, as llama.cpp counts them: without efficiency cores where there are others."""
    folder = ROOT / "sys" / "devices"
    fast = cpus & _parse_list(_read(folder / "cpu_core" / "cpus"))
    if fast and _read(folder / "cpu_atom" / "cpus"):
        cpus = fast
    topology = (folder / "system" / "cpu" / f"cpu{i}" / "topology" / "thread_siblings" for i in cpus)
    siblings = {text for text in map(_read, topology) if text}
    if siblings:
        return len(siblings)
    return len(cpus) if len(cpus) <= 4 else len(cpus) // 2


def _group_folders() -> Iterator[Path]:
    """The control groups of this process that may limit its CPU time, each with those above it."""
    base = ROOT / "sys" / "fs" / "cgroup"
    for line in _read(ROOT / "proc" / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        if controllers and "cpu" not in names:
            continue
        for root in {base} if not controllers else {base / controllers, base / "cpu"}:
            inner = root / path.lstrip("/")
            yield inner
            while inner != root:  # in a container the path may be the host's, and only the root be there
                inner = inner.parent
                yield inner


def _quota() -> float:
    """CPUs whose time the control groups grant (cpu.max, or cfs_quota_us of version 1); infinite without a limit."""
    granted = float("inf")
    for folder in _group_folders():
        words = _read(folder / "cpu.max").split() or [
            _read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")
        ]
        if len(words) == 2 and all(word.isdigit() and int(word) for word in words):
            granted = min(granted, int(words[0]) / int(words[1]))
    return granted


@dataclass(frozen=True)
class Granted:
    """What this process may use of the machine's CPUs."""

    cpus: int  # that the machine has
    allowed: int  # of these, by affinity
    cores: int  # physical ones among the allowed
    quota: float | None  # CPUs whose time the control groups grant; None: no limit


def granted() -> Granted:
    """CPUs, affinity and quota of this process."""
    allowed, quota = _allowed(), _quota()
    return Granted(os.cpu_count() or 1, len(allowed), _cores(allowed), None if quota == float("inf") else quota)


def flags() -> frozenset[str]:
    """The CPU's instruction sets by the kernel's names; empty where it does not say."""
    for line in _read(ROOT / "proc" / "cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def usable_cores() -> int:
    """Physical cores that this process may use, at most the whole CPUs of its quota; at least 1."""
    return max(int(min(_cores(_allowed()), _quota())), 1)
