"""Calibration from the GGUF itself: the model reads a text, dense; its post-RoPE queries and keys say which chunks are dominant.

Memory is bounded whatever the text's length: energies are running sums, and the greedy ranking keeps the keys of one window
and the queries at its end, one layer after the other (a window is read once for a group of layers).
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

import numpy as np

from . import __version__, native, reference
from .embed import read_shape, weights_sha256
from .errors import FasaError
from .gguf_file import GGUFFile
from .profile import METHODS, Profile
from .session import Session

TOOL = f"fasa_gguf {__version__}"


@dataclass(frozen=True)
class CalibrationParams:
    """What a calibration reads and how it ranks; units are tokens unless said otherwise."""

    method: str = "recall"     # recall, energy or ca
    context: int = 4096        # length of a window; shorter when the model's context is
    windows: int = 1           # windows read; energy and ca average over them, recall and the weights come from the first
    queries: int = 96          # last queries of a window that recall, ca and the weights see
    budget: int = 256          # tokens whose attention mass the ranking maximises
    sink: int = 4
    recent: int = 32
    rank_share: float = 0.5    # share of the chunks that are chosen greedily; the rest follows by energy
    weight_share: float = 0.375  # share of the chunks that get a weight
    memory: int = 512 << 20    # bytes that one pass may keep


def default_corpus() -> tuple[str, str]:
    """(name, text): prose that every Python installation carries, the pydoc topics."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise FasaError("this Python carries no pydoc topics to calibrate on; give a text with -f TEXT") from None
    return "python pydoc topics", "\n\n".join(topics[name] for name in sorted(topics))


@dataclass
class _Seen:
    """What the observer gathers of one layer."""

    q_sum: np.ndarray            # float64 [n_head_kv, n_chunk] sum of the query pairs' lengths, over the group
    k_sum: np.ndarray            # float64 [n_head_kv, n_chunk]
    n: int = 0                   # tokens seen, over all windows
    q: list[np.ndarray] = field(default_factory=list)  # per window float32 [n_queries, n_head, head_dim]
    k: list[np.ndarray] = field(default_factory=list)  # per window float16 [context, n_head_kv, head_dim]
    scale: float = 1.0
    soft_cap: float = 0.0


class Calibration:
    """One run: `profile = Calibration(session, text, params).run(progress)`."""

    def __init__(self, session: Session, corpus: tuple[str, str], params: CalibrationParams, n_threads: int = 0) -> None:
        self.session, self.params = session, params
        self.n_threads = n_threads or os.cpu_count() or 1
        self.name, text = corpus
        path = session.path
        if params.method not in METHODS[:3]:
            raise FasaError(f"ranking method {params.method!r}: expected one of {', '.join(METHODS[:3])}")
        info = session.fasa.model_info()
        self.arch = arch = GGUFFile(path).arch
        if info["is_mla"]:
            raise FasaError(f"{path}: architecture {arch} has multi-head latent attention, which has no keys per head to rank; FASA does not apply")
        if info["rope_layout"] < 0:
            raise FasaError(f"{path}: architecture {arch} has no RoPE, so it has no frequency chunks; FASA does not apply")
        self.layout = ("norm", "neox")[info["rope_layout"]]
        self.info = info
        self.shapes = [session.fasa.layer_shape(il) for il in range(info["n_layer"])]
        if not any(shape[1] for shape in self.shapes):
            raise FasaError(f"{path}: architecture {arch} has no attention layer with a KV cache; FASA does not apply")
        self.context = min(params.context, session.n_ctx, session.n_ctx_train)
        least = max(2 * params.queries, params.sink + params.recent + 2, 256)
        if self.context < least:
            raise FasaError(f"{path}: a window of {self.context} tokens (asked for {params.context}, the model has {session.n_ctx_train}); "
                            f"calibration needs at least {least}; use a larger -c")
        tokens = session.tokenize(text[: 16 * self.context * params.windows])
        if len(tokens) < self.context * params.windows:
            self.context = len(tokens) // params.windows
        if self.context < least:
            raise FasaError(f"{self.name}: the text has {len(tokens)} tokens; calibration needs at least {least * params.windows}; use a longer -f TEXT")
        self.tokens = [tokens[i * self.context : (i + 1) * self.context] for i in range(params.windows)]
        self.corpus_sha256 = hashlib.sha256(text.encode()).hexdigest()

    # ---- reading ----

    def _dims(self, il: int) -> np.ndarray:
        _, _, width, n_rot = self.shapes[il]
        return reference.chunk_dims(width, n_rot, self.layout)

    def _pass(self, layers: list[int], tick: Callable[[int], None]) -> dict[int, _Seen]:
        """Read all windows once, keeping what `layers` need."""
        seen = {il: _Seen(*(np.zeros((self.shapes[il][1], self.shapes[il][2] // 2)) for _ in range(2))) for il in layers}
        dims = {il: self._dims(il) for il in layers}
        n_ubatch = self.session.llama.llama_n_ubatch(self.session.ctx)
        read = 0  # tokens of all windows read before the ubatch at hand

        def observe(o: native.Observation) -> None:
            if o.il not in seen:
                return
            s, d = seen[o.il], dims[o.il]
            n, at = len(o.q), read % self.context                                   # tokens, and the position of the first
            pair = np.hypot(*np.moveaxis(o.q[:, :, d], -1, 0))                      # [n, n_head, n_chunk]
            s.q_sum += pair.sum(0).reshape(len(s.q_sum), -1, len(d)).mean(1)
            new = o.k[at : at + n].astype(np.float32)                               # [n, n_head_kv, head_dim]
            s.k_sum += np.hypot(*np.moveaxis(new[:, :, d], -1, 0)).sum(0)
            s.n += n
            s.scale, s.soft_cap = o.scale, o.soft_cap
            first = self.context - self.params.queries
            if at + n > first:                                                       # queries at the end of the window
                part = o.q[max(0, first - at) :]
                if at <= first:
                    s.q.append(part)
                else:
                    s.q[-1] = np.concatenate([s.q[-1], part])
            if at + n == self.context:
                s.k.append(o.k[: self.context].copy())

        self.session.fasa.observe(observe)
        try:
            for window in self.tokens:
                self.session.clear()
                for i in range(0, len(window), n_ubatch):                            # one ubatch a call: its position is known
                    part = window[i : i + n_ubatch]
                    self.session.decode(part, i, logits="none")
                    read += len(part)
                    tick(len(part))
        finally:
            self.session.fasa.observe(None)
            self.session.clear()
        return seen

    # ---- ranking ----

    def _budget(self) -> int:
        """Tokens that the ranking keeps; at most half of a window, or there is nothing to choose."""
        return min(self.params.budget, self.context // 2)

    def _rank_layer(self, il: int, s: _Seen) -> dict[str, Any]:
        """Ranking, weights and recall of one layer, as plain lists."""
        p, dims = self.params, self._dims(il)
        n_head, n_kv_heads, _, _ = self.shapes[il]
        n_chunk, group = len(dims), n_head // n_kv_heads
        pos = np.arange(self.context - p.queries, self.context)
        n_rank = max(1, int(n_chunk * p.rank_share))
        n_weight = max(1, int(n_chunk * p.weight_share))
        budget = self._budget()
        out: dict[str, Any] = {"ranking": [], "weight": [], "recall": []}
        for h in range(n_kv_heads):
            energy = reference.rank_energy(s.q_sum[h] / s.n, s.k_sum[h] / s.n)
            heads = [np.ascontiguousarray(q[:, h * group : (h + 1) * group].transpose(1, 0, 2)) for q in s.q]   # [G, n_q, d] each
            keys = [k[:, h].astype(np.float32) for k in s.k]                                                    # [n, d] each
            order, recall = energy, []
            if p.method == "ca":
                rank = np.mean([np.argsort(reference.rank_ca(q, k, pos, dims, s.scale, budget)) for q, k in zip(heads, keys)], 0)
                order = np.argsort(rank, kind="stable")
            elif p.method == "recall":
                best, kept = native.rank_recall(heads[0], keys[0], pos, dims, n_rank, budget, p.sink, p.recent, s.scale, s.soft_cap,
                                                n_threads=self.n_threads)
                order = np.concatenate([best, [c for c in energy if c not in set(best.tolist())]])
                recall = kept.tolist()
            weight = reference.fit_weights(heads[0][:, ::4], keys[0], pos[::4], dims, np.asarray(order[:n_weight], int), s.scale,
                                           s.soft_cap)
            out["ranking"].append([int(c) for c in order])
            out["weight"].append([float(w) for w in weight])
            out["recall"].append(recall)
        return out

    def _key(self) -> str:
        text = json.dumps([TOOL, self.params.__dict__, self.context, self.corpus_sha256, os.path.getsize(self.session.path),
                           os.path.getmtime(self.session.path), self.session.path])
        return f"{zlib.crc32(text.encode()):08x}"

    def run(self, out: str | os.PathLike | None = None, progress: Callable[[str, int, int], None] | None = None) -> Profile:
        """The profile. With `out`, finished layers are kept in OUT.partial, and an interrupted run goes on from there."""
        layers = [il for il, shape in enumerate(self.shapes) if shape[1] and shape[2] % 2 == 0 and shape[0] % shape[1] == 0]
        if out and not Path(out).resolve().parent.is_dir():
            raise FasaError(f"{out}: the folder does not exist; make it, or give another -o")
        partial = Path(f"{out}.partial") if out else None
        done: dict[int, dict | None] = {}
        if partial and partial.exists():
            try:
                saved = json.loads(partial.read_text())
                if saved["key"] == self._key():
                    done = {int(il): entry for il, entry in saved["layers"].items()}
            except (ValueError, KeyError, TypeError, OSError, AttributeError):
                pass  # another run's, or half written: start again
        kept = max(sum(2 * self.shapes[il][1] * self.shapes[il][2] for il in layers) // len(layers), 1) * self.context * self.params.windows
        per_pass = max(1, self.params.memory // kept)
        report = progress or (lambda what, n, total: None)
        todo = [il for il in layers if il not in done]
        passes = [todo[i : i + per_pass] for i in range(0, len(todo), per_pass)]
        n_total, n_read = len(passes) * self.context * self.params.windows, 0
        for group in passes:
            def tick(n: int) -> None:
                nonlocal n_read
                n_read += n
                report("reading", n_read, n_total)

            seen = self._pass(group, tick)
            for il in group:
                s = seen.pop(il)
                done[il] = self._rank_layer(il, s) if s.k else None                  # None: its attention is of another kind
                report("ranking", len(done), len(layers))
                if partial:
                    self._save(partial, done)
        done = {il: entry for il, entry in done.items() if entry is not None}
        if not done:
            raise FasaError(f"{self.session.path}: no layer of architecture {self.arch} showed its queries and keys; FASA does not apply")
        profile = self._profile(done)
        if out:
            profile.save(out)
            partial.unlink(missing_ok=True)
        return profile

    def _save(self, partial: Path, done: dict[int, dict | None]) -> None:
        temporary = Path(f"{partial}.tmp")
        try:
            temporary.write_text(json.dumps({"key": self._key(), "layers": done}))
            os.replace(temporary, partial)
        except OSError as e:
            raise FasaError(f"{partial}: cannot be written: {e.strerror or e}") from None

    def _profile(self, done: dict[int, dict]) -> Profile:
        n_layer = len(self.shapes)
        n_chunk = [len(done[il]["ranking"][0]) if il in done else 0 for il in range(n_layer)]
        none = np.zeros((0, 0))
        most = max(n_chunk)
        weight_k = max(1, int(most * self.params.weight_share))
        recall_k = max(1, int(most * self.params.rank_share)) if self.params.method == "recall" else 0
        same = len({n for n in n_chunk if n}) == 1  # per-chunk extras only where all layers have one shape
        model = GGUFFile(self.session.path)
        return Profile(
            n_head_kv=[shape[1] for shape in self.shapes], n_chunk=n_chunk,
            ranking=[np.array(done[il]["ranking"], np.uint16) if il in done else none.astype(np.uint16) for il in range(n_layer)],
            ranking_method=self.params.method,
            rope={"layout": self.layout, "dims": max(shape[3] for shape in self.shapes), "base": float(self.info["rope_base"]),
                  "scale": float(self.info["rope_scale"])},
            weight=[np.array(done[il]["weight"], np.float32) if il in done else none for il in range(n_layer)] if same else None,
            weight_k=weight_k if same else 0,
            recall=[np.array(done[il]["recall"], np.float32) if il in done else none for il in range(n_layer)] if same and recall_k else None,
            recall_k=recall_k if same else 0, recall_budget=self._budget() if recall_k and same else 0,
            calibration={"tool": TOOL, "corpus": self.name, "corpus_sha256": self.corpus_sha256,
                         "tokens": self.context * self.params.windows, "context": self.context, "source": "gguf",
                         "weights_sha256": weights_sha256(model)})


def calibrate(model: str | os.PathLike, corpus: tuple[str, str] | None = None, params: CalibrationParams | None = None,
              out: str | os.PathLike | None = None, n_threads: int = 0, n_gpu_layers: int = 0,
              progress: Callable[[str, int, int], None] | None = None) -> Profile:
    """Calibrate a GGUF on a text (name, content); default_corpus() when none is given.

    progress(what, done, total). Raises FasaError for a model out of scope (no RoPE, MLA, no attention), a text that is too
    short, an unknown method.
    """
    params = params or CalibrationParams()
    read_shape(GGUFFile(model))                                                      # refuses what is out of scope, by name
    with Session(model, n_ctx=params.context, n_threads=n_threads, n_gpu_layers=n_gpu_layers) as probe:
        return Calibration(probe, corpus or default_corpus(), params, n_threads).run(out, progress)
