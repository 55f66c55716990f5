"""Which pairs of dimensions a Hugging Face model rotates: measured, not looked up by the model's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .. import reference


class Probe:
    """What single tokens show of every layer, at one position and at a later one; 0 would reset some recurrent layers.

    A token that is alone attends to itself only. Its hidden states then do not depend on its position, and in every
    layer the keys of the two passes differ by RoPE alone. The pairing that keeps the length of each pair is the layout.
    """

    TOKENS, POSITIONS = 16, (1, 1001)

    def __init__(self, run: Callable[..., None], n_vocab: int) -> None:
        self.keys: list[dict[int, np.ndarray]] = []  # per position {layer: [n_token, n_head_kv, head_dim]}
        self.modules: dict[int, Any] = {}  # that attend, by layer
        self.n_head: dict[int, int] = {}
        self.windows: dict[int, int] = {}
        self.both_ways = False
        ids = (np.arange(self.TOKENS) * 37 % n_vocab)[:, None]  # [n_token, 1]
        for position in self.POSITIONS:
            self.keys.append({})
            run(self._watch, ids, np.full_like(ids, position))

    def _watch(self, module: Any, q: Any, k: Any, scale: float, soft_cap: float, window: int) -> None:
        il, found = getattr(module, "layer_idx", None), self.keys[-1]
        if il is not None and il not in found:
            self.modules[il] = module
            found[il] = k[:, :, 0].float().cpu().numpy()
            self.n_head[il], self.windows[il] = q.shape[1], window
            self.both_ways |= getattr(module, "is_causal", True) is False

    def change(self, il: int) -> np.ndarray:
        """[n_token, n_head_kv, head_dim] of one layer."""
        return np.abs(self.keys[1][il] - self.keys[0][il])

    def layout(self, n_rot: Callable[[int], int]) -> str | None:
        """norm or neox; "" when no key depends on the position; None when keys do, but not as rotating pairs.

        n_rot(layer): its rotated dimensions per head.
        """
        error, moved = {"norm": 0.0, "neox": 0.0}, 0.0
        for il, k0 in self.keys[0].items():
            width, rotated = k0.shape[-1], n_rot(il)
            change = self.change(il)
            if change.max() <= 1e-3 * np.abs(k0).max():
                continue  # a layer without RoPE, among others
            if change[..., rotated:].sum() > 0.01 * change.sum():
                return None
            moved += change.sum()
            for layout in error:
                dims = reference.chunk_dims(width, rotated, layout)[: rotated // 2]
                # of each pair, [n_token, n_head_kv, n_rot/2]
                length = [np.linalg.norm(keys[il][..., dims], axis=-1) for keys in self.keys]
                error[layout] += np.abs(length[1] - length[0]).sum()
        if moved == 0:
            return ""
        best, worst = min(error, key=lambda name: (error[name], name)), max(error.values())
        clear = error[best] < 0.5 * worst and error[best] < 0.2 * moved
        return best if clear or worst < 0.01 * moved else None
