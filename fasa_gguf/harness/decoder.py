"""A Llama-family GGUF in torch, fp32.

The prefix of a window runs dense in one pass. Then all tokens of its tail run in one batch, every layer's attention
restricted to a policy's lists. The keys and values of the tail come from the sparse hidden states and later layers see
the sparse outputs, so the batch gives what decoding token by token would give.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import FasaError
from ..gguf.file import F32, U32, GGUFFile
from ..gguf.shape import ModelShape, first_shard, read_shape

KV_TYPES = {"f16": torch.float16, "f32": torch.float32}
N_LAST = 64  # queries at the end of the prompt that are kept for policies that look at them


@dataclass(frozen=True)
class Shape:
    """Of the attention; all layers are alike."""

    n_layer: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_rot: int
    layout: str = "norm"

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.n_head // self.n_head_kv

    @property
    def scale(self) -> float:
        """Of the logits."""
        return self.head_dim**-0.5

    @property
    def row_bytes(self) -> int:
        """One token's K and V of one KV head, f16."""
        return 4 * self.head_dim


@dataclass
class Prefix:
    """What a dense pass over the prompt leaves, per layer: K and V [n_head_kv, n, head_dim] and the last queries
    [n_head, N_LAST, head_dim]."""

    n: int
    k: list[torch.Tensor]
    v: list[torch.Tensor]
    q_last: list[torch.Tensor]


@dataclass
class Tail:
    """The decode steps after a prefix: query t stands at position start + t and sees the cells up to itself.

    Cell = position.
    """

    shape: Shape
    start: int
    visible: torch.Tensor  # bool [n_query, n_kv]

    @classmethod
    def make(cls, shape: Shape, start: int, n_query: int, device: Any = "cpu") -> Tail:
        position = torch.arange(start, start + n_query, device=device)[:, None]  # [n_query, 1]
        return cls(shape, start, torch.arange(start + n_query, device=device) <= position)

    def forced(self, sink: int, recent: int) -> torch.Tensor:
        """bool [n_query, n_kv]: the first `sink` and the last `recent` cells that each query sees
        (reference.forced_cells)."""
        n_query, n_kv = self.visible.shape
        cell = torch.arange(n_kv, device=self.visible.device)  # [n_kv]
        position = torch.arange(self.start, self.start + n_query, device=cell.device)[:, None]
        return ((cell < sink) | (position - cell < recent)) & self.visible


class Selector(Protocol):
    """What the decoder asks of a policy; policy.Policy describes the methods."""

    dense_layers: int

    def prepare(self, layer: int, q: torch.Tensor, k: torch.Tensor) -> None: ...

    def select(self, layer: int, q: torch.Tensor, k: torch.Tensor, tail: Tail) -> torch.Tensor: ...

    def score_bytes(self, n: int) -> float: ...

    def index_bytes(self) -> float: ...


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """Exact attention of q [n_head, n_query, d] over the cells of k, v [n_head_kv, n_kv, d] in a mask.

    mask bool [n_head, n_query, n_kv].
    """
    grouped = q.reshape(len(k), -1, q.shape[-1])  # [n_head_kv, G*n_query, d]
    logits = (grouped @ k.transpose(1, 2) * scale).reshape(mask.shape)
    weight = logits.masked_fill_(~mask, -torch.inf).softmax(-1)  # [n_head, n_query, n_kv]
    return (weight.reshape(len(k), -1, k.shape[1]) @ v).reshape(q.shape)


def _checked_shape(file: GGUFFile) -> ModelShape:
    """The shape of a model that the decoder runs. Raises FasaError for others."""
    s, path = read_shape(file), file.path
    if s.arch != "llama" or f"{s.arch}.expert_count" in file.kv:
        experts = " with experts" if s.arch == "llama" else ""
        raise FasaError(f"{path}: architecture {s.arch}{experts}: the harness runs Llama-family models only (llama)")
    if s.rope_scaling not in ("none", "linear"):
        raise FasaError(f"{path}: RoPE scaling {s.rope_scaling}: the harness knows none and linear only")
    if len({(h, kv, d) for h, kv, d in zip(s.n_head, s.n_head_kv, s.head_dim, strict=True)}) > 1:
        raise FasaError(f"{path}: layers of different shapes, which the harness does not run")
    return s


class Decoder:
    """The model. kv_type: how K and V are stored, f16 (the library's default) or f32; device: cpu or cuda.

    Raises FasaError for another architecture, RoPE scaling that it does not know, a missing device or a missing
    package.
    """

    def __init__(self, path: str | os.PathLike, device: str = "cpu", kv_type: str = "f16") -> None:
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise FasaError(f"--device {device}: torch finds no CUDA device here; use --device cpu")
        file = GGUFFile(path)
        first_shard(file)
        s = _checked_shape(file)
        self.path, self.device, self.kv_type = str(path), torch.device(device), KV_TYPES[kv_type]
        self.shape = Shape(len(s.n_head), s.n_head[0], s.n_head_kv[0], s.head_dim[0], s.n_rot, s.layout)
        self.n_ctx_train = file.get("llama.context_length", U32)
        self.eps = file.get("llama.attention.layer_norm_rms_epsilon", F32)
        self.weights = self._load(path)
        factor = file.get("llama.rope.scaling.factor", F32, default=1.0) if s.rope_scaling == "linear" else 1.0
        freq = s.rope_base ** -(torch.arange(0, s.n_rot, 2, dtype=torch.float64) / s.n_rot) / factor  # [n_rot/2]
        if "rope_freqs.weight" in self.weights:
            freq = freq / self.weights["rope_freqs.weight"].double().cpu()
        self.freq = freq.to(self.device)

    def _load(self, path: str | os.PathLike) -> dict[str, torch.Tensor]:
        try:
            from gguf import GGUFReader
            from gguf.quants import dequantize
        except ImportError:
            raise FasaError("the harness needs the gguf package; run `pip install 'fasa_gguf[harness]'`") from None
        out = {}
        for t in GGUFReader(path).tensors:
            try:
                out[t.name] = torch.from_numpy(np.array(dequantize(t.data, t.tensor_type), np.float32)).to(self.device)
            except NotImplementedError:
                raise FasaError(
                    f"{path}: tensor {t.name}: the gguf package does not dequantise {t.tensor_type.name}"
                ) from None
        return out

    # ---- parts of a layer ----

    def _weight(self, name: str) -> torch.Tensor:
        if name not in self.weights:
            raise FasaError(f"{self.path}: tensor {name} is missing, so this is no Llama that the harness can run")
        return self.weights[name]

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self._weight(name + ".weight"), self.weights.get(name + ".bias"))

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self._weight(name + ".weight")

    def _rope(self, x: torch.Tensor, start: int) -> torch.Tensor:
        """x [heads, n, head_dim] at positions from start on; NORM: pairs (2i, 2i+1)."""
        angle = (
            torch.arange(start, start + x.shape[1], device=self.device)[:, None] * self.freq
        )  # [n, n_rot/2], float64
        cos, sin = angle.cos().float(), angle.sin().float()
        n_rot = self.shape.n_rot
        a, b = x[..., 0:n_rot:2], x[..., 1:n_rot:2]
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)  # [heads, n, n_rot]
        return torch.cat([turned, x[..., n_rot:]], -1)

    def _qkv(self, il: int, x: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Post-RoPE q [n_head, n, head_dim]; k and v [n_head_kv, n, head_dim], as they are read back from the cache."""
        h = self._norm(x, f"blk.{il}.attn_norm")
        q, k, v = (
            self._linear(h, f"blk.{il}.attn_{p}").view(len(x), -1, self.shape.head_dim).transpose(0, 1) for p in "qkv"
        )
        return self._rope(q, start), self._rope(k, start).to(self.kv_type).float(), v.to(self.kv_type).float()

    def _finish(self, il: int, x: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
        """The rest of a layer after its attention output o [n_head, n, head_dim]."""
        x = x + self._linear(o.transpose(0, 1).reshape(len(x), -1), f"blk.{il}.attn_output")
        h = self._norm(x, f"blk.{il}.ffn_norm")
        return x + self._linear(
            F.silu(self._linear(h, f"blk.{il}.ffn_gate")) * self._linear(h, f"blk.{il}.ffn_up"), f"blk.{il}.ffn_down"
        )

    def _embed(self, tokens: Any) -> torch.Tensor:
        return self._weight("token_embd.weight")[torch.as_tensor(tokens, device=self.device)]

    # ---- passes ----

    @torch.no_grad()
    def prefill(self, tokens: Any, observe: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None) -> Prefix:
        """Dense over tokens [n]. observe(layer, q [n_head, n, d], k [n_head_kv, n, d]) sees every layer."""
        x, out, g = self._embed(tokens), Prefix(len(tokens), [], [], []), self.shape.group
        for il in range(self.shape.n_layer):
            q, k, v = self._qkv(il, x, 0)
            if observe:
                observe(il, q, k)
            every_k, every_v = (t.repeat_interleave(g, 0)[None] for t in (k, v))  # [1, n_head, n, d]
            scale = self.shape.scale
            o = F.scaled_dot_product_attention(q[None], every_k, every_v, is_causal=True, scale=scale)[0]
            x = self._finish(il, x, o)
            out.k.append(k)
            out.v.append(v)
            out.q_last.append(q[:, -N_LAST:].clone())
        return out

    @torch.no_grad()
    def decode(self, prefix: Prefix, tokens: Any, policy: Selector) -> tuple[torch.Tensor, dict[str, int]]:
        """(logits f32 [n_query, n_vocab] of the tail's tokens under a policy, counters as the library names them).

        Here `lists` and `tokens_attended` count query heads, and bytes_fac counts a token once for a KV head.
        """
        s, n_query = self.shape, len(tokens)
        tail = Tail.make(s, prefix.n, n_query, self.device)
        seen = tail.visible.sum(-1)  # [n_query] tokens that each query sees
        count = dict.fromkeys(("tokens_attended", "bytes_fac", "bytes_tip"), 0)
        x = self._embed(tokens)
        for il in range(s.n_layer):
            q, k, v = self._qkv(il, x, prefix.n)
            policy.prepare(il, prefix.q_last[il], prefix.k[il])
            k, v = torch.cat([prefix.k[il], k], 1), torch.cat([prefix.v[il], v], 1)
            if il < policy.dense_layers:
                mask = tail.visible.expand(s.n_head, -1, -1)
            else:
                mask = policy.select(il, q, k, tail)  # bool [n_head, n_query, n_kv]
                count["bytes_tip"] += round(s.n_head_kv * sum(policy.score_bytes(n) for n in seen.tolist()))
            count["tokens_attended"] += int(mask.sum())
            count["bytes_fac"] += int(mask.view(s.n_head_kv, s.group, *mask.shape[1:]).any(1).sum()) * s.row_bytes
            x = self._finish(il, x, attend(q, k, v, mask, s.scale))
        head = "output" if "output.weight" in self.weights else "token_embd"
        n_cells = s.n_layer * s.n_head_kv * (prefix.n + n_query)
        return F.linear(self._norm(x, "output_norm"), self._weight(head + ".weight")), {
            **count,
            "lists": s.n_layer * s.n_head * n_query,
            "tokens_visible": s.n_layer * s.n_head * int(seen.sum()),
            "bytes_dense": s.n_layer * s.n_head_kv * int(seen.sum()) * s.row_bytes,
            "bytes_k_dom": round(n_cells * policy.index_bytes()),
            "bytes_kv": n_cells * s.row_bytes,
            "steps_sparse": n_query,
            "steps_dense": 0,
            "layers_sparse": s.n_layer * n_query,
            "layers_dense": 0,
        }
