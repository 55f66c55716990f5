"""Tiny random models of the kinds that llama-cpp-python's own tests download: recurrent, hybrid, and for embeddings."""

import numpy as np
from gguf import GGUFWriter, TokenType
from tiny_gguf import add_byte_vocabulary

LAYERS, WIDTH, INNER, STATE, HEADS = 2, 64, 128, 16, 4


class _Writer:
    """A GGUF of one architecture, with random matrices, and vectors of one value."""

    def __init__(self, path, arch, numbers):
        self.rng = np.random.default_rng(0)
        self.gguf = GGUFWriter(path, arch)
        common = {"context_length": 512, "embedding_length": WIDTH, "block_count": LAYERS, "feed_forward_length": 96}
        for key, value in {**common, **numbers}.items():
            add = {bool: self.gguf.add_bool, int: self.gguf.add_uint32, float: self.gguf.add_float32}[type(value)]
            add(f"{arch}.{key}", value)

    def matrix(self, name, *shape, scale=0.2):
        self.gguf.add_tensor(name, (self.rng.standard_normal(shape) * scale).astype(np.float32))

    def fill(self, name, *shape, value=1.0):
        self.gguf.add_tensor(name, np.full(shape, value, np.float32))

    def layer(self, i, matrices, fills):
        """Tensors of a layer. matrices: (name, *shape); fills: (name, value, *shape)."""
        for name, *shape in matrices:
            self.matrix(f"blk.{i}.{name}", *shape)
        for name, value, *shape in fills:
            self.fill(f"blk.{i}.{name}", *shape, value=value)

    def close(self):
        self.gguf.write_header_to_file()
        self.gguf.write_kv_data_to_file()
        self.gguf.write_tensors_to_file()
        self.gguf.close()


def _decoder(path, arch, numbers):
    """A writer with a vocabulary of bytes and the tensors outside of layers."""
    w = _Writer(path, arch, {"attention.layer_norm_rms_epsilon": 1e-5, **numbers})
    n_vocab = add_byte_vocabulary(w.gguf, ["\N{LOWER ONE EIGHTH BLOCK}"])  # a space is one token
    w.matrix("token_embd.weight", n_vocab, WIDTH, scale=1.0)
    w.matrix("output.weight", n_vocab, WIDTH)
    w.fill("output_norm.weight", WIDTH)
    return w


def write_recurrent(path):
    """mamba: no attention at all."""
    sizes = {"conv_kernel": 4, "inner_size": INNER, "state_size": STATE, "time_step_rank": 4}
    w = _decoder(path, "mamba", {f"ssm.{k}": v for k, v in sizes.items()})
    for i in range(LAYERS):
        w.layer(
            i,
            [
                ("ssm_in.weight", 2 * INNER, WIDTH),
                ("ssm_conv1d.weight", INNER, 4),
                ("ssm_x.weight", 4 + 2 * STATE, INNER),
                ("ssm_dt.weight", INNER, 4),
                ("ssm_out.weight", WIDTH, INNER),
            ],
            [
                ("attn_norm.weight", 1.0, WIDTH),
                ("ssm_conv1d.bias", 0.0, INNER),
                ("ssm_dt.bias", 0.0, INNER),
                ("ssm_a", -1.0, INNER, STATE),
                ("ssm_d", 1.0, INNER),
            ],
        )
    w.close()


def write_hybrid_heads(path):
    """falcon-h1: attention and a state in every layer."""
    sizes = {"conv_kernel": 4, "inner_size": INNER, "state_size": STATE, "time_step_rank": HEADS, "group_count": 1}
    attention = {"head_count": HEADS, "head_count_kv": 2, "key_length": 16, "value_length": 16}
    numbers = {**{f"ssm.{k}": v for k, v in sizes.items()}, **{f"attention.{k}": v for k, v in attention.items()}}
    w = _decoder(path, "falcon-h1", {**numbers, "rope.dimension_count": 16})
    mixed = INNER + 2 * STATE
    for i in range(LAYERS):
        w.layer(
            i,
            [
                ("ssm_in.weight", INNER + mixed + HEADS, WIDTH),
                ("ssm_conv1d.weight", mixed, 4),
                ("ssm_out.weight", WIDTH, INNER),
                ("attn_q.weight", WIDTH, WIDTH),
                ("attn_k.weight", 32, WIDTH),
                ("attn_v.weight", 32, WIDTH),
                ("attn_output.weight", WIDTH, WIDTH),
                ("ffn_gate.weight", 96, WIDTH),
                ("ffn_up.weight", 96, WIDTH),
                ("ffn_down.weight", WIDTH, 96),
            ],
            [
                ("attn_norm.weight", 1.0, WIDTH),
                ("ffn_norm", 1.0, WIDTH),
                ("ssm_conv1d.bias", 0.0, mixed),
                ("ssm_dt.bias", 0.0, HEADS),
                ("ssm_a", -1.0, HEADS, 1),
                ("ssm_d", 1.0, HEADS, 1),
                ("ssm_norm.weight", 1.0, 1, INNER),
            ],
        )
    w.close()


def write_embedder(path):
    """bert, with a vocabulary of letters: at the start of a word and within one."""
    attention = {"head_count": HEADS, "layer_norm_epsilon": 1e-5, "causal": False}
    w = _Writer(path, "bert", {**{f"attention.{k}": v for k, v in attention.items()}, "pooling_type": 2})
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1) if not chr(c).isupper()]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = special + ["\N{LOWER ONE EIGHTH BLOCK}" + c for c in letters] + letters
    w.gguf.add_tokenizer_model("bert")
    w.gguf.add_token_list(tokens)
    w.gguf.add_token_types([TokenType.CONTROL] * len(special) + [TokenType.NORMAL] * 2 * len(letters))
    w.gguf.add_token_type_count(2)
    for add, token in (
        (w.gguf.add_pad_token_id, 0),
        (w.gguf.add_unk_token_id, 1),
        (w.gguf.add_bos_token_id, 2),
        (w.gguf.add_sep_token_id, 3),
        (w.gguf.add_mask_token_id, 4),
    ):
        add(token)
    w.matrix("token_embd.weight", len(tokens), WIDTH, scale=1.0)
    w.matrix("token_types.weight", 2, WIDTH)
    w.matrix("position_embd.weight", 512, WIDTH)
    norms = ["attn_output_norm", "layer_output_norm"]
    square = [(f"attn_{name}.weight", WIDTH, WIDTH) for name in ("q", "k", "v", "output")]
    w.fill("token_embd_norm.weight", WIDTH)
    w.fill("token_embd_norm.bias", WIDTH, value=0.0)
    for i in range(LAYERS):
        w.layer(
            i,
            [*square, ("ffn_up.weight", 96, WIDTH), ("ffn_down.weight", WIDTH, 96)],
            [(f"{name}.weight", 1.0, WIDTH) for name in norms] + [(f"{name}.bias", 0.0, WIDTH) for name in norms],
        )
    w.close()
