"""A tiny seeded model with a small vocabulary: 3 layers, 4 query heads, 2 KV heads, head_dim 16 (8 chunks)."""

import numpy as np
from gguf import GGUFWriter, TokenType

N_LAYER, N_HEAD, N_HEAD_KV, WIDTH, N_EMBD, N_FF = 3, 4, 2, 16, 64, 96


def write_tiny(path, seed=0, arch="llama"):
    rng = np.random.default_rng(seed)
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    w = GGUFWriter(path, arch)
    w.add_context_length(4096)
    w.add_embedding_length(N_EMBD)
    w.add_block_count(N_LAYER)
    w.add_feed_forward_length(N_FF)
    w.add_head_count(N_HEAD)
    w.add_head_count_kv(N_HEAD_KV)
    w.add_rope_dimension_count(WIDTH)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_tokenizer_model("llama")
    w.add_token_list(tokens)
    w.add_token_scores([0.0] * len(tokens))
    w.add_token_types([TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.BYTE] * 256)
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)

    def add(name, *shape, scale=1.0):
        w.add_tensor(name + ".weight", (rng.standard_normal(shape) * scale).astype(np.float32))

    add("token_embd", len(tokens), N_EMBD)
    add("output", len(tokens), N_EMBD, scale=0.2)
    w.add_tensor("output_norm.weight", np.ones(N_EMBD, np.float32))
    for i in range(N_LAYER):
        for part in ("attn_norm", "ffn_norm"):
            w.add_tensor(f"blk.{i}.{part}.weight", np.ones(N_EMBD, np.float32))
        for part, rows, cols in (("attn_q", N_HEAD * WIDTH, N_EMBD), ("attn_k", N_HEAD_KV * WIDTH, N_EMBD), ("attn_v", N_HEAD_KV * WIDTH, N_EMBD),
                                 ("attn_output", N_EMBD, N_HEAD * WIDTH), ("ffn_gate", N_FF, N_EMBD), ("ffn_up", N_FF, N_EMBD), ("ffn_down", N_EMBD, N_FF)):
            add(f"blk.{i}.{part}", rows, cols, scale=0.2)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
