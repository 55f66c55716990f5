"""The ops of one layer on host arrays: for calibration, tests and timing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import FasaError
from ..params import K_DOM_TYPES
from .interrupt import in_thread
from .library import api, array, check, struct
from .settings import thread_count


def rank_recall(
    q: np.ndarray,
    k: np.ndarray,
    q_pos: Sequence[int] | np.ndarray,
    chunk_dims: np.ndarray,
    n_rank: int,
    budget: int,
    sink: int,
    recent: int,
    scale: float,
    soft_cap: float = 0.0,
    candidate: np.ndarray | None = None,
    n_threads: int | None = None,
    q_est: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Rank one KV head's chunks as a set, greedily: reference.rank_recall in C++.

    q float32 [n_group, n_query, head_dim], k float32 [n_kv, head_dim], chunk_dims int32 [n_chunk, 2]; q_pos: the
    position of each query. candidate bool [n_chunk]: the chunks that may be chosen; None: all. q_est, of q's shape: the
    queries that score.
    Returns (order int32 [n_rank], share of the attention mass kept float32 [n_rank]). Raises FasaError.
    """
    pq, q = array("float", q, np.float32)
    if q_est is not None and np.shape(q_est) != q.shape:
        raise FasaError(f"rank_recall: expected q_est of shape {[*q.shape]}, found {[*np.shape(q_est)]}")
    pk, k = array("float", k, np.float32)
    pp, _pos = array("int32_t", q_pos, np.int32)
    pd, dims = array("int32_t", chunk_dims, np.int32)
    po, order = array("int32_t", np.zeros(n_rank), np.int32)
    pr, recall = array("float", np.zeros(n_rank), np.float32)
    c = struct(
        "fasa_rank_case",
        n_group=q.shape[0],
        n_query=q.shape[1],
        n_kv=k.shape[0],
        n_embd_head=k.shape[1],
        n_chunk=dims.shape[0],
        n_rank=n_rank,
        budget=budget,
        sink=sink,
        recent=recent,
        n_threads=thread_count(n_threads or 0),
        scale=scale,
        soft_cap=soft_cap,
        q=pq,
        k=pk,
        q_pos=pp,
        chunk_dims=pd,
        out_order=po,
        out_recall=pr,
    )
    if candidate is not None:
        c.candidate, _keep = array("uint8_t", candidate, np.uint8)
    if q_est is not None:
        c.q_est, _est = array("float", q_est, np.float32)
    lib = api()[1]
    in_thread(lambda: check(lib.fasa_rank_recall(c)))
    return order, recall


def _op_case(
    keep: list[Any],
    *,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    dims: np.ndarray | None = None,
    weight: np.ndarray | None = None,
    forced: np.ndarray | None = None,
    fresh: np.ndarray | None = None,
    list: np.ndarray | None = None,
    budget: int = 0,
    scale: float,
    n_kv: int,
    mask: np.ndarray | None = None,
    mass: float = 0.0,
    floor: int = 64,
    cap: int = 1024,
    soft_cap: float = 0.0,
    k_dom: str = "q4",
    type_k: str = "f16",
    type_v: str = "f16",
    n_hadamard: int = 0,
    sinks: np.ndarray | None = None,
    per_head: bool = False,
    backend: str = "CPU",
    tip_backend: str | None = None,
    n_threads: int = 2,
    mode: int = 0,
    row_slots: int = 0,
    beside: int = 0,
) -> Any:
    """A struct fasa_op_case, without its outputs. `keep` gets the arrays that it points to."""
    ffi, _ = api()
    n_stream, n_tokens, n_head, d_k = q.shape

    def kept(ctype: str, values: Any, dtype: Any) -> Any:
        pointer, owner = array(ctype, values, dtype)
        keep.append(owner)
        return pointer

    def text(value: str) -> Any:
        keep.append(ffi.new("char[]", value.encode()))
        return keep[-1]

    c = struct(
        "fasa_op_case",
        backend=text(backend),
        tip_backend=text(tip_backend or backend),
        n_threads=n_threads,
        n_head=n_head,
        n_head_kv=v.shape[-2],
        n_embd_head_k=d_k,
        n_embd_head_v=v.shape[-1],
        n_kv=n_kv,
        n_tokens=n_tokens,
        n_stream=n_stream,
        n_hadamard=n_hadamard,
        type_k=text(type_k),
        type_v=text(type_v),
        k_dom=K_DOM_TYPES.index(k_dom),
        scale=scale,
        soft_cap=soft_cap,
        budget=budget,
        mass=mass,
        floor=floor,
        cap=cap,
        per_head=per_head,
        mode=mode,
        row_slots=row_slots,
        beside=beside,
        q=kept("float", q, np.float32),
        k=kept("float", k, np.float32),
        v=kept("float", v, np.float32),
    )
    if dims is not None:
        c.dims, c.n_dom = kept("int32_t", dims, np.int32), dims.shape[-1]
    if weight is not None:
        c.weight = kept("float", weight, np.float32)
    if forced is not None:
        c.forced, c.n_forced = kept("int32_t", forced, np.int32), forced.shape[-1]
    if fresh is not None:
        c.fresh, c.n_fresh = kept("int32_t", fresh, np.int32), fresh.shape[-1]
    if list is not None:
        c.list, c.list_length = kept("int32_t", list, np.int32), list.shape[-1] - 1
    if mask is not None:
        c.mask = kept("float", mask, np.float32)
    if sinks is not None:
        c.sinks = kept("float", sinks, np.float32)
    return c


_SELECTS = ("dims", "weight", "forced", "budget")  # what TIP and SELECT need, and FAC on a given list does not


def _list_length(n_kv: int, case: dict[str, Any]) -> int:
    """Cells that a list of the case has room for: fasa_list_length of core/select.h, or the given list's."""
    if case.get("list") is not None:
        return case["list"].shape[-1] - 1
    most = case.get("cap", 1024) if case.get("mass", 0) > 0 else case["budget"]
    return min(n_kv, max(most, case["forced"].shape[-1]))


def _check_case(n_list: int, q: np.ndarray, case: dict[str, Any]) -> None:
    given = case.get("list")
    if given is None:
        missing = [name for name in _SELECTS if case.get(name) is None]
        if missing:
            raise FasaError(f"op_run: expected a list, or {', '.join(_SELECTS)}; {', '.join(missing)} missing")
    elif given.ndim != 4 or given.shape[:3] != (*q.shape[:2], n_list) or given.shape[3] < 2:
        shape = f"[{q.shape[0]}, {q.shape[1]}, {n_list}, 1 + length]"
        raise FasaError(f"op_run: expected a list of shape {shape}, found {[*given.shape]}")


def op_run(*, q: np.ndarray, v: np.ndarray, **case: Any) -> dict[str, np.ndarray]:
    """Run the ops of one layer on host arrays, whose shapes are those of struct fasa_op_case.

    Returns est, count, list and out. tip_backend: TIP runs there, and `backend` selects from its scores and attends.
    list int32 [n_stream, n_tokens, n_list, 1 + length]: the count, then the cells in any order. FAC then runs alone on
    these lists; dims, weight, forced and budget are not needed, and est is not returned. Raises FasaError.
    """
    n_stream, n_tokens, n_head, _ = q.shape
    _, n_kv, n_head_kv, d_v = v.shape
    n_list = n_head if case.get("per_head") else n_head_kv
    _check_case(n_list, q, case)
    out = {
        "est": np.full((n_stream, n_tokens, n_head, n_kv), np.nan, np.float32),
        "count": np.full((n_stream, n_tokens, n_list), -1, np.int32),
        "list": np.full((n_stream, n_tokens, n_list, _list_length(n_kv, case)), -1, np.int32),
        "out": np.full((n_stream, n_tokens, n_head, d_v), np.nan, np.float32),
    }
    if case.get("list") is not None:
        del out["est"]
    keep: list[Any] = []
    c = _op_case(keep, q=q, v=v, n_kv=n_kv, **case)
    for name, values in out.items():
        pointer, _ = array("float" if values.dtype == np.float32 else "int32_t", values, values.dtype)
        setattr(c, f"out_{name}" if name != "out" else "out", pointer)
    check(api()[1].fasa_op_run(c))
    return out


def tile_run(
    *, q: np.ndarray, v: np.ndarray, tiles: np.ndarray, cell_pos: np.ndarray, own: np.ndarray, **case: Any
) -> dict[str, np.ndarray]:
    """Run the ops of sparse prefill of one layer on host arrays, whose shapes are those of struct fasa_tile_case.

    Returns score (not times 2^60), count, list and out. Raises FasaError.
    """
    n_stream, n_tokens, n_head, _ = q.shape
    _, n_kv, n_head_kv, d_v = v.shape
    n_list = n_head if case.get("per_head") else n_head_kv
    out = {
        "score": np.full((len(tiles), n_head, n_kv), np.nan, np.float32),
        "count": np.full((len(tiles), n_list), -1, np.int32),
        "list": np.full((len(tiles), n_list, _list_length(n_kv, case)), -1, np.int32),
        "out": np.full((n_stream, n_tokens, n_head, d_v), np.nan, np.float32),
    }
    keep: list[Any] = []
    c = _op_case(keep, q=q, v=v, n_kv=n_kv, **case)
    for name, field in (("count", "out_count"), ("list", "out_list"), ("out", "out")):
        pointer, _ = array("float" if name == "out" else "int32_t", out[name], out[name].dtype)
        setattr(c, field, pointer)
    p_tiles, _tiles = array("int32_t", tiles, np.int32)
    p_pos, _pos = array("int32_t", cell_pos, np.int32)
    p_own, _own = array("uint8_t", own, np.uint8)
    p_score, _score = array("float", out["score"], np.float32)
    test = struct(
        "fasa_tile_case", op=c, n_tile=len(tiles), tile_size=(tiles.shape[1] - 2) // 2, tiles=p_tiles, cell_pos=p_pos,
        own=p_own, out_score=p_score,
    )  # fmt: skip
    check(api()[1].fasa_tile_run(test))
    out["score"] *= np.float32(2.0**-60)
    return out


TIME_CELLS = 16384  # FASA_TIME_CELLS of measure/op-time.cpp


def op_time(*, n_layer: int = 4, n_rep: int = 20, **case: Any) -> dict[str, float]:
    """Time one layer's attention, in seconds: the fastest of n_rep runs over n_layer caches.

    Returns "dense" (dense flash attention), "select" (TIP and SELECT) and "fasa" (all three ops). k and v float32
    [1, 16384, n_head_kv, head_dim] are repeated over n_kv cells. beside: bytes of a feed-forward's weights; "beside" is
    then its time, and "ahead" that of the feed-forward with TIP and SELECT beside it and FAC behind. Raises FasaError.
    """
    for name in ("k", "v"):
        if case[name].shape[:2] != (1, TIME_CELLS):
            shape = f"[1, {TIME_CELLS}, n_head_kv, head_dim]"
            raise FasaError(f"op_time: expected {name} of shape {shape}, found {[*case[name].shape]}")
    keep: list[Any] = []
    times = struct("fasa_op_times")
    check(api()[1].fasa_op_time(_op_case(keep, **case), n_layer, n_rep, times))
    return {name: getattr(times, name) for name, _ in api()[0].typeof("fasa_op_times").fields if name != "size"}
