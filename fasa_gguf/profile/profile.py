"""The profile: which frequency chunks of every KV head are dominant. A JSON file, or keys in the model's own GGUF."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FasaError, check_path
from ..gguf.file import GGUFFile
from ..gguf.shape import first_shard
from ..params import FasaParams
from . import flat
from .keys import REMAKE

PRESETS = ("default", "paper")


@dataclass
class Profile:
    """The ranking and where it comes from; shapes in the comments. `check_values` tells whether a file may have it."""

    n_head_kv: list[int]  # [n_layer]
    n_chunk: list[int]  # [n_layer], 0: no ranking
    ranking: list[np.ndarray]  # per layer uint16 [n_head_kv, n_chunk]; [0, 0] where there is none
    ranking_method: str = "recall"
    rope: dict[str, Any] = field(default_factory=dict)  # layout, dims, base, base_window, scale
    window: list[int] | None = None  # [n_layer] last tokens that a layer attends to, 0: all; None: none has a window
    weight: list[np.ndarray] | None = None  # per layer float32 [n_head_kv, weight_k]
    weight_k: int = 0
    recall: list[np.ndarray] | None = None  # per layer float32 [n_head_kv, recall_k]
    recall_k: int = 0
    recall_budget: int = 0  # tokens
    ahead: np.ndarray | None = None  # uint8 [n_layer] 1: may select ahead, by foreseen queries; None: every layer may
    ahead_ranking: list[np.ndarray] | None = None  # as ranking, for foreseen queries; None: ranking
    ahead_weight: list[np.ndarray] | None = None  # as weight, for ahead_ranking; both or none where there are weights
    layer_miss: np.ndarray | None = None  # float32 [n_layer]
    mean_budget: dict[int, float] = field(default_factory=dict)  # mean tokens -> target mass, both ascending
    defaults: dict[str, Any] = field(default_factory=dict)  # some of FasaParams
    calibration: dict[str, Any] = field(default_factory=dict)  # tool, corpus, tokens, context, source, ...

    def params(self) -> FasaParams:
        """The package's settings with the profile's defaults in their place."""
        return FasaParams.from_mapping(self.defaults, "profile defaults")

    def preset(self, name: str) -> tuple[FasaParams, Profile]:
        """(settings, profile) of a named way to decode.

        default: `params()` and this profile. paper: FASA as published (arXiv 2602.03152): chunks ranked one by one by
        contextual agreement, a quarter of them, in f16 and unweighted, a selection per query head by its own query, no
        forced tokens.
        Raises FasaError for another name, or for `paper` when the ranking is not `ca`.
        """
        if name == "default":
            return self.params(), self
        if name != "paper":
            raise FasaError(f"preset {name!r}: expected one of {', '.join(PRESETS)}")
        if self.ranking_method != "ca":
            raise FasaError(
                f"preset paper: expected a profile ranked by ca, found {self.ranking_method}; "
                "make one with `fasa-gguf calibrate MODEL --method ca -o ca.json`, and give it with --profile ca.json"
            )
        params = FasaParams(
            chunks=max(max(self.n_chunk) // 4, 1), sink=0, recent=0, k_dom="f16", per_head=1, ahead="off", prefill="off"
        )
        return params, replace(self, weight=None, weight_k=0, ahead_ranking=None, ahead_weight=None)

    # ---- against a model ----

    def check(self, n_head_kv: Sequence[int], n_chunk: Sequence[int], where: str) -> None:
        """Raises FasaError naming both shapes when the profile is for another model.

        n_head_kv, n_chunk: [n_layer], the model's; a chunk count of -1 is not known. where: the model, for the message.
        """
        shapes = zip(self.n_head_kv, self.n_chunk, n_head_kv, n_chunk, strict=False)
        bad = [il for il, (h, c, mh, mc) in enumerate(shapes) if c and (h != mh or mc not in (c, -1))]
        if len(self.n_chunk) == len(n_chunk) and not bad:
            return
        mine = f"{len(self.n_chunk)} layers, {span(self.n_head_kv)} KV heads, {span(self.n_chunk)} chunks"
        theirs = f"{len(n_chunk)} layers, {span(n_head_kv)} KV heads, {span(n_chunk)} chunks"
        if mine == theirs:
            il = bad[0]
            mine = f"{self.n_head_kv[il]} KV heads and {self.n_chunk[il]} chunks in layer {il}"
            theirs = f"{n_head_kv[il]} and {n_chunk[il]}"
        raise FasaError(f"{where}: the profile is for another model: it has {mine}, the model {theirs}; {REMAKE}")

    def check_values(self, where: str) -> None:
        """Raises FasaError, naming `where` and the key, when a file with these values could not be read back."""
        flat.read_flat(self.to_flat(), where)

    # ---- flat form, JSON, GGUF ----

    def to_flat(self) -> dict[str, Any]:
        """Plain numbers, strings and lists by key name, without `fasa.`."""
        return flat.write_flat(self)

    @classmethod
    def from_flat(cls, values: dict[str, Any], where: str) -> Profile:
        """The opposite of to_flat; every value is checked. Raises FasaError naming `where` and the key."""
        return cls(**flat.read_flat(values, where))

    def to_json(self) -> str:
        """Readable, one key a line; floats have 5 digits."""
        return flat.write_json(self.to_flat())

    @classmethod
    def from_json(cls, text: str, where: str) -> Profile:
        """The opposite of to_json. Raises FasaError naming `where`."""
        return cls.from_flat(flat.read_json(text, where), where)

    def to_gguf_kv(self) -> list[tuple[str, int, Any, int | None]]:
        """(key, GGUF type, value, type of an array's elements or None) of every entry."""
        return flat.gguf_entries(self.to_flat())

    @classmethod
    def from_gguf(cls, model: GGUFFile) -> Profile | None:
        """The embedded profile, None when there is none. Raises FasaError for a bad key."""
        values = flat.read_gguf(model)
        return None if values is None else cls.from_flat(values, str(model))

    # ---- files ----

    def save(self, path: str | os.PathLike) -> None:
        """To a JSON file, whole or not at all.

        Raises FasaError for a value out of range, or when the file cannot be written.
        """
        check_path(path)
        self.check_values(str(path))
        text = self.to_json()
        self.from_json(text, str(path))  # a file that `load` would refuse is not written
        temporary = Path(f"{path}.tmp-{os.getpid()}")
        try:
            if os.path.exists(path) and not os.path.isfile(path):  # a device would be replaced by the file
                raise FasaError(f"{path}: expected the name of a file to write, found something else there")
            temporary.write_text(text)
            os.replace(temporary, path)
        except ValueError as e:  # a path with a null byte
            raise FasaError(f"{os.fspath(path)!r}: cannot be written: {e}; give another path with -o") from None
        except OSError as e:
            raise FasaError(f"{path}: cannot be written: {e.strerror or e}; give another path with -o") from None
        finally:
            with contextlib.suppress(OSError, ValueError):
                temporary.unlink()

    @classmethod
    def load(cls, path: str | os.PathLike) -> Profile:
        """From a JSON file or a GGUF that has a profile embedded. A GGUFFile is not read again.

        Raises FasaError when the file cannot be read, has no profile, or has a bad one.
        """
        values, model = flat.read_file(path)
        if values is not None:
            return cls.from_flat(values, str(path))
        found = None if model is None else cls.from_gguf(model)
        if found is None:
            if model is not None:
                first_shard(model)
            raise FasaError(f"{path}: there is no FASA profile in this model; run `fasa-gguf embed-profile {path}`")
        return found


def span(values: Sequence[int]) -> str:
    """The least and the greatest of the values, as in "0 to 8"; one number when they are equal."""
    low, high = min(values, default=0), max(values, default=0)
    return str(low) if low == high else f"{low} to {high}"
