"""Every picture: a profile, needles found, a sweep, speed against depth, loss against tokens or bytes.

All are PNG files; the one of speed is any of PLOT_FORMATS. Each function raises FasaError when its file cannot be
written.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import FasaError
from ..profile.profile import Profile


def _pyplot() -> Any:
    """matplotlib.pyplot, which draws without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_heatmap(profile: Profile, path: str | os.PathLike) -> None:
    """How high every chunk is ranked, mean over the layer's KV heads (1: always first, 0: always last).

    Layers with a sliding window have a w behind their number.
    """
    plt = _pyplot()
    n_chunk = max(profile.n_chunk)
    height = np.full((len(profile.n_chunk), n_chunk), np.nan)  # [n_layer, n_chunk]
    for il, rows in enumerate(profile.ranking):
        n = profile.n_chunk[il]
        if n:
            place = np.argsort(rows.astype(int), -1)  # [n_head_kv, n_chunk] place of every chunk
            height[il, :n] = 1 - place.mean(0) / max(n - 1, 1)
    n_layer, windows = len(height), profile.window or []
    size = min(max(6, n_chunk / 5 + 2), 14), min(max(4, n_layer / 5 + 1.5), 20)  # inches
    fig, ax = plt.subplots(figsize=size, layout="constrained")
    image = ax.imshow(height, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    ax.set_xlabel("frequency chunk (0 is the fastest)")
    ax.set_ylabel("layer")
    if any(windows):
        lengths = " or ".join(f"{n:,}" for n in sorted({n for n in windows if n}))
        ax.set_ylabel(f"layer (w: a sliding window of {lengths} tokens; white: dense)")
        step = -(-n_layer // 100)  # every layer's number has room up to 100
        ax.set_yticks(range(0, n_layer, step), [f"{il}{' w' * bool(windows[il])}" for il in range(0, n_layer, step)])
        ax.tick_params(axis="y", labelsize="small")
    ax.set_title(f"dominant frequency chunks ({profile.ranking_method})")
    fig.colorbar(image, ax=ax, label="mean rank over the KV heads (1: first)", pad=0.02, aspect=30)
    _save(fig, path)


def save_needle_map(grid: dict[str, Any], path: str | os.PathLike) -> None:
    """A grid of needles.needle_grid: the share found, depth x length, a panel for each arm."""
    plt = _pyplot()
    n_depth, n_length, arms = len(grid["depths"]), len(grid["lengths"]), grid["arms"]
    size = len(arms) * max(3.5, 0.9 * n_length) + 1, max(3, 0.5 * n_depth + 1.8)  # inches
    fig, axes = plt.subplots(1, len(arms), figsize=size, squeeze=False, layout="constrained")
    for ax, arm in zip(axes[0], arms, strict=True):
        found = np.array(arm["found"], float)  # [n_depth, n_length]
        image = ax.imshow(found, aspect="auto", cmap="RdYlGn", vmin=0, vmax=1, interpolation="nearest")
        for d in range(n_depth):
            for n in range(n_length):
                ax.text(n, d, f"{100 * found[d, n]:.0f}", ha="center", va="center")
        ax.set_title(arm["arm"], fontsize="medium")
        ax.set_xticks(range(n_length), [f"{n:,}" for n in grid["lengths"]])
        ax.set_yticks(range(n_depth), [f"{100 * d:.0f}%" for d in grid["depths"]])
        ax.set_xlabel("length in tokens")
    axes[0][0].set_ylabel("depth of the needle")
    fig.colorbar(image, ax=axes[0].tolist(), label=f"share found, {grid['n']} a cell")
    _save(fig, path)


def save_sweep_map(result: dict[str, Any], path: str | os.PathLike) -> None:
    """What sweep.sweep returns: perplexity loss, chunks x budgets and masses; under it the share of dense's KV bytes
    read.

    The recommended setting has a frame.
    """
    plt = _pyplot()
    results, best = result["rows"], result["best"]
    chunks = sorted({r["chunks"] for r in results})
    columns = sorted({(r["mass"], r["budget"]) for r in results})  # fixed budgets first, then masses
    at = {(r["chunks"], (r["mass"], r["budget"])): r for r in results}
    loss = np.array([[100 * (at[k, c]["ppl_ratio"] - 1) for c in columns] for k in chunks])  # [n_chunks, n_columns]
    size = max(5, 1.1 * len(columns) + 2), max(3, 0.7 * len(chunks) + 1.8)  # inches
    fig, ax = plt.subplots(figsize=size, layout="constrained")
    low, high = min(0.0, float(loss.min())), min(max(float(loss.max()), 1e-6), 5 * 100 * result["max_loss"])
    image = ax.imshow(loss, aspect="auto", cmap="RdYlGn_r", vmin=low, vmax=high)
    for i, k in enumerate(chunks):
        for j, c in enumerate(columns):
            r = at[k, c]
            text = f"{loss[i, j]:+.2f}%\n{100 * r['kv_read_share']:.0f}% read"
            ax.text(j, i, text, ha="center", va="center", fontsize="small")
            if best and r["arm"] == best["arm"]:
                ax.add_patch(plt.Rectangle((j - 0.48, i - 0.47), 0.96, 0.94, fill=False, lw=2.5))
    ax.set_xticks(range(len(columns)), [f"mass {m:g}" if m else f"{b:,}" for m, b in columns])
    ax.set_yticks(range(len(chunks)), [str(k) for k in chunks])
    ax.set_xlabel("budget in tokens, or target mass")
    ax.set_ylabel("chunks")
    fig.colorbar(image, label="perplexity against dense, %")
    _save(fig, path)


PLOT_FORMATS = ("svg", "png", "pdf")
# readable on white and on black, as the background is transparent
_INK, _DENSE = "#7f8790", "#98a0a8"
_COLOURS = ("#e8743b", "#3d8fd6", "#2fa36b", "#b06fd0", "#c99a1b", "#d6568c")
_STYLE = {
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "font.size": 11,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "fasa",  # the same figures make the same file
}


def check_plot_path(path: str | os.PathLike) -> None:
    """Raises FasaError when the end of the name is none of PLOT_FORMATS."""
    end = os.path.splitext(path)[1]
    if end.lower().lstrip(".") not in PLOT_FORMATS:
        expected = " or ".join(f".{x}" for x in PLOT_FORMATS)
        raise FasaError(f"--plot {os.fspath(path)}: expected a name that ends in {expected}, found {end or 'no end'}")


def save_speed_plot(lines: Mapping[str, Sequence[Any]], path: str | os.PathLike, title: str, machine: str = "") -> None:
    """Tokens/s against depth: a line for each name, its speed.results.Result by ascending depth, with error bars of one
    standard deviation. Dense is grey and dashed. Where there is one line of FASA, its ratio to dense is written at each
    point that ran sparse. machine: the line below the title.

    The background is transparent. Raises FasaError when there is no line, and for a file that is none of PLOT_FORMATS.
    """
    check_plot_path(path)
    if not lines:
        raise FasaError(f"{path}: no decode result was measured, so there is nothing to draw")
    plt = _pyplot()
    with plt.rc_context(_STYLE):
        fig, ax = plt.subplots(figsize=(8.3, 4.3), layout="constrained")
        _draw_lines(ax, lines)
        _depth_axis(ax, sorted({r.n_depth for line in lines.values() for r in line}))
        ax.set_ylabel("decode, tokens/s")
        ax.set_title(f"{title}\n{machine}".strip(), fontsize=11)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.3, color=_INK)
        fig.legend(loc="outside lower center", ncols=min(len(lines), 4), frameon=False)
        _save(fig, path, transparent=True)


def _draw_lines(ax: Any, lines: Mapping[str, Sequence[Any]]) -> None:
    sparse = [name for name, line in lines.items() if line[0].params is not None]
    for name, line in lines.items():
        x, y, error = zip(*((r.n_depth, r.avg_ts, r.stddev_ts) for r in line), strict=True)
        is_sparse = name in sparse
        style = {"color": _COLOURS[sparse.index(name) % len(_COLOURS)] if is_sparse else _DENSE, "lw": 2}
        style |= {} if is_sparse else {"ls": "--"}
        ax.errorbar(x, y, error, marker="o", ms=5, capsize=3, label=name, zorder=3 if is_sparse else 2, **style)
        for r in line if len(sparse) == 1 and is_sparse else ():
            if r.ratio and r.sparse_share:
                at = {"xytext": (0, 9), "textcoords": "offset points", "ha": "center"}
                ax.annotate(f"{r.ratio:.1f}x", (r.n_depth, r.avg_ts + r.stddev_ts), color=style["color"], **at)
    ax.set_ylim(bottom=0)
    ax.margins(y=0.1)


def _depth_axis(ax: Any, depths: Sequence[int]) -> None:
    """Linear, or logarithmic where the depths are far apart: a logarithm has no 0, so linear up to the first depth."""
    first = next(filter(None, depths), 1)
    if depths[-1] > 10 * first and depths[0] == 0:
        ax.set_xscale("symlog", base=2, linthresh=first)
        ax.set_xlim(left=-first / 4)
    elif depths[-1] > 10 * first:
        ax.set_xscale("log", base=2)
    ax.set_xticks(depths, [f"{d:,}" for d in depths], rotation=30 if len(depths) > 8 else 0)
    ax.minorticks_off()
    ax.set_xlabel("depth: tokens in the cache")


def save_loss_curves(
    results: Sequence[Mapping[str, Any]],
    key: str,
    unit: float,
    label: str,
    path: str | os.PathLike,
    thin: Collection[str] = (),
) -> None:
    """KL and perplexity loss of harness.compare's results against `key` in `unit`s, one point a budget.

    thin: names of methods that are drawn dashed.
    """
    plt = _pyplot()
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    fig, axes = plt.subplots(1, 2, figsize=(13, 5.5))
    for i, name in enumerate(dict.fromkeys(r["asked"] for r in results if r["method"] != "dense")):
        mine = sorted((r for r in results if r["asked"] == name), key=lambda r: r[key])
        x, loss = [r[key] / unit for r in mine], [100 * (r["ppl_ratio"] - 1) for r in mine]
        style = {
            "marker": "o",
            "ms": 4,
            "color": plt.get_cmap("tab20")(i % 20),
            "label": name,
            "ls": "--" if mine[0]["method"] in thin else "-",
            "lw": 2.4 if name.startswith("fasa") else 1.2,
        }
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
    _save(fig, path)


def _save(fig: Any, path: str | os.PathLike, **kw: Any) -> None:
    if os.fspath(path).lower().endswith(".svg"):
        kw["metadata"] = {"Date": None}  # the same picture is the same file
    try:
        fig.savefig(path, dpi=120, **kw)
    except OSError as e:
        raise FasaError(f"{path}: cannot be written: {e.strerror or e}") from None
    finally:
        _pyplot().close(fig)
