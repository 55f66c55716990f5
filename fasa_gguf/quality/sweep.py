"""The cheapest setting of FASA within a loss: chunks x budgets and masses, through the shipped library."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FasaError
from ..params import FasaParams, default_chunks
from ..profile.find import require_profile
from ..profile.profile import Profile
from ..report.columns import columns
from ..runtime.settings import ContextSettings
from .arms import Arm, Progress
from .journal import text_print
from .perplexity import WindowSettings, evaluate, loss_text


@dataclass
class Grid:
    """What is tried. Empty chunks are 1/8, 1/4, 3/8 and 1/2 of the head's; empty budgets or masses are none."""

    chunks: Sequence[int] = ()  # frequency chunks per KV head
    budgets: Sequence[int] = (128, 256, 512, 1024)  # tokens
    masses: Sequence[float] = ()  # shares of the estimated attention


def _eighths(n_chunk: int) -> list[int]:
    """1/8, 1/4, 3/8 and 1/2 of the chunks; 3/8 as the setting 0 takes them, where that is fewer than half."""
    three = default_chunks(n_chunk)
    return [max(1, n_chunk * n // 8) if n != 3 or 2 * three >= n_chunk else three for n in (1, 2, 3, 4)]


def make_arms(grid: Grid, base: FasaParams, profile: Profile) -> list[Arm]:
    """One arm for each chunk count and budget, then for each mass.

    Raises FasaError for a setting that is out of range.
    """
    most = max(profile.n_chunk)
    chunks = sorted(set(grid.chunks or _eighths(most)))
    if chunks[-1] > most or chunks[0] < 1:
        raise FasaError(
            f"--chunks {','.join(map(str, chunks))}: expected 1 to {most}, the chunks of this model's heads"
        )
    if not grid.budgets and not grid.masses:
        raise FasaError("nothing to sweep: give --budgets or --masses")
    out = [
        Arm(f"k={k} B={b}", base.replace(chunks=k, budget=b, mass=0.0, mean_budget=0).check(), profile)
        for k in chunks
        for b in sorted(set(grid.budgets))
    ]
    return out + [
        Arm(f"k={k} mass={m:g}", base.replace(chunks=k, mass=m, mean_budget=0).check(), profile)
        for k in chunks
        for m in sorted(set(grid.masses))
    ]


def recommend(results: Sequence[dict[str, Any]], max_loss: float) -> dict[str, Any] | None:
    """The result that reads the fewest bytes, of those with at most (1 + max_loss) times dense's perplexity.

    Ties go to the smaller loss. None: there is none."""
    good = [r for r in results if r["ppl_ratio"] <= 1 + max_loss]
    return min(good, key=lambda r: (r["kv_read_share"], r["ppl_ratio"]), default=None)


def advice(result: dict[str, Any]) -> str:
    """The recommendation in a sentence, with its flags, and how sure it is."""
    best, most = result["best"], result["max_loss"]
    if best is None:
        least = min(result["rows"], key=lambda r: r["ppl_ratio"])
        return f"no setting is within {100 * most:g}%; the least loss is {loss_text(least)} with {least['flags']}"
    text = (
        f"cheapest within {100 * most:g}%: {best['flags']} ({loss_text(best)}, {best['tokens_attended']:.0f} tokens, "
        f"{100 * best['kv_read_share']:.1f}% of the KV bytes read)"
    )
    if best["ppl_ratio"] - 1 + best["ppl_ratio_se"] > most:
        text += f"; with its standard error it may be above {100 * most:g}%: more --windows would tell"
    return text


def format_sweep(result: dict[str, Any]) -> str:
    """For people: cheapest first, the recommended one marked, the advice below."""
    head = ["", "chunks", "budget", "mass", "tokens", "ppl ratio", "KL", "same top"]
    head += ["KiB/token", "KV read", "K_dom/KV"]
    lines = [
        [
            "->" if result["best"] and r["arm"] == result["best"]["arm"] else "",
            str(r["chunks"]),
            str(r["budget"] or ""),
            f"{r['mass']:g}" if r["mass"] else "",
            f"{r['tokens_attended']:.0f}",
            loss_text(r),
            f"{r['kl']:.4f} +-{r['kl_se']:.4f}",
            f"{r['same_top']:.3f}",
            f"{r['kv_bytes_per_token'] / 1024:.0f}",
            f"{100 * r['kv_read_share']:.1f}%",
            f"{100 * r['k_dom_share']:.1f}%",
        ]
        for r in sorted(result["rows"], key=lambda r: r["kv_read_share"])
    ]
    return "\n".join([*columns([head, *lines]), advice(result)])


def _flags(result: dict[str, Any]) -> str:
    size = f"--fasa-mass {result['mass']:g}" if result["mass"] else f"--fasa-budget {result['budget']}"
    return f"--fasa-chunks {result['chunks']} {size}"


def sweep(
    model: str | os.PathLike,
    text: str,
    out: str | os.PathLike,
    grid: Grid | None = None,
    max_loss: float = 0.01,
    base: FasaParams | None = None,
    profile: Profile | None = None,
    windows: WindowSettings | None = None,
    settings: ContextSettings | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Try the grid and write DIR's sweep.json and sweep.png. Returns what sweep.json holds.

    That is rows (results with chunks, budget, mass and flags), best (one of them or None), dense, max_loss. settings:
    as evaluate's; default windows: 5. Finished windows are kept in DIR, one file for each grid; the same call goes on
    there. Raises FasaError as evaluate does.
    """
    profile = profile or require_profile(model)
    windows = windows or WindowSettings(windows=5)
    arms = make_arms(grid or Grid(), base or profile.params(), profile)
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise FasaError(f"{out}: cannot be made: {e.strerror or e}; give another -o") from None
    name = f"windows-{text_print(repr([(a.name, a.params) for a in arms]))}.jsonl"
    dense, *results = evaluate(model, text, arms, windows, settings, progress=progress, resume=out / name)
    for r in results:
        r["chunks"], r["mass"] = r["fasa"]["chunks"], r["fasa"]["mass"]
        r["budget"] = 0 if r["mass"] else r["fasa"]["budget"]
        r["flags"] = _flags(r)
    result = {"max_loss": max_loss, "best": recommend(results, max_loss), "dense": dense, "rows": results}
    try:
        (out / "sweep.json").write_text(json.dumps(result, indent=1) + "\n")
    except OSError as e:
        raise FasaError(f"{out / 'sweep.json'}: cannot be written: {e.strerror or e}") from None
    from ..report.pictures import save_sweep_map

    save_sweep_map(result, out / "sweep.png")
    return result
