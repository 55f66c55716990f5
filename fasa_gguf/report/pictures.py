"""Pictures: a profile, layer x frequency chunk; needles found, depth x length; a sweep, chunks x budget."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from ..errors import FasaError
from ..profile.profile import Profile


def save_heatmap(profile: Profile, path: str | os.PathLike) -> None:
    """PNG: how high every chunk is ranked, mean over the layer's KV heads (1: always first, 0: always last)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    n_chunk = max(profile.n_chunk)
    height = np.full((len(profile.n_chunk), n_chunk), np.nan)  # [n_layer, n_chunk]
    for il, rows in enumerate(profile.ranking):
        n = profile.n_chunk[il]
        if n:
            place = np.argsort(rows.astype(int), -1)  # [n_head_kv, n_chunk] place of every chunk
            height[il, :n] = 1 - place.mean(0) / max(n - 1, 1)
    fig, ax = plt.subplots(figsize=(max(6, n_chunk / 4 + 2), max(4, len(height) / 5 + 1.5)))
    image = ax.imshow(height, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    ax.set_xlabel("frequency chunk (0 is the fastest)")
    ax.set_ylabel("layer")
    ax.set_title(f"dominant frequency chunks ({profile.ranking_method})")
    fig.colorbar(image, label="mean rank over the KV heads (1: first)")
    fig.tight_layout()
    _save(fig, path)


def save_needle_map(grid: dict[str, Any], path: str | os.PathLike) -> None:
    """PNG of tasks.needle_grid: the share found, depth x length, a panel for each arm."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    n_depth, n_length, arms = len(grid["depths"]), len(grid["lengths"]), grid["arms"]
    size = len(arms) * max(3.5, 0.9 * n_length) + 1, max(3, 0.5 * n_depth + 1.8)  # inches
    fig, axes = plt.subplots(1, len(arms), figsize=size, squeeze=False, layout="constrained")
    for ax, arm in zip(axes[0], arms):
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
    """PNG of sweep.sweep: perplexity loss, chunks x budgets and masses; under it the share of dense's KV bytes read. The
    recommended setting has a frame."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, best = result["rows"], result["best"]
    chunks = sorted({r["chunks"] for r in rows})
    columns = sorted({(r["mass"], r["budget"]) for r in rows})  # fixed budgets first, then masses
    at = {(r["chunks"], (r["mass"], r["budget"])): r for r in rows}
    loss = np.array([[100 * (at[k, c]["ppl_ratio"] - 1) for c in columns] for k in chunks])  # [n_chunks, n_columns]
    fig, ax = plt.subplots(
        figsize=(max(5, 1.1 * len(columns) + 2), max(3, 0.7 * len(chunks) + 1.8)), layout="constrained"
    )
    top = max(float(loss.max()), 1e-6)
    image = ax.imshow(
        loss,
        aspect="auto",
        cmap="RdYlGn_r",
        vmin=min(0.0, float(loss.min())),
        vmax=min(top, 5 * 100 * result["max_loss"]),
    )
    for i, k in enumerate(chunks):
        for j, c in enumerate(columns):
            row = at[k, c]
            ax.text(
                j,
                i,
                f"{loss[i, j]:+.2f}%\n{100 * row['kv_read_share']:.0f}% read",
                ha="center",
                va="center",
                fontsize="small",
            )
            if best and row["arm"] == best["arm"]:
                ax.add_patch(plt.Rectangle((j - 0.48, i - 0.47), 0.96, 0.94, fill=False, lw=2.5))
    ax.set_xticks(range(len(columns)), [f"mass {m:g}" if m else f"{b:,}" for m, b in columns])
    ax.set_yticks(range(len(chunks)), [str(k) for k in chunks])
    ax.set_xlabel("budget in tokens, or target mass")
    ax.set_ylabel("chunks")
    fig.colorbar(image, label="perplexity against dense, %")
    _save(fig, path)


def _save(fig: Any, path: str | os.PathLike) -> None:
    import matplotlib.pyplot as plt

    try:
        fig.savefig(path, dpi=120)
    except OSError as e:
        raise FasaError(f"{path}: cannot be written: {e.strerror or e}") from None
    finally:
        plt.close(fig)
