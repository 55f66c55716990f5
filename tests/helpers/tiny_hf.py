"""Tiny random Hugging Face models with planted dominant chunks, and their GGUF files."""

import importlib.util
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from paths import ROOT

N_LAYER, N_EMBD, N_HEAD, N_HEAD_KV, WIDTH, N_VOCAB, N_CTX = 2, 64, 4, 2, 32, 256, 1024
PLANTED = 3  # dominant chunks of a KV head
COMMON = {
    "hidden_size": N_EMBD,
    "intermediate_size": 96,
    "num_hidden_layers": N_LAYER,
    "num_attention_heads": N_HEAD,
    "vocab_size": N_VOCAB,
    "max_position_embeddings": N_CTX,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GQA = {"num_key_value_heads": N_HEAD_KV, "head_dim": WIDTH}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
    "rope_theta": 10000.0,
}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}

# name: (config class, settings, rotated dims, layout)
MODELS = {
    "llama": ("LlamaConfig", GQA, 32, "neox"),
    "llama3-scaled": ("LlamaConfig", {**GQA, "rope_parameters": LLAMA3}, 32, "neox"),
    "linear": ("LlamaConfig", {**GQA, "rope_parameters": LINEAR}, 32, "neox"),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": N_HEAD_KV}, 16, "neox"),  # head_dim 16, biases
    "qwen2-yarn": ("Qwen2Config", {"num_key_value_heads": N_HEAD_KV, "rope_parameters": YARN}, 16, "neox"),
    "qwen3": ("Qwen3Config", GQA, 32, "neox"),  # q/k-norm
    "gemma2": ("Gemma2Config", {**GQA, "sliding_window": 128, "query_pre_attn_scalar": 32}, 32, "neox"),  # soft-capped
    "gemma3": (
        "Gemma3TextConfig",
        {**GQA, "num_hidden_layers": 6, "sliding_window": 128, "query_pre_attn_scalar": 32},
        32,
        "neox",
    ),
    "phi3": ("Phi3Config", {"num_key_value_heads": N_HEAD_KV, "sliding_window": None}, 16, "neox"),  # fused q, k, v
    "phi3-partial": (
        "Phi3Config",
        {
            "num_key_value_heads": N_HEAD_KV,
            "sliding_window": None,
            "partial_rotary_factor": 0.75,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "original_max_position_embeddings": 1024,
                "short_factor": [1.0] * 6,
                "long_factor": [4.0] * 6,
            },
        },
        12,
        "neox",
    ),
    "gptneox": (
        "GPTNeoXConfig",
        {"rotary_pct": 0.5, "max_position_embeddings": N_CTX},
        8,
        "neox",
    ),  # partial, fused per head, MHA
    "smollm3": (
        "SmolLM3Config",
        {"num_key_value_heads": N_HEAD_KV, "num_hidden_layers": 4},
        16,
        "neox",
    ),  # layer 3 has no RoPE
    "glm4": ("Glm4Config", {**GQA, "partial_rotary_factor": 0.5}, 16, "norm"),  # neighbours rotate
    "cohere": ("CohereConfig", {"num_key_value_heads": N_HEAD_KV}, 16, "norm"),
}


def _planted_chunks(rng, n_rot, width):
    """Chunks of one KV head that carry its attention, among those that rotate."""
    return np.sort(rng.choice(n_rot // 2, PLANTED, replace=False))


def build(name):
    """(model in f32, [n_layer, n_head_kv, PLANTED] planted chunks)."""
    import torch
    import transformers

    from fasa_gguf.reference import chunk_dims

    kind, settings, n_rot, layout = MODELS[name]
    config = getattr(transformers, kind)(**{**COMMON, **settings})
    seed = list(MODELS).index(name)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    n_head, n_kv = config.num_attention_heads, getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // n_head
    planted = []
    with torch.no_grad():
        for key, w in model.named_parameters():
            if w.ndim == 2:
                w.normal_(0, 1.0 if "embed" in key else 0.25)
            else:
                w.add_(torch.randn_like(w), alpha=0.1)  # norms, biases
        for layer in model.base_model.layers:
            attention = getattr(layer, "self_attn", None) or layer.attention
            planted.append([_planted_chunks(rng, n_rot, width) for _ in range(n_kv)])
            gain = np.zeros((n_kv, width), np.float32)  # of each key dimension
            for h, best in enumerate(planted[-1]):
                rest = rng.permutation(np.setdiff1d(np.arange(width // 2), best))  # weaker, each by another gain
                dims = chunk_dims(width, n_rot, layout)
                gain[h, dims[best]], gain[h, dims[rest]] = 1.3, np.geomspace(0.7, 0.1, len(rest))[:, None]
            gain = torch.from_numpy(gain)
            by_head = gain.repeat_interleave(n_head // n_kv, 0)  # [n_head, width]
            if hasattr(attention, "q_proj"):
                attention.q_proj.weight.mul_(by_head.reshape(-1, 1))
                attention.k_proj.weight.mul_(gain.reshape(-1, 1))
            elif hasattr(attention, "qkv_proj"):  # all q, all k, all v
                attention.qkv_proj.weight[: (n_head + n_kv) * width].mul_(torch.cat([by_head, gain]).reshape(-1, 1))
            else:  # q, k, v of each head in turn
                w = attention.query_key_value.weight.view(n_head, 3, width, -1)
                w[:, :2] *= gain[:, None, :, None]
    return model.eval(), np.array(planted)


def source_tree(folder):
    """The pinned converter: in a build, or unpacked from the cached sdist into `folder`; skips without both."""
    for tree in sorted((ROOT / "build").glob("*/llama.cpp-src")):
        if (tree / "conversion").is_dir():
            return tree
    spec = importlib.util.spec_from_file_location("patch_queue", ROOT / "patches" / "queue.py")
    queue = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(queue)
    if not queue.cached().exists():
        pytest.skip(
            "no source of llama.cpp with its converter: neither build/*/llama.cpp-src nor the cached "
            "sdist; run `make build`"
        )
    parts = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/")
    with tarfile.open(queue.cached()) as tar:
        for m in tar:
            name = m.name.split("/", 1)[-1].removeprefix(queue.upstream()["folder"] + "/")
            if m.isfile() and name.startswith(parts):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(tar.extractfile(m).read())
    return folder


def convert(tree, folders):
    """HF_DIR.gguf beside every folder."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "helpers" / "convert_tiny.py", tree, *folders], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
