"""Calibration from Hugging Face weights: transformers runs the model, and our attention function sees every layer.

It gets the post-RoPE queries and keys, after any q/k-norm, before it attends. Needs the extra `fasa_gguf[hf]`. One
forward pass per window shows all layers; what is kept of them is ranking.py's sample.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FasaError
from ..gguf.file import GGUFFile, read_header
from ..gguf.shape import read_shape, sliding_windows
from ..profile.profile import Profile
from ..runtime.settings import thread_count
from .calibrator import Calibrator, Progress
from .corpus import Corpus, default_corpus
from .hf_ahead import Foresight
from .hf_attention import by_token, import_torch, watched
from .hf_model import check_config, load_model, load_tokenizer, read_config, text_config, weights_hash
from .hf_probe import Probe
from .ranking import CalibrationParams, LayerSample


class HFCalibration(Calibrator):
    """From a PreTrainedModel: `profile = HFCalibration(model, corpus, params).run(out, progress)`.

    tokenize: for the corpus' text; not needed when its content is token ids. folder: where the weights come from.
    gguf: the model that the profile is for, a path or GGUFFile; its sliding windows, which may differ, are used.
    Raises FasaError for a model out of scope, or when the GGUF's shape is another.
    """

    def __init__(
        self,
        model: Any,
        corpus: Corpus,
        params: CalibrationParams,
        tokenize: Callable[[str], Sequence[int]] | None = None,
        folder: str | os.PathLike | None = None,
        gguf: str | os.PathLike | None = None,
        n_threads: int = 0,
    ) -> None:
        super().__init__(params, n_threads)
        import_torch()
        self.model, self.folder = model, folder
        self.arch, self.text = type(model).__name__, text_config(model.config)
        self.where = str(folder or self.arch)
        check_config(model.config, self.where, self.arch)
        probe = Probe(self._forward, self.text.vocab_size)
        self._shape(probe)
        self.foresight = Foresight(model, probe.modules)
        self.foresight.check(lambda ids: self._forward(lambda *_: None, ids), self.text.vocab_size)
        rope = self._rope_of(self._full_layer())
        factor = rope.get("factor", 1.0) if rope.get("rope_type") in ("linear", "yarn") else 1.0
        self.rope = {"base": float(rope.get("rope_theta", 10000.0)), "scale": 1.0 / float(factor)}
        if gguf:
            self._fit(read_header(gguf))
        local = next((il for il, n in enumerate(self.windows) if n and self.shapes[il][1]), None)
        if local is not None:
            self.rope["base_window"] = float(self._rope_of(local).get("rope_theta", 10000.0))

        def missing(text: str) -> Sequence[int]:
            raise FasaError(f"{self.where}: a text needs a tokenizer; give token ids")

        self._read(corpus, getattr(self.text, "max_position_embeddings", None) or params.context, tokenize or missing)

    def _shape(self, probe: Probe) -> None:
        """shapes, windows and layout, from what the layers show; FasaError for a model without rotating keys."""
        n_layer = self.text.num_hidden_layers
        own = n_layer - (getattr(self.text, "num_kv_shared_layers", None) or 0)  # later layers attend to keys of these
        seen = {il: k for il, k in probe.keys[0].items() if il < own}
        if not seen:
            raise FasaError(
                f"{self.where}: architecture {self.arch} shows no attention layer through transformers' "
                "AttentionInterface; calibrate its GGUF instead"
            )
        if probe.both_ways:
            raise self._refuse("attends both ways, and nothing is cached")
        layout = probe.layout(lambda il: self._n_rot(il, probe.keys[0][il].shape[-1]))
        if layout == "":
            raise self._refuse("has no RoPE, so it has no frequency chunks")
        if layout is None:
            raise self._refuse("does not rotate its keys in the pairs that its config tells of")
        self.layout = layout
        self.shapes = [
            (probe.n_head[il], *seen[il].shape[1:], self._n_rot(il, seen[il].shape[2])) if il in seen else (0, 0, 0, 0)
            for il in range(n_layer)
        ]
        self.windows = [probe.windows.get(il, 0) for il in range(n_layer)]

    def _full_layer(self) -> int:
        """A layer that attends to all tokens, or the first with attention."""
        layers = [il for il, shape in enumerate(self.shapes) if shape[1]]
        return next((il for il in layers if not self.windows[il]), layers[0])

    def _rope_of(self, il: int) -> dict[str, Any]:
        """The config's RoPE parameters of a layer; nested by the layer's type in some models."""
        rope, types = self.text.rope_parameters, getattr(self.text, "layer_types", None)
        if any(isinstance(x, dict) for x in rope.values()):
            return (rope.get(types[il]) if types else None) or next(x for x in rope.values() if isinstance(x, dict))
        return rope

    def _n_rot(self, il: int, width: int) -> int:
        """Rotated dimensions per head; "proportional" rotates all of them, some by nothing."""
        rope = self._rope_of(il)
        factor = 1.0 if rope.get("rope_type") == "proportional" else rope.get("partial_rotary_factor") or 1.0
        return min(-(-int(width * factor) // 2) * 2, width)

    def _fit(self, gguf: GGUFFile) -> None:
        """Take the GGUF's sliding windows; FasaError when it is another model."""
        shape = read_shape(gguf)
        mine = Profile([s[1] for s in self.shapes], [s[2] // 2 for s in self.shapes], [])
        mine.check(shape.n_head_kv, shape.n_chunk, str(gguf))
        self.windows = sliding_windows(gguf, len(self.shapes))

    def _origin(self) -> dict[str, str]:
        found = weights_hash(self.folder) if self.folder else None
        return {"source": "hf", **({"weights_sha256": found} if found else {})}

    def _identity(self) -> list[Any]:
        files = sorted(Path(self.folder).glob("*.safetensors")) if self.folder else []
        return [
            self.model.config.to_json_string(),
            str(self.model.dtype),
            self.windows,
            *((f.stat().st_size, f.stat().st_mtime) for f in files),
        ]

    def _passes(self, todo: list[int]) -> list[list[int]]:
        return [todo] if todo else []  # a forward pass shows every layer

    def _forward(self, watch: Callable[..., None], ids: np.ndarray, positions: np.ndarray | None = None) -> None:
        """The decoder stack on ids [batch, n], at positions [batch, n] or from 0 on; logits are not computed."""
        import torch

        given = {"input_ids": ids} if positions is None else {"input_ids": ids, "position_ids": positions}
        with watched(self.model, watch), torch.inference_mode():
            self.model.base_model(
                **{k: torch.as_tensor(v, dtype=torch.long, device=self.model.device) for k, v in given.items()},
                use_cache=False,
            )

    def _pass(self, layers: list[int], tick: Callable[[int], None]) -> dict[int, LayerSample]:
        """Every window in one forward pass; each layer's queries and keys go into its sample."""
        seen = self._samples(layers)
        for window in self.tokens:
            shown: set[int] = set()  # layers
            watch = _into_samples(seen, shown, len(window), tick, self.foresight)
            with self.foresight.watching():
                self._forward(watch, np.array([window]))
            tick(len(window) - len(window) * len(shown) // len(seen))
            for s in seen.values():
                s.fold()
        return seen


def _into_samples(
    seen: dict[int, LayerSample], shown: set[int], n: int, tick: Callable[[int], None], foresight: Foresight
) -> Callable[..., None]:
    """Puts a window's queries and keys into the samples; `shown` gets the layers seen, n is the window's tokens."""

    def watch(module: Any, q: Any, k: Any, scale: float, soft_cap: float, sliding: int) -> None:
        il = getattr(module, "layer_idx", None)
        if il is None or il not in seen or il in shown:
            return
        s, keys = seen[il], by_token(k)
        s.scale, s.soft_cap = float(scale), float(soft_cap)
        q_ahead = foresight.q.get(il)
        s.add(by_token(q), keys, 0, None if q_ahead is None else by_token(q_ahead))
        s.end(keys)
        shown.add(il)
        tick(n * len(shown) // len(seen) - n * (len(shown) - 1) // len(seen))

    return watch


def calibrate_hf(
    model: Any,
    corpus: Corpus | None = None,
    params: CalibrationParams | None = None,
    out: str | os.PathLike | None = None,
    n_threads: int = 0,
    device_map: str | dict | None = None,
    dtype: str = "auto",
    gguf: str | os.PathLike | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Calibrate Hugging Face weights: a folder, or a PreTrainedModel (then the corpus holds token ids).

    corpus: (name, text or token ids), default_corpus() when none is given; out: where the profile is saved; device_map,
    dtype: see load_model; gguf: the model that the profile is for, a path or GGUFFile, if known; progress(what, done,
    total). Raises FasaError for a missing extra, a folder that cannot be loaded, a model out of scope (no RoPE, MLA, no
    decoder), one that is not the GGUF's, or a text that is too short.
    """
    torch, _ = import_torch()
    params, corpus = params or CalibrationParams(), corpus or default_corpus()
    torch.set_num_threads(n_threads or min(torch.get_num_threads(), thread_count()))
    folder = tokenize = None
    if isinstance(model, (str, os.PathLike)):
        folder = str(model)
        tokenize = load_tokenizer(folder) if read_config(folder) and isinstance(corpus[1], str) else None
        model = load_model(folder, device_map, dtype)
    return HFCalibration(model, corpus, params, tokenize, folder, gguf, n_threads).run(out, progress)
