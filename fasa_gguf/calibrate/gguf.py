"""Calibration of a GGUF: llama.cpp reads it, and the library's observer shows each layer's queries and keys."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from .. import runtime
from ..gguf.file import GGUFFile, read_header
from ..gguf.shape import read_shape, sliding_windows, weights_sha256
from ..profile.profile import Profile
from ..session import Session
from .calibrator import Calibrator, Progress
from .corpus import Corpus, default_corpus
from .ranking import CalibrationParams, LayerSample


class Calibration(Calibrator):
    """From a GGUF, read by llama.cpp: `profile = Calibration(session, corpus, params).run(out, progress)`.

    model: the header of the session's file, if it has been read. Raises FasaError for a model out of scope.
    """

    def __init__(
        self,
        session: Session,
        corpus: Corpus,
        params: CalibrationParams,
        n_threads: int = 0,
        model: GGUFFile | None = None,
    ) -> None:
        super().__init__(params, n_threads)
        self.session, self.where = session, session.path
        self.model = read_header(model or session.path)
        self.arch, info = self.model.arch, session.fasa.model_info()
        if info["is_mla"]:
            raise self._refuse("has multi-head latent attention, which has no keys per head to rank")
        if info["rope_layout"] < 0:
            raise self._refuse("has no RoPE, so it has no frequency chunks")
        self.layout = ("norm", "neox")[info["rope_layout"]]
        self.rope = {"base": float(info["rope_base"]), "scale": float(info["rope_scale"])}
        self.shapes = [session.fasa.layer_shape(il) for il in range(info["n_layer"])]
        if not any(shape[1] for shape in self.shapes):
            raise self._refuse("has no attention layer with a KV cache")
        self.windows = sliding_windows(self.model, info["n_layer"])
        self.weights_sha256 = weights_sha256(self.model)  # now: the file may be another one when calibration ends
        if any(self.windows):
            self.rope["base_window"] = float(info["rope_base_window"])
        self._read(corpus, min(session.n_ctx, session.n_ctx_train), session.tokenize)

    def _origin(self) -> dict[str, str]:
        return {"source": "gguf", "weights_sha256": self.weights_sha256}

    def _identity(self) -> list[Any]:
        return [os.path.getsize(self.where), os.path.getmtime(self.where)]

    def _pass(self, layers: list[int], tick: Callable[[int], None]) -> dict[int, LayerSample]:
        """Read all windows once, keeping what `layers` need."""
        seen = self._samples(layers)
        n_ubatch = self.session.llama.llama_n_ubatch(self.session.ctx)
        at = 0  # position of the current ubatch's first token

        def observe(o: runtime.context.Observation) -> None:
            if o.il in seen:
                s, n = seen[o.il], len(o.q)
                s.scale, s.soft_cap = o.scale, o.soft_cap
                s.add(o.q, o.k[at : at + n], at, o.q_ahead)
                if at + n == self.context:
                    s.end(o.k[: self.context])

        self.session.fasa.observe(observe)
        try:
            for window in self.tokens:
                self.session.clear()
                for at in range(0, len(window), n_ubatch):  # one ubatch a call, so that its position is known
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
    progress: Progress | None = None,
) -> Profile:
    """Calibrate a GGUF, given by its path or GGUFFile.

    corpus: (name, text or token ids), default_corpus() when none is given. out: where the profile is saved.
    progress(what, done, total). Raises FasaError for a model out of scope (no RoPE, MLA, no attention), a text that is
    too short, or an unknown method.
    """
    params = params or CalibrationParams()
    header = read_header(model)
    read_shape(header)  # refuses what is out of scope before the weights are loaded
    with Session(header.path, n_ctx=params.context, n_threads=n_threads, n_gpu_layers=n_gpu_layers) as probe:
        return Calibration(probe, corpus or default_corpus(), params, n_threads, header).run(out, progress)
