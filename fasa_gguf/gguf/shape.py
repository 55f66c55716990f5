"""What a profile must fit: heads, chunks and windows of a model, from its metadata."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FasaError
from .file import ARR, BOOL, F32, I32, STR, U16, U32, GGUFFile, printable

# llama_model_rope_type of the pinned llama.cpp (src/llama-model.cpp): architectures without RoPE, and those that rotate
# neighbours (2i, 2i+1); every other one pairs (i, i + dims/2).
NO_ROPE = frozenset(
    [
        "arwkv7",
        "bloom",
        "clip",
        "glm5-next",
        "gpt2",
        "gptj",
        "jais",
        "jamba",
        "jina-bert-v2",
        "kimi-k3",
        "kimi-linear",
        "mamba",
        "mamba2",
        "mpt",
        "nemotron_h",
        "nemotron_h_moe",
        "refact",
        "rwkv6",
        "rwkv6qwen2",
        "rwkv7",
        "t5",
        "t5encoder",
        "wavtokenizer-dec",
    ]
)
NORM = frozenset(
    [
        "arcee",
        "arctic",
        "baichuan",
        "bailingmoe",
        "bailingmoe3",
        "chameleon",
        "chatglm",
        "cohere2",
        "cohere2moe",
        "command-r",
        "deci",
        "deepseek",
        "deepseek2",
        "deepseek2-ocr",
        "deepseek32",
        "deepseek4",
        "dots3note",
        "eagle3",
        "ernie4_5",
        "ernie4_5-moe",
        "glm-dsa",
        "glm4",
        "granite",
        "granite_swa",
        "granitehybrid",
        "granitemoe",
        "graniteswitch",
        "hy_v4",
        "internlm2",
        "llada",
        "llama",
        "llama-embed",
        "llama4",
        "maincoder",
        "minicpm",
        "mistral3",
        "mistral4",
        "muse-glimmer",
        "nanbeige",
        "neo-bert",
        "olmo",
        "plm",
        "pockettts",
        "smollm3",
        "starcoder",
        "xverse",
    ]
)
# architectures that keep latent keys when the metadata say so (kv_lora_rank, key_length_mla)
LATENT = frozenset(
    [
        "bailingmoe3",
        "deepseek2",
        "deepseek2-ocr",
        "deepseek32",
        "dots3note",
        "glm-dsa",
        "glm5-next",
        "hy_v4",
        "kimi-k3",
        "kimi-linear",
        "minicpm3",
        "mistral4",
        "plm",
    ]
)
# where llama.cpp keeps a sliding window, the period of its layers when the metadata have no pattern: every n-th attends to all
SWA_PERIOD = {
    "afmoe": 4,
    "cohere2": 4,
    "exaone-moe": 4,
    "exaone4": 4,
    "gemma2": 2,
    "gemma3": 6,
    "gemma3n": 5,
    "gpt-oss": 2,
    "mellum": 4,
    "muse-glimmer": 4,
    "olmo2": 4,
    "plamo3": 8,
}
# encoders and diffusion models: attention looks both ways and nothing is cached
NO_CACHE = frozenset(
    [
        "bert",
        "dream",
        "eurobert",
        "gemma-embedding",
        "jina-bert-v3",
        "llada",
        "llada-moe",
        "llama-embed",
        "modern-bert",
        "neo-bert",
        "nomic-bert",
        "nomic-bert-moe",
        "rnd1",
    ]
)


@dataclass
class ModelShape:
    """What a profile must fit, from a model's metadata."""

    arch: str
    n_head: list[int]  # [n_layer] query heads
    n_head_kv: list[int]  # [n_layer], 0: no attention there
    head_dim: list[int]  # [n_layer] of the keys, 0: no attention there; -1: only the loader knows which of two it is
    n_rot: int  # rotated dimensions per head
    layout: str  # norm or neox
    rope_base: float
    rope_scaling: str  # none, linear, yarn, longrope, ...

    @property
    def n_chunk(self) -> list[int]:
        """[n_layer] frequency chunks per head; -1 where head_dim is."""
        return [d // 2 for d in self.head_dim]  # -1 // 2 is -1


def read_shape(model: GGUFFile) -> ModelShape:
    """The shape by the metadata; FasaError for a model that is out of FASA's scope, or when a key is missing or out of range."""
    arch, path = model.arch, model.path

    def refuse(why: str) -> FasaError:
        return FasaError(f"{path}: architecture {arch} {why}; FASA does not apply")

    if arch in LATENT and any(f"{arch}.attention.{key}" in model.kv for key in ("kv_lora_rank", "key_length_mla")):
        raise refuse("has multi-head latent attention, which has no keys per head to rank")
    if arch in NO_ROPE:
        raise refuse("has no RoPE, so it has no frequency chunks")
    if arch in NO_CACHE or not model.get(f"{arch}.attention.causal", BOOL, default=True):
        raise refuse("has no attention layer with a KV cache")

    def number(key: str, most: int, default: Any = ..., least: int = 1) -> int:
        value = model.get(f"{arch}.{key}", U32, default=default)
        if not least <= value <= most:
            raise FasaError(
                f"{path}: key {arch}.{key}: expected {least} to {most}, found {value}; download or convert the model again"
            )
        return value

    n_block = number("block_count", 4096)
    n_layer = n_block - number("nextn_predict_layers", n_block - 1, 0, 0)  # layers that draft are not the model's own

    def per_layer(key: str, default: list[int] | None) -> list[int]:
        full = f"{arch}.{key}"
        entry = model.kv.get(full)
        what = f"{n_block} whole numbers from 0 to 65535, or one for all layers"
        if entry is not None and entry.type == ARR and entry.count != n_block:
            raise FasaError(
                f"{path}: key {full}: expected {what}, found {entry.count} values; download or convert the model again"
            )
        value = model.get(full, U32, I32, ARR, default=... if default is None else default)
        value = value if isinstance(value, list) else [value] * n_block
        bad = next((x for x in value if isinstance(x, (str, float)) or not 0 <= x < 1 << 16), None)
        if bad is not None:
            shown = printable(bad) if isinstance(bad, str) else bad
            raise FasaError(f"{path}: key {full}: expected {what}, found {shown}; download or convert the model again")
        return [int(x) for x in value]

    n_head = per_layer("attention.head_count", None)
    n_head_kv = per_layer("attention.head_count_kv", n_head)
    if not any(n_head_kv[:n_layer]):
        raise refuse("has no attention layer with a KV cache")
    # llama.cpp: embedding_length / head_count of the first layer, unless the key is there
    width = number("embedding_length", 1 << 20) // n_head[0] if n_head[0] else 0
    width = number("attention.key_length", 1 << 16, width, 0)
    swa = number("attention.key_length_swa", 1 << 16, width, 0)
    widths = [width] * n_layer
    if swa != width:  # layers with a sliding window have heads of another size
        pattern = model.kv.get(f"{arch}.attention.sliding_window_pattern")
        known = pattern is not None and pattern.type == ARR and pattern.item_type != STR and pattern.count == n_block
        widths = [swa if x else width for x in pattern.value[:n_layer]] if known else [-1] * n_layer
    dims = model.kv.get(f"{arch}.rope.dimension_count")
    sections = model.kv.get(f"{arch}.rope.dimension_sections")  # of image positions; with them these two pair halves
    halves = (
        arch in ("glm4", "bailingmoe3") and sections is not None and sections.type == ARR and 2 <= sections.count <= 4
    )
    halves = halves and all(sections.value[:2])
    return ModelShape(
        arch,
        n_head[:n_layer],
        n_head_kv[:n_layer],
        [d if h else 0 for d, h in zip(widths, n_head_kv)],
        n_rot=number("rope.dimension_count", 1 << 16, width, 0) if dims is None or dims.type == U32 else width,
        layout="norm" if arch in NORM and not halves else "neox",
        rope_base=model.get(f"{arch}.rope.freq_base", F32, default=10000.0),
        rope_scaling=model.get(f"{arch}.rope.scaling.type", STR, default="none"),
    )


def model_shape(model: GGUFFile) -> tuple[list[int], list[int]]:
    """(KV heads, frequency chunks) per layer, as a Profile has them. Raises as read_shape does."""
    shape = read_shape(model)
    return shape.n_head_kv, shape.n_chunk


def sliding_windows(model: GGUFFile, n_layer: int) -> list[int]:
    """[n_layer] the last tokens that a query of each layer attends, 0: all; as llama.cpp runs the model."""
    key = f"{model.arch}.attention.sliding_window"
    window, pattern = model.get(key, U32, default=0), model.kv.get(key + "_pattern")
    if pattern is not None and pattern.type == ARR:
        local = [pattern.item_type != STR and il < pattern.count and bool(pattern.value[il]) for il in range(n_layer)]
    else:
        period = pattern.value if pattern is not None and pattern.type == U32 else SWA_PERIOD.get(model.arch, 1)
        local = [period == 0 or il % period < period - 1 for il in range(n_layer)]
    return [window if x and (pattern is not None or model.arch in SWA_PERIOD) else 0 for x in local]


# ---- split models ----


def _split(model: GGUFFile) -> tuple[int, int]:
    """(number from 0, count) of a file of a split model; (0, 1) otherwise."""
    return model.get("split.no", U16, U32, I32, default=0), max(model.get("split.count", U16, U32, I32, default=1), 1)


def _shard(model: GGUFFile, number: int) -> Path:
    """The path of another file of the same split model; llama.cpp's names end in -00001-of-00003.gguf."""
    own, count = _split(model)
    return model.path.with_name(
        model.path.name.replace(f"-{own + 1:05d}-of-{count:05d}", f"-{number + 1:05d}-of-{count:05d}")
    )


def first_shard(model: GGUFFile) -> None:
    """A split model keeps its metadata in its first file: FasaError, naming that file, for any other."""
    number, count = _split(model)
    if number:
        raise FasaError(
            f"{model.path}: this is file {number + 1} of {count} of a split model, and the profile belongs in the first; use {_shard(model, 0)}"
        )


def shards(model: GGUFFile) -> Iterator[GGUFFile]:
    """The files of a model, one or several, the first one first. Raises FasaError when `model` is not the first, or a file is not usable."""
    first_shard(model)
    yield model
    for i in range(1, _split(model)[1]):
        yield GGUFFile(_shard(model, i))


def weights_sha256(model: GGUFFile) -> str:
    """Hash of the q and k projection weights as stored, in file order, whether split or not: two models of one shape differ in it."""
    h = hashlib.sha256()
    for part in shards(model):
        with open(part.path, "rb") as f:
            for t in part.tensors:
                if any(name in t.name for name in ("attn_q.weight", "attn_k.weight", "attn_qkv.weight")):
                    h.update(t.name.encode())
                    f.seek(part.data_offset + t.offset)
                    left = t.n_bytes
                    while left:
                        data = f.read(min(left, 1 << 22))
                        if not data:
                            raise FasaError(f"{part.path}: tensor {t.name} is cut short; download the model again")
                        h.update(data)
                        left -= len(data)
    return h.hexdigest()
