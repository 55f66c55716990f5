"""Tiny random models of other architectures: with sliding windows, and a hybrid."""

import numpy as np
from gguf import GGUFWriter


def write_arch(path, arch, numbers, n_head_kv, tensors, zeros=()):
    """A random model of 4 layers, 4 query heads of 16, no vocabulary.

    numbers: further keys; tensors: (name, rows, columns), those whose names end with one of `zeros` hold zeros.
    """
    rng = np.random.default_rng(0)
    w = GGUFWriter(path, arch)
    w.add_vocab_size(64)
    w.add_context_length(4096)
    w.add_embedding_length(64)
    w.add_block_count(4)
    w.add_feed_forward_length(96)
    w.add_head_count(4)
    w.add_head_count_kv(n_head_kv)
    w.add_rope_dimension_count(16)
    w.add_tokenizer_model("no_vocab")
    for key, value in numbers.items():
        add = w.add_uint32 if isinstance(value, int) else w.add_array if isinstance(value, list) else w.add_float32
        add(f"{arch}.{key}", value)
    for name, *shape in tensors:
        scale = 0.0 if name.endswith(tuple(zeros)) else 0.2
        w.add_tensor(
            name + ".weight",
            (rng.standard_normal(shape) * scale if len(shape) > 1 else np.ones(shape)).astype(np.float32),
        )
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def attention(i):
    return [
        (f"blk.{i}.attn_q", 64, 64),
        (f"blk.{i}.attn_k", 32, 64),
        (f"blk.{i}.attn_v", 32, 64),
        (f"blk.{i}.attn_output", 64, 64),
    ]


def feed_forward(i):
    return [(f"blk.{i}.ffn_gate", 96, 64), (f"blk.{i}.ffn_up", 96, 64), (f"blk.{i}.ffn_down", 64, 96)]


def write_sliding(path):
    """cohere2: three layers of four have a window of 64."""
    tensors = [("token_embd", 64, 64), ("output_norm", 64)]
    for i in range(4):
        tensors += [(f"blk.{i}.attn_norm", 64), *attention(i), *feed_forward(i)]
    write_arch(
        path,
        "cohere2",
        {"attention.sliding_window": 64, "logit_scale": 1.0, "attention.layer_norm_epsilon": 1e-5},
        2,
        tensors,
    )


def write_two_dimensional(path):
    """qwen2vl: positions in 2D (M-RoPE)."""
    tensors = [("token_embd", 64, 64), ("output_norm", 64), ("output", 64, 64)]
    for i in range(4):
        tensors += [(f"blk.{i}.attn_norm", 64), (f"blk.{i}.ffn_norm", 64), *attention(i), *feed_forward(i)]
    numbers = {"attention.layer_norm_rms_epsilon": 1e-5, "rope.dimension_sections": [2, 3, 3, 0]}
    write_arch(path, "qwen2vl", numbers, 2, tensors)


def write_hybrid(path):
    """lfm2: two layers of attention, two of short convolutions."""
    tensors = [("token_embd", 64, 64), ("token_embd_norm", 64)]
    for i in range(4):
        tensors += [(f"blk.{i}.attn_norm", 64), (f"blk.{i}.ffn_norm", 64), *feed_forward(i)]
        if i % 2:
            tensors += [*attention(i), (f"blk.{i}.attn_q_norm", 16), (f"blk.{i}.attn_k_norm", 16)]
        else:
            tensors += [
                (f"blk.{i}.shortconv.conv", 64, 3),
                (f"blk.{i}.shortconv.in_proj", 192, 64),
                (f"blk.{i}.shortconv.out_proj", 64, 64),
            ]
    write_arch(path, "lfm2", {"attention.layer_norm_rms_epsilon": 1e-5, "shortconv.l_cache": 3}, [0, 2, 0, 2], tensors)


def write_experts(path, still=False):
    """qwen3moe: four experts in every layer, of which a token uses two. still: they add nothing."""
    tensors = [("token_embd", 64, 64), ("output_norm", 64), ("output", 64, 64)]
    for i in range(4):
        tensors += [(f"blk.{i}.attn_norm", 64), (f"blk.{i}.ffn_norm", 64), *attention(i)]
        tensors += [(f"blk.{i}.attn_q_norm", 16), (f"blk.{i}.attn_k_norm", 16), (f"blk.{i}.ffn_gate_inp", 4, 64)]
        tensors += [(f"blk.{i}.ffn_{part}_exps", 4, 96, 64) for part in ("gate", "up")]
        tensors += [(f"blk.{i}.ffn_down_exps", 4, 64, 96)]
    numbers = {
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "expert_count": 4,
        "expert_used_count": 2,
        "expert_feed_forward_length": 96,
    }
    write_arch(path, "qwen3moe", numbers, 2, tensors, zeros=("ffn_down_exps",) if still else ())


def write_encoder(path):
    """llada: every token attends to all others of its batch, and there is no KV cache."""
    tensors = [("token_embd", 64, 64), ("output_norm", 64)]
    for i in range(4):
        tensors += [(f"blk.{i}.attn_norm", 64), (f"blk.{i}.ffn_norm", 64), *attention(i), *feed_forward(i)]
    write_arch(path, "llada", {"attention.layer_norm_rms_epsilon": 1e-5}, 2, tensors)
