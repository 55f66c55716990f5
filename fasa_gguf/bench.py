"""Speed: dense and FASA alternating in one process, one context, one library; names and columns as llama-bench has them."""

from __future__ import annotations

import csv
import io
import json
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

FORMATS = ("md", "json", "jsonl", "csv")
STATE_FILL_FROM = 2048  # tokens of depth from which a random cache is filled through the state API
NOISE = 0.02            # share of dense's speed that counts as equal when the crossover is looked for


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
    fill: str = ""                 # how the cache got its depth: prefill or state
    ratio: float | None = None     # to dense's tokens/s at this depth
    setup: dict[str, Any] = field(default_factory=dict)  # n_threads, type_k, ... by llama-bench's names

    @property
    def avg_ts(self) -> float:
        return statistics.fmean(self.samples_ts)

    @property
    def stddev_ts(self) -> float:
        return statistics.stdev(self.samples_ts) if len(self.samples_ts) > 1 else 0.0

    def as_dict(self, extra: dict[str, Any]) -> dict[str, Any]:
        return {**extra, **self.setup, "test": f"tg{self.n_gen} @ d{self.n_depth}", "arm": self.arm, "n_prompt": 0, "n_gen": self.n_gen,
                "n_depth": self.n_depth, "avg_ts": self.avg_ts, "stddev_ts": self.stddev_ts, "samples_ts": self.samples_ts, "ratio": self.ratio,
                "kv_bytes_per_token": self.kv_bytes, "sparse_share": self.sparse_share, "tokens_attended": self.tokens_attended,
                "fill": self.fill, "note": self.note}


# ---- a cache of a given depth ----


@dataclass
class _Cache:
    """One KV cache in a sequence's state: (ggml type, bytes of a row) of every K tensor, then of every V tensor."""

    n_layer: int
    rows: list[tuple[int, int]]


def state_layout(raw: bytes, where: str) -> tuple[bytes, list[_Cache]]:
    """(head, caches) of the state of a sequence that holds one token at position 0.

    The layout is llama_kv_cache::state_write's: magic, sequence, then for every cache (a sliding-window model has two): streams,
    cells, per cell position, number of sequences and their ids; whether V is transposed, layers, then for every layer's K and
    every layer's V the type, the bytes of a row, the rows. Raises FasaError when that is not what `raw` holds: recurrent
    memory, positions of images, V transposed for want of flash attention.
    """
    at = 8

    def skip(size: int, fits: bool = True) -> None:
        nonlocal at
        at += size
        if at > len(raw) or not fits:
            raise FasaError(f"{where}: the state of this model's cache has a layout that cannot be filled at random; use --fill prefill")

    def take(code: str, *expected: int) -> tuple[int, ...]:
        size = struct.calcsize("<" + code)
        value = struct.unpack("<" + code, raw[at : at + size].ljust(size, b"\0"))
        skip(size, not expected or value == expected)
        return value

    caches = []
    while at < len(raw) or not caches:
        take("II", 1, 1)                 # streams, cells
        take("iIi", 0, 1, 0)             # position, number of sequences, the sequence
        take("I", 0)                     # V is not transposed
        cache = _Cache(take("I")[0], [])
        for _ in range(2 * cache.n_layer):
            kind, size = take("iQ")
            skip(size)
            cache.rows.append((kind, size))
        caches.append(cache)
    return raw[:8], caches


def _random_rows(rng: np.random.Generator, kind: int, size: int, where: str) -> tuple[np.ndarray, int]:
    """(a pool of random cells uint8 [4096, 2*size], step): a row is `size` bytes of a pool row from any multiple of `step` on.

    Values are standard normal, the scale that normalised keys have.
    """
    n = 4096
    if kind == 1:                                                                   # f16
        return rng.standard_normal((n, size), np.float32).astype("<f2").view(np.uint8), 2
    if kind == 8:                                                                   # q8_0: f16 scale and 32 x int8
        blocks = np.empty((n, 2 * size // 34, 34), np.uint8)
        blocks[..., :2] = np.frombuffer(np.float16(1 / 40).tobytes(), np.uint8)
        blocks[..., 2:] = (40 * rng.standard_normal(blocks[..., 2:].shape, np.float32)).clip(-127, 127).astype(np.int8).view(np.uint8)
        return blocks.reshape(n, -1), 34
    raise FasaError(f"{where}: a random cache is made in f16 and q8_0, this one is ggml type {kind}; use --fill prefill")


def random_state(raw: bytes, depth: int, where: str, seed: int = 0) -> np.ndarray:
    """`raw`, the state of one token, with `depth` random cells instead: uint8 [bytes], for llama_state_seq_set_data."""
    head, caches = state_layout(raw, where)
    rng = np.random.default_rng(seed)
    pools = {row: _random_rows(rng, *row, where) for cache in caches for row in cache.rows}
    cells = np.zeros((depth, 3), "<i4")                                             # position, number of sequences, sequence
    cells[:, 0], cells[:, 1] = np.arange(depth), 1
    out = np.empty(8 + sum(16 + cells.nbytes + sum(12 + depth * size for _, size in c.rows) for c in caches), np.uint8)
    at = 0

    def put(data: bytes | np.ndarray) -> None:
        nonlocal at
        a = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data.reshape(-1).view(np.uint8)
        out[at : at + len(a)] = a
        at += len(a)

    put(head)
    for cache in caches:
        put(struct.pack("<II", 1, depth))
        put(cells)
        put(struct.pack("<II", 0, cache.n_layer))
        for kind, size in cache.rows:
            put(struct.pack("<iQ", kind, size))
            pool, step = pools[kind, size]
            # another part of the pool's rows, from another row on, for every 4,096 cells: equal cells would tie in the selection
            for i in range(0, depth, len(pool)):
                n = min(len(pool), depth - i)
                left, top = step * int(rng.integers((pool.shape[1] - size) // step + 1)), int(rng.integers(len(pool)))
                part = out[at : at + n * size].reshape(n, size)
                first = min(n, len(pool) - top)
                part[:first] = pool[top : top + first, left : left + size]
                part[first:] = pool[: n - first, left : left + size]
                at += n * size
    return out


def fill_state(session: Session, depth: int, seed: int = 0) -> None:
    """Put `depth` cells of random keys and values into sequence 0 through the state API: no prefill needed.

    Takes the cache's size in memory once more. Raises FasaError when the cache's state has another layout than expected.
    """
    session.clear()
    session.decode([0], 0, logits="none")
    raw = session.state(0)
    session.clear()
    if depth:
        session.set_state(random_state(raw, depth, session.path, seed))


def prefill(session: Session, depth: int, seed: int = 0, start: int = 0, report: Callable[[int], None] = lambda n: None) -> None:
    """Decode `depth` random tokens; the first `start` of them are in the cache already. `report` gets the depth reached."""
    if not start:
        session.clear()
    tokens = np.random.default_rng(seed).integers(0, session.n_vocab, depth).tolist()
    for at in range(start, depth, session.n_batch):
        part = tokens[at : at + session.n_batch]
        session.decode(part, at, logits="none")
        report(at + len(part))


# ---- the measurement ----


def _time_arm(s: Session, p: FasaParams | None, depth: int, n: int) -> tuple[float, dict[str, int], str]:
    """(tokens/s, counters, why the first step was dense) of n tokens, one a step, behind `depth` cells; the cache is left at that depth."""
    s.fasa.set_params(p)
    s.decode([1], depth)                                    # derives the dominant keys and builds the graph, untimed
    reason = s.fasa.step_reason()
    s.fasa.reset_counters()
    start = time.perf_counter()
    for j in range(n):
        s.decode([1 + (j * 7919) % (s.n_vocab - 1)], depth + 1 + j)
    seconds = time.perf_counter() - start
    counters = s.fasa.counters()
    s.remove(0, depth)
    return n / seconds, counters, reason


def bench(model: str | os.PathLike, depths: Sequence[int], params: FasaParams, n_gen: int = 32, repetitions: int = 5, n_threads: int = 0,
          n_gpu_layers: int = 0, type_k: str = "f16", type_v: str = "f16", fill: str = "auto", profile: Profile | None = None,
          progress: Callable[[str, int, int], None] | None = None) -> list[Row]:
    """Two rows per depth. fill: prefill, state, or auto (state from 2,048 tokens of depth on, where the cache allows it).

    Raises FasaError when no step of the whole run was sparse, or the profile does not fit.
    """
    if not depths or min(depths) < 0 or n_gen < 1 or repetitions < 1:
        raise FasaError("-d, -n and -r: expected depths from 0, and at least 1 token and 1 repetition")
    if fill not in ("auto", "prefill", "state"):
        raise FasaError(f"--fill {fill!r}: expected auto, prefill or state")
    profile = profile or Profile.load(model)
    report = progress or (lambda what, n, total: None)
    rows: list[Row] = []
    reason, total, done, in_cache = "", len(set(depths)) * repetitions * 2, 0, 0      # in_cache: prefilled tokens
    with Session(model, n_ctx=max(depths) + n_gen + 8, n_threads=n_threads, n_gpu_layers=n_gpu_layers, type_k=type_k, type_v=type_v) as s:
        s.fasa.set_profile(profile)
        setup = {"n_threads": n_threads or os.cpu_count() or 1, "n_gpu_layers": n_gpu_layers, "type_k": type_k, "type_v": type_v, "flash_attn": True}
        row_bytes = s.fasa.counters()["bytes_kv"] / s.n_ctx                           # K and V of one cell, all layers

        def set_depth(depth: int) -> str:
            nonlocal in_cache
            s.fasa.set_params(None)
            if fill == "state" or (fill == "auto" and depth >= STATE_FILL_FROM):
                in_cache = 0
                try:
                    fill_state(s, depth)
                    return "state"
                except FasaError:
                    if fill == "state":
                        raise
            prefill(s, depth, start=in_cache, report=lambda n: report(f"prefilling {depth}", n, depth))
            in_cache = depth
            return "prefill"

        for depth in sorted(set(depths)):
            filled = set_depth(depth)
            pair = [Row("dense", depth, n_gen, fill=filled, setup=setup), Row("fasa", depth, n_gen, fill=filled, setup=setup)]
            c: dict[str, int] = {}                                                    # FASA's counters over the repetitions
            for r in range(-1, repetitions):                                          # the first round warms up
                for row, p in zip(pair, (None, params)):
                    speed, counters, why = _time_arm(s, p, depth, n_gen if r >= 0 else min(n_gen, 4))
                    if r < 0:
                        continue
                    row.samples_ts.append(speed)
                    if p is not None:
                        reason = why or reason
                        c = {k: c.get(k, 0) + n for k, n in counters.items()}
                    done += 1
                    report("benchmarking", done, total)
            dense, fasa = pair
            steps = n_gen * repetitions
            dense.kv_bytes = row_bytes * (depth + 1 + (n_gen + 1) / 2)
            dense.ratio, fasa.ratio = 1.0, fasa.avg_ts / dense.avg_ts
            fasa.sparse_share = c["steps_sparse"] / steps
            executions = (c["layers_sparse"] + c["layers_dense"]) / max(c["steps_sparse"], 1) * steps   # layers x steps
            sparse = c["layers_sparse"] / max(executions, 1)
            fasa.kv_bytes = (c["bytes_fac"] + c["bytes_tip"]) / steps + (1 - sparse) * dense.kv_bytes
            if c["lists"]:
                fasa.tokens_attended = c["rows_attended"] / c["lists"]
            if c["steps_sparse"] < steps:
                fasa.note = f"dense (n < {params.min_context})" if "min_context" in reason else f"dense ({reason})"
                if c["steps_sparse"]:
                    fasa.note = f"{steps - c['steps_sparse']} of {steps} steps {fasa.note}"
            elif c["layers_dense"]:
                reasons = sorted({x for x in s.fasa.layer_reasons() if x})
                fasa.note = f"{c['layers_dense'] // steps} layers dense ({'; '.join(reasons)})"
            rows += pair
    if not any(r.sparse_share for r in rows):
        raise FasaError(f"FASA was asked for and no step of the run used it: {reason}; use deeper -d DEPTHS or a smaller --fasa-min-context")
    return rows


def crossover(rows: Sequence[Row], noise: float = NOISE) -> int | None:
    """The smallest measured depth from which on FASA, at every measured depth, is no slower than dense; None: there is none.

    Only rows that ran sparse count. "No slower": at most `noise` (a share) below dense's mean.
    """
    found = None
    for r in sorted((r for r in rows if r.arm == "fasa"), key=lambda r: -r.n_depth):
        if not r.sparse_share or r.ratio is None or r.ratio < 1 - noise:
            break
        found = r.n_depth
    return found


def find_crossover(model: str | os.PathLike, params: FasaParams, depths: Sequence[int] = (256, 512, 768, 1024, 1536, 2048, 3072, 4096),
                   **kw: Any) -> tuple[int | None, list[Row]]:
    """(depth, rows): `bench` with FASA at every depth; the depth is what `min_context` should be. kw: as bench's."""
    rows = bench(model, depths, params.replace(min_context=0), **kw)
    return crossover(rows), rows


def crossover_text(depth: int | None, rows: Sequence[Row]) -> str:
    """One sentence."""
    if depth is None:
        return f"FASA is slower than dense at depth {max(r.n_depth for r in rows)}: no crossover among the depths measured."
    if depth == min(r.n_depth for r in rows):
        return f"FASA is no slower than dense from depth {depth} on, the smallest one measured: --fasa-min-context {depth}, or less."
    return f"FASA is no slower than dense from depth {depth} on: --fasa-min-context {depth}."


# ---- output ----


def table(rows: Sequence[Row], model: str) -> str:
    """llama-bench's markdown, with the arm, the bytes, the tokens attended and the ratio."""
    head = ["model", "test", "arm", "t/s", "KV MB/token", "attended", "ratio"]
    cells = []
    for r in rows:
        attended = "all" if r.arm == "dense" else r.note if r.tokens_attended is None else f"{r.tokens_attended:.0f}"
        if r.tokens_attended is not None and r.note:
            attended += f"; {r.note}"
        cells.append([os.path.basename(model)[:40], f"tg{r.n_gen} @ d{r.n_depth}", r.arm, f"{r.avg_ts:.2f} +- {r.stddev_ts:.2f}",
                      f"{r.kv_bytes / 1e6:.2f}", attended, "" if r.arm == "dense" or r.ratio is None else f"{r.ratio:.2f}x"])
    width = [max(len(line[i]) for line in [head, *cells]) for i in range(len(head))]
    show = lambda line: "| " + " | ".join(x.ljust(w) if i == 0 else x.rjust(w) for i, (x, w) in enumerate(zip(line, width))) + " |"
    rule = "| " + " | ".join("-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(width)) + " |"
    return "\n".join([show(head), rule, *map(show, cells)])


def as_json(rows: Sequence[Row], model: str, params: FasaParams) -> list[dict[str, Any]]:
    """llama-bench's names and ours; `fasa` holds the settings of the FASA arm."""
    extra = {"build_commit": f"fasa_gguf {native.version()}, llama-cpp-python {native.LLAMA_CPP_VERSION}", "model_filename": str(model)}
    return [{**r.as_dict(extra), "fasa": None if r.arm == "dense" else dict(params.__dict__)} for r in rows]


def render(rows: Sequence[Row], model: str, params: FasaParams, output: str = "md") -> str:
    """The rows as md (a table), json, jsonl or csv (settings as fasa_budget, ...; samples separated by spaces)."""
    if output == "md":
        return table(rows, model)
    entries = as_json(rows, model, params)
    if output == "json":
        return json.dumps(entries, indent=1)
    if output == "jsonl":
        return "\n".join(json.dumps(e) for e in entries)
    if output == "csv":
        out = io.StringIO()
        flat = [{**{k: v for k, v in e.items() if k != "fasa"}, "samples_ts": " ".join(f"{x:.6g}" for x in e["samples_ts"]),
                 **{f"fasa_{k}": (e["fasa"] or {}).get(k) for k in params.__dict__}} for e in entries]
        writer = csv.DictWriter(out, list(flat[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
        return out.getvalue().rstrip("\n")
    raise FasaError(f"-o {output!r}: expected one of {', '.join(FORMATS)}")
