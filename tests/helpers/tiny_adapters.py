"""Adapters for the tiny model: LoRA files and control vectors, seeded."""

import ctypes

import numpy as np
from gguf import GGUFWriter
from tiny_gguf import N_EMBD, N_FF, N_HEAD, N_HEAD_KV, N_LAYER, WIDTH

ROWS = {
    "attn_q": (N_HEAD * WIDTH, N_EMBD),
    "attn_k": (N_HEAD_KV * WIDTH, N_EMBD),
    "attn_v": (N_HEAD_KV * WIDTH, N_EMBD),
    "attn_output": (N_EMBD, N_HEAD * WIDTH),
    "ffn_gate": (N_FF, N_EMBD),
    "ffn_up": (N_FF, N_EMBD),
}
ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")


def write_lora(path, parts=ATTENTION, rank=4, seed=1, scale=0.3, alpha=8.0):
    """A LoRA adapter of these matrices of every layer; returns {(layer, part): what it adds to W at scale 1}."""
    rng, added = np.random.default_rng(seed), {}
    w = GGUFWriter(path, "llama")
    w.add_type("adapter")
    w.add_string("adapter.type", "lora")
    w.add_float32("adapter.lora.alpha", alpha)
    for il in range(N_LAYER):
        for part in parts:
            rows, cols = ROWS[part]
            a, b = (rng.standard_normal(shape) * scale for shape in ((rank, cols), (rows, rank)))
            for name, x in (("a", a), ("b", b)):
                w.add_tensor(f"blk.{il}.{part}.weight.lora_{name}", x.astype(np.float32))
            added[il, part] = b.astype(np.float32) @ a.astype(np.float32) * (alpha / rank)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return added


def set_loras(session, loras):
    """Apply adapters [(pointer of llama_adapter_lora_init, scale)] to the context of a session, and no others."""
    llama = session.llama
    pointers = (llama.llama_adapter_lora_p_ctypes * max(1, len(loras)))(*[p for p, _ in loras])
    scales = (ctypes.c_float * max(1, len(loras)))(*[x for _, x in loras])
    assert llama.llama_set_adapters_lora(session.ctx, pointers, len(loras), scales) == 0


def load_lora(session, path):
    """The pointer of a LoRA file; it is freed with the model."""
    pointer = session.llama.llama_adapter_lora_init(session.model, str(path).encode())
    assert pointer
    return pointer


def control_vector(seed=5, scale=0.5):
    """f32 [n_layer - 1, n_embd]: what llama.cpp adds behind the layers from 1 on."""
    return (np.random.default_rng(seed).standard_normal((N_LAYER - 1, N_EMBD)) * scale).astype(np.float32)


def write_control_vector(path, vector):
    """A GGUF for --control-vector."""
    w = GGUFWriter(path, "controlvector")
    w.add_string("controlvector.model_hint", "llama")
    w.add_uint32("controlvector.layer_count", len(vector))
    for i, row in enumerate(vector):
        w.add_tensor(f"direction.{i + 1}", row)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def set_control_vector(session, vector):
    """Apply a control vector [n_layer - 1, n_embd] to all layers, or none (None)."""
    llama = session.llama
    if vector is None:
        assert llama.llama_set_adapter_cvec(session.ctx, None, 0, 0, 0, 0) == 0
        return
    flat = np.ascontiguousarray(vector.ravel())
    data = flat.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    assert llama.llama_set_adapter_cvec(session.ctx, data, flat.size, N_EMBD, 1, N_LAYER) == 0
