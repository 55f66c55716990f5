"""Tiny random models of other architectures: with sliding windows, and a hybrid."""

import numpy as np
from gguf import GGUFWriter


def write_arch(path, arch, numbers, n_head_kv, tensors):
    """A random model of 4 layers, 4 query heads of 16, no vocabulary.

    numbers: further keys; tensors: (name, rows, columns).
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
        (w.add_uint32 if isinstance(value, int) else w.add_float32)(f"{arch}.{key}", value)
    for name, *shape in tensors:
        w.add_tensor(
            name + ".weight",
            (rng.standard_normal(shape) * 0.2 if len(shape) > 1 else np.ones(shape)).astype(np.float32),
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


def write_encoder(path):
    """llada: every token attends to all others of its batch, and there is no KV cache."""
    tensors = [("token_embd", 64, 64), ("output_norm", 64)]
    for i in range(4):
        tensors += [(f"blk.{i}.attn_norm", 64), (f"blk.{i}.ffn_norm", 64), *attention(i), *feed_forward(i)]
    write_arch(path, "llada", {"attention.layer_norm_rms_epsilon": 1e-5}, 2, tensors)
