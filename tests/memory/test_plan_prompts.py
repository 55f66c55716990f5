"""What sparse prompts add to a plan."""

from dataclasses import replace

import pytest

from fasa_gguf import FasaParams
from fasa_gguf.memory.model import read_model
from fasa_gguf.memory.plan import ContextShape, compute_bytes, estimate, tiles_on_device
from fasa_gguf.runtime.settings import ContextSettings

SETTINGS = ContextSettings(n_batch=2048, n_ubatch=512, n_gpu_layers=-1)


def test_what_a_sparse_prompt_takes_of_a_device(shape_8b):
    m, s = read_model(shape_8b), SETTINGS.replace(n_ctx=131072)
    off = FasaParams(chunks=16, prefill_budget=1024, prefill_mass=0, min_context_gpu=0)
    on = off.replace(prefill="on")
    layer, c = m.layers[0], ContextShape(m, s)
    # f16 keys of 32 dimensions, scores and lists of 6 tiles; K, V and mask of all lists fit into 128 MiB
    buffer, pool = c.tile_bytes(on, layer)
    assert buffer == 131072 * 8 * 32 * 2 + 6 * 8 * (131072 + 1024) * 4
    rows, queries = 8 * (4 * 128 + 2 * 128), 8 * 128 * 32 * 128  # of a cell of all lists; of a tile
    assert pool == 6 * (1280 * rows + queries)
    wide, _ = c.tile_bytes(on.replace(per_head=1, prefill_mass=0.98), layer)  # lists of query heads, of up to 4,096
    assert wide == 131072 * 8 * 32 * 2 + 6 * 32 * (131072 + 4096) * 4
    # more than that: a tile at a time
    assert c.tile_bytes(on.replace(prefill_budget=32768), layer)[1] == (32768 + 256) * rows + queries
    for mode in ("device", "host"):
        mine = s.replace(mode=mode)
        sparse, dense, auto = (estimate(m, mine, p).scratch for p in (on, off.replace(prefill="off"), off))
        masks = 2 * 512 * 131072  # which a sparse prompt does without
        assert auto == sparse and dense < sparse < dense + buffer + pool - masks + 4 * 512 * 4096 * 8
    shorter = SETTINGS.replace(n_ctx=4096)  # below prefill_min_context_gpu
    assert estimate(m, shorter, off).scratch == estimate(m, shorter, off.replace(prefill="off")).scratch
    short = estimate(m, s, on.replace(min_context_gpu=1 << 20))  # layers without dominant keys are dense
    assert short.scratch == estimate(m, s).scratch


def test_tiles_of_several_sequences(shape_8b):
    """Sequences share no tile: 16 of 32 tokens each may be two tiles each. Short lists of all fit into 128 MiB."""
    m, s = read_model(shape_8b), SETTINGS.replace(n_ctx=131072, n_seq_max=64, kv_unified=True)
    p = FasaParams(chunks=16, prefill="on", prefill_budget=1024, prefill_mass=0, min_context_gpu=0)
    buffer, pool = ContextShape(m, s).tile_bytes(p, m.layers[0])
    assert buffer == 131072 * 8 * 32 * 2 + 36 * 8 * (131072 + 1024) * 4
    rows, queries = 8 * (4 * 128 + 2 * 128), 8 * 128 * 32 * 128
    assert pool == 36 * (512 * rows + queries)  # of 768 cells it is 28, of 1,280 cells 17


@pytest.mark.parametrize("width, is_sparse", [(64, True), (80, True), (72, False), (192, False), (512, False)])
def test_head_dimensions_without_kernels(shape_8b, width, is_sparse):
    """Their prompts are dense on a device, and take nothing."""
    m = read_model(shape_8b)
    m = replace(m, layers=[replace(x, d_k=width, d_v=width, n_chunk=width // 2) for x in m.layers])
    s = SETTINGS.replace(n_ctx=16384)
    on = FasaParams(chunks=width // 2, prefill="on", min_context_gpu=0)
    assert tiles_on_device(ContextShape(m, s), on, m.layers[0]) == is_sparse
    sparse, dense = (estimate(m, s, on.replace(prefill=p)).scratch for p in ("on", "off"))
    assert (sparse > dense) == is_sparse


def test_masks_beside_sparse_layers(shape_8b):
    """One layer without a ranking needs the mask of all cells, which the sparse layers' prompt then has beside it."""
    m, s = read_model(shape_8b), SETTINGS.replace(n_ctx=131072)
    p = FasaParams(chunks=16, prefill="on", prefill_budget=1024, prefill_mass=0, min_context_gpu=0)
    some = [replace(x, n_chunk=0) if il == 3 else x for il, x in enumerate(m.layers)]
    c = ContextShape(m, s)
    values = 4 * 512 * (3 * 4096 + 2 * 32 * 128 + 2 * 8 * 128)  # of the layer's input, queries, keys and values
    assert compute_bytes(c, some, False, p) == 2 * 512 * 131072 + values + c.tile_bytes(p, m.layers[0])[0]
