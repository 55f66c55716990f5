"""A Profile as struct fasa_profile, on the way into C.

A Profile may be made by hand, so its arrays are checked here against its own shape; the library then checks the shape
against the model, every length, and every value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import FasaError
from .library import array, struct

if TYPE_CHECKING:
    from ..profile.profile import Profile


def _numbers(name: str, values: Any, dtype: Any) -> np.ndarray:
    """`values` as dtype, which must hold every one of them. Raises FasaError."""
    whole = np.issubdtype(dtype, np.integer)
    expected = f"whole numbers from 0 to {np.iinfo(dtype).max}" if whole else "numbers"
    try:
        given = np.asarray(values)
        with np.errstate(all="ignore"):
            out = given.astype(dtype)
    except (TypeError, ValueError, OverflowError) as e:
        raise FasaError(f"the profile's {name}: expected {expected}, found others: {e}") from None
    wrong = np.full(given.shape, given.dtype.kind not in ("iu" if whole else "iuf"))
    if whole:
        wrong |= out != given
    if wrong.any():
        raise FasaError(f"the profile's {name}: expected {expected}, found {given[wrong][0]}")
    return out


def _whole(name: str, value: Any) -> int:
    return int(_numbers(name, [value], np.uint32)[0])


def _flat(name: str, layers: Sequence[Any], shapes: dict[int, tuple[int, int]], dtype: Any) -> np.ndarray:
    """The arrays of the layers in `shapes`, which must have these shapes, behind each other. Raises FasaError."""
    parts = []
    for il, shape in shapes.items():
        if il >= len(layers):
            raise FasaError(f"the profile's {name}: expected an array for each layer, found {len(layers)} arrays")
        part = _numbers(f"{name} of layer {il}", layers[il], dtype)
        if part.shape != shape:
            raise FasaError(f"the profile's {name} of layer {il}: expected shape {[*shape]}, found {[*part.shape]}")
        parts.append(part.ravel())
    return np.concatenate(parts) if parts else np.zeros(0, dtype)


class Attached:
    """struct fasa_profile of a Profile, with the arrays that it points to."""

    def __init__(self, profile: Profile) -> None:
        self._keep: list[np.ndarray] = []
        n_head_kv = _numbers("n_head_kv", profile.n_head_kv, np.uint32)
        n_chunk = _numbers("n_chunk", profile.n_chunk, np.uint32)
        if n_chunk.ndim != 1 or n_head_kv.shape != n_chunk.shape:
            raise FasaError(
                "the profile's n_head_kv and n_chunk: expected one number each for every layer, found shapes "
                f"{[*n_head_kv.shape]} and {[*n_chunk.shape]}"
            )
        heads = {il: int(n_head_kv[il]) for il in np.flatnonzero(n_chunk).tolist()}
        ranking = _flat("ranking", profile.ranking, {il: (h, int(n_chunk[il])) for il, h in heads.items()}, np.uint16)
        self.struct = struct("fasa_profile", n_layer=len(n_chunk))
        self._set("uint32_t", "n_head_kv", n_head_kv)
        self._set("uint32_t", "n_chunk", n_chunk)
        self._set("uint16_t", "ranking", ranking, "n_ranking")
        self._set_weights(profile, heads)
        self._set_ahead(profile, heads)
        if profile.layer_miss is not None:
            self._set("float", "layer_miss", _numbers("layer_miss", profile.layer_miss, np.float32), "n_layer_miss")
        table = profile.mean_budget
        self._set("uint32_t", "mean_budget", _numbers("mean_budget", list(table), np.uint32), "n_mean_budget")
        self._set("float", "mean_budget_mass", _numbers("mean_budget_mass", list(table.values()), np.float32))

    def _set_weights(self, profile: Profile, heads: dict[int, int]) -> None:
        k = _whole("weight_k", profile.weight_k)
        if k == 0:
            return
        if profile.weight is None:
            raise FasaError(f"the profile's weight: expected arrays, since weight_k is {k}; found none")
        flat = _flat("weight", profile.weight, {il: (h, k) for il, h in heads.items()}, np.float32)
        self.struct.weight_k = k
        self._set("float", "weight", flat, "n_weight")

    def _set_ahead(self, profile: Profile, heads: dict[int, int]) -> None:
        if profile.ahead is not None:
            self._set("uint8_t", "ahead", _numbers("ahead", profile.ahead, np.uint8), "n_ahead")
        k = _whole("weight_k", profile.weight_k)
        if (profile.ahead_weight is not None) != (profile.ahead_ranking is not None and k > 0):
            what, found = "arrays where ahead_ranking and weight are, and only there", profile.ahead_weight
            raise FasaError(f"the profile's ahead_weight: expected {what}; found {'none' if found is None else 'some'}")
        if profile.ahead_ranking is not None:
            shapes = {il: (h, int(profile.n_chunk[il])) for il, h in heads.items()}
            self._set("uint16_t", "ahead_ranking", _flat("ahead_ranking", profile.ahead_ranking, shapes, np.uint16))
        if profile.ahead_weight is not None:
            shapes = {il: (h, k) for il, h in heads.items()}
            self._set("float", "ahead_weight", _flat("ahead_weight", profile.ahead_weight, shapes, np.float32))

    def _set(self, ctype: str, name: str, values: np.ndarray, count: str = "") -> None:
        pointer, owner = array(ctype, values, values.dtype)
        self._keep.append(owner)
        setattr(self.struct, name, pointer)
        if count:
            setattr(self.struct, count, len(owner))
