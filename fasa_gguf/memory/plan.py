"""What a context takes, and the context that fits, from a model's metadata alone.

Bytes of weights, of K and V and of the dominant keys are exact (src/llama-kv-cache.cpp, native/core/layout.h). The
scratch, llama.cpp's compute buffer, is the largest of the moments in a ubatch of t tokens that can be the peak
(src/llama-graph.cpp; f32 activations):

    logits        4 t (n_vocab + 2 n_embd)
    feed-forward  4 t (3 n_ff + 4 n_embd)                        + masks
    attention     4 t (3 n_embd + 2 queries + keys + values)     + masks + f16 copies of K and V
    sparse prompt 4 t (3 n_embd + 2 queries + keys + values)     + keys in f16 + scores of lists + other layers' masks

Layers that select ahead have the dominant rows of their W_q beside it. Prompts are sparse on a device as
`tiles_on_device` says; where all layers of a mask are, it is not there.

masks: 2 t bytes for every cell (f16), of the cache with a window too. f16 copies: of one layer, when the cache has
another type. FASA-M adds one layer's K and V for dense attention (in a model with windows, one of either kind). A
mixture of experts has the n_ff of the experts that a token uses.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import FasaError
from ..gguf.cache_types import cache_type
from ..gguf.file import TENSOR_TYPES
from ..params import FasaParams, default_chunks
from ..runtime.settings import ContextSettings
from .host import MIB, Available
from .model import Layer, Model

TILE, GROUP = 32, 8  # FASA_TILE, FASA_GROUP of native/core/layout.h
PAD = 256  # cells that llama.cpp rounds a context up to
TILE_ROOM = 128 * MIB  # FASA_TILE_ROOM of native/core/memory.h
TILE_LEAST = 32  # FASA_TILE_LEAST of native/core/tiles.h
TILE_WIDTHS = (64, 80, 96, 112, 128, 256)  # head dimensions of fasa_cuda_tile_reason (native/cuda/forward.cu)
WORK_BYTES = 5_400_000  # sizeof(fasa_work), and the tables of dimensions
MOST_CELLS = 1 << 26  # beyond any context


# ---- sizes ----


def row_bytes(type_name: str, n_values: int) -> int:
    """Bytes of n_values of a cache type. Raises FasaError for an unknown type, and unless they fill blocks."""
    per, size = TENSOR_TYPES[cache_type(type_name)]
    if n_values % per:
        raise FasaError(f"cache type {type_name}: expected rows of a multiple of {per} values, found {n_values}")
    return n_values // per * size


def n_dom(params: FasaParams, model: Model, layer: Layer) -> int:
    """Dominant dimensions per KV head (fasa_n_dom): two for each chunk, in whole groups."""
    most = max((x.n_chunk for x in model.layers), default=0)
    chunks = min(params.chunks or default_chunks(most), layer.n_chunk)
    return -(-2 * chunks // GROUP) * GROUP


def runs_sparse(params: FasaParams, layer: Layer) -> bool:
    """Whether a layer can run sparse: it is ranked, and reaches farther back than what it would attend."""
    return layer.n_chunk > 0 and not 0 < layer.window <= params.longest


def block_bytes(k_dom: str, dims: int) -> int:
    """Bytes of TILE cells of the dominant keys of a KV head (fasa_block_bytes)."""
    scales = 0 if k_dom == "f16" else dims // GROUP * TILE * 2
    return scales + {"f16": 2 * dims, "q8": dims, "q4": dims // 2}[k_dom] * TILE


def pool_bytes(n_act: int, n_tokens: int) -> int:
    """What ggml-cuda takes from its pool for a ubatch, beside the compute buffer (fasa_pool_bytes).

    n_act: the most values of a token that go into a matrix product. They lie there as blocks of q8_1, or, beside f16
    weights, in f16 with the product's result. 16 MiB more: partial results of matrix products and attention.
    """
    return 4 * n_act * n_tokens + 16 * MIB


def _up(n: int, step: int) -> int:
    return -(-n // step) * step


def _padded(n_cells: int) -> int:
    return _up(n_cells, PAD)


@dataclass(frozen=True)
class ContextShape:
    """The numbers of a context that llama.cpp derives from a model and settings."""

    model: Model
    settings: ContextSettings

    @property
    def n_ctx(self) -> int:
        """Tokens over all sequences, as asked for."""
        return self.settings.n_ctx or self.model.n_ctx_train

    @property
    def n_ubatch(self) -> int:
        return min(self.settings.n_ubatch, self.settings.n_batch, self.n_ctx)

    @property
    def n_stream(self) -> int:
        return 1 if self.settings.kv_unified else self.settings.n_seq_max

    @property
    def first_on_device(self) -> int:
        """Layers from this one on are on the device; the end of the model counts as one more."""
        n = len(self.model.layers) + 1
        return max(n - (self.settings.n_gpu_layers if self.settings.n_gpu_layers >= 0 else n), 0)

    def cells(self, window: int = 0) -> int:
        """Cells of a stream in the cache of layers with this window, 0: of the others.

        From llama-context.cpp and llama-kv-cache-iswa.cpp.
        """
        size = _padded(_padded(self.n_ctx) // self.n_stream)
        if not window or self.settings.swa_full:
            return size
        sequences = self.settings.n_seq_max if self.settings.kv_unified else 1
        return _padded(min(size, window * sequences + self.n_ubatch))

    def kv_bytes(self, layer: Layer) -> int:
        """K and V of a layer."""
        s = self.settings
        cell = row_bytes(s.type_k, layer.n_head_kv * layer.d_k) + row_bytes(s.type_v, layer.n_head_kv * layer.d_v)
        return cell * self.cells(layer.window) * self.n_stream

    def k_dom_bytes(self, params: FasaParams, layer: Layer) -> int:
        """The dominant keys of a layer."""
        if not runs_sparse(params, layer):
            return 0
        tiles = -(-self.cells(layer.window) // TILE)
        return block_bytes(params.k_dom, n_dom(params, self.model, layer)) * tiles * layer.n_head_kv * self.n_stream

    def dominant_rows_bytes(self, params: FasaParams, layer: Layer) -> int:
        """The dominant rows of W_q of a layer on a device, which selects ahead (fasa_cache::dominant_rows)."""
        if params.ahead == "off" or not runs_sparse(params, layer):
            return 0
        return layer.query_row * n_dom(params, self.model, layer) * layer.n_head

    def tile_bytes(self, params: FasaParams, layer: Layer) -> tuple[int, int]:
        """What a layer's sparse prompt takes on a device: (in the compute buffer, in ggml-cuda's pool).

        From fasa_build_tile_select, fasa_max_tiles and fasa_tile_pool_bytes. Sequences share no tile, and a ubatch with
        fewer than 32 tokens a sequence on average is dense.
        """
        p, n_list, cells = params, layer.n_head if params.per_head else layer.n_head_kv, self.cells(layer.window)
        n_seq = max(1, min(self.settings.n_seq_max, self.n_ubatch // TILE_LEAST))
        n_tile, size = self.n_ubatch // p.prefill_tile + 2 * n_seq, _up(p.prefill_tile, 64)
        dims = next(n for n in (16, 32, 48, 64, 96, 128, 256) if n >= n_dom(p, self.model, layer))  # fasa_tile_pad
        most = p.prefill_cap if p.prefill_mass > 0 else p.prefill_budget
        length = min(cells, max(most, p.sink + p.prefill_band + p.prefill_tile))
        scores = 4 * n_tile * n_list * (cells + length)
        queries, pool = 8 * size * layer.n_head * layer.d_k, 0  # queries and results
        for n in range(256, _up(length + 1, 256) + 1, 256):  # of shorter lists more tiles are gathered at a time
            rows = n_list * n * (4 * layer.d_k + 2 * size)  # K, V and mask
            pool = max(pool, min(n_tile, max(1, TILE_ROOM // rows)) * (rows + queries))
        return 2 * dims * cells * layer.n_head_kv * self.n_stream + scores, pool

    def row_stride(self, layer: Layer) -> int:
        """Bytes of a fetched row: K and V of a cell and KV head, each in steps of 16 (fasa_row_layout)."""
        sizes = ((self.settings.type_k, layer.d_k), (self.settings.type_v, layer.d_v))
        return sum(-(-row_bytes(kind, width) // 16) * 16 for kind, width in sizes)

    def list_length(self, params: FasaParams, layer: Layer) -> int:
        """The most tokens that a list holds (fasa_list_length)."""
        return min(params.longest, self.cells(layer.window))

    def fetch_bytes(self, params: FasaParams, layer: Layer) -> int:
        """The rows of one token as they are fetched (fasa_rows_bytes); all layers of a device share the buffer."""
        n = self.list_length(params, layer) + 1
        return n * (layer.n_head if params.per_head else layer.n_head_kv) * (self.row_stride(layer) + 4) + 256

    def row_cache_bytes(self, params: FasaParams, layers: Sequence[Layer]) -> int:
        """The row caches of these layers, which share the setting evenly. A slot has 8 bytes beside its row, and slots
        come in eights."""
        total = 0
        for x in layers:
            slot = self.row_stride(x) + 8
            if params.row_cache >= 0:
                wanted = params.row_cache * MIB // len(layers) // x.n_head_kv // self.n_stream // slot
            else:
                wanted = 2 * self.list_length(params, x)
            n_slot = min(wanted, self.cells(x.window) + 7) // 8 * 8
            total += slot * n_slot * x.n_head_kv * self.n_stream
        return total


# ---- the scratch ----


def compute_bytes(
    c: ContextShape, layers: Sequence[Layer], has_output: bool = True, params: FasaParams | None = None
) -> int:
    """llama.cpp's compute buffer by the formula at the head of this file. layers: those that attend on the device.

    has_output: whether the logits are computed there, where they are computed on a device at all. params: FASA's, None:
    dense.
    """
    m, t = c.model, c.n_ubatch
    masks = sum(2 * t * c.cells(max(x.window for x in same)) for same in _by_window(layers))
    tiled = tiled_layers(c, layers, params)
    others = _by_window(x for x in layers if x not in tiled)
    masks_beside = sum(2 * t * c.cells(max(x.window for x in same)) for same in others)
    attention = sparse = 0
    for x in layers:
        if x.n_head_kv:
            cells = c.cells(x.window) * c.n_stream
            k, v = x.n_head_kv * x.d_k, x.n_head_kv * x.d_v
            copies = sum(2 * n * cells for n, kind in ((k, c.settings.type_k), (v, c.settings.type_v)) if kind != "f16")
            values = 4 * t * (3 * m.n_embd + 2 * x.n_head * x.d_k + k + v)
            attention = max(attention, values + copies)
            if params is not None and x in tiled:
                sparse = max(sparse, masks_beside + values + c.tile_bytes(params, x)[0])
    layer = max(masks + max(attention, 4 * t * (3 * m.n_ff + 4 * m.n_embd)), sparse)
    logits = 4 * t * (m.n_vocab + 2 * m.n_embd) if has_output and c.first_on_device <= len(m.layers) else 0
    return max(layer, logits)


def stage_bytes(c: ContextShape, layers: Sequence[Layer]) -> int:
    """One layer's K and V, of layers with and without a window: what dense attention reads in FASA-M."""
    return sum(max(map(c.kv_bytes, same)) for same in _by_window(layers))


def _by_window(layers: Iterable[Layer]) -> list[list[Layer]]:
    """The layers with a KV cache: those that attend to all, and those with a window; none of them is empty."""
    both = [[x for x in layers if x.n_head_kv and bool(x.window) == has_window] for has_window in (False, True)]
    return [same for same in both if same]


# ---- the estimate ----


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

    def fits(self, available: Available) -> bool:
        """Whether the device has room for it, and the host where its memory is known."""
        on_device = available.device is None or self.device <= available.device
        return on_device and (available.host is None or self.host <= available.host)


def _stays_dense(c: ContextShape, params: FasaParams, layer: Layer) -> bool:
    """A layer on a GPU in mode device gets no dominant keys while its cells are below min_context_gpu."""
    return c.settings.mode != "host" and params.min_context > 0 and c.cells(layer.window) < params.min_context_gpu


def tiles_on_device(c: ContextShape, params: FasaParams, layer: Layer) -> bool:
    """Whether a layer on a device processes prompts sparsely."""
    is_sparse = runs_sparse(params, layer) and not layer.window and not _stays_dense(c, params, layer)
    least = params.prefill_min_context_gpu * (2 if c.settings.mode == "host" else 1)
    waits = params.prefill == "auto" and c.cells() < max(least, params.prefill_min_context)
    return params.prefill != "off" and not waits and is_sparse and layer.d_k in TILE_WIDTHS


def tiled_layers(c: ContextShape, layers: Iterable[Layer], params: FasaParams | None) -> list[Layer]:
    """Those of the layers on a device that process prompts sparsely."""
    return [x for x in layers if params is not None and x.n_head_kv and tiles_on_device(c, params, x)]


def estimate(
    model: Model, settings: ContextSettings, params: FasaParams | None = None, part: range | None = None
) -> Memory:
    """What a context takes. params None: dense. settings.mode: device or host; auto counts as device.

    part: only what lies on the device that has these layers (device_layers), None: on all of them together.
    Raises FasaError when a head's values do not fill whole blocks of the cache type.
    """
    c, host = ContextShape(model, settings), settings.mode == "host"
    put = dict.fromkeys(("weights", "kv", "k_dom", "row_cache", "scratch", "kv_pinned", "kv_ram", "k_dom_ram"), 0)
    n_layer = len(model.layers)
    part = range(n_layer + 1) if part is None else part
    for il, x in enumerate(model.layers):
        if il not in part:
            continue
        on_device = il >= c.first_on_device
        attends_there = on_device and not settings.no_kv_offload
        put["weights"] += x.n_bytes if on_device else 0
        if not x.n_head_kv:
            continue
        put[("kv_pinned" if host else "kv") if attends_there else "kv_ram"] += c.kv_bytes(x)
        if params is not None and not (attends_there and _stays_dense(c, params, x)):
            put["k_dom" if attends_there else "k_dom_ram"] += c.k_dom_bytes(params, x)
            put["scratch"] += c.dominant_rows_bytes(params, x) if attends_there and il > 0 else 0
    here = [model.layers[il] for il in part if c.first_on_device <= il < n_layer]
    attending = [] if settings.no_kv_offload else here
    if c.first_on_device <= n_layer and len(part):
        put["weights"] += model.output_bytes if n_layer in part else 0
        put["scratch"] = compute_bytes(c, attending, n_layer in part, params)
        put["scratch"] += pool_bytes(max(model.n_ff, model.n_embd), c.n_ubatch)
        if params is not None:
            tiled = tiled_layers(c, attending, params)
            put["scratch"] += max((c.tile_bytes(params, x)[1] for x in tiled), default=0)
        put["scratch"] += (stage_bytes(c, attending) if host else 0) + (WORK_BYTES if put["k_dom"] else 0)
    fetching = [x for x in attending if host and params is not None and runs_sparse(params, x)]
    if params is not None and fetching:
        put["row_cache"] = c.row_cache_bytes(params, fetching)
        put["scratch"] += max(c.fetch_bytes(params, x) for x in fetching)
    return Memory(**put)


def device_layers(n_layer: int, n_gpu_layers: int, shares: Sequence[float]) -> list[range]:
    """The layers that llama.cpp puts on each of several devices; number n_layer is the output.

    shares: of the devices, as tensor_split, or their free memory. From llama_model::load_tensors.
    """
    n = n_layer + 1
    count = n if n_gpu_layers < 0 else min(n_gpu_layers, n)
    given = np.asarray(shares if any(shares) else [1] * len(shares), np.float32)
    ends = np.cumsum(given, dtype=np.float32) / given.sum(dtype=np.float32)
    at = np.searchsorted(ends, np.arange(count, dtype=np.float32) / np.float32(max(count, 1)), "right")
    first = [int(np.searchsorted(at, i)) + n - count for i in range(len(shares) + 1)]
    return [range(a, b) for a, b in itertools.pairwise(first)]


def too_small(
    model: Model,
    settings: ContextSettings,
    params: FasaParams | None,
    free: Sequence[int],
    split: Sequence[float] | None = None,
    loaded: bool = False,
) -> tuple[int, int] | None:
    """(number, bytes needed) of the first of several devices that has no room for its layers; None: all have.

    free: bytes of each. split: tensor_split, None: by free memory. loaded: the weights are there.
    """
    shares = [*(split or ()), *[0.0] * len(free)][: len(free)]
    for i, part in enumerate(device_layers(len(model.layers), settings.n_gpu_layers, shares if any(shares) else free)):
        x = estimate(model, settings, params, part)
        need = x.context if loaded else x.device
        if len(part) and need > free[i]:
            return i, need
    return None


def largest_context(model: Model, settings: ContextSettings, params: FasaParams | None, available: Available) -> int:
    """The most tokens, over all sequences, whose context fits what is available; 0: none does."""
    step = PAD * ContextShape(model, settings).n_stream
    low, high = 0, MOST_CELLS // step
    while low < high:
        middle = (low + high + 1) // 2
        own = settings.replace(n_ctx=middle * step)
        fits = estimate(model, own, params).fits(available)
        if fits and len(available.devices) > 1:
            fits = too_small(model, own, params, available.devices) is None
        low, high = (middle, high) if fits else (low, middle - 1)
    return low * step


# ---- the four ways beside each other ----


@dataclass(frozen=True)
class Way:
    """One column of the plan."""

    name: str
    memory: Memory
    largest: int | None  # tokens; None: the device's memory is not known
    bound: str = ""  # what ends the largest context: device or host memory


def ways(model: Model, settings: ContextSettings, params: FasaParams, available: Available | None = None) -> list[Way]:
    """Dense in f16, dense in q8_0, FASA-C and FASA-M (both with the cache types of the settings).

    A way is missing when the model's heads do not fill whole blocks of its cache type.
    """
    available, settings, found = available or Available(), settings.replace(mode="device"), []
    for name, changes, p in (
        ("dense f16", {"type_k": "f16", "type_v": "f16"}, None),
        ("dense q8_0", {"type_k": "q8_0", "type_v": "q8_0"}, None),
        ("FASA-C", {}, params),
        ("FASA-M", {"mode": "host"}, params),
    ):
        own = settings.replace(**changes)
        try:
            need = estimate(model, own, p)
        except FasaError:
            continue
        most, bound = None, ""
        if available.device is not None:
            most = largest_context(model, own, p, available)
            bound = "host" if largest_context(model, own, p, replace(available, host=None)) > most else "device"
        found.append(Way(name, need, most, bound))
    return found
