"""Figures of answered questions: scores of every arm, and paired differences to dense."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..counters import read_share
from ..report.columns import columns
from . import ruler
from .arms import COUNTERS, dense_share
from .paired import paired, sign_test, t_quantile


def _arm_figures(samples: Sequence[dict[str, Any]], i: int) -> dict[str, Any]:
    """Score and paired difference, in percent, of arm i over samples; tasks and lengths weigh the same."""
    diff = np.array([r["arms"][i]["score"] - r["arms"][0]["score"] for r in samples])  # [n_sample]
    of = [(r["task"], r["length"]) for r in samples]
    groups = [diff[[o == g for o in of]] for g in dict.fromkeys(of)]
    mean, low, high = paired(diff)
    if len(groups) > 1 and min(map(len, groups)) > 1 and any(np.ptp(g) for g in groups):
        mean = float(np.mean([g.mean() for g in groups]))
        variance = sum(g.var(ddof=1) / len(g) for g in groups)
        half = t_quantile(len(diff) - len(groups)) * math.sqrt(variance) / len(groups)
        low, high = max(-1.0, mean - half), min(1.0, mean + half)
    lost, gained = int((diff < 0).sum()), int((diff > 0).sum())
    c = {k: sum(r["arms"][i]["counters"][k] for r in samples) for k in COUNTERS}
    scores = [
        np.mean([r["arms"][i]["score"] for r, o in zip(samples, of, strict=True) if o == g]) for g in dict.fromkeys(of)
    ]
    first = samples[0]["arms"][i]
    return {
        "arm": first["arm"],
        "min_context": first["min_context"],
        "score": 100 * float(np.mean(scores)),
        "diff": 100 * mean,
        "diff_ci": [100 * low, 100 * high],
        "lost": lost,
        "gained": gained,
        "sign_p": sign_test(lost, gained),
        **{k: c[k] for k in COUNTERS[:4]},
        "tokens_attended": c["tokens_attended"] / c["lists"] if c["lists"] else None,
        "kv_read_share": read_share(c) if c["lists"] else 1.0,
        "prefill_share": _prefill_share(samples, i),
        **_logp_figures(samples, i),
    }


def _prefill_share(samples: Sequence[dict[str, Any]], i: int) -> float | None:
    """Cells that arm i's own sparse prompts attended, as a share of dense's; None: there were none."""
    attended, visible = (
        sum(r["arms"][i]["counters"].get(k, 0) for r in samples) for k in ("prefill_attended", "prefill_visible")
    )
    return attended / visible if visible else None


def _logp_figures(samples: Sequence[dict[str, Any]], i: int) -> dict[str, float | None]:
    """Of answers that stand in the prompt: their mean log probability, the mean paired difference to dense, its
    standard error over samples."""
    if samples[0]["arms"][i].get("logp") is None:
        return {"logp": None, "logp_diff": None, "logp_diff_se": None}
    logp, dense = (np.array([r["arms"][j]["logp"] for r in samples]) for j in (i, 0))
    diff = logp - dense
    se = float(diff.std(ddof=1)) / math.sqrt(len(diff)) if len(diff) > 1 else 0.0
    return {"logp": float(logp.mean()), "logp_diff": float(diff.mean()), "logp_diff_se": se}


def _figures(task: str, length: int | None, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "task": task,
        "length": length,
        "n": len(samples),
        "haystack": samples[0]["haystack"],
        "n_prompt": float(np.mean([r["n_prompt"] for r in samples])),
        "arms": [_arm_figures(samples, i) for i in range(len(samples[0]["arms"]))],
    }


def summarize(samples: Sequence[dict[str, Any]], numbers: ruler.Numbers | None = None) -> list[dict[str, Any]]:
    """The results of each length and task: n, n_prompt (mean tokens) and the arms' figures, dense first.

    A result 'mean' stands for several tasks of a length, one with length None for everything; tasks and lengths weigh
    the same in them. numbers: of needles and chains, which a result names where they are not RULER's.
    """
    results, lengths = [], sorted({r["length"] for r in samples})
    for length in lengths:
        here = [r for r in samples if r["length"] == length]
        names = list(dict.fromkeys(r["task"] for r in here))
        results += [_figures(name, length, [r for r in here if r["task"] == name]) for name in names]
        if len(names) > 1:
            results.append(_figures("mean", length, here))
    results += [_figures("mean", None, samples)] if len(lengths) > 1 else []
    for r in results:
        r["numbers"] = numbers.changed(r["task"]) if numbers else {}
    return results


def format_answers(results: Sequence[dict[str, Any]]) -> str:
    """For people: one line a task, length and arm."""
    lines = [["task", "length", "n", "arm", "tokens", "KV read", "score", "diff", "95%", "lost", "gained", "p"]]
    for result in results:
        for i, a in enumerate(result["arms"]):
            first = [result["task"], str(result["length"] or "all"), str(result["n"])] if i == 0 else ["", "", ""]
            used = "all" if a["min_context"] is None else f"dense (< {a['min_context']})"
            if a["tokens_attended"] is not None:
                used = f"{a['tokens_attended']:.0f}"
            rest = [
                f"{a['diff']:+.1f}",
                "{:+.1f} to {:+.1f}".format(*a["diff_ci"]),
                str(a["lost"]),
                str(a["gained"]),
                f"{a['sign_p']:.2g}",
            ]
            rest = rest if i else [""] * len(rest)
            lines.append([*first, a["arm"], used, f"{100 * a['kv_read_share']:.1f}%", f"{a['score']:.1f}", *rest])
    return "\n".join(columns(lines, 4) + notes(results))


def notes(results: Sequence[dict[str, Any]]) -> list[str]:
    """What was dense in an arm that ran sparse elsewhere, and tasks whose haystack is not RULER's, one line each."""
    out = []
    for r in results:
        task = ruler.TASKS.get(r["task"])
        if r["haystack"] == "noise" and task is not None and task.haystack == "essay":
            out.append(f"{r['task']} at {r['length']}: no text was given (-f), the haystack is RULER's noise")
        if changed := (r.get("numbers") or {}):
            out.append(f"{r['task']} at {r['length']}: {', '.join(f'{k} {n}' for k, n in changed.items())}")
        if r["task"] == "mean":
            continue
        for a in r["arms"][1:]:
            steps = a["steps_sparse"] + a["steps_dense"]
            where = f"{a['arm']}, {r['task']} at {r['length']}"
            if a["steps_sparse"] and a["steps_dense"]:
                out.append(f"{where}: {a['steps_dense']} of {steps} steps were dense")
            if (share := dense_share(a)) > 0:
                out.append(f"{where}: {100 * share:.0f}% of the layers were dense")
    for a in results[-1]["arms"]:  # of all tasks and lengths
        if a["prefill_share"] is not None:
            out.append(f"{a['arm']}: its prompts attended {100 * a['prefill_share']:.0f}% of the cells")
    return out
