"""What every calibration shares: the model reads a text, dense, and its post-RoPE queries and keys rank the chunks.

Two sources build on `Calibrator`: gguf.py, where llama.cpp reads the GGUF, and hf.py, where transformers reads Hugging
Face weights. Memory is bounded whatever the text's length: energies are running sums, and the greedy ranking keeps the
keys of one window and the queries at its end for one group of layers. The window is read once for each group.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__, reference
from ..errors import FasaError
from ..params import FasaParams
from ..profile.keys import MAX_CHUNKS, METHODS
from ..profile.profile import Profile
from ..runtime.settings import thread_count
from .corpus import Corpus
from .ranking import CalibrationParams, LayerSample, k_dom_for, may_select_ahead, rank_layer

TOOL = f"fasa_gguf {__version__}"
ATTENDED = max(FasaParams().budget, FasaParams().cap)  # tokens that decoding attends at most, by default
Progress = Callable[[str, int, int], None]  # what, done, total
Ranked = dict[int, "dict[str, Any] | None"]  # by layer what rank_layer returns; None: attention of another kind


class Calibrator:
    """One run: `profile = SomeCalibrator(...).run(out, progress)`.

    A source sets the fields below, and defines `_pass`, `_origin` and `_identity`.
    """

    where: str  # the model's path, for messages
    arch: str
    layout: str  # norm or neox
    rope: dict[str, float]  # base, scale
    shapes: list[tuple[int, int, int, int]]  # per layer (n_head, n_head_kv, head_dim, n_rot); n_head_kv 0: no attention
    windows: list[int]  # per layer, the last tokens that a query attends; 0: all

    def __init__(self, params: CalibrationParams, n_threads: int = 0) -> None:
        self.params, self.n_threads = params, thread_count(n_threads)
        if not 0 <= params.chunks <= MAX_CHUNKS:
            raise FasaError(f"--chunks {params.chunks}: expected 0 to {MAX_CHUNKS}")
        if params.method not in METHODS[:3]:
            raise FasaError(f"ranking method {params.method!r}: expected one of {', '.join(METHODS[:3])}")

    def _refuse(self, why: str) -> FasaError:
        return FasaError(f"{self.where}: architecture {self.arch} {why}; FASA does not apply")

    def _read(self, corpus: Corpus, n_most: int, tokenize: Callable[[str], Sequence[int]]) -> None:
        """Cut the corpus into windows of at most n_most tokens.

        Raises FasaError when the corpus or the model's context is too short.
        """
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
                f"{self.name}: the text has {len(tokens)} tokens; calibration needs at least {least * p.windows}; "
                "use a longer -f TEXT"
            )
        self.tokens = [list(tokens[i * self.context : (i + 1) * self.context]) for i in range(p.windows)]

    # ---- what a source adds ----

    def _pass(self, layers: list[int], tick: Callable[[int], None]) -> dict[int, LayerSample]:
        """Read all windows once and return the samples of `layers`; tick(n) after n tokens."""
        raise NotImplementedError

    def _origin(self) -> dict[str, str]:
        """Where the profile comes from: the values of the keys fasa.calibration.source and weights_sha256."""
        raise NotImplementedError

    def _identity(self) -> list[Any]:
        """What tells this model from another one of the same path; JSON can hold it."""
        raise NotImplementedError

    # ---- ranking ----

    def _to_rank(self) -> list[int]:
        """The layers that are ranked: a window that a list would hold whole makes sparse attention pointless.

        Raises FasaError when only such layers are there.
        """
        layers = [
            il for il, (n_head, n_kv, width, _) in enumerate(self.shapes) if n_kv and not (width % 2 or n_head % n_kv)
        ]
        if self.params.window_layers:
            return layers
        reach = [il for il in layers if not 0 < self.windows[il] <= ATTENDED]
        if layers and not reach:
            raise FasaError(
                f"{self.where}: every attention layer has a sliding window of at most "
                f"{max(self.windows[il] for il in layers)} tokens, and decoding attends up to {ATTENDED}; rank them "
                "with --window-layers, and decode with a smaller budget or cap than the window"
            )
        return reach

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
        # ca keeps the keys of two windows, the first and the current one
        windows = 2 if self.params.method == "ca" and self.params.windows > 1 else 1
        per_token = sum(2 * self.shapes[il][1] * self.shapes[il][2] for il in todo) // max(len(todo), 1)  # f16
        per_pass = max(1, self.params.memory // (max(per_token, 1) * self.context * windows))
        return [todo[i : i + per_pass] for i in range(0, len(todo), per_pass)]

    def _key(self) -> str:
        text = json.dumps(
            [TOOL, "ahead", self.params.__dict__, self.context, self.corpus_sha256, *self._identity(), self.where]
        )
        return f"{zlib.crc32(text.encode()):08x}"

    def _resume(self, partial: Path | None) -> Ranked:
        """The layers that an interrupted run has finished."""
        if partial and partial.exists():
            try:
                saved = json.loads(partial.read_text())
                if saved["key"] == self._key():
                    return {int(il): entry for il, entry in saved["layers"].items()}
            except (ValueError, KeyError, TypeError, OSError, AttributeError):
                pass  # another run's, or half written: start again
        return {}

    def run(self, out: str | os.PathLike | None = None, progress: Progress | None = None) -> Profile:
        """The profile. With `out` it is saved there, and a later run continues from the layers in OUT.partial.

        progress(what, done, total). Raises FasaError when `out` cannot be written, or no layer shows queries and keys.
        """
        if out and not Path(out).resolve().parent.is_dir():
            raise FasaError(f"{out}: the folder does not exist; make it, or give another -o")
        partial = Path(f"{out}.partial") if out else None
        done = self._rank_layers(self._resume(partial), partial, progress or (lambda what, n, total: None))
        ranked = {il: entry for il, entry in done.items() if entry is not None}
        if not ranked:
            raise FasaError(
                f"{self.where}: no layer of architecture {self.arch} showed its queries and keys; FASA does not apply"
            )
        profile = self._profile(ranked)
        if out and partial:
            profile.save(out)
            partial.unlink(missing_ok=True)
        return profile

    def _rank_layers(self, done: Ranked, partial: Path | None, progress: Progress) -> Ranked:
        """`done` with the layers that it lacks, read in as few passes as the memory allows."""
        layers = self._to_rank()
        passes = self._passes([il for il in layers if il not in done])
        n_total, n_read = len(passes) * self.context * self.params.windows, 0

        def tick(n: int) -> None:
            nonlocal n_read
            n_read += n
            progress("reading", n_read, n_total)

        for group in passes:
            seen = self._pass(group, tick)
            for il in group:
                s = seen.pop(il)
                done[il] = self._rank_layer(il, s) if s.k is not None else None
                progress("ranking", len(done), len(layers))
                if partial:
                    self._save(partial, done)
        return done

    def _save(self, partial: Path, done: Ranked) -> None:
        temporary = Path(f"{partial}.tmp")
        try:
            temporary.write_text(json.dumps({"key": self._key(), "layers": done}))
            os.replace(temporary, partial)
        except OSError as e:
            raise FasaError(f"{partial}: cannot be written: {e.strerror or e}") from None

    def _profile(self, done: dict[int, dict]) -> Profile:
        n_layer = len(self.shapes)
        n_chunk = [len(done[il]["ranking"][0]) if il in done else 0 for il in range(n_layer)]
        most = max(n_chunk)

        def layers(key: str, kind: type) -> list[np.ndarray]:
            return [np.array(done[il][key], kind) if il in done else np.zeros((0, 0), kind) for il in range(n_layer)]

        kind, why = k_dom_for({il: entry["kept"] for il, entry in done.items() if entry.get("kept")})
        if why:
            print(f"fasa_gguf: {self.where}: {why}", file=sys.stderr)
        profile = Profile(
            n_head_kv=[shape[1] for shape in self.shapes],
            n_chunk=n_chunk,
            ranking=layers("ranking", np.uint16),
            ranking_method=self.params.method,
            rope={"layout": self.layout, "dims": max(shape[3] for shape in self.shapes), **self.rope},
            window=list(self.windows) if any(self.windows) else None,
            defaults={
                **({"chunks": min(self.params.chunks, most)} if self.params.chunks else {}),
                **({"k_dom": kind} if why else {}),
            },
            calibration={
                "tool": TOOL,
                "corpus": self.name,
                "corpus_sha256": self.corpus_sha256,
                "tokens": self.context * self.params.windows,
                "context": self.context,
                **self._origin(),
            },
        )
        if len({n for n in n_chunk if n}) == 1:  # a profile has one weight_k and one recall_k for all layers
            n_rank, profile.weight_k = self.params.counts(most)
            profile.weight = layers("weight", np.float32)
            if self.params.method == "recall":
                profile.recall_k, profile.recall_budget = n_rank, self.params.budget_in(self.context)
                profile.recall = layers("recall", np.float32)
        _add_ahead(profile, done)
        return profile


def _add_ahead(profile: Profile, done: dict[int, dict]) -> None:
    """Which layers may select ahead, and their ranking and weights; the other layers keep their own."""
    may = {il for il, entry in done.items() if may_select_ahead(entry)}
    profile.ahead = np.array([il in may for il in range(len(profile.n_chunk))], np.uint8)
    if not may:
        return

    def layers(own: list[np.ndarray], key: str) -> list[np.ndarray]:
        return [np.array(done[il][key], own[il].dtype) if il in may else x for il, x in enumerate(own)]

    profile.ahead_ranking = layers(profile.ranking, "ahead_ranking")
    if profile.weight is not None:
        profile.ahead_weight = layers(profile.weight, "ahead_weight")
