"""What FASA counts: the one table. struct fasa_counters of native/fasa.h, its collection and its reset follow from it.

After a change run `make tables`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

COUNTED_BY = {
    "op": "the ops, on the CPU and on a device",
    "device": "the ops of a device only",
    "step": "the host, once for every ubatch that was computed",
    "memory": "nobody: a size, read when it is asked for, which a reset leaves",
}


@dataclass(frozen=True)
class Counter:
    """One row of the table. counted_by: a key of COUNTED_BY."""

    name: str
    counted_by: str
    unit: str
    help: str


COUNTERS = (
    Counter("steps_sparse", "step", "ubatches", "decode steps in which at least one layer ran sparse"),
    Counter("steps_dense", "step", "ubatches", "decode steps in which every layer was dense"),
    Counter("steps_prefill", "step", "ubatches", "ubatches of prompts"),
    Counter("steps_prefill_sparse", "step", "ubatches", "those of them in which at least one layer ran sparse"),
    Counter("layers_sparse", "step", "layers x steps", "layers that ran with FASA"),
    Counter("layers_ahead", "step", "layers x steps", "layers that ran with FASA and selected ahead"),
    Counter("layers_dense", "step", "layers x steps", "layers that ran without FASA in decode steps"),
    Counter("layers_prefill", "step", "layers x steps", "layers that ran in ubatches of prompts"),
    Counter("layers_prefill_sparse", "step", "layers x steps", "those of them that ran sparse"),
    Counter("tiles_sparse", "step", "tiles x layers", "tiles of prompts in layers that ran sparse"),
    Counter("tiles_dense", "step", "tiles x layers", "tiles of prompts in layers that ran dense while FASA was on"),
    Counter("prefill_attended", "op", "cells x lists", "cells that the lists of tiles hold"),
    Counter("prefill_visible", "op", "cells x lists", "cells that dense attention would have attended instead"),
    Counter("tokens_attended", "op", "tokens x lists", "tokens that the lists hold"),
    Counter("tokens_visible", "op", "tokens x lists", "tokens that dense attention would have attended instead"),
    Counter(
        "lists",
        "op",
        "lists",
        "lists selected: layers that select x KV heads (query heads with per_head) x tokens of the step",
    ),
    Counter("bytes_tip", "op", "bytes", "dominant keys read"),
    Counter("bytes_fac", "op", "bytes", "K and V rows read by sparse layers"),
    Counter(
        "bytes_dense",
        "step",
        "bytes",
        "K and V rows that dense attention would have read in their place: of cells that a token sees",
    ),
    Counter(
        "bytes_layers_dense",
        "step",
        "bytes",
        "K and V rows that dense layers read in decode steps: of cells that a token sees",
    ),
    Counter("cells_refreshed", "step", "cells", "cells whose dominant keys were derived from the stored K"),
    Counter("rebuilds", "step", "ubatches", "steps that derived more cells than they had written"),
    Counter("bytes_k_dom", "memory", "bytes", "the dominant keys"),
    Counter("bytes_kv", "memory", "bytes", "the K and V cache"),
    Counter("bytes_kv_host", "memory", "bytes", "the part of bytes_kv in pinned host memory (FASA-M)"),
    Counter("bytes_row_cache", "memory", "bytes", "device memory that keeps recently attended rows"),
    Counter(
        "rows_fetched",
        "device",
        "rows",
        "rows (K and V of a cell and KV head) that sparse layers read from pinned host memory",
    ),
    Counter("rows_reused", "device", "rows", "rows that they found in the row cache instead"),
    Counter("bytes_fetched", "device", "bytes", "the bytes of rows_fetched"),
    Counter(
        "bytes_staged",
        "device",
        "bytes",
        "K and V that dense layers copied from pinned host memory to their device while FASA was on",
    ),
)


def bytes_read(c: Mapping[str, int]) -> int:
    """Bytes of K, V and dominant keys that all layers read in the decode steps that were counted."""
    return c["bytes_fac"] + c["bytes_tip"] + c.get("bytes_layers_dense", 0)


def bytes_of_dense(c: Mapping[str, int]) -> int:
    """Bytes of K and V that all layers had read in these steps, were they dense: cells that the mask shows."""
    return c.get("bytes_dense", 0) + c.get("bytes_layers_dense", 0)


def read_share(c: Mapping[str, int]) -> float:
    """bytes_read as a share of bytes_of_dense; 1 when nothing was counted."""
    return bytes_read(c) / bytes_of_dense(c) if bytes_of_dense(c) else 1.0
