"""What a context takes, from a model's metadata alone: bytes on the device and in host memory, and the context that fits.

Sizes of weights, of K and V and of the dominant keys are exact (src/llama-kv-cache.cpp, native/core/layout.h). The scratch, llama.cpp's
compute buffer, is the largest of the three moments in a ubatch of t tokens that can be the peak (src/llama-graph.cpp; f32 activations):

    logits        4 t (n_vocab + 2 n_embd)
    feed-forward  4 t (3 n_ff + 4 n_embd)                        + masks
    attention     4 t (3 n_embd + 2 queries + keys + values)     + masks + f16 copies of K and V

masks: 2 t bytes for every cell (f16), of the cache with a window too; f16 copies: of one layer's when the cache has another type. FASA-M takes
one layer's K and V (of a model with windows, of either kind) beside it, for dense attention. A mixture of experts has the n_ff of the experts
that a token uses.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import FasaError
from ..gguf.cache_types import cache_type
from ..gguf.file import ARR, TENSOR_TYPES, U32, GGUFFile
from ..gguf.shape import read_shape, shards, sliding_windows
from ..params import FasaParams, default_chunks
from ..profile.profile import Profile

MIB, GIB = 1 << 20, 1 << 30
TILE, GROUP = 32, 8  # FASA_TILE, FASA_GROUP of native/core/layout.h
PAD = 256  # cells that llama.cpp rounds a context up to
WORK_BYTES = 5_400_000  # sizeof(fasa_work), and the tables of dimensions
POOL_BYTES = (
    16 * MIB
)  # of ggml-cuda's pool besides quantised activations: partial results of matrix products and attention
CUDA_CONTEXT = 500 * MIB  # what the driver counts for a process that has begun to use the device
CUDA_KERNELS = 100 * MIB  # and for kernels, which are loaded when they first run
MOST_CELLS = 1 << 26  # beyond any context


# ---- the model ----


@dataclass(frozen=True)
class Layer:
    """One block of a model; n_head_kv 0: no attention with a KV cache there."""

    n_bytes: int  # of its weights, as the device stores them
    n_head: int = 0
    n_head_kv: int = 0
    d_k: int = 0  # head dimension of keys and values
    d_v: int = 0
    window: int = 0  # the last tokens that it attends, 0: all
    n_chunk: int = 0  # frequency chunks that the profile ranks, 0: it stays dense


@dataclass(frozen=True)
class Model:
    """What of a model's metadata decides about memory."""

    name: str
    n_ctx_train: int
    n_embd: int
    n_ff: int  # of a token; with experts of all that it uses
    n_vocab: int
    layers: Sequence[Layer]
    output_bytes: int  # of the output matrix and the norms, on the device of the layers' end; token embeddings stay in host memory


def _device_bytes(t: Any) -> int:
    """Bytes of a tensor in a CUDA buffer: quantised rows end in a block of 512 values (ggml-cuda.cu), tensors at 128 bytes."""
    per, size = TENSOR_TYPES[t.type]
    n = t.n_bytes + (-t.shape[0] % 512 // per * size if per > 1 else 0)
    return n + -n % 128


def read_model(path: str | os.PathLike, profile: Profile | None = None) -> Model:
    """The model of a GGUF file, split ones too. profile: which layers have dominant keys; without one, its own or else all.

    Raises FasaError for a model that FASA does not apply to, and for a file that is not usable.
    """
    gguf = GGUFFile(path)
    profile = profile or Profile.from_gguf(gguf)
    shape = read_shape(gguf)
    n_layer, arch = len(shape.n_head), gguf.arch
    number = lambda key, default: gguf.get(f"{arch}.{key}", U32, default=default)
    n_embd = number("embedding_length", 0)
    width = number("attention.value_length", n_embd // max(shape.n_head[0], 1))
    width_local = number("attention.value_length_swa", width)
    windows = sliding_windows(gguf, n_layer)
    tensors = [t for part in shards(gguf) for t in part.tensors]
    weights, names, end, embedding = [0] * n_layer, [set() for _ in range(n_layer)], 0, None
    for t in tensors:
        block, _, rest = t.name.removeprefix("blk.").partition(".")
        if t.name.startswith("blk.") and block.isdigit():
            if int(block) < n_layer:
                weights[int(block)] += _device_bytes(t)
                names[int(block)].add(rest)
        elif t.name == "token_embd.weight":
            embedding = t
        elif t.name != "per_layer_token_embd.weight":
            end += _device_bytes(t)
    if embedding is None:
        raise FasaError(f"{path}: there is no tensor token_embd.weight; give a whole model")
    if not any(t.name == "output.weight" for t in tensors):  # then the embedding is copied to the device too
        end += _device_bytes(embedding)
    kept = n_layer - number("attention.shared_kv_layers", 0)  # later layers use the cache of earlier ones
    layers = []
    for il in range(n_layer):
        recurrent = (
            any(name.startswith(("ssm_", "shortconv")) for name in names[il]) and "attn_k.weight" not in names[il]
        )
        if il >= kept or recurrent or not shape.n_head_kv[il]:
            layers.append(Layer(weights[il]))
            continue
        if shape.head_dim[il] < 0:
            raise FasaError(
                f"{path}: its heads have two sizes, and the metadata do not say which layers have which; there is no plan for it"
            )
        ranked = profile.n_chunk[il] if profile and il < len(profile.n_chunk) else 0 if profile else shape.n_chunk[il]
        layers.append(
            Layer(
                weights[il],
                shape.n_head[il],
                shape.n_head_kv[il],
                shape.head_dim[il],
                width_local if windows[il] else width,
                windows[il],
                ranked,
            )
        )
    ff = gguf.get(f"{arch}.feed_forward_length", U32, ARR, default=0)
    experts = number("expert_used_count", 0) * number(
        "expert_feed_forward_length", max(ff) if isinstance(ff, list) else ff
    )
    n_ff = max(max(ff) if isinstance(ff, list) else ff, experts + number("expert_shared_feed_forward_length", 0))
    return Model(os.path.basename(path), number("context_length", 0), n_embd, n_ff, embedding.shape[-1], layers, end)


# ---- the context ----


@dataclass(frozen=True)
class Setup:
    """How the context is made; llama.cpp's own names and defaults. Tokens are over all sequences."""

    n_ctx: int = 0  # 0: what the model was trained on
    n_seq_max: int = 1
    n_batch: int = 2048
    n_ubatch: int = 512
    n_gpu_layers: int = -1  # -1: all
    type_k: str = "f16"
    type_v: str = "f16"
    kv_unified: bool = False
    swa_full: bool = True
    no_kv_offload: bool = False

    def tokens(self, m: Model) -> int:
        """Of the context, as asked for."""
        return self.n_ctx or m.n_ctx_train

    def ubatch(self, m: Model) -> int:
        return min(self.n_ubatch, self.n_batch, self.tokens(m))

    def streams(self) -> int:
        return 1 if self.kv_unified else self.n_seq_max

    def cells(self, m: Model, window: int = 0) -> int:
        """Cells of a stream, of the cache of layers with a window or of the others (llama-context.cpp, llama-kv-cache-iswa.cpp)."""
        up = lambda n: -(-n // PAD) * PAD
        size = up(up(self.tokens(m)) // self.streams())
        if not window or self.swa_full:
            return size
        return up(min(size, window * (self.n_seq_max if self.kv_unified else 1) + self.ubatch(m)))

    def first_on_device(self, m: Model) -> int:
        """Layers from this one on are on the device; the end of the model counts as one more."""
        n = len(m.layers)
        return max(n + 1 - (self.n_gpu_layers if self.n_gpu_layers >= 0 else n + 1), 0)


def row_bytes(type_name: str, n_values: int) -> int:
    """Bytes of n_values of a cache type. Raises FasaError for an unknown one, and when the values do not fill whole blocks."""
    per, size = TENSOR_TYPES[cache_type(type_name)]
    if n_values % per:
        raise FasaError(f"cache type {type_name}: expected rows of a multiple of {per} values, found {n_values}")
    return n_values // per * size


def n_dom(params: FasaParams, m: Model, layer: Layer) -> int:
    """Dominant dimensions per KV head (fasa_n_dom): two a chunk, in whole groups."""
    most = max((x.n_chunk for x in m.layers), default=0)
    chunks = min(params.chunks or default_chunks(most), layer.n_chunk)
    return -(-2 * chunks // GROUP) * GROUP


def block_bytes(k_dom: str, dims: int) -> int:
    """Bytes of TILE cells of the dominant keys of a KV head (fasa_block_bytes)."""
    scales = 0 if k_dom == "f16" else dims // GROUP * TILE * 2
    return scales + {"f16": 2 * dims, "q8": dims, "q4": dims // 2}[k_dom] * TILE


def _kv_bytes(m: Model, s: Setup, layer: Layer) -> int:
    row = row_bytes(s.type_k, layer.n_head_kv * layer.d_k) + row_bytes(s.type_v, layer.n_head_kv * layer.d_v)
    return row * s.cells(m, layer.window) * s.streams()


def _k_dom_bytes(m: Model, s: Setup, p: FasaParams, layer: Layer) -> int:
    if not layer.n_chunk:
        return 0
    tiles = -(-s.cells(m, layer.window) // TILE)
    return block_bytes(p.k_dom, n_dom(p, m, layer)) * tiles * layer.n_head_kv * s.streams()


def _row_stride(s: Setup, layer: Layer) -> int:
    """Bytes of a fetched row: K and V of a cell and KV head, each in steps of 16 (fasa_row_layout)."""
    return sum(-(-row_bytes(kind, width) // 16) * 16 for kind, width in ((s.type_k, layer.d_k), (s.type_v, layer.d_v)))


def _list_length(m: Model, s: Setup, p: FasaParams, layer: Layer) -> int:
    """The most tokens that a list holds (fasa_list_length)."""
    longest = p.cap if p.mass > 0 else 2 * p.mean_budget if p.mean_budget else p.budget
    return min(max(longest, p.sink + p.recent, 1), s.cells(m, layer.window))


def _fetch_bytes(m: Model, s: Setup, p: FasaParams, layer: Layer) -> int:
    """What the rows of one token are fetched to (fasa_rows_bytes), one for all layers of a device."""
    n = _list_length(m, s, p, layer) + 1
    return n * (layer.n_head if p.per_head else layer.n_head_kv) * (_row_stride(s, layer) + 4) + 256


def _row_cache_bytes(m: Model, s: Setup, p: FasaParams, here: Sequence[Layer]) -> int:
    """The row caches of these layers, which share the setting evenly; a slot has 8 bytes beside its row, and they come in eights."""
    total = 0
    for x in here:
        slot = _row_stride(s, x) + 8
        wanted = (
            p.row_cache * MIB // len(here) // x.n_head_kv // s.streams() // slot
            if p.row_cache >= 0
            else 2 * _list_length(m, s, p, x)
        )
        total += slot * (min(wanted, s.cells(m, x.window) + 7) // 8 * 8) * x.n_head_kv * s.streams()
    return total


def _scratch_bytes(m: Model, s: Setup, here: Sequence[Layer], staged: bool) -> int:
    """The compute buffer by the formula at the head of this file, and what ggml-cuda and FASA's kernels take beside it."""
    t, kinds = s.ubatch(m), {bool(x.window) for x in here if x.n_head_kv}
    masks = sum(
        2 * t * s.cells(m, max((x.window for x in here if bool(x.window) == kind), default=0)) for kind in kinds
    )
    attention = 0
    for x in here:
        if x.n_head_kv:
            cells = s.cells(m, x.window) * s.streams()
            k, v = x.n_head_kv * x.d_k, x.n_head_kv * x.d_v
            copies = sum(2 * n * cells for n, kind in ((k, s.type_k), (v, s.type_v)) if kind != "f16")
            attention = max(attention, 4 * t * (3 * m.n_embd + 2 * x.n_head * x.d_k + k + v) + copies)
    layer = masks + max(attention, 4 * t * (3 * m.n_ff + 4 * m.n_embd))
    logits = 4 * t * (m.n_vocab + 2 * m.n_embd) if s.first_on_device(m) <= len(m.layers) else 0
    pool = t * max(m.n_ff, m.n_embd) * 36 // 32 + POOL_BYTES  # activations as blocks of q8_1
    stages = (
        sum(
            max((_kv_bytes(m, s, x) for x in here if x.n_head_kv and bool(x.window) == kind), default=0)
            for kind in kinds
        )
        if staged
        else 0
    )
    return max(layer, logits) + pool + stages


@dataclass(frozen=True)
class Memory:
    """Bytes of one way to run a model."""

    weights: int = 0  # on the device
    kv: int = 0  # K and V on the device
    k_dom: int = 0  # dominant keys on the device
    row_cache: int = 0
    scratch: int = 0
    kv_pinned: int = 0  # K and V in pinned host memory
    kv_ram: int = 0  # K and V of layers on the CPU
    k_dom_ram: int = 0  # and their dominant keys

    @property
    def context(self) -> int:
        """On the device, without the weights."""
        return self.kv + self.k_dom + self.row_cache + self.scratch

    @property
    def device(self) -> int:
        return self.weights + self.context

    @property
    def host(self) -> int:
        """In host memory, without weights and what llama.cpp itself takes."""
        return self.kv_pinned + self.kv_ram + self.k_dom_ram


def memory(m: Model, s: Setup, params: FasaParams | None = None, mode: str = "c") -> Memory:
    """What a context takes: params None: dense; mode: c (K and V on the device) or m (in pinned host memory)."""
    first = s.first_on_device(m)
    put = dict.fromkeys(("weights", "kv", "k_dom", "kv_pinned", "kv_ram", "k_dom_ram"), 0)
    for il, x in enumerate(m.layers):
        on_device = il >= first
        attends_there = on_device and not s.no_kv_offload
        put["weights"] += x.n_bytes if on_device else 0
        if not x.n_head_kv:
            continue
        put[("kv_pinned" if mode == "m" else "kv") if attends_there else "kv_ram"] += _kv_bytes(m, s, x)
        waits = (
            attends_there
            and mode == "c"
            and params is not None
            and params.min_context > 0
            and s.cells(m, x.window) < params.min_context_gpu
        )
        if params is not None and not waits:
            put["k_dom" if attends_there else "k_dom_ram"] += _k_dom_bytes(m, s, params, x)
    here = m.layers[first:]
    if first <= len(m.layers):
        put["weights"] += m.output_bytes
        put["scratch"] = _scratch_bytes(m, s, [] if s.no_kv_offload else here, mode == "m") + (
            WORK_BYTES if put["k_dom"] else 0
        )
    fetching = [x for x in here if x.n_chunk] if mode == "m" and params is not None and not s.no_kv_offload else []
    if fetching:
        put["row_cache"] = _row_cache_bytes(m, s, params, fetching)
        put["scratch"] += max(_fetch_bytes(m, s, params, x) for x in fetching)
    return Memory(**put)


def largest_context(
    m: Model, s: Setup, params: FasaParams | None, mode: str, device: int, host: int | None = None
) -> int:
    """The most tokens, over all sequences, whose context fits `device` bytes, and `host` bytes where they are known; 0: none does."""
    step = PAD * s.streams()

    def fits(n: int) -> bool:
        need = memory(m, replace(s, n_ctx=n * step), params, mode)
        return need.device <= device and (host is None or need.host <= host)

    low, high = 0, MOST_CELLS // step
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low * step


# ---- the four ways beside each other ----


@dataclass(frozen=True)
class Way:
    """One column of the plan."""

    name: str
    memory: Memory
    largest: int | None  # tokens; None: the device's memory is not known
    bound: str = ""  # what ends the largest context: device or host memory


def ways(m: Model, s: Setup, params: FasaParams, device: int | None = None, host: int | None = None) -> list[Way]:
    """Dense in f16, dense in q8_0, FASA-C and FASA-M (with the setup's own cache types). device, host: bytes that there are for it."""
    out = []
    for name, setup, p, mode in (
        ("dense f16", replace(s, type_k="f16", type_v="f16"), None, "c"),
        ("dense q8_0", replace(s, type_k="q8_0", type_v="q8_0"), None, "c"),
        ("FASA-C", s, params, "c"),
        ("FASA-M", s, params, "m"),
    ):
        try:
            need = memory(m, setup, p, mode)
        except FasaError:  # heads too small for blocks of 32 values
            continue
        most, bound = None, ""
        if device is not None:
            most = largest_context(m, setup, p, mode, device, host)
            bound = "host" if host is not None and largest_context(m, setup, p, mode, device) > most else "device"
        out.append(Way(name, need, most, bound))
    return out


def size(text: str) -> int:
    """Bytes of "12G", "900M" or "11.5G" (powers of 1024). Raises FasaError."""
    unit = {"K": 10, "M": 20, "G": 30, "T": 40}
    body = text.strip().upper().removesuffix("B").removesuffix("I")
    try:
        value = float(body[:-1]) * (1 << unit[body[-1]])
        if not 0 < value < math.inf:
            raise ValueError
    except (ValueError, KeyError, IndexError):
        raise FasaError(f"{text!r}: expected an amount of memory such as 12G or 900M") from None
    return int(value)
