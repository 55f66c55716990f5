"""The plan beside what the driver counts when the model is really loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from .. import runtime
from ..errors import FasaError
from ..memory.host import MIB
from ..memory.model import Model
from ..memory.plan import ContextShape, Memory, estimate
from ..params import FasaParams
from ..profile.profile import Profile
from ..runtime.settings import ContextSettings
from ..session import Session


def _used(devices: Sequence[str]) -> int:
    return sum(total - free for free, total in map(runtime.devices.device_memory, devices))


def _work(s: Session, profile: Profile, params: FasaParams) -> None:
    """Fill the context, prefill a ubatch behind that, and decode: whatever is allocated late is there then."""
    s.fasa.set_profile(profile)
    s.fasa.set_params(params)
    per_sequence = s.n_ctx // (1 if s.settings.kv_unified else s.settings.n_seq_max)
    batch = min(s.settings.n_ubatch, per_sequence // 2)
    depth = max(per_sequence - batch - 8, 0)
    s.fasa.fill_random(depth)
    s.decode([1 + i % 7 for i in range(batch)], depth, logits="last")
    for i in range(2):
        s.decode([1], depth + batch + i)
    s.synchronize()


def _compare(planned: Memory, counters: dict[str, int], loaded: int, opened: int, worked: int) -> dict[str, Any]:
    """Planned bytes beside FASA's counters and the driver's.

    loaded, opened, worked: what the model takes, and what the context takes when it is made and after its first steps.
    """
    return {
        "weights_planned": planned.weights,
        "weights_measured": loaded,
        "context_planned": planned.context,
        "context_measured": worked,
        "opened_measured": opened,
        "kv_planned": planned.kv + planned.kv_pinned + planned.kv_ram,
        "kv_counted": counters["bytes_kv"],
        "k_dom_planned": planned.k_dom + planned.k_dom_ram,
        "k_dom_counted": counters["bytes_k_dom"],
        "pinned_planned": planned.kv_pinned,
        "pinned_counted": counters["bytes_kv_host"],
        "scratch_planned": planned.scratch,
        "row_cache_planned": planned.row_cache,
        "row_cache_counted": counters["bytes_row_cache"],
        "device_planned": planned.device,
        "device_measured": loaded + worked,
        "error": planned.device / (loaded + worked) - 1,
    }


def check(
    path: str | os.PathLike,
    model: Model,
    settings: ContextSettings,
    params: FasaParams,
    profile: Profile,
    modes: Sequence[str],
) -> list[dict[str, Any]]:
    """Load the model and make a context in each of `modes`: planned and measured bytes by the driver's count, by mode.

    weights is measured after a small context has run, so it includes the kernels that CUDA loads when they first run:
    they are what is measured there above the plan. context is everything of the context after its first decode steps.
    FASA runs from the first cell on in it.
    Raises FasaError when there is no CUDA device, or a context cannot be made. Other processes must not take or free
    memory of the device meanwhile.
    """
    devices = runtime.devices.cuda_devices()
    if not devices:
        raise FasaError("--check compares the plan with a CUDA device, and there is none, or no CUDA in this build")
    if settings.n_gpu_layers == 0:
        raise FasaError("--check compares what lies on the GPU; give -ngl, -1 for all layers")
    params = params.replace(min_context=0)
    settings = settings.replace(n_ctx=ContextShape(model, settings).n_ctx)
    small = settings.replace(n_ctx=512, n_batch=64, n_ubatch=64, n_seq_max=1, mode="device")
    start, results = _used(devices), []
    with Session(path, small) as s:
        for mode in modes:
            s.reopen(small, mode=mode)
            _work(s, profile, params)
        s.free_context()
        loaded = _used(devices)
        for mode in modes:
            s.reopen(settings, mode=mode)
            opened = _used(devices)
            _work(s, profile, params)
            worked = _used(devices)
            planned = estimate(model, s.settings, params)
            found = _compare(planned, s.fasa.counters(), loaded - start, opened - loaded, worked - loaded)
            results.append({"mode": s.mode, "n_ctx": s.n_ctx, **found, "cuda_before": start})
            s.free_context()
    return results


def format_check(results: Sequence[dict[str, Any]]) -> str:
    """Markdown, one line for each figure: planned, measured or counted, and how far they are apart."""
    lines = ["| mode | MiB | planned | measured | planned/measured - 1 |", "| - | - | -: | -: | -: |"]
    for r in results:
        for name, against in (
            ("weights", "measured"),
            ("context", "measured"),
            ("device", "measured"),
            ("kv", "counted"),
            ("k_dom", "counted"),
            ("pinned", "counted"),
            ("row_cache", "counted"),
        ):
            planned, found = r[f"{name}_planned"], r[f"{name}_{against}"]
            if planned or found:
                apart = f"{100 * (planned / found - 1):+.1f}%" if found else ""
                lines.append(f"| {r['mode']} | {name} | {planned / MIB:,.1f} | {found / MIB:,.1f} | {apart} |")
        lines.append(f"| {r['mode']} | scratch | {r['scratch_planned'] / MIB:,.1f} | | |")
        lines.append(f"| {r['mode']} | used before the model | | {r['cuda_before'] / MIB:,.1f} | |")
    return "\n".join(lines)
