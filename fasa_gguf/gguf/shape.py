"""What a profile must fit: heads, chunks and windows of a model, from its metadata.

Key names are gguf-py's. The tables of architectures are llama.cpp's and have no counterpart in gguf-py; a test looks up
every name in them in the lists of architectures.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gguf import Keys

from ..errors import FasaError
from .file import ARR, BOOL, F32, I32, NEXT, STR, U16, U32, GGUFFile, printable

MAX_LAYERS = 4096

# fmt: off
# llama_model_rope_type of the pinned llama.cpp (src/llama-model.cpp): architectures without RoPE, and those that rotate
# neighbours (2i, 2i+1); every other one pairs (i, i + dims/2).
NO_ROPE = frozenset([
    "arwkv7", "bloom", "clip", "glm5-next", "gpt2", "gptj", "jais", "jamba", "jina-bert-v2", "kimi-k3",
    "kimi-linear", "mamba", "mamba2", "mpt", "nemotron_h", "nemotron_h_moe", "refact", "rwkv6", "rwkv6qwen2",
    "rwkv7", "t5", "t5encoder", "wavtokenizer-dec",
])
NORM = frozenset([
    "arcee", "arctic", "baichuan", "bailingmoe", "bailingmoe3", "chameleon", "chatglm", "cohere2", "cohere2moe",
    "command-r", "deci", "deepseek", "deepseek2", "deepseek2-ocr", "deepseek32", "deepseek4", "dots3note", "eagle3",
    "ernie4_5", "ernie4_5-moe", "glm-dsa", "glm4", "granite", "granite_swa", "granitehybrid", "granitemoe",
    "graniteswitch", "hy_v4", "internlm2", "llada", "llama", "llama-embed", "llama4", "maincoder", "minicpm",
    "mistral3", "mistral4", "muse-glimmer", "nanbeige", "neo-bert", "olmo", "plm", "pockettts", "smollm3",
    "starcoder", "xverse",
])
# architectures that cache latent keys when the metadata say so (kv_lora_rank, key_length_mla)
LATENT = frozenset([
    "bailingmoe3", "deepseek2", "deepseek2-ocr", "deepseek32", "dots3note", "glm-dsa", "glm5-next", "hy_v4",
    "kimi-k3", "kimi-linear", "minicpm3", "mistral4", "plm",
])
# Architectures whose sliding window llama.cpp uses, and its default period: of n layers the last attends to all tokens.
# The metadata may hold a pattern instead.
SWA_PERIOD = {
    "afmoe": 4, "cohere2": 4, "exaone-moe": 4, "exaone4": 4, "gemma2": 2, "gemma3": 6, "gemma3n": 5, "gpt-oss": 2,
    "mellum": 4, "muse-glimmer": 4, "olmo2": 4, "plamo3": 8,
}
# encoders and diffusion models: attention looks both ways and nothing is cached
NO_CACHE = frozenset([
    "bert", "dream", "eurobert", "gemma-embedding", "jina-bert-v3", "llada", "llada-moe", "llama-embed",
    "modern-bert", "neo-bert", "nomic-bert", "nomic-bert-moe", "rnd1",
])
# fmt: on


@dataclass
class ModelShape:
    """What a profile must fit, from a model's metadata."""

    arch: str
    n_head: list[int]  # [n_layer] query heads
    n_head_kv: list[int]  # [n_layer], 0: no attention there
    head_dim: list[
        int
    ]  # [n_layer] of the keys, 0: no attention there; -1: one of two sizes, only the loader knows which
    n_rot: int  # rotated dimensions per head
    layout: str  # norm or neox
    rope_base: float
    rope_scaling: str  # none, linear, yarn, longrope, ...

    @property
    def n_chunk(self) -> list[int]:
        """[n_layer] frequency chunks per head; -1 where head_dim is."""
        return [d // 2 for d in self.head_dim]  # -1 // 2 is -1


class _Metadata:
    """Numbers of a model's own keys, checked. Keys are gguf-py's, with {arch} for the architecture."""

    def __init__(self, model: GGUFFile) -> None:
        self.model, self.arch, self.n_block = model, model.arch, 0

    def name(self, key: str) -> str:
        return key.format(arch=self.arch)

    def fail(self, key: str, expected: str, found: Any) -> FasaError:
        return FasaError(f"{self.model.path}: key {self.name(key)}: expected {expected}, found {found}; {NEXT}")

    def has(self, key: str) -> bool:
        return self.name(key) in self.model.kv

    def entry(self, key: str) -> Any:
        """The KeyValue, or None."""
        return self.model.kv.get(self.name(key))

    def get(self, key: str, *types: int, default: Any = None) -> Any:
        return self.model.get(self.name(key), *types, default=default)

    def number(self, key: str, most: int, default: Any = ..., least: int = 1) -> int:
        value = self.get(key, U32, default=default)
        if not least <= value <= most:
            raise self.fail(key, f"{least} to {most}", value)
        return value

    def per_layer(self, key: str, default: list[int] | None) -> list[int]:
        """[n_block] whole numbers below 2^16; the file may hold one for all."""
        what = f"{self.n_block} whole numbers from 0 to 65535, or one for all layers"
        entry = self.entry(key)
        if entry is not None and entry.type == ARR and entry.count != self.n_block:
            raise self.fail(key, what, f"{entry.count} values")
        value = self.get(key, U32, I32, ARR, default=... if default is None else default)
        value = value if isinstance(value, list) else [value] * self.n_block
        bad = next((x for x in value if isinstance(x, (str, float)) or not 0 <= x < 1 << 16), None)
        if bad is not None:
            raise self.fail(key, what, printable(bad) if isinstance(bad, str) else bad)
        return [int(x) for x in value]


def _out_of_scope(model: GGUFFile, why: str) -> FasaError:
    return FasaError(f"{model.path}: architecture {model.arch} {why}; FASA does not apply")


def _check_scope(m: _Metadata) -> None:
    """FasaError for an architecture without keys that FASA could rank."""
    if m.arch in LATENT and (m.has(Keys.Attention.KV_LORA_RANK) or m.has(Keys.Attention.KEY_LENGTH_MLA)):
        raise _out_of_scope(m.model, "has multi-head latent attention, which has no keys per head to rank")
    if m.arch in NO_ROPE:
        raise _out_of_scope(m.model, "has no RoPE, so it has no frequency chunks")
    if m.arch in NO_CACHE or not m.get(Keys.Attention.CAUSAL, BOOL, default=True):
        raise _out_of_scope(m.model, "has no attention layer with a KV cache")


def _head_dims(m: _Metadata, n_layer: int, width: int) -> list[int]:
    """[n_layer] dimensions of a key, `width` in layers that attend to all tokens; -1 where the metadata do not say."""
    swa = m.number(Keys.Attention.KEY_LENGTH_SWA, 1 << 16, width, 0)  # of layers with a sliding window
    if swa == width:
        return [width] * n_layer
    pattern = m.entry(Keys.Attention.SLIDING_WINDOW_PATTERN)
    if pattern is None or pattern.type != ARR or pattern.item_type == STR or pattern.count != m.n_block:
        return [-1] * n_layer
    return [swa if x else width for x in pattern.value[:n_layer]]


def _layout(m: _Metadata) -> str:
    """norm or neox. Two architectures pair halves when they have sections for image positions."""
    sections = m.entry(Keys.Rope.DIMENSION_SECTIONS)
    halves = m.arch in ("glm4", "bailingmoe3") and sections is not None and sections.type == ARR
    halves = halves and 2 <= sections.count <= 4 and all(sections.value[:2])
    return "norm" if m.arch in NORM and not halves else "neox"


def read_shape(model: GGUFFile) -> ModelShape:
    """The shape by the metadata.

    Raises FasaError for a model that is out of FASA's scope, or when a key is missing or out of range.
    """
    m = _Metadata(model)
    _check_scope(m)
    m.n_block = m.number(Keys.LLM.BLOCK_COUNT, MAX_LAYERS)
    # layers that draft tokens are not the model's own
    n_layer = m.n_block - m.number(Keys.LLM.NEXTN_PREDICT_LAYERS, m.n_block - 1, 0, 0)
    n_head = m.per_layer(Keys.Attention.HEAD_COUNT, None)
    n_head_kv = m.per_layer(Keys.Attention.HEAD_COUNT_KV, n_head)
    if not any(n_head_kv[:n_layer]):
        raise _out_of_scope(model, "has no attention layer with a KV cache")
    # llama.cpp: embedding_length / head_count of the first layer, unless the key is there
    width = m.number(Keys.LLM.EMBEDDING_LENGTH, 1 << 20) // n_head[0] if n_head[0] else 0
    width = m.number(Keys.Attention.KEY_LENGTH, 1 << 16, width, 0)
    widths = _head_dims(m, n_layer, width)
    dims = m.entry(Keys.Rope.DIMENSION_COUNT)
    known = dims is None or dims.type == U32
    return ModelShape(
        m.arch,
        n_head[:n_layer],
        n_head_kv[:n_layer],
        [d if h else 0 for d, h in zip(widths, n_head_kv, strict=False)],
        n_rot=m.number(Keys.Rope.DIMENSION_COUNT, 1 << 16, width, 0) if known else width,
        layout=_layout(m),
        rope_base=m.get(Keys.Rope.FREQ_BASE, F32, default=10000.0),
        rope_scaling=m.get(Keys.Rope.SCALING_TYPE, STR, default="none"),
    )


def model_shape(model: GGUFFile) -> tuple[list[int], list[int]]:
    """(KV heads, frequency chunks) per layer, as a Profile has them. Raises as read_shape does."""
    shape = read_shape(model)
    return shape.n_head_kv, shape.n_chunk


def sliding_windows(model: GGUFFile, n_layer: int) -> list[int]:
    """[n_layer] the last tokens that a query of each layer attends, 0: all; as llama.cpp runs the model."""
    m = _Metadata(model)
    window = m.get(Keys.Attention.SLIDING_WINDOW, U32, default=0)
    pattern = m.entry(Keys.Attention.SLIDING_WINDOW_PATTERN)
    if pattern is not None and pattern.type == ARR:
        if pattern.count > MAX_LAYERS:
            raise m.fail(Keys.Attention.SLIDING_WINDOW_PATTERN, f"at most {MAX_LAYERS} values", pattern.count)
        flags = [] if pattern.item_type == STR else pattern.value
        local = [il < len(flags) and bool(flags[il]) for il in range(n_layer)]
    else:
        period = pattern.value if pattern is not None and pattern.type == U32 else SWA_PERIOD.get(m.arch, 1)
        local = [period == 0 or il % period < period - 1 for il in range(n_layer)]
    return [window if x and (pattern is not None or m.arch in SWA_PERIOD) else 0 for x in local]


def describe_windows(windows: Sequence[int]) -> list[str]:
    """Sentences such as "layers 0-4, 6 have a sliding window of 512 tokens", one for each length; windows [n_layer]."""
    return [
        f"layers {number_ranges([il for il, x in enumerate(windows) if x == n])} have a sliding window of {n:,} tokens"
        for n in sorted({n for n in windows if n})
    ]


def number_ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in short: "0-4, 6, 8-9"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][1] == n - 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


# ---- split models ----


def _split(model: GGUFFile) -> tuple[int, int]:
    """(number from 0, count) of a file of a split model; (0, 1) otherwise."""
    count = model.get(Keys.Split.LLM_KV_SPLIT_COUNT, U16, U32, I32, default=1)
    return model.get(Keys.Split.LLM_KV_SPLIT_NO, U16, U32, I32, default=0), max(count, 1)


def _shard(model: GGUFFile, number: int) -> Path:
    """The path of another file of the same split model; llama.cpp's names end in -00001-of-00003.gguf."""
    own, count = _split(model)
    mine, other = (f"-{i + 1:05d}-of-{count:05d}" for i in (own, number))
    return model.path.with_name(model.path.name.replace(mine, other))


def first_shard(model: GGUFFile) -> None:
    """A split model keeps its metadata in its first file: FasaError, naming that file, for any other."""
    number, count = _split(model)
    if number:
        raise FasaError(
            f"{model.path}: this is file {number + 1} of {count} of a split model, "
            f"and the profile belongs in the first; use {_shard(model, 0)}"
        )


def check_shard_name(model: GGUFFile, target: Path, warn: Callable[[str], None]) -> None:
    """llama.cpp finds the files of a split model by the name of the first: FasaError when `target` cannot be that.

    warn(sentence) is told of files that another folder lacks.
    """
    count = _split(model)[1]
    ending = f"-00001-of-{count:05d}.gguf"
    if count < 2:
        return
    if not target.name.endswith(ending):
        raise FasaError(
            f"{target}: this is file 1 of {count} of a split model, which llama.cpp tells by its name; "
            f"expected one that ends in {ending}"
        )
    for i in range(1, count) if target.parent != model.path.parent.resolve() else ():
        other = target.with_name(target.name.removesuffix(ending) + f"-{i + 1:05d}-of-{count:05d}.gguf")
        if not other.exists():
            warn(f"{other}: the model cannot be loaded without this file; put it there")


def shards(model: GGUFFile) -> Iterator[GGUFFile]:
    """The files of a model, one or several, the first one first.

    Raises FasaError when `model` is not the first, or a file is not usable.
    """
    first_shard(model)
    yield model
    for i in range(1, _split(model)[1]):
        yield GGUFFile(_shard(model, i))


def weights_sha256(model: GGUFFile, file: BinaryIO | None = None) -> str:
    """Hash of the q and k projection weights as stored, in file order: it tells models of one shape apart.

    file: the model, if it is open already. A split model has the hash of the whole. Raises FasaError as `shards` does,
    or when a file is not the one whose header was read, or cut short.
    """
    h = hashlib.sha256()
    for part in shards(model):
        with contextlib.ExitStack() as stack:
            f = file if file is not None and part is model else stack.enter_context(open(part.path, "rb"))
            if not part.is_open_as(f):
                raise FasaError(f"{part.path}: the file changed after its header was read; run the command again")
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
