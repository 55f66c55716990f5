"""Which setting of FASA is the cheapest within a loss: chunks x budgets and masses, through the shipped library (evaluate.py)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FasaError
from ..params import FasaParams
from ..profile.profile import Profile
from ..report.columns import columns
from .arms import Arm
from .journal import text_print
from .perplexity import evaluate


@dataclass
class Grid:
    """What is walked; empty: chunks get an eighth, a quarter, 3/8 and half of the head's, the others nothing."""

    chunks: Sequence[int] = ()  # frequency chunks per KV head
    budgets: Sequence[int] = (128, 256, 512, 1024)  # tokens
    masses: Sequence[float] = ()  # shares of the estimated attention


def make_arms(grid: Grid, base: FasaParams, profile: Profile) -> list[Arm]:
    """One arm for each chunk count and budget, then for each mass. Raises FasaError for a setting that is out of range."""
    most = max(profile.n_chunk)
    chunks = sorted(set(grid.chunks or [max(1, most * n // 8) for n in (1, 2, 3, 4)]))
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


def recommend(rows: Sequence[dict[str, Any]], max_loss: float) -> dict[str, Any] | None:
    """The row that reads the fewest bytes of those whose perplexity is at most (1 + max_loss) times dense's; ties: the smaller loss."""
    good = [r for r in rows if r["ppl_ratio"] <= 1 + max_loss]
    return min(good, key=lambda r: (r["kv_read_share"], r["ppl_ratio"]), default=None)


def advice(result: dict[str, Any]) -> str:
    """The recommendation in a sentence, with its flags, and how sure it is."""
    best, most = result["best"], result["max_loss"]
    if best is None:
        least = min(result["rows"], key=lambda r: r["ppl_ratio"])
        return (
            f"no setting is within {100 * most:g}%; the least loss is {100 * (least['ppl_ratio'] - 1):+.2f} +-{100 * least['ppl_ratio_se']:.2f}% "
            f"with {least['flags']}"
        )
    loss, se = best["ppl_ratio"] - 1, best["ppl_ratio_se"]
    text = (
        f"cheapest within {100 * most:g}%: {best['flags']} ({100 * loss:+.2f} +-{100 * se:.2f}%, {best['tokens_attended']:.0f} tokens, "
        f"{100 * best['kv_read_share']:.1f}% of the KV bytes read)"
    )
    return text + (
        f"; with its standard error it may be above {100 * most:g}%: more --windows would tell"
        if loss + se > most
        else ""
    )


def table(result: dict[str, Any]) -> str:
    """For people: cheapest first, the recommended row marked, the advice below."""
    lines = [
        ["", "chunks", "budget", "mass", "tokens", "ppl ratio", "KL", "same top", "KiB/token", "KV read", "K_dom/KV"]
    ]
    for r in sorted(result["rows"], key=lambda r: r["kv_read_share"]):
        lines.append(
            [
                "->" if result["best"] and r["arm"] == result["best"]["arm"] else "",
                str(r["chunks"]),
                str(r["budget"] or ""),
                f"{r['mass']:g}" if r["mass"] else "",
                f"{r['tokens_attended']:.0f}",
                f"{100 * (r['ppl_ratio'] - 1):+.2f} +-{100 * r['ppl_ratio_se']:.2f}%",
                f"{r['kl']:.4f} +-{r['kl_se']:.4f}",
                f"{r['same_top']:.3f}",
                f"{r['kv_bytes_per_token'] / 1024:.0f}",
                f"{100 * r['kv_read_share']:.1f}%",
                f"{100 * r['k_dom_share']:.1f}%",
            ]
        )
    return "\n".join([*columns(lines), advice(result)])


def _flags(row: dict[str, Any]) -> str:
    return f"--fasa-chunks {row['chunks']} " + (
        f"--fasa-mass {row['mass']:g}" if row["mass"] else f"--fasa-budget {row['budget']}"
    )


def sweep(
    model: str | os.PathLike,
    text: str,
    out: str | os.PathLike,
    grid: Grid | None = None,
    max_loss: float = 0.01,
    base: FasaParams | None = None,
    profile: Profile | None = None,
    windows: int = 5,
    window: int = 4096,
    score: int = 384,
    progress: Callable[[str, int, int], None] | None = None,
    **machine: Any,
) -> dict[str, Any]:
    """Walk the grid and write DIR's sweep.json and sweep.png. Returns what sweep.json holds: rows (with chunks, budget, mass and
    flags), best (a row or None), dense, max_loss. machine: n_threads, n_gpu_layers, type_k, type_v, mode.

    Finished windows are kept in DIR, one file for each grid; the same call goes on there. Raises FasaError as evaluate does.
    """
    profile = profile or Profile.load(model)
    arms = make_arms(grid or Grid(), base or profile.params(), profile)
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise FasaError(f"{out}: cannot be made: {e.strerror or e}; give another -o") from None
    name = f"windows-{text_print(repr([(a.name, a.params) for a in arms]))}.jsonl"
    dense, *rows = evaluate(model, text, arms, windows, window, score, progress=progress, resume=out / name, **machine)
    for row in rows:
        row["chunks"], row["mass"] = row["fasa"]["chunks"], row["fasa"]["mass"]
        row["budget"] = 0 if row["mass"] else row["fasa"]["budget"]
        row["flags"] = _flags(row)
    result = {"max_loss": max_loss, "best": recommend(rows, max_loss), "dense": dense, "rows": rows}
    try:
        (out / "sweep.json").write_text(json.dumps(result, indent=1) + "\n")
    except OSError as e:
        raise FasaError(f"{out / 'sweep.json'}: cannot be written: {e.strerror or e}") from None
    from ..report.pictures import save_sweep_map

    save_sweep_map(result, out / "sweep.png")
    return result
