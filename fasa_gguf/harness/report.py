"""results.md, results.json and the curves of a comparison."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import FasaError
from ..quality.perplexity import loss_text
from ..report.columns import markdown_table
from ..report.pictures import save_loss_curves
from .policies import POLICIES

NOT_METHODS = ("dense", "oracle", "oracle-shared")  # no budget, or not possible: drawn thin and dashed


def format_comparison(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: one line a trial, budget by budget."""
    lines = []
    for r in sorted(results, key=lambda r: (r["method"] != "dense", r["budget"])):
        lines.append(
            [
                r["spec"],
                str(r["budget"] or ""),
                f"{r['tokens_attended']:.1f}",
                f"{r['ppl']:.3f}",
                loss_text(r),
                f"{r['kl']:.4f} +-{r['kl_se']:.4f}",
                f"{r['same_top']:.3f}",
                f"{r['bytes_per_token'] / 1024:.1f}",
                f"{100 * r['kv_read_share']:.1f}%",
                f"{100 * r['score_share']:.1f}%",
                f"{100 * r['k_dom_share']:.1f}%",
            ]
        )
    head = ["method", "budget", "tokens", "perplexity", "against dense", "KL", "same top"]
    head += ["KiB read", "of dense", "to choose", "index / KV"]
    return markdown_table(head, lines, left=head[:1])


def format_agreement(result: dict[str, Any]) -> str:
    """Markdown: FASA in the harness beside the shipped library on the same windows."""
    ours = {(r["spec"], r["budget"]): r for r in result["rows"]}
    lines = []
    for r in result["library"]:
        h = ours[r["spec"], r["budget"]]
        tokens = "all" if r["tokens_attended"] is None else f"{r['tokens_attended']:.1f}"
        lines.append(
            [
                r["spec"],
                str(r["budget"] or ""),
                tokens,
                f"{h['tokens_attended']:.1f}",
                f"{r['ppl']:.3f}",
                f"{h['ppl']:.3f}",
                loss_text(r),
                loss_text(h),
                f"{r['kl']:.4f}",
                f"{h['kl']:.4f}",
                f"{100 * r['kv_read_share']:.1f}%",
                f"{100 * h['kv_read_share']:.1f}%",
            ]
        )
    figures = ("tokens", "perplexity", "against dense", "KL", "KV read")
    head = ["arm", "budget", *(f"{what}, {where}" for what in figures for where in ("library", "harness"))]
    return markdown_table(head, lines, left=head[:1])


def config_lines(c: dict[str, Any]) -> list[str]:
    """What was compared, in sentences."""
    names = c["texts"]

    def windows(n: int) -> str:
        return f"{n} window" + "s" * (n > 1)

    tuned = (
        f"tuned on {windows(c['tune_windows'])} of {names.get('tune', 'another text')}" if c["tuned"] else "not tuned"
    )
    return [
        f"Model {c['model'].split()[0]}; {windows(c['windows'])} of {c['window']:,} tokens of "
        f"{names.get('text', 'the text')}, the last {c['score']} of each scored; {tuned}; {c['sink']} sinks and "
        f"{c['recent']} recent tokens in every budget except the paper's.",
        "tokens: mean attended per step and query head, everything forced or dense counted. KiB read: by one layer for "
        "one decoded token, K and V in f16, what is read to choose included; K and V of a token that several query "
        "heads of a KV head attend are read once.",
        f"fasa_gguf {c['fasa_gguf']}, torch {c['torch']}, {c['device']}, weights dequantised, fp32, "
        f"K and V rounded to {c['kv_type']}.",
    ]


def write_results(result: dict[str, Any], out: str | os.PathLike) -> None:
    """results.json, results.md, budget.png and bytes.png into a folder. Raises FasaError when one cannot be written."""
    out, results = Path(out), result["rows"]
    used = dict.fromkeys(r["method"] for r in results)
    parts = [
        "# Methods at equal budget",
        *config_lines(result["config"]),
        format_comparison(results),
        "## What each reads to choose",
        "\n".join(f"- {name}: {POLICIES[name].about}" for name in used),
        "![KL and perplexity against tokens](budget.png)",
        "![KL and perplexity against bytes](bytes.png)",
    ]
    if result["library"]:
        parts += ["## FASA here and in the shipped library", format_agreement(result)]
    try:
        (out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
        (out / "results.md").write_text("\n\n".join(parts) + "\n")
    except OSError as e:
        raise FasaError(f"{out}: cannot be written: {e.strerror or e}") from None
    tokens, read = "tokens attended per step and query head", "KiB read by one layer for one token"
    save_loss_curves(results, "tokens_attended", 1, tokens, out / "budget.png", NOT_METHODS)
    save_loss_curves(results, "bytes_per_token", 1024, read, out / "bytes.png", NOT_METHODS)
