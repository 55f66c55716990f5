"""A picture of a profile: layer x frequency chunk."""

from __future__ import annotations

import os

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
    try:
        fig.savefig(path, dpi=120)
    except OSError as e:
        raise FasaError(f"{path}: cannot be written: {e.strerror or e}") from None
    finally:
        plt.close(fig)
