"""The self-test's model: random f32 weights, whose products add no noise of quantisation to what is compared."""

from __future__ import annotations

import os

import gguf
import numpy as np

from ..profile.profile import Profile
from ..speed.random_model import synthetic_profile

N_LAYER, N_HEAD, N_HEAD_KV, HEAD_DIM, N_EMBD, N_FF, N_VOCAB = 4, 8, 4, 64, 256, 256, 512
CELL_BYTES = N_LAYER * N_HEAD_KV * HEAD_DIM * 2 * 2  # K and V of a cell, f16


def nano_profile() -> Profile:
    """A ranking of all its layers, which knows nothing."""
    return synthetic_profile([N_HEAD_KV] * N_LAYER, [HEAD_DIM // 2] * N_LAYER, seed=0)


def write_nano(path: str | os.PathLike, seed: int = 0) -> None:
    """A Llama-shaped GGUF of 10 MB, without a vocabulary."""
    rng = np.random.default_rng(seed)
    w = gguf.GGUFWriter(path, "llama")
    w.add_vocab_size(N_VOCAB)
    w.add_context_length(131072)
    w.add_embedding_length(N_EMBD)
    w.add_block_count(N_LAYER)
    w.add_feed_forward_length(N_FF)
    w.add_head_count(N_HEAD)
    w.add_head_count_kv(N_HEAD_KV)
    w.add_key_length(HEAD_DIM)
    w.add_value_length(HEAD_DIM)
    w.add_rope_dimension_count(HEAD_DIM)
    w.add_rope_freq_base(500000.0)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_tokenizer_model("no_vocab")

    def matrix(name: str, rows: int, cols: int) -> None:
        w.add_tensor(f"{name}.weight", (rng.standard_normal((rows, cols)) / np.sqrt(cols)).astype(np.float32))

    def ones(name: str) -> None:
        w.add_tensor(f"{name}.weight", np.ones(N_EMBD, np.float32))

    matrix("token_embd", N_VOCAB, N_EMBD)
    matrix("output", N_VOCAB, N_EMBD)
    ones("output_norm")
    for i in range(N_LAYER):
        ones(f"blk.{i}.attn_norm")
        ones(f"blk.{i}.ffn_norm")
        matrix(f"blk.{i}.attn_q", N_HEAD * HEAD_DIM, N_EMBD)
        matrix(f"blk.{i}.attn_k", N_HEAD_KV * HEAD_DIM, N_EMBD)
        matrix(f"blk.{i}.attn_v", N_HEAD_KV * HEAD_DIM, N_EMBD)
        matrix(f"blk.{i}.attn_output", N_EMBD, N_HEAD * HEAD_DIM)
        matrix(f"blk.{i}.ffn_gate", N_FF, N_EMBD)
        matrix(f"blk.{i}.ffn_up", N_FF, N_EMBD)
        matrix(f"blk.{i}.ffn_down", N_EMBD, N_FF)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
