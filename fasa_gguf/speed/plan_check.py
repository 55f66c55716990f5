"""The plan beside what the driver counts when the model is really loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from .. import runtime
from ..errors import FasaError
from ..memory.plan import MIB, Model, Setup, memory
from ..params import FasaParams
from ..profile.profile import Profile
from ..session import Session

# ---- planned against measured ----


def _used(devices: Sequence[str]) -> int:
    return sum(total - free for free, total in map(runtime.devices.device_memory, devices))


def _work(s: Session, setup: Setup, profile: Profile, params: FasaParams) -> None:
    """Fill the context, prefill a ubatch behind that, and decode: whatever is allocated late is there then."""
    s.fasa.set_profile(profile)
    s.fasa.set_params(params)
    per_sequence = s.n_ctx // setup.streams()
    batch = min(setup.n_ubatch, per_sequence // 2)
    depth = max(per_sequence - batch - 8, 0)
    s.fasa.fill_random(depth)
    s.decode([1 + i % 7 for i in range(batch)], depth, logits="last")
    for i in range(2):
        s.decode([1], depth + batch + i)
    s.synchronize()


def check(
    path: str | os.PathLike, m: Model, setup: Setup, params: FasaParams, profile: Profile, modes: Sequence[str]
) -> list[dict[str, Any]]:
    """Load the model and make a context in each of `modes`; one row each: planned and measured bytes by the driver's count.

    weights is measured after a small context has run, so kernels that CUDA loads when they first run are in it; what is measured there above
    the plan is theirs. context is everything of the context after its first decode steps. FASA runs from the first cell on in it.
    Raises FasaError when there is no CUDA device, or a context cannot be made. Other processes must leave the device's memory alone.
    """
    devices = runtime.devices.cuda_devices()
    if not devices:
        raise FasaError("--check compares the plan with a CUDA device, and there is none, or no CUDA in this build")
    if setup.n_gpu_layers == 0:
        raise FasaError("--check compares what lies on the GPU; give -ngl, -1 for all layers")
    params = params.replace(min_context=0)
    start, rows = _used(devices), []
    small = {"n_ctx": 512, "n_batch": 64, "n_ubatch": 64, "n_seq_max": 1}
    made = {
        name: getattr(setup, name)
        for name in ("n_seq_max", "n_batch", "n_ubatch", "type_k", "type_v", "kv_unified", "swa_full", "no_kv_offload")
    }
    with Session(path, n_gpu_layers=setup.n_gpu_layers, **{**made, **small}) as s:
        for mode in modes:
            s.reopen(**small, mode=mode)
            _work(s, Setup(n_ctx=512, n_ubatch=64), profile, params)
        s.free_context()
        loaded = _used(devices)
        for mode in modes:
            s.reopen(**made, n_ctx=setup.tokens(m), mode=mode)
            opened = _used(devices)
            _work(s, setup, profile, params)
            counters, planned = s.fasa.counters(), memory(m, setup, params, mode)
            rows.append(
                {
                    "mode": mode,
                    "n_ctx": s.n_ctx,
                    "weights_planned": planned.weights,
                    "weights_measured": loaded - start,
                    "context_planned": planned.context,
                    "context_measured": _used(devices) - loaded,
                    "opened_measured": opened - loaded,
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
                    "device_measured": _used(devices) - start,
                    "cuda_before": start,
                }
            )
            rows[-1]["error"] = rows[-1]["device_planned"] / rows[-1]["device_measured"] - 1
            s.free_context()
    return rows


def check_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a figure: planned, measured or counted, and how far they are apart."""
    lines = ["| mode | MiB | planned | measured | planned/measured - 1 |", "| - | - | -: | -: | -: |"]
    for r in rows:
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
