"""What of a model decides about memory, from its metadata alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import FasaError
from ..gguf.file import ARR, TENSOR_TYPES, U32, GGUFFile, TensorInfo
from ..gguf.shape import ModelShape, read_shape, shards, sliding_windows
from ..profile.find import find_profile
from ..profile.profile import Profile


@dataclass(frozen=True)
class Layer:
    """One block of a model; n_head_kv 0: no attention with a KV cache there."""

    n_bytes: int  # of its weights, as the device stores them
    n_head: int = 0
    n_head_kv: int = 0
    d_k: int = 0  # head dimension of keys and values
    d_v: int = 0
    window: int = 0  # the last tokens that it attends, 0: all
    n_chunk: int = 0  # frequency chunks that the profile ranks, 0: it stays dense
    feed_forward_bytes: int = 0  # of the weights that a token's feed-forward reads, as stored
    may_ahead: bool = True  # by the profile it may select ahead
    query_row: int = 0  # bytes of a row of W_q on the device; 0: queries are not its product and RoPE alone


@dataclass(frozen=True)
class Model:
    """What of a model's metadata decides about memory."""

    name: str
    n_ctx_train: int
    n_embd: int
    n_ff: int  # of a token; in a mixture of experts of all experts that it uses
    n_vocab: int
    layers: Sequence[Layer]
    output_bytes: (
        int  # output matrix and norms, on the device when the last layer is; token embeddings stay in host memory
    )


@dataclass
class _Tensors:
    """A model's tensors by block."""

    n_bytes: list[int]  # [n_layer], in a CUDA buffer
    names: list[set[str]]  # [n_layer], without "blk.N."
    query_row: list[int]  # [n_layer] bytes of a row of W_q, or of the fused W_qkv
    feed_forward: list[int]  # [n_layer] bytes of a feed-forward, and
    experts: list[int]  # [n_layer] of all its experts
    output_bytes: int = 0
    embedding: TensorInfo | None = None
    has_output: bool = False  # without one, the embedding is the output matrix too


_FEED_FORWARD = {f"ffn_{part}.weight" for part in ("up", "gate", "down")}
_EXPERTS = {f"ffn_{part}_exps.weight" for part in ("up", "gate", "down")}


def _number(gguf: GGUFFile, key: str, default: int = 0) -> int:
    """A key of the model's architecture."""
    return gguf.get(f"{gguf.arch}.{key}", U32, default=default)


def device_bytes(t: TensorInfo) -> int:
    """Bytes of a tensor in a CUDA buffer (ggml-cuda.cu).

    Quantised rows are padded to a multiple of 512 values, and tensors to a multiple of 128 bytes.
    """
    per, size = TENSOR_TYPES[t.type]
    n = t.n_bytes + (-t.shape[0] % 512 // per * size if per > 1 else 0)
    return n + -n % 128


def row_device_bytes(t: TensorInfo) -> int:
    """Bytes of a row in a CUDA buffer."""
    per, size = TENSOR_TYPES[t.type]
    return t.shape[0] // per * size


def _read_tensors(gguf: GGUFFile, n_layer: int) -> _Tensors:
    n_bytes, query_row, feed_forward, experts = ([0] * n_layer for _ in range(4))
    found = _Tensors(n_bytes, [set() for _ in range(n_layer)], query_row, feed_forward, experts)
    for t in (t for part in shards(gguf) for t in part.tensors):
        block, _, rest = t.name.removeprefix("blk.").partition(".")
        if t.name.startswith("blk.") and block.isdigit():
            if int(block) < n_layer:
                found.n_bytes[int(block)] += device_bytes(t)
                found.names[int(block)].add(rest)
                if rest in _FEED_FORWARD:
                    found.feed_forward[int(block)] += t.n_bytes
                elif rest in _EXPERTS:
                    found.experts[int(block)] += t.n_bytes
                if rest in ("attn_q.weight", "attn_qkv.weight"):
                    found.query_row[int(block)] = row_device_bytes(t)
        elif t.name == "token_embd.weight":
            found.embedding = t
        elif t.name != "per_layer_token_embd.weight":
            found.output_bytes += device_bytes(t)
            found.has_output = found.has_output or t.name == "output.weight"
    return found


def _read_layers(gguf: GGUFFile, shape: ModelShape, tensors: _Tensors, profile: Profile | None) -> list[Layer]:
    n_layer = len(shape.n_head)
    width = _number(gguf, "attention.value_length", _number(gguf, "embedding_length") // max(shape.n_head[0], 1))
    width_local = _number(gguf, "attention.value_length_swa", width)
    windows = sliding_windows(gguf, n_layer)
    kept = n_layer - _number(gguf, "attention.shared_kv_layers")  # later layers use the cache of earlier ones
    n_expert, n_used = _number(gguf, "expert_count") or 1, _number(gguf, "expert_used_count")
    may = None if profile is None else profile.ahead
    layers = []
    for il in range(n_layer):
        names = tensors.names[il]
        recurrent = "attn_k.weight" not in names and any(name.startswith(("ssm_", "shortconv")) for name in names)
        if il >= kept or recurrent or not shape.n_head_kv[il]:
            layers.append(Layer(tensors.n_bytes[il]))
            continue
        if shape.head_dim[il] < 0:
            raise FasaError(
                f"{gguf.path}: its heads have two sizes, and the metadata do not say which layers have which; "
                "there is no plan for it"
            )
        ranked = shape.n_chunk if profile is None else profile.n_chunk
        layers.append(
            Layer(
                n_bytes=tensors.n_bytes[il],
                n_head=shape.n_head[il],
                n_head_kv=shape.n_head_kv[il],
                d_k=shape.head_dim[il],
                d_v=width_local if windows[il] else width,
                window=windows[il],
                n_chunk=ranked[il] if il < len(ranked) else 0,
                feed_forward_bytes=tensors.feed_forward[il] + tensors.experts[il] * n_used // n_expert,
                may_ahead=may is None or bool(may[il]),
                query_row=0 if "attn_q_norm.weight" in names else tensors.query_row[il],
            )
        )
    return layers


def _feed_forward(gguf: GGUFFile) -> int:
    """The widest feed-forward of a token, with all experts that it uses."""
    widths = gguf.get(f"{gguf.arch}.feed_forward_length", U32, ARR, default=0)
    widest = max(widths) if isinstance(widths, list) else widths
    experts = _number(gguf, "expert_used_count") * _number(gguf, "expert_feed_forward_length", widest)
    return max(widest, experts + _number(gguf, "expert_shared_feed_forward_length"))


def read_model(model: str | os.PathLike | GGUFFile, profile: Profile | None = None) -> Model:
    """What decides about memory in a GGUF file, split ones too. profile: which layers have dominant keys; without one,
    that of find_profile, or else all.

    Raises FasaError for a model that FASA does not apply to, and for a file that is not usable.
    """
    gguf = model if isinstance(model, GGUFFile) else GGUFFile(model)
    profile = profile or find_profile(gguf)
    shape = read_shape(gguf)
    tensors = _read_tensors(gguf, len(shape.n_head))
    if tensors.embedding is None:
        raise FasaError(f"{gguf.path}: there is no tensor token_embd.weight; give a whole model")
    return Model(
        name=gguf.path.name,
        n_ctx_train=_number(gguf, "context_length"),
        n_embd=_number(gguf, "embedding_length"),
        n_ff=_feed_forward(gguf),
        n_vocab=tensors.embedding.shape[-1],
        layers=_read_layers(gguf, shape, tensors, profile),
        output_bytes=tensors.output_bytes + (0 if tensors.has_output else device_bytes(tensors.embedding)),
    )
