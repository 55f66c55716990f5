"""Llama-shaped models with random weights: real dimensions, no knowledge. For speed and memory only."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from ..errors import FasaError
from ..profile.profile import Profile

Q4_0_BLOCK, Q4_0_BYTES = gguf.GGML_QUANT_SIZES[GGMLQuantizationType.Q4_0]
SHAPES = {  # n_embd, n_ff, n_layer, n_head, n_head_kv, head_dim, n_vocab
    "8b": (4096, 14336, 32, 32, 8, 128, 128256),
    "3b": (3072, 8192, 28, 24, 8, 128, 128256),
    "1b": (2048, 8192, 16, 32, 8, 64, 128256),
    "tiny": (1024, 2816, 8, 8, 2, 128, 32000),
}


def _q4_0(rng: np.random.Generator, rows: int, cols: int) -> np.ndarray:
    """Random Q4_0 blocks, uint8 [rows, bytes]; a pattern of 64 Ki blocks repeats.

    The values are -7 to 7 times the scale, so their mean is 0. A mean would grow from layer to layer until every token
    attends to itself alone.
    """
    n = rows * cols // Q4_0_BLOCK
    block = rng.integers(1, 16, (min(n, 1 << 16), Q4_0_BYTES), np.uint8)
    block |= rng.integers(1, 16, block.shape, np.uint8) << 4  # f16 scale, 32 nibbles
    block[:, :2] = np.frombuffer(np.float16(0.25 / np.sqrt(cols)).tobytes(), np.uint8)
    return np.resize(block, (n, Q4_0_BYTES)).reshape(rows, -1)


def _tensors(shape: str) -> list[tuple[str, int, int]]:
    """(name, rows, columns) in file order; 0 rows: a vector of ones."""
    n_embd, n_ff, n_layer, n_head, n_head_kv, width, n_vocab = SHAPES[shape]
    q, kv = n_head * width, n_head_kv * width
    out = [("token_embd", n_vocab, n_embd), ("output_norm", 0, n_embd), ("output", n_vocab, n_embd)]
    for i in range(n_layer):
        out += [
            (f"blk.{i}.{part}", rows, cols)
            for part, rows, cols in (
                ("attn_norm", 0, n_embd),
                ("attn_q", q, n_embd),
                ("attn_k", kv, n_embd),
                ("attn_v", kv, n_embd),
                ("attn_output", n_embd, q),
                ("ffn_norm", 0, n_embd),
                ("ffn_gate", n_ff, n_embd),
                ("ffn_up", n_ff, n_embd),
                ("ffn_down", n_embd, n_ff),
            )
        ]
    return out


def write_model(path: str | os.PathLike, shape: str, seed: int = 0) -> None:
    """A GGUF of one of SHAPES with a synthetic profile; `path` appears only when it is whole.

    One tensor is in memory at a time. Raises FasaError for an unknown shape, or when the file cannot be written.
    """
    if shape not in SHAPES:
        raise FasaError(f"shape {shape!r}: expected one of {', '.join(SHAPES)}")
    rng = np.random.default_rng(seed)
    temporary = Path(f"{path}.tmp-{os.getpid()}")
    w = gguf.GGUFWriter(temporary, "llama")
    _add_keys(w, shape, seed)
    tensors = _tensors(shape)
    for name, rows, cols in tensors:
        if rows:
            n_bytes = cols // Q4_0_BLOCK * Q4_0_BYTES
            size = rows * n_bytes
            w.add_tensor_info(name + ".weight", (rows, n_bytes), np.dtype(np.uint8), size, GGMLQuantizationType.Q4_0)
        else:
            w.add_tensor_info(name + ".weight", (cols,), np.dtype(np.float32), 4 * cols)
    try:
        try:
            w.write_header_to_file()
            w.write_kv_data_to_file()
            w.write_ti_data_to_file()
            for _, rows, cols in tensors:
                w.write_tensor_data(_q4_0(rng, rows, cols) if rows else np.ones(cols, np.float32))
        finally:
            w.close()
        os.replace(temporary, path)
    except OSError as e:
        raise FasaError(
            f"{path}: cannot be written: {e.strerror or e}; a {shape} model takes {model_bytes(shape) / 1e9:.1f} GB"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def _add_keys(w: gguf.GGUFWriter, shape: str, seed: int) -> None:
    """The metadata, and the profile."""
    n_embd, n_ff, n_layer, n_head, n_head_kv, width, n_vocab = SHAPES[shape]
    w.add_name(f"random-{shape}")
    w.add_vocab_size(n_vocab)
    w.add_context_length(131072)
    w.add_embedding_length(n_embd)
    w.add_block_count(n_layer)
    w.add_feed_forward_length(n_ff)
    w.add_head_count(n_head)
    w.add_head_count_kv(n_head_kv)
    w.add_key_length(width)
    w.add_value_length(width)
    w.add_rope_dimension_count(width)
    w.add_rope_freq_base(500000.0)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_tokenizer_model("no_vocab")
    w.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    profile = synthetic_profile([n_head_kv] * n_layer, [width // 2] * n_layer, seed)
    profile.rope = {"layout": "norm", "dims": width, "base": 500000.0}
    for key, kind, value, item in profile.to_gguf_kv():
        w.add_key_value(key, value, GGUFValueType(kind), None if item is None else GGUFValueType(item))


def model_bytes(shape: str) -> int:
    """Bytes of the tensors of a shape."""
    return sum(rows * cols // Q4_0_BLOCK * Q4_0_BYTES if rows else 4 * cols for _, rows, cols in _tensors(shape))


def synthetic_profile(n_head_kv: list[int], n_chunk: list[int], seed: int | None = None) -> Profile:
    """A ranking that knows nothing, method "synthetic": chunks in order, or shuffled by a seed.

    n_head_kv, n_chunk: [n_layer]; 0 chunks: no ranking there.
    """
    order = np.arange if seed is None else np.random.default_rng(seed).permutation
    ranking = [
        np.array([order(n) for _ in range(h)], np.uint16).reshape(h, n) if n else np.zeros((0, 0), np.uint16)
        for h, n in zip(n_head_kv, n_chunk, strict=True)
    ]
    return Profile(list(n_head_kv), list(n_chunk), ranking, "synthetic")


def cached_model(shape: str, say: Callable[[str], None] = lambda text: None) -> Path:
    """The random model of a shape in the user's cache folder, written when it is missing; `say` is then told so."""
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fasa_gguf" / f"random-{shape}.fasa.gguf"
    if shape in SHAPES and not path.exists():
        say(f"writing a random {shape} model, {model_bytes(shape) / 1e9:.1f} GB, to {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_model(path, shape)
    return path
