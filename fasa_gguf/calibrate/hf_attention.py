"""The attention function that transformers calls in place of its own: it shows queries and keys before it attends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..errors import FasaError

NAME = "fasa_observe"  # of our function in transformers' AttentionInterface
BLOCK = 512  # queries that attend at once where torch has no fused attention
_watcher: Callable[..., None] | None = None  # of the current forward pass


def import_torch() -> tuple[Any, Any]:
    """(torch, transformers), our attention function registered. Raises FasaError when they are not installed."""
    try:
        import torch
        import transformers
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    except ImportError as e:
        raise FasaError(
            f"Hugging Face weights need torch, transformers 5 and safetensors ({e}); run `pip install 'fasa_gguf[hf]'`"
        ) from None
    AttentionInterface.register(NAME, _observe_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return torch, transformers


def _observe_attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Any = None,
    **kwargs: Any,
) -> tuple[Any, None]:
    """What transformers calls in every layer: show the queries and keys, then attend.

    query [batch, n_head, n, head_dim], key and value [batch, n_head_kv, n, head_dim].
    """
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if _watcher:
        _watcher(module, query, key, scale, softcap or 0.0, sliding_window or 0)
    if softcap or s_aux is not None:
        return _blocked_attention(query, key, value, attention_mask, scale, softcap or 0.0, s_aux), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scale, **kwargs)


def _blocked_attention(query: Any, key: Any, value: Any, mask: Any, scale: float, soft_cap: float, sinks: Any) -> Any:
    """Attention with soft-capped logits or learned sinks [n_head], BLOCK queries at a time.

    Returns [batch, n, n_head, head_dim of value].
    """
    import torch

    n = query.shape[2]
    n_kv_heads, n_kv = key.shape[1:3]
    grouped = query.unflatten(1, (n_kv_heads, -1))  # [batch, n_head_kv, G, n, head_dim]
    cell, out = torch.arange(n_kv, device=query.device), []
    for i in range(0, n, BLOCK):
        x = (grouped[..., i : i + BLOCK, :] @ key[:, :, None].mT).float() * scale  # [batch, n_head_kv, G, block, n_kv]
        if soft_cap:
            x = torch.tanh(x / soft_cap) * soft_cap
        if mask is None:
            x.masked_fill_(cell > cell[n_kv - n + i : n_kv - n + i + x.shape[3], None], -torch.inf)
        elif mask.dtype == torch.bool:
            x.masked_fill_(~mask[:, :, None, i : i + BLOCK, :n_kv], -torch.inf)
        else:
            x = x + mask[:, :, None, i : i + BLOCK, :n_kv]
        if sinks is not None:
            x = torch.cat([x, sinks.float().view(1, n_kv_heads, -1, 1, 1).expand(*x.shape[:-1], 1)], -1)
        share = torch.softmax(x, -1)[..., :n_kv].to(value.dtype)
        out.append((share @ value[:, :, None]).flatten(1, 2))  # [batch, n_head, block, head_dim]
    return torch.cat(out, 2).transpose(1, 2).contiguous()


@contextlib.contextmanager
def watched(model: Any, watch: Callable[..., None]) -> Iterator[None]:
    """Our attention function in place of the model's: watch(module, q, k, scale, soft_cap, window) in every layer."""
    old = model.config._attn_implementation
    try:
        model.set_attn_implementation(NAME)
        with watching(watch):
            yield
    finally:
        model.set_attn_implementation(old)


@contextlib.contextmanager
def watching(watch: Callable[..., None] | None) -> Iterator[None]:
    """Another watcher, or none, of what runs inside."""
    global _watcher
    old, _watcher = _watcher, watch
    try:
        yield
    finally:
        _watcher = old


def by_token(x: Any) -> np.ndarray:
    """float32 [n, heads, head_dim] of the first sequence of [batch, heads, n, head_dim]."""
    return x[0].transpose(0, 1).float().contiguous().cpu().numpy()
