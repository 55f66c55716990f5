"""results.md, results.json and the curves of a comparison."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import FasaError
from .methods import METHODS

NOT_METHODS = ("dense", "oracle", "oracle-shared")  # no budget, or not possible: drawn thin and dashed


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table of text cells."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *lines])


def loss_text(row: dict[str, Any]) -> str:
    """Perplexity against dense, with its standard error."""
    return f"{100 * (row['ppl_ratio'] - 1):+.2f} +-{100 * row['ppl_ratio_se']:.2f}%"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a job, budget by budget."""
    lines = []
    for r in sorted(rows, key=lambda r: (r["method"] != "dense", r["budget"])):
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
    return markdown_table(
        [
            "method",
            "budget",
            "tokens",
            "perplexity",
            "against dense",
            "KL",
            "same top",
            "KiB read",
            "of dense",
            "to choose",
            "index / KV",
        ],
        lines,
    )


def agreement(result: dict[str, Any]) -> str:
    """FASA in the harness beside the shipped library on the same windows."""
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
    return markdown_table(
        [
            "arm",
            "budget",
            *(
                f"{what}, {where}"
                for what in ("tokens", "perplexity", "against dense", "KL", "KV read")
                for where in ("library", "harness")
            ),
        ],
        lines,
    )


def config_lines(c: dict[str, Any]) -> list[str]:
    """What was compared, in sentences."""
    names = c["texts"]

    def windows(n: int) -> str:
        return f"{n} window" + "s" * (n > 1)

    tuned = (
        f"tuned on {windows(c['tune_windows'])} of {names.get('tune', 'another text')}" if c["tuned"] else "not tuned"
    )
    return [
        f"Model {c['model'].split()[0]}; {windows(c['windows'])} of {c['window']:,} tokens of {names.get('text', 'the text')}, the last "
        f"{c['score']} of each scored; {tuned}; {c['sink']} sinks and {c['recent']} recent tokens in every budget but the paper's.",
        "tokens: mean attended per step and query head, everything forced or dense counted. KiB read: by one layer for one decoded "
        "token, K and V in f16, what is read to choose included; a row that several query heads of a KV head attend is read once.",
        f"fasa_gguf {c['fasa_gguf']}, torch {c['torch']}, {c['device']}, weights dequantised, fp32, K and V rounded to {c['kv_type']}.",
    ]


def save_curves(rows: Sequence[dict[str, Any]], key: str, unit: float, label: str, path: Path) -> None:
    """PNG: KL and perplexity loss of every method against `key` in `unit`s, one point a budget."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    fig, axes = plt.subplots(1, 2, figsize=(13, 5.5))
    for i, name in enumerate(dict.fromkeys(r["asked"] for r in rows if r["method"] != "dense")):
        mine = sorted((r for r in rows if r["asked"] == name), key=lambda r: r[key])
        x, loss = [r[key] / unit for r in mine], [100 * (r["ppl_ratio"] - 1) for r in mine]
        style = dict(
            marker="o",
            ms=4,
            color=plt.get_cmap("tab20")(i % 20),
            label=name,
            ls="--" if mine[0]["method"] in NOT_METHODS else "-",
            lw=2.4 if name.startswith("fasa") else 1.2,
        )
        axes[0].plot(x, [r["kl"] for r in mine], **style)
        axes[1].errorbar(x, loss, [100 * r["ppl_ratio_se"] for r in mine], capsize=2, elinewidth=0.8, **style)
    axes[0].set_yscale("log")
    axes[0].set_ylabel("KL to dense, nats")
    axes[1].set_yscale("symlog", linthresh=2)
    axes[1].yaxis.set_major_locator(FixedLocator([-5, -2, -1, 0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]))
    axes[1].yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:+g}" if v else "0"))
    axes[1].set_ylabel("perplexity against dense, %")
    for ax in axes:
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_xlabel(label)
        ax.grid(alpha=0.3, which="both")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=6, fontsize=9)
    fig.tight_layout(rect=(0, 0.1, 1, 1))
    try:
        fig.savefig(path, dpi=120)
    finally:
        plt.close(fig)


def write_results(result: dict[str, Any], out: str | os.PathLike) -> None:
    """results.json, results.md, budget.png and bytes.png into a folder. Raises FasaError when one cannot be written."""
    out, rows = Path(out), result["rows"]
    used = dict.fromkeys(r["method"] for r in rows)
    parts = [
        "# Methods at equal budget",
        *config_lines(result["config"]),
        table(rows),
        "## What each reads to choose",
        "\n".join(f"- {name}: {METHODS[name].about}" for name in used),
        "![KL and perplexity against tokens](budget.png)",
        "![KL and perplexity against bytes](bytes.png)",
    ]
    if result["library"]:
        parts += ["## FASA here and in the shipped library", agreement(result)]
    try:
        (out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
        (out / "results.md").write_text("\n\n".join(parts) + "\n")
        save_curves(rows, "tokens_attended", 1, "tokens attended per step and query head", out / "budget.png")
        save_curves(rows, "bytes_per_token", 1024, "KiB read by one layer for one token", out / "bytes.png")
    except OSError as e:
        raise FasaError(f"{out}: cannot be written: {e.strerror or e}") from None
