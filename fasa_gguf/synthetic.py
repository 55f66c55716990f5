"""Llama-shaped models with random weights: real dimensions, no knowledge. For speed and memory only."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from .errors import FasaError
from .profile import Profile

SHAPES = {  # n_embd, n_ff, n_layer, n_head, n_head_kv, head_dim, n_vocab
    "8b": (4096, 14336, 32, 32, 8, 128, 128256),
    "3b": (3072, 8192, 28, 24, 8, 128, 128256),
    "1b": (2048, 8192, 16, 32, 8, 64, 128256),
    "tiny": (1024, 2816, 8, 8, 2, 128, 32000),
}


def _q4_0(rng: np.random.Generator, rows: int, cols: int) -> np.ndarray:
    """Random Q4_0 blocks, uint8 [rows, bytes]; a pattern of 64 Ki blocks repeats."""
    n = rows * cols // 32
    block = rng.integers(0, 256, (min(n, 1 << 16), 18), np.uint8)                   # f16 scale, 32 nibbles
    block[:, :2] = np.frombuffer(np.float16(0.25 / np.sqrt(cols)).tobytes(), np.uint8)
    return np.resize(block, (n, 18)).reshape(rows, -1)


def write_model(path: str | os.PathLike, shape: str, seed: int = 0) -> None:
    """A GGUF of one of SHAPES. Raises FasaError for an unknown shape, or when the gguf package is missing."""
    try:
        from gguf import GGMLQuantizationType, GGUFWriter
    except ImportError:
        raise FasaError("making a random model needs the gguf package; run `pip install gguf`") from None
    if shape not in SHAPES:
        raise FasaError(f"shape {shape!r}: expected one of {', '.join(SHAPES)}")
    n_embd, n_ff, n_layer, n_head, n_head_kv, width, n_vocab = SHAPES[shape]
    rng = np.random.default_rng(seed)
    w: Any = GGUFWriter(path, "llama")
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
    w.add_file_type(2)

    def matrix(name: str, rows: int, cols: int) -> None:
        w.add_tensor(name + ".weight", _q4_0(rng, rows, cols), raw_dtype=GGMLQuantizationType.Q4_0)

    def norm(name: str) -> None:
        w.add_tensor(name + ".weight", np.ones(n_embd, np.float32))

    matrix("token_embd", n_vocab, n_embd)
    norm("output_norm")
    matrix("output", n_vocab, n_embd)
    for i in range(n_layer):
        for part in ("attn_norm", "ffn_norm"):
            norm(f"blk.{i}.{part}")
        for part, rows, cols in (("attn_q", n_head * width, n_embd), ("attn_k", n_head_kv * width, n_embd), ("attn_v", n_head_kv * width, n_embd),
                                 ("attn_output", n_embd, n_head * width), ("ffn_gate", n_ff, n_embd), ("ffn_up", n_ff, n_embd), ("ffn_down", n_embd, n_ff)):
            matrix(f"blk.{i}.{part}", rows, cols)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def synthetic_profile(n_head_kv: list[int], n_chunk: list[int], seed: int | None = None) -> Profile:
    """A ranking that knows nothing: chunks in order, or shuffled by a seed."""
    rng = np.random.default_rng(seed)
    order = (lambda n: np.arange(n)) if seed is None else rng.permutation
    ranking = [np.array([order(n) for _ in range(h)], np.uint16).reshape(h, n) if n else np.zeros((0, 0), np.uint16)
               for h, n in zip(n_head_kv, n_chunk)]
    return Profile(list(n_head_kv), list(n_chunk), ranking, "synthetic")
