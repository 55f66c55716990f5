"""The flat form of a profile: plain numbers, strings and lists by key name, as JSON and GGUF files hold them.

Keys are those of keys.py without `fasa.`. `read_flat` checks every value and returns the fields of a Profile;
`write_flat` is its opposite. JSON and GGUF are read into the flat form, and written from it. Values from a GGUF stay
undecoded until their number is known to be right: a hostile file costs no more memory than its own bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import FasaError, check_path
from ..gguf.file import (
    ARR,
    F32,
    F64,
    I32,
    INTEGERS,
    NOT_GGUF,
    STR,
    U8,
    U16,
    U32,
    GGUFFile,
    KeyValue,
    printable,
    what_is_there,
)
from ..params import FasaParams
from .keys import (
    DROPPED,
    MAX_BUDGETS,
    MAX_CHUNKS,
    MAX_HEADS,
    MAX_JSON,
    MAX_LAYERS,
    MAX_NAMES,
    MAX_NUMBERS,
    MAX_TEXT,
    METHODS,
    REMAKE,
    TYPES,
    VERSION,
)
from .values import as_text, brief, exact, is_f32, is_i32, is_u32, short

if TYPE_CHECKING:
    from .profile import Profile

_GGUF_TYPES = {"u32": U32, "i32": I32, "f32": F32, "str": STR}
_ROUNDED = ("weight", "ahead.weight", "recall")  # long lists, whose order and neighbours do not matter


# ---- writing ----


def write_flat(profile: Profile) -> dict[str, Any]:
    """Plain numbers, strings and lists by key name; the ranking is last."""
    ranked = [il for il, n in enumerate(profile.n_chunk) if n]

    def flat(layers: list[np.ndarray], kind: type) -> list:
        return [kind(x) for il in ranked for x in np.asarray(layers[il]).ravel()]

    out: dict[str, Any] = {
        "version": VERSION,
        "n_layer": len(profile.n_chunk),
        "n_head_kv": [int(n) for n in profile.n_head_kv],
        "n_chunk": [int(n) for n in profile.n_chunk],
        "ranking_method": profile.ranking_method,
    }
    if profile.window is not None:
        out["window"] = [int(n) for n in profile.window]
    out |= {f"rope.{k}": v for k, v in profile.rope.items()}
    out |= {f"default.{k}": v for k, v in profile.defaults.items()}
    out |= {f"calibration.{k}": as_text(v) for k, v in profile.calibration.items()}
    if profile.weight is not None:
        out |= {"weight_k": profile.weight_k, "weight": flat(profile.weight, float)}
    if profile.recall is not None:
        out |= {
            "recall_k": profile.recall_k,
            "recall_budget": profile.recall_budget,
            "recall": flat(profile.recall, float),
        }
    if profile.ahead is not None:
        out["ahead.layers"] = [int(x) for x in profile.ahead]
    if profile.ahead_weight is not None:
        out["ahead.weight"] = flat(profile.ahead_weight, float)
    if profile.ahead_ranking is not None:
        out["ahead.ranking"] = flat(profile.ahead_ranking, int)
    if profile.layer_miss is not None:
        out["layer_miss"] = [float(x) for x in profile.layer_miss]
    if profile.mean_budget:
        out["mean_budget"] = [int(n) for n in profile.mean_budget]
        out["mean_budget_mass"] = [float(x) for x in profile.mean_budget.values()]
    out["ranking"] = flat(profile.ranking, int)
    return out


def write_json(values: dict[str, Any]) -> str:
    """Readable JSON of a flat form, one key a line; floats have 5 digits, or as many as tell them from their neighbours
    in f32 where a reader compares them."""
    lines = ((k, short(v) if k in _ROUNDED else exact(v)) for k, v in values.items())
    body = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in lines)
    return "{\n" + body + "\n}\n"


def gguf_entries(values: dict[str, Any]) -> list[tuple[str, int, Any, int | None]]:
    """(key, GGUF type, value, type of an array's elements or None) of every entry of a flat form."""
    out: list[tuple[str, int, Any, int | None]] = []
    for key, value in values.items():
        kind = TYPES[key]
        if kind.startswith("["):
            item = {"[u32]": U32, "[f32]": F32}.get(kind, U8 if max(value, default=0) < 256 else U16)
            out.append(("fasa." + key, ARR, value, item))
        elif kind == "i32" and value >= 0:  # versions before this key could be negative read u32 only
            out.append(("fasa." + key, U32, value, None))
        else:
            out.append(("fasa." + key, _GGUF_TYPES[kind], value, None))
    return out


# ---- reading files ----


def read_file(path: str | os.PathLike) -> tuple[dict[str, Any] | None, GGUFFile | None]:
    """(flat form, None) of a JSON file, (None, header) of a GGUF; a GGUFFile is taken as it is."""
    if isinstance(path, GGUFFile):
        return None, path
    if not isinstance(path, (str, os.PathLike)):
        raise FasaError(f"profile: expected the path of a file, JSON or GGUF, found {type(path).__name__}; {REMAKE}")
    check_path(path)
    try:
        if why := what_is_there(path):
            raise FasaError(f"{path}: not a FASA profile: expected a regular file, JSON or GGUF{why}")
        with open(path, "rb") as f:
            data = f.read(4)
            if data != b"GGUF":
                data += f.read(MAX_JSON)
        if data == b"GGUF" or data[:4].lower() in NOT_GGUF:  # the second raises, and says what it is
            return None, GGUFFile(path)
        _check_size(len(data), str(path))
        text = data.decode()
    except OSError as e:
        raise FasaError(f"{path}: cannot be read: {e.strerror or e}; check the path") from None
    except UnicodeDecodeError:  # before its base class, ValueError: a path with a null byte
        raise FasaError(f"{path}: not a FASA profile: expected JSON or GGUF, found other bytes; {REMAKE}") from None
    except ValueError as e:
        raise FasaError(f"{os.fspath(path)!r}: cannot be read: {e}; check the path") from None
    return read_json(text, str(path)), None


def _check_size(n_bytes: int, where: str) -> None:
    if n_bytes > MAX_JSON:
        raise FasaError(f"{where}: not a FASA profile: expected at most {MAX_JSON} bytes of JSON, found more; {REMAKE}")


def read_json(text: str, where: str) -> dict[str, Any]:
    """The flat form that JSON holds, not yet checked. Raises FasaError naming `where`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise FasaError(f"{where}: key fasa.{printable(name)}: expected it once, found it twice; {REMAKE}")
            found[name] = value
        return found

    _check_size(len(text), where)
    # before they become objects, which take up to 50 times as much memory
    if text.count("[") + text.count("{") > MAX_NAMES or text.count('"') > 2 * MAX_NAMES:
        what = f"expected JSON, found more than {MAX_NAMES} names, texts and lists"
        raise FasaError(f"{where}: not a FASA profile: {what}; {REMAKE}")
    try:
        values = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:
        raise FasaError(f"{where}: not a FASA profile: neither GGUF nor JSON ({e}); {REMAKE}") from None
    if not isinstance(values, dict):
        found = type(values).__name__
        raise FasaError(f"{where}: not a FASA profile: expected a JSON object, found {found}; {REMAKE}")
    return values


def read_gguf(model: GGUFFile) -> dict[str, Any] | None:
    """The flat form of an embedded profile, None when there is none. Types are checked: FasaError naming the key.

    The values are KeyValue, which `read_flat` decodes. An integer may have any type of integers: other programs that
    write GGUF choose their own.
    """
    entries = {key[5:]: entry for key, entry in model.kv.items() if key.startswith("fasa.")}
    if not entries:
        return None
    version = entries.get("version")
    if version is not None and version.type in INTEGERS and version.value > VERSION:
        return {"version": version.value}  # read_flat refuses it, whatever the other keys are
    values: dict[str, Any] = {}
    for key, entry in entries.items():
        if key in DROPPED:
            continue
        kind = TYPES.get(key)
        if kind is None:
            raise _unknown(key, str(model))
        if (entry.type == ARR) != kind.startswith("[") or entry.item_type not in _readable(kind):
            raise FasaError(f"{model}: key fasa.{key}: expected {kind}, found {entry.type_name}; {REMAKE}")
        if entry.count > MAX_NUMBERS:
            what = f"expected at most {MAX_NUMBERS} elements, found {entry.count}"
            raise FasaError(f"{model}: key fasa.{key}: {what}; {REMAKE}")
        values[key] = entry
    return values


def _readable(kind: str) -> frozenset[int]:
    """The GGUF types whose values a key of this type may have."""
    if kind == "str":
        return frozenset([STR])
    return INTEGERS | {F32, F64} if "f32" in kind else INTEGERS


# ---- checking ----


def read_flat(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of the Profile that a flat form describes. Every value is checked: type, length, range, order.

    values: numbers, strings and lists, or KeyValue of a GGUF. Raises FasaError naming `where` and the key.
    """
    if not isinstance(values, dict):
        raise FasaError(
            f"{where}: not a FASA profile: expected keys and values, found {type(values).__name__}; {REMAKE}"
        )
    checked = _Values({key: value for key, value in values.items() if key not in DROPPED}, where)
    _check_version(checked)
    n_head_kv, n_chunk = _read_shape(checked)
    method = checked.get("ranking_method")
    if method not in METHODS:
        raise checked.fail("ranking_method", " or ".join(METHODS), method)
    return {
        "n_head_kv": n_head_kv,
        "n_chunk": n_chunk,
        "ranking": _read_ranking(checked, "ranking", n_head_kv, n_chunk),
        "ranking_method": method,
        **_read_per_chunk(checked, n_head_kv, n_chunk),
        **_read_window(checked, len(n_chunk)),
        **_read_ahead(checked, n_head_kv, n_chunk),
        **_read_layer_miss(checked, len(n_chunk)),
        **_read_mean_budget(checked),
        **_read_groups(checked),
    }


class _Values:
    """A flat form whose values are taken one by one, each of the type that its key has."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def fail(self, key: str, expected: str, value: Any) -> FasaError:
        return self.explain(key, expected, "nothing" if value is None else brief(value))

    def explain(self, key: str, expected: str, found: str) -> FasaError:
        """The same, with the text of what was found."""
        return FasaError(f"{self.where}: key fasa.{key}: expected {expected}, found {found}; {REMAKE}")

    def count(self, key: str) -> int | None:
        """Elements of an array, which is not decoded; None for anything else."""
        value = self.values.get(key)
        if isinstance(value, KeyValue):
            return value.count if value.type == ARR else None
        return len(value) if isinstance(value, list) else None

    def get(self, key: str, default: Any = ...) -> Any:
        """The value; `default` when it is missing, FasaError if that is `...`."""
        kind = TYPES[key]
        if key not in self.values:
            if default is ...:
                raise self.fail(key, kind, None)
            return default
        value = self.values[key]
        value = value.value if isinstance(value, KeyValue) else value
        good = is_f32 if "f32" in kind else is_i32 if kind == "i32" else is_u32
        if kind == "str":
            if not isinstance(value, str) or len(value) >= MAX_TEXT:
                raise self.fail(key, f"text of fewer than {MAX_TEXT} characters", value)
            if value != as_text(value):
                raise self.fail(key, "text that can be written as UTF-8", value)
        elif kind.startswith("["):
            if not isinstance(value, list):
                raise self.fail(key, f"an array, {kind}", value)
            bad = next((i for i, x in enumerate(value) if not good(x)), None)
            if bad is not None:
                raise self.explain(key, f"an array, {kind}", f"{brief(value[bad])} at index {bad}")
        elif not good(value):
            raise self.fail(key, kind, value)
        return value


def _unknown(key: str, where: str) -> FasaError:
    what = f"expected one of the keys of format version {VERSION}, found an unknown one"
    return FasaError(f"{where}: key fasa.{printable(key)}: {what}; {REMAKE}")


def _check_version(v: _Values) -> None:
    """The version comes first: a newer format may have keys and types that are unknown here."""
    version = v.get("version")
    if version > VERSION:
        what = f"expected at most {VERSION}, found {version}"
        raise FasaError(f"{v.where}: key fasa.version: {what}; install a newer fasa_gguf, or {REMAKE}")
    if version < 1:
        raise v.fail("version", str(VERSION), version)
    for key in v.values:
        if key not in TYPES:
            raise _unknown(key, v.where)


def _read_shape(v: _Values) -> tuple[list[int], list[int]]:
    """n_head_kv and n_chunk, both [n_layer]."""
    n_layer = v.get("n_layer")
    if not 1 <= n_layer <= MAX_LAYERS:
        raise v.fail("n_layer", f"1 to {MAX_LAYERS}", n_layer)
    for key in ("n_head_kv", "n_chunk"):
        if v.count(key) not in (None, n_layer):
            raise v.explain(key, f"{n_layer} numbers, one a layer", f"{v.count(key)} numbers")
    n_head_kv, n_chunk = v.get("n_head_kv"), v.get("n_chunk")
    for key, numbers, most in (("n_head_kv", n_head_kv, MAX_HEADS), ("n_chunk", n_chunk, MAX_CHUNKS)):
        il = next((il for il, x in enumerate(numbers) if x > most), None)
        if il is not None:
            raise v.explain(key, f"numbers from 0 to {most}", f"{numbers[il]} in layer {il}")
    if not any(n_chunk):
        raise v.explain("n_chunk", "chunks in at least one layer", "none in any")
    il = next((il for il, (h, c) in enumerate(zip(n_head_kv, n_chunk, strict=True)) if c and not h), None)
    if il is not None:
        raise v.explain("n_head_kv", "KV heads in every layer that has chunks", f"0 in layer {il}")
    return n_head_kv, n_chunk


def _per_layer(
    v: _Values, key: str, n_head_kv: Sequence[int], per_head: Sequence[int], ranked: Sequence[int], dtype: Any
) -> list[np.ndarray]:
    """An array as [n_head_kv, per_head] for every layer; [0, 0] where `ranked` is 0."""
    shapes = [(h, n) if c else (0, 0) for h, n, c in zip(n_head_kv, per_head, ranked, strict=True)]
    sizes = [h * n for h, n in shapes]
    if v.count(key) not in (None, sum(sizes)):
        raise v.explain(key, f"{sum(sizes)} numbers for this shape", f"{v.count(key)} numbers")
    parts = np.split(np.asarray(v.get(key), dtype), np.cumsum(sizes)[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _read_ranking(v: _Values, key: str, n_head_kv: list[int], n_chunk: list[int]) -> list[np.ndarray]:
    """Per layer uint16 [n_head_kv, n_chunk], every chunk of a head once."""
    layers = _per_layer(v, key, n_head_kv, n_chunk, n_chunk, np.uint32)
    for il, heads in enumerate(layers):
        n = heads.shape[1]
        wrong = (np.sort(heads, axis=1) != np.arange(n)).any(axis=1)  # [n_head_kv]
        if wrong.any():
            h = int(np.argmax(wrong))
            order = heads[h]
            bad = next(int(x) for x in order if x >= n or (order == x).sum() > 1)
            expected = f"each chunk from 0 to {n - 1} once in layer {il}, KV head {h}"
            raise v.explain(key, expected, f"chunk {bad} twice" if bad < n else f"chunk {bad}")
    return [layer.astype(np.uint16) for layer in layers]


def _read_per_chunk(v: _Values, n_head_kv: list[int], n_chunk: list[int]) -> dict[str, Any]:
    """weight and recall, per layer float32 [n_head_kv, ..._k], with what belongs to them."""
    out: dict[str, Any] = {}
    least = min(c for c in n_chunk if c)
    for key in ("weight", "recall"):
        n = v.get(key + "_k", 0)
        if n > 0 or key in v:
            if not 1 <= n <= least:
                raise v.fail(key + "_k", f"1 to {least}", n)
            out[key + "_k"] = n
            out[key] = _per_layer(v, key, n_head_kv, [n] * len(n_chunk), n_chunk, np.float32)
    for il, kept in enumerate(out.get("recall", [])):
        if kept.size and not (kept.min() >= 0 and kept.max() <= 1.001):  # 1 up to rounding
            raise v.explain("recall", "shares from 0 to 1", f"{kept.min():.4g} to {kept.max():.4g} in layer {il}")
    return out | {"recall_budget": v.get("recall_budget", 0)}


def _read_window(v: _Values, n_layer: int) -> dict[str, Any]:
    """window, [n_layer], if it is there."""
    if "window" not in v:
        return {}
    each = v.get("window")
    if len(each) != n_layer:
        raise v.explain("window", f"{n_layer} numbers, one a layer", f"{len(each)} numbers")
    return {"window": each}


def _read_ahead(v: _Values, n_head_kv: list[int], n_chunk: list[int]) -> dict[str, Any]:
    """ahead, uint8 [n_layer], and the ranking and weights for foreseen queries, those that are there."""
    out: dict[str, Any] = {}
    if "ahead.layers" in v:
        expected, n = f"{len(n_chunk)} numbers, 0 or 1, one a layer", v.count("ahead.layers")
        if n not in (None, len(n_chunk)):
            raise v.explain("ahead.layers", expected, f"{n} numbers")
        each = v.get("ahead.layers")
        il = next((il for il, x in enumerate(each) if x > 1), None)
        if il is not None:
            raise v.explain("ahead.layers", expected, f"{each[il]} in layer {il}")
        out["ahead"] = np.asarray(each, np.uint8)
    if "ahead.ranking" in v:
        out["ahead_ranking"] = _read_ranking(v, "ahead.ranking", n_head_kv, n_chunk)
    n = v.get("weight_k", 0)
    if ("ahead.weight" in v) != ("ahead.ranking" in v and n > 0):  # weights are those of one order of chunks
        expected = "it where both fasa.ahead.ranking and fasa.weight are, and only there"
        raise v.explain("ahead.weight", expected, "it" if "ahead.weight" in v else "nothing")
    if "ahead.weight" in v:
        out["ahead_weight"] = _per_layer(v, "ahead.weight", n_head_kv, [n] * len(n_chunk), n_chunk, np.float32)
    return out


def _read_layer_miss(v: _Values, n_layer: int) -> dict[str, Any]:
    """layer_miss, float32 [n_layer], if it is there."""
    if "layer_miss" not in v:
        return {}
    expected, n = f"{n_layer} factors above 0 and below 100", v.count("layer_miss")
    if n not in (None, n_layer):
        raise v.explain("layer_miss", expected, f"a list of {n}")
    each = np.asarray(v.get("layer_miss"), np.float32)
    if not ((each > 0) & (each < 100)).all():
        raise v.explain("layer_miss", expected, f"a list of {n}")
    return {"layer_miss": each}


def _read_mean_budget(v: _Values) -> dict[str, Any]:
    """The table of mean budgets as {tokens: mass}, both ascending, if it is there."""
    if "mean_budget" not in v and "mean_budget_mass" not in v:
        return {}
    for key in ("mean_budget", "mean_budget_mass"):
        if (v.count(key) or 0) > MAX_BUDGETS:
            raise v.explain(key, f"at most {MAX_BUDGETS} numbers", f"{v.count(key)} numbers")
    tokens, masses = v.get("mean_budget"), v.get("mean_budget_mass")
    if not tokens or tokens[0] < 1 or any(a >= b for a, b in pairwise(tokens)):
        found = str(tokens[:8]) if tokens else brief(tokens)
        raise v.explain("mean_budget", "numbers of tokens, each larger than the one before", found)
    if len(masses) != len(tokens):
        expected = f"{len(tokens)} numbers, one for each of mean_budget"
        raise v.explain("mean_budget_mass", expected, f"{len(masses)} numbers")
    small = np.asarray(masses, np.float32)
    if not (small[0] > 0 and small[-1] < 1 and (np.diff(small) > 0).all()):
        found = str([short(float(x)) for x in masses[:8]])
        raise v.explain("mean_budget_mass", "masses between 0 and 1, each larger than the one before", found)
    return {"mean_budget": dict(zip(tokens, (float(x) for x in masses), strict=True))}


def _read_groups(v: _Values) -> dict[str, Any]:
    """rope, defaults and calibration: the keys with a dot."""
    rope, defaults, calibration = (
        {key.split(".", 1)[1]: v.get(key) for key in v.values if key.startswith(group + ".")}
        for group in ("rope", "default", "calibration")
    )
    if rope.get("layout", "norm") not in ("norm", "neox"):
        raise v.fail("rope.layout", "norm or neox", rope["layout"])
    for key in ("base", "base_window", "scale"):
        if np.float32(rope.get(key, 1.0)) <= 0:
            raise v.fail("rope." + key, "a number above 0", rope[key])
    try:
        FasaParams.from_mapping(defaults, "fasa.default")
    except FasaError as e:
        raise FasaError(f"{v.where}: keys fasa.default.*: {e}; {REMAKE}") from None
    _check_default_budget(v, defaults.get("mean_budget", 0))
    return {"rope": rope, "defaults": defaults, "calibration": calibration}


def _check_default_budget(v: _Values, n: int) -> None:
    """A default mean budget lies within the table of mean budgets."""
    tokens = v.get("mean_budget", [])
    if n and not (tokens and min(tokens) <= n <= max(tokens)):
        reach = f"{min(tokens)} to {max(tokens)} tokens" if tokens else "none"
        expected = "a number that the table fasa.mean_budget reaches"
        raise v.explain("default.mean_budget", expected, f"{n}, and the table has {reach}")
