"""Speed: dense and FASA alternating in one process, one context, one library; names and columns as llama-bench has them."""

from __future__ import annotations

import os
import statistics
import struct
import time
from dataclasses import dataclass, field
from typing import Any, Callable, Sequence

import numpy as np

from . import native
from .errors import FasaError
from .params import FasaParams
from .profile import Profile
from .session import Session


@dataclass
class Row:
    """One arm at one depth: samples in tokens/s, bytes of K, V and K_dom read per token."""

    arm: str
    n_depth: int
    n_gen: int
    samples_ts: list[float] = field(default_factory=list)
    kv_bytes: float = 0.0
    sparse_share: float = 0.0      # of the steps
    tokens_attended: float | None = None
    note: str = ""

    @property
    def avg_ts(self) -> float:
        return statistics.fmean(self.samples_ts)

    @property
    def stddev_ts(self) -> float:
        return statistics.stdev(self.samples_ts) if len(self.samples_ts) > 1 else 0.0

    def as_dict(self, extra: dict[str, Any]) -> dict[str, Any]:
        return {**extra, "test": f"tg{self.n_gen} @ d{self.n_depth}", "arm": self.arm, "n_prompt": 0, "n_gen": self.n_gen, "n_depth": self.n_depth,
                "avg_ts": self.avg_ts, "stddev_ts": self.stddev_ts, "samples_ts": self.samples_ts, "kv_bytes_per_token": self.kv_bytes,
                "sparse_share": self.sparse_share, "tokens_attended": self.tokens_attended, "note": self.note}


def fill_state(session: Session, depth: int, seed: int = 0) -> None:
    """Put `depth` cells of random keys and values into sequence 0 through the state API: no prefill needed.

    The state of one decoded token shows the layout (llama_kv_cache::state_write): magic, sequence, streams, cell count, per cell position, number of
    sequences and their ids, then for every layer K rows, then V rows, each behind type and row size. Values are of the scale
    that normalised keys have. Raises FasaError when the layout is not the one expected (recurrent models, other caches).
    """
    session.clear()
    session.decode([0], 0, logits="none")
    raw = session.state(0)
    session.clear()
    rng = np.random.default_rng(seed)
    at = 0
    out: list[bytes] = []

    def take(code: str) -> Any:
        nonlocal at
        if at + struct.calcsize("<" + code) > len(raw):
            raise FasaError(f"{session.path}: the state of this model's cache has another layout; fill the cache with --fill prefill")
        value = struct.unpack_from("<" + code, raw, at)
        at += struct.calcsize("<" + code)
        return value

    magic, seq = take("II")
    out.append(struct.pack("<II", magic, seq))
    n_stream, count = take("II")
    if n_stream != 1 or count != 1:
        raise FasaError(f"{session.path}: the state of this model's cache has another layout; fill the cache with --fill prefill")
    pos, n_seq = take("iI")
    take(f"{n_seq}i")
    out.append(struct.pack("<II", 1, depth))
    cells = np.zeros((depth, 3), "<i4")                                             # position, sequences, id
    cells[:, 0], cells[:, 1] = np.arange(depth), 1
    out.append(cells.tobytes())
    v_trans, n_layer = take("II")
    if v_trans:
        raise FasaError(f"{session.path}: the value cache is transposed; flash attention is needed")
    out.append(struct.pack("<II", v_trans, n_layer))
    block = rng.standard_normal((min(depth, 4096), 1 << 14), np.float32).astype("<f2")
    for _ in range(2 * n_layer):
        kind, size = take("iQ")
        if kind != 1:
            raise FasaError(f"{session.path}: a random cache is made in f16 only, this one is ggml type {kind}; use --fill prefill or -ctk f16 -ctv f16")
        take(f"{size}s")
        out.append(struct.pack("<iQ", kind, size))
        rows = np.roll(block[:, : size // 2], int(rng.integers(1 << 12)), 0)         # [<= 4096, row]
        for i in range(0, depth, len(rows)):
            out.append(rows[: depth - i].tobytes())
    if at != len(raw):
        raise FasaError(f"{session.path}: the state of this model's cache has another layout; fill the cache with --fill prefill")
    session.set_state(b"".join(out))


def prefill(session: Session, depth: int, seed: int = 0) -> None:
    """Decode `depth` random tokens."""
    session.clear()
    if depth:
        session.decode(np.random.default_rng(seed).integers(0, session.n_vocab, depth).tolist(), 0, logits="none")


def bench(model: str | os.PathLike, depths: Sequence[int], params: FasaParams, n_gen: int = 32, repetitions: int = 5, n_threads: int = 0,
          n_gpu_layers: int = 0, type_k: str = "f16", type_v: str = "f16", fill: str = "auto", profile: Profile | None = None,
          progress: Callable[[str, int, int], None] | None = None) -> list[Row]:
    """Two rows per depth. fill: prefill, state, or auto (state from 2,048 tokens of depth on, where the cache allows it).

    Raises FasaError when no step of the whole run was sparse, or the profile does not fit.
    """
    if not depths or min(depths) < 0 or n_gen < 1 or repetitions < 1:
        raise FasaError("-d, -n and -r: expected depths from 0, and at least 1 token and 1 repetition")
    profile = profile or Profile.load(model)
    rows: list[Row] = []
    arms: tuple[tuple[str, FasaParams | None], ...] = (("dense", None), ("fasa", params))
    any_sparse, reason, total, done = False, "", len(depths) * repetitions * 2, 0
    with Session(model, n_ctx=max(depths) + n_gen + 8, n_threads=n_threads, n_gpu_layers=n_gpu_layers, type_k=type_k, type_v=type_v) as s:
        s.fasa.set_profile(profile)
        row_bytes = s.fasa.counters()["bytes_kv"] / s.n_ctx                           # K and V of one cell, all layers
        for depth in sorted(set(depths)):
            s.fasa.set_params(None)
            by_state = fill == "state" or (fill == "auto" and depth >= 2048 and type_k == type_v == "f16")
            (fill_state if by_state else prefill)(s, depth)
            pair = [Row(name, depth, n_gen) for name, _ in arms]
            counters: list[dict[str, int]] = [{}, {}]
            for r in range(-1, repetitions):                                          # the first round warms up
                for i, (_, p) in enumerate(arms):
                    s.fasa.set_params(p)
                    s.decode([1], depth)                                              # derives the dominant keys, builds the graph
                    s.fasa.reset_counters()
                    n = n_gen if r >= 0 else 4
                    start = time.perf_counter()
                    for j in range(n):
                        s.decode([1 + (j * 7919) % (s.n_vocab - 1)], depth + 1 + j)
                    seconds = time.perf_counter() - start
                    s.remove(0, depth)
                    if r >= 0:
                        pair[i].samples_ts.append(n / seconds)
                        counters[i] = s.fasa.counters()
                        done += 1
                        if progress:
                            progress("benchmarking", done, total)
            c = counters[1]
            pair[0].kv_bytes = row_bytes * (depth + 1 + n_gen / 2)
            pair[1].sparse_share = c["steps_sparse"] / n_gen
            if c["steps_sparse"]:
                any_sparse = True
                pair[1].kv_bytes = (c["bytes_fac"] + c["bytes_tip"]) / c["steps_sparse"]
                pair[1].tokens_attended = c["rows_attended"] / c["lists"]
            else:
                reason = s.fasa.step_reason()
                pair[1].kv_bytes = pair[0].kv_bytes
                pair[1].note = f"dense (n < {params.min_context})" if "min_context" in reason else f"dense ({reason})"
            rows += pair
    if not any_sparse:
        raise FasaError(f"FASA was asked for and no step of the run used it: {reason}; use deeper -d DEPTHS or a smaller --fasa-min-context")
    return rows


def table(rows: Sequence[Row], model: str) -> str:
    """llama-bench's markdown, with the arm, the bytes and the ratio."""
    lines = [f"| {'model':<28} | {'test':>16} | {'arm':>5} | {'t/s':>16} | {'KV MB/token':>11} | {'attended':>8} | {'ratio':>6} |",
             f"| {'-' * 28} | {'-' * 15}: | {'-' * 4}: | {'-' * 15}: | {'-' * 10}: | {'-' * 7}: | {'-' * 5}: |"]
    base = {r.n_depth: r.avg_ts for r in rows if r.arm == "dense"}
    for r in rows:
        attended = "all" if r.tokens_attended is None else f"{r.tokens_attended:.0f}"
        ratio = "" if r.arm == "dense" else r.note or f"{r.avg_ts / base[r.n_depth]:.2f}x"
        lines.append(f"| {os.path.basename(model)[:28]:<28} | {f'tg{r.n_gen} @ d{r.n_depth}':>16} | {r.arm:>5} | {f'{r.avg_ts:.2f} +- {r.stddev_ts:.2f}':>16} | "
                     f"{r.kv_bytes / 1e6:>11.2f} | {attended:>8} | {ratio:>6} |")
    return "\n".join(lines)


def as_json(rows: Sequence[Row], model: str, params: FasaParams) -> list[dict[str, Any]]:
    extra = {"model_filename": str(model), "build": native.version(), "fasa": dict(params.__dict__)}
    return [r.as_dict(extra) for r in rows]
