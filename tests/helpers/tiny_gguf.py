"""A tiny seeded model that llama.cpp loads. By default 3 layers, 4 query heads, 2 KV heads, head_dim 16 (8 chunks)."""

import struct

import numpy as np
from gguf import GGUFWriter, TokenType

from fasa_gguf.gguf.file import GGUFFile

N_LAYER, N_HEAD, N_HEAD_KV, WIDTH, N_EMBD, N_FF = 3, 4, 2, 16, 64, 96


def add_byte_vocabulary(w, words=(), bos=1):
    """The tokens of bytes, and words after them; returns how many. bos: None for a tokenizer that puts none."""
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)] + list(words)
    w.add_tokenizer_model("llama")
    w.add_token_list(tokens)
    w.add_token_scores([0.0] * len(tokens))
    w.add_token_types(
        [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
        + [TokenType.BYTE] * 256
        + [TokenType.NORMAL] * len(words)
    )
    if bos is None:
        w.add_add_bos_token(False)
    else:
        w.add_bos_token_id(bos)
    w.add_eos_token_id(2)
    return len(tokens)


def write_tiny(
    path,
    seed=0,
    arch="llama",
    n_layer=N_LAYER,
    n_head=N_HEAD,
    n_head_kv=N_HEAD_KV,
    head_dim=WIDTH,
    n_embd=N_EMBD,
    n_ff=N_FF,
    n_ctx=4096,
    dtype=np.float32,
    rope_base=None,
    alignment=None,
    words=(),
    chat_template=None,
    biases=None,
    writer=None,
    bos=1,
    feed_forward=0.2,
    change=None,
    experts=0,
):
    """A GGUF with random weights of `dtype` (f32 or f16) and a vocabulary of bytes; `arch` has the tensors of llama.

    words: tokens after those of bytes, from number 259 on. biases: of every layer, by name (attn_k).
    writer: arguments of GGUFWriter (splits, byte order). bos: None for a tokenizer that puts none before a text.
    feed_forward: standard deviation of ffn_down; 0: feed-forwards add nothing.
    experts: how many each feed-forward has, two of which a token uses; 0: it has none.
    change: a function of a matrix's name and f32 values that returns other values.
    """
    rng = np.random.default_rng(seed)
    w = GGUFWriter(path, arch, **(writer or {}))
    if alignment:
        w.add_custom_alignment(alignment)
    w.add_context_length(n_ctx)
    w.add_embedding_length(n_embd)
    w.add_block_count(n_layer)
    w.add_feed_forward_length(n_ff)
    w.add_head_count(n_head)
    w.add_head_count_kv(n_head_kv)
    if head_dim * n_head != n_embd:
        w.add_key_length(head_dim)
        w.add_value_length(head_dim)
    w.add_rope_dimension_count(head_dim)
    if rope_base:
        w.add_rope_freq_base(rope_base)
    w.add_layer_norm_rms_eps(1e-5)
    if experts:
        w.add_expert_count(experts)
        w.add_expert_used_count(2)
    n_vocab = add_byte_vocabulary(w, words, bos)
    if chat_template:
        w.add_chat_template(chat_template)

    def matrix(name, *shape, scale=0.2):
        x = rng.standard_normal(shape) * scale
        w.add_tensor(name + ".weight", (change(name + ".weight", x) if change else x).astype(dtype))

    def norm(name):
        w.add_tensor(name + ".weight", np.ones(n_embd, np.float32))

    matrix("token_embd", n_vocab, n_embd, scale=1.0)
    matrix("output", n_vocab, n_embd)
    norm("output_norm")
    for i in range(n_layer):
        norm(f"blk.{i}.attn_norm")
        norm(f"blk.{i}.ffn_norm")
        for part, rows, cols in (
            ("attn_q", n_head * head_dim, n_embd),
            ("attn_k", n_head_kv * head_dim, n_embd),
            ("attn_v", n_head_kv * head_dim, n_embd),
            ("attn_output", n_embd, n_head * head_dim),
            ("ffn_gate", n_ff, n_embd),
            ("ffn_up", n_ff, n_embd),
            ("ffn_down", n_embd, n_ff),
        ):
            scale = feed_forward if part == "ffn_down" else 0.2
            if experts and part.startswith("ffn"):
                matrix(f"blk.{i}.{part}_exps", experts, rows, cols, scale=scale)
            else:
                matrix(f"blk.{i}.{part}", rows, cols, scale=scale)
        if experts:
            matrix(f"blk.{i}.ffn_gate_inp", experts, n_embd)
        for part, bias in (biases or {}).items():
            w.add_tensor(f"blk.{i}.{part}.bias", np.asarray(bias, np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def gguf_bytes(kv, tensors=(), version=3, alignment=32, n_kv=None, n_tensors=None):
    """A GGUF made by hand. kv: packed entries; tensors: (name, shape, type, offset, data); the counts may lie."""
    infos, data = b"", b""
    for name, shape, kind, offset, content in tensors:
        infos += (
            struct.pack("<Q", len(name))
            + name.encode()
            + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
        )
        data += content + bytes(-len(content) % alignment)
    head = struct.pack(
        "<4sIQQ", b"GGUF", version, len(tensors) if n_tensors is None else n_tensors, len(kv) if n_kv is None else n_kv
    )
    head += b"".join(kv) + infos
    return head + bytes(-len(head) % alignment) + data


def insert(model, out, *entries):
    """`model` with more packed entries, written to `out`."""
    g = GGUFFile(model)
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(g.tensors), len(g.kv) + len(entries))
    head += b"".join([kv.raw for kv in g.kv.values()] + list(entries)) + g.info_raw
    out.write_bytes(head + bytes(-len(head) % g.alignment) + model.read_bytes()[g.data_offset :])
    return out


def text_entry(key, value):
    """A packed metadata string."""
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<IQ", 8, len(value)) + value.encode()
