"""Calibration: the model reads a text, dense; its post-RoPE queries and keys say which chunks are dominant.

`Calibrator` is what every source shares; `Calibration` reads the GGUF itself with llama.cpp, hf.py the Hugging Face weights.
Memory is bounded whatever the text's length: energies are running sums, and the greedy ranking keeps the keys of one window
and the queries at its end, one layer after the other (a window is read once for a group of layers).
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__, reference, runtime
from ..errors import FasaError
from ..gguf.file import GGUFFile
from ..gguf.shape import read_shape, sliding_windows, weights_sha256
from ..profile.keys import MAX_CHUNKS, METHODS
from ..profile.profile import Profile
from ..session import Session
from .ranking import CalibrationParams, LayerSample, rank_layer

TOOL = f"fasa_gguf {__version__}"
Corpus = tuple[str, "str | Sequence[int]"]  # name, and a text or token ids


def default_corpus() -> tuple[str, str]:
    """(name, text): prose that every Python installation carries, the pydoc topics."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise FasaError("this Python carries no pydoc topics to calibrate on; give a text with -f TEXT") from None
    return "python pydoc topics", "\n\n".join(topics[name] for name in sorted(topics))


class Calibrator:
    """One run: `profile = SomeCalibrator(...).run(progress)`. What a source adds: the fields below, `_pass` and `_origin`."""

    where: str  # the model's path, for messages
    arch: str
    layout: str  # norm or neox
    rope: dict[str, float]  # base, scale
    shapes: list[tuple[int, int, int, int]]  # per layer (n_head, n_head_kv, head_dim, n_rot); n_head_kv 0: no attention
    windows: list[int]  # per layer, the last tokens that a query attends; 0: all

    def __init__(self, params: CalibrationParams, n_threads: int = 0) -> None:
        self.params, self.n_threads = params, n_threads or os.cpu_count() or 1
        if not 0 <= params.chunks <= MAX_CHUNKS:
            raise FasaError(f"--chunks {params.chunks}: expected 0 to {MAX_CHUNKS}")
        if params.method not in METHODS[:3]:
            raise FasaError(f"ranking method {params.method!r}: expected one of {', '.join(METHODS[:3])}")

    def _refuse(self, why: str) -> FasaError:
        return FasaError(f"{self.where}: architecture {self.arch} {why}; FASA does not apply")

    def _read(self, corpus: Corpus, n_most: int, tokenize: Callable[[str], Sequence[int]]) -> None:
        """Cut the corpus into windows of at most n_most tokens. Raises FasaError when it, or the model's context, is too short."""
        self.name, content = corpus
        p, self.context = self.params, min(self.params.context, n_most)
        least = max(2 * p.queries, p.sink + p.recent + 2, 256)
        if self.context < least:
            raise FasaError(
                f"{self.where}: a window of {self.context} tokens (asked for {p.context}, the model has {n_most}); "
                f"calibration needs at least {least}; use a larger -c"
            )
        if isinstance(content, str):
            tokens = tokenize(content[: 16 * self.context * p.windows])
            self.corpus_sha256 = hashlib.sha256(content.encode()).hexdigest()
        else:
            tokens = [int(t) for t in content]
            self.corpus_sha256 = hashlib.sha256(np.asarray(tokens, "<i4").tobytes()).hexdigest()
        if len(tokens) < self.context * p.windows:
            self.context = len(tokens) // p.windows
        if self.context < least:
            raise FasaError(
                f"{self.name}: the text has {len(tokens)} tokens; calibration needs at least {least * p.windows}; use a longer -f TEXT"
            )
        self.tokens = [list(tokens[i * self.context : (i + 1) * self.context]) for i in range(p.windows)]

    # ---- what a source adds ----

    def _pass(self, layers: list[int], tick: Callable[[int], None]) -> dict[int, LayerSample]:
        """Read all windows once and return the samples of `layers`; tick(n) after n tokens."""
        raise NotImplementedError

    def _origin(self) -> dict[str, str]:
        """Where the profile comes from: the keys fasa.calibration.source and weights_sha256."""
        raise NotImplementedError

    def _identity(self) -> list[Any]:
        """What tells this model from another one of the same path, as JSON."""
        raise NotImplementedError

    # ---- ranking ----

    def _dims(self, il: int) -> np.ndarray:
        _, _, width, n_rot = self.shapes[il]
        return reference.chunk_dims(width, n_rot, self.layout)

    def _samples(self, layers: list[int]) -> dict[int, LayerSample]:
        """An empty sample for each layer."""
        out = {il: LayerSample(self.shapes[il][1], self._dims(il), self.context, self.params) for il in layers}
        for il, s in out.items():
            s.window = self.windows[il] if self.windows[il] < self.context else 0
        return out

    def _rank_layer(self, il: int, s: LayerSample) -> dict[str, Any]:
        return rank_layer(s, self.n_threads)

    def _passes(self, todo: list[int]) -> list[list[int]]:
        """The layers of each pass, so that one keeps at most params.memory bytes."""
        windows = (
            2 if self.params.method == "ca" and self.params.windows > 1 else 1
        )  # the first window's keys, and those at hand
        kept = (
            max(sum(2 * self.shapes[il][1] * self.shapes[il][2] for il in todo) // max(len(todo), 1), 1)
            * self.context
            * windows
        )
        per_pass = max(1, self.params.memory // kept)
        return [todo[i : i + per_pass] for i in range(0, len(todo), per_pass)]

    def _key(self) -> str:
        text = json.dumps([TOOL, self.params.__dict__, self.context, self.corpus_sha256, *self._identity(), self.where])
        return f"{zlib.crc32(text.encode()):08x}"

    def _resume(self, partial: Path | None) -> dict[int, dict | None]:
        """The layers that an interrupted run has finished."""
        if partial and partial.exists():
            try:
                saved = json.loads(partial.read_text())
                if saved["key"] == self._key():
                    return {int(il): entry for il, entry in saved["layers"].items()}
            except (ValueError, KeyError, TypeError, OSError, AttributeError):
                pass  # another run's, or half written: start again
        return {}

    def run(
        self, out: str | os.PathLike | None = None, progress: Callable[[str, int, int], None] | None = None
    ) -> Profile:
        """The profile. With `out`, finished layers are kept in OUT.partial, and an interrupted run goes on from there."""
        layers = [
            il for il, shape in enumerate(self.shapes) if shape[1] and shape[2] % 2 == 0 and shape[0] % shape[1] == 0
        ]
        if out and not Path(out).resolve().parent.is_dir():
            raise FasaError(f"{out}: the folder does not exist; make it, or give another -o")
        partial = Path(f"{out}.partial") if out else None
        done = self._resume(partial)
        report = progress or (lambda what, n, total: None)
        passes = self._passes([il for il in layers if il not in done])
        n_total, n_read = len(passes) * self.context * self.params.windows, 0
        for group in passes:

            def tick(n: int) -> None:
                nonlocal n_read
                n_read += n
                report("reading", n_read, n_total)

            seen = self._pass(group, tick)
            for il in group:
                s = seen.pop(il)
                done[il] = (
                    self._rank_layer(il, s) if s.k is not None else None
                )  # None: its attention is of another kind
                report("ranking", len(done), len(layers))
                if partial:
                    self._save(partial, done)
        done = {il: entry for il, entry in done.items() if entry is not None}
        if not done:
            raise FasaError(
                f"{self.where}: no layer of architecture {self.arch} showed its queries and keys; FASA does not apply"
            )
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
        n_rank, weight_k = self.params.counts(most)
        recall_k = n_rank if self.params.method == "recall" else 0
        same = len({n for n in n_chunk if n}) == 1  # per-chunk extras only where all layers have one shape
        return Profile(
            n_head_kv=[shape[1] for shape in self.shapes],
            n_chunk=n_chunk,
            ranking=[
                np.array(done[il]["ranking"], np.uint16) if il in done else none.astype(np.uint16)
                for il in range(n_layer)
            ],
            ranking_method=self.params.method,
            rope={"layout": self.layout, "dims": max(shape[3] for shape in self.shapes), **self.rope},
            weight=[np.array(done[il]["weight"], np.float32) if il in done else none for il in range(n_layer)]
            if same
            else None,
            weight_k=weight_k if same else 0,
            recall=[np.array(done[il]["recall"], np.float32) if il in done else none for il in range(n_layer)]
            if same and recall_k
            else None,
            recall_k=recall_k if same else 0,
            recall_budget=self.params.budget_in(self.context) if recall_k and same else 0,
            defaults={"chunks": min(self.params.chunks, most)} if self.params.chunks else {},
            calibration={
                "tool": TOOL,
                "corpus": self.name,
                "corpus_sha256": self.corpus_sha256,
                "tokens": self.context * self.params.windows,
                "context": self.context,
                **self._origin(),
            },
        )


class Calibration(Calibrator):
    """From a GGUF, read by llama.cpp: `profile = Calibration(session, corpus, params).run(progress)`."""

    def __init__(self, session: Session, corpus: Corpus, params: CalibrationParams, n_threads: int = 0) -> None:
        super().__init__(params, n_threads)
        self.session, self.where = session, session.path
        info, model = session.fasa.model_info(), GGUFFile(session.path)
        self.arch = model.arch
        if info["is_mla"]:
            raise self._refuse("has multi-head latent attention, which has no keys per head to rank")
        if info["rope_layout"] < 0:
            raise self._refuse("has no RoPE, so it has no frequency chunks")
        self.layout = ("norm", "neox")[info["rope_layout"]]
        self.rope = {"base": float(info["rope_base"]), "scale": float(info["rope_scale"])}
        self.shapes = [session.fasa.layer_shape(il) for il in range(info["n_layer"])]
        if not any(shape[1] for shape in self.shapes):
            raise self._refuse("has no attention layer with a KV cache")
        self.windows = sliding_windows(model, info["n_layer"])
        self._read(corpus, min(session.n_ctx, session.n_ctx_train), session.tokenize)

    def _origin(self) -> dict[str, str]:
        return {"source": "gguf", "weights_sha256": weights_sha256(GGUFFile(self.where))}

    def _identity(self) -> list[Any]:
        return [os.path.getsize(self.where), os.path.getmtime(self.where)]

    def _pass(self, layers: list[int], tick: Callable[[int], None]) -> dict[int, LayerSample]:
        """Read all windows once, keeping what `layers` need."""
        seen = self._samples(layers)
        n_ubatch = self.session.llama.llama_n_ubatch(self.session.ctx)
        at = 0  # position of the first token of the ubatch at hand

        def observe(o: runtime.context.Observation) -> None:
            if o.il in seen:
                s, n = seen[o.il], len(o.q)
                s.scale, s.soft_cap = o.scale, o.soft_cap
                s.add(o.q, o.k[at : at + n], at)
                if at + n == self.context:
                    s.end(o.k[: self.context])

        self.session.fasa.observe(observe)
        try:
            for window in self.tokens:
                self.session.clear()
                for at in range(0, len(window), n_ubatch):  # one ubatch a call: its position is known
                    part = window[at : at + n_ubatch]
                    self.session.decode(part, at, logits="none")
                    tick(len(part))
                for s in seen.values():
                    s.fold()
        finally:
            self.session.fasa.observe(None)
            self.session.clear()
        return seen


def calibrate(
    model: str | os.PathLike,
    corpus: Corpus | None = None,
    params: CalibrationParams | None = None,
    out: str | os.PathLike | None = None,
    n_threads: int = 0,
    n_gpu_layers: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Profile:
    """Calibrate a GGUF on a text (name, content); default_corpus() when none is given. The content may be token ids.

    progress(what, done, total). Raises FasaError for a model out of scope (no RoPE, MLA, no attention), a text that is too
    short, an unknown method.
    """
    params = params or CalibrationParams()
    read_shape(GGUFFile(model))  # refuses what is out of scope, by name
    with Session(model, n_ctx=params.context, n_threads=n_threads, n_gpu_layers=n_gpu_layers) as probe:
        return Calibration(probe, corpus or default_corpus(), params, n_threads).run(out, progress)
