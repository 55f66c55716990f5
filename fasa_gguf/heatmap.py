"""Pictures: a profile, layer x frequency chunk, and needles found, depth x length."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from .errors import FasaError
from .profile import Profile


def save_heatmap(profile: Profile, path: str | os.PathLike) -> None:
    """PNG: how high every chunk is ranked, mean over the layer's KV heads (1: always first, 0: always last)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    n_chunk = max(profile.n_chunk)
    height = np.full((len(profile.n_chunk), n_chunk), np.nan)                    # [n_layer, n_chunk]
    for il, rows in enumerate(profile.ranking):
        n = profile.n_chunk[il]
        if n:
            place = np.argsort(rows.astype(int), -1)                             # [n_head_kv, n_chunk] place of every chunk
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
    size = len(arms) * max(3.5, 0.9 * n_length) + 1, max(3, 0.5 * n_depth + 1.8)   # inches
    fig, axes = plt.subplots(1, len(arms), figsize=size, squeeze=False, layout="constrained")
    for ax, arm in zip(axes[0], arms):
        found = np.array(arm["found"], float)                                    # [n_depth, n_length]
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


def _save(fig: Any, path: str | os.PathLike) -> None:
    import matplotlib.pyplot as plt

    try:
        fig.savefig(path, dpi=120)
    except OSError as e:
        raise FasaError(f"{path}: cannot be written: {e.strerror or e}") from None
    finally:
        plt.close(fig)
