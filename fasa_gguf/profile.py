"""The profile: which frequency chunks of every KV head are dominant. JSON in a file, or keys in the model's own GGUF."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Sequence

import numpy as np

from .errors import FasaError
from .gguf_file import ARR, F32, STR, TYPE_NAMES, U8, U16, U32, GGUFFile
from .params import FasaParams

VERSION = 1
METHODS = ("recall", "energy", "ca", "synthetic")
MAX_LAYERS, MAX_HEADS, MAX_CHUNKS = 4096, 4096, 4096
REMAKE = "make the profile anew with `fasa-gguf embed-profile MODEL`"

# The one table of keys: name, type, meaning. A type in brackets is an array's element type.
KEYS = (
    ("fasa.version", "u32", "format version; a newer one is refused"),
    ("fasa.n_layer", "u32", "layers of the model"),
    ("fasa.n_head_kv", "[u32]", "KV heads of every layer"),
    ("fasa.n_chunk", "[u32]", "frequency chunks per KV head of every layer; 0: the layer has no ranking and stays dense"),
    ("fasa.ranking", "[u8] or [u16]", "every chunk of every KV head of every layer, best first"),
    ("fasa.ranking_method", "str", "recall (greedy set), energy or ca (as published)"),
    ("fasa.weight_k", "u32", "how many leading chunks have a weight; 0: none"),
    ("fasa.weight", "[f32]", "weight of each leading chunk's score"),
    ("fasa.recall", "[f32]", "share of the attention kept, per KV head, with the leading 1, 2, ... n chunks at fasa.recall_budget"),
    ("fasa.recall_k", "u32", "n of fasa.recall; 0: none"),
    ("fasa.recall_budget", "u32", "tokens attended while fasa.recall was measured"),
    ("fasa.layer_budget", "[f32]", "share of the budget for every layer, mean 1"),
    ("fasa.rope.layout", "str", "norm: a chunk is dims (2i, 2i+1); neox: (i, i + dims/2). Chunk ids do not depend on it"),
    ("fasa.rope.dims", "u32", "rotated dimensions per head"),
    ("fasa.rope.base", "f32", "frequency base under which the ranking was made"),
    ("fasa.rope.scale", "f32", "frequency scale under which the ranking was made"),
    *((f"fasa.default.{f.name}", {"mass": "f32", "k_dom": "str"}.get(f.name, "u32"), f.metadata["help"]) for f in fields(FasaParams)),
    ("fasa.calibration.tool", "str", "fasa_gguf version"),
    ("fasa.calibration.corpus", "str", "name of the text"),
    ("fasa.calibration.corpus_sha256", "str", "hash of the text"),
    ("fasa.calibration.tokens", "u32", "tokens read"),
    ("fasa.calibration.context", "u32", "length of a window in tokens"),
    ("fasa.calibration.source", "str", "gguf or hf"),
    ("fasa.calibration.weights_sha256", "str", "hash of the q and k projection weights that were calibrated"),
)
_TYPES = {name: kind for name, kind, _ in KEYS}
_NUMBERS = {"u8": U8, "u16": U16, "u32": U32, "f32": F32, "str": STR}


@dataclass
class Profile:
    """The ranking and where it comes from; shapes in the comments. `check_values` raises FasaError, naming `where`."""

    n_head_kv: list[int]                    # [n_layer]
    n_chunk: list[int]                      # [n_layer], 0: no ranking
    ranking: list[np.ndarray]               # per layer uint16 [n_head_kv, n_chunk]; [0, 0] where there is none
    ranking_method: str = "recall"
    rope: dict[str, Any] = field(default_factory=dict)          # layout, dims, base, scale
    weight: list[np.ndarray] | None = None  # per layer float32 [n_head_kv, weight_k]
    weight_k: int = 0
    recall: list[np.ndarray] | None = None  # per layer float32 [n_head_kv, recall_k]
    recall_k: int = 0
    recall_budget: int = 0
    layer_budget: np.ndarray | None = None  # float32 [n_layer]
    defaults: dict[str, Any] = field(default_factory=dict)      # some of FasaParams
    calibration: dict[str, Any] = field(default_factory=dict)   # tool, corpus, corpus_sha256, tokens, context, source, ...

    def params(self) -> FasaParams:
        """The profile's default settings on top of the package's."""
        return FasaParams.from_mapping(self.defaults, "profile defaults")

    # ---- flat form: names of KEYS without "fasa." ----

    def to_flat(self) -> dict[str, Any]:
        """Plain numbers, strings and lists by key name."""
        ranked = [il for il, n in enumerate(self.n_chunk) if n]

        def flat(layers: list[np.ndarray], kind: type) -> list:
            return [kind(x) for il in ranked for x in np.asarray(layers[il]).ravel()]

        out: dict[str, Any] = {"version": VERSION, "n_layer": len(self.n_chunk), "n_head_kv": [int(n) for n in self.n_head_kv],
                               "n_chunk": [int(n) for n in self.n_chunk], "ranking_method": self.ranking_method}
        out |= {f"rope.{k}": v for k, v in self.rope.items()}
        out |= {f"default.{k}": v for k, v in self.defaults.items()}
        out |= {f"calibration.{k}": v for k, v in self.calibration.items()}
        if self.weight is not None:
            out |= {"weight_k": self.weight_k, "weight": flat(self.weight, float)}
        if self.recall is not None:
            out |= {"recall_k": self.recall_k, "recall_budget": self.recall_budget, "recall": flat(self.recall, float)}
        if self.layer_budget is not None:
            out["layer_budget"] = [float(x) for x in self.layer_budget]
        out["ranking"] = flat(self.ranking, int)
        return out

    @classmethod
    def from_flat(cls, values: dict[str, Any], where: str) -> "Profile":
        """The opposite of to_flat; every value is checked: type, length, range, chunks ranked twice."""

        def fail(key: str, expected: str, found: Any) -> FasaError:
            text = repr(found)
            return FasaError(f"{where}: key fasa.{key}: expected {expected}, found {text if len(text) < 60 else text[:57] + '...'}; {REMAKE}")

        for key in values:
            if "fasa." + key not in _TYPES:
                raise FasaError(f"{where}: key fasa.{key} is unknown; expected one of the keys of format version {VERSION}; {REMAKE}")

        def get(key: str, default: Any = ...) -> Any:
            kind = _TYPES["fasa." + key]
            if key not in values:
                if default is ...:
                    raise fail(key, kind, None)
                return default
            value = values[key]
            number = lambda x, integer: not isinstance(x, bool) and isinstance(x, int if integer else (int, float))
            if kind == "str":
                good = isinstance(value, str) and len(value) < 4096
            elif kind.startswith("["):
                good = isinstance(value, list) and all(number(x, kind != "[f32]") for x in value)
            else:
                good = number(value, kind != "f32") and (kind == "f32" or 0 <= value < 2**32)
            if not good:
                raise fail(key, kind, value)
            return value

        version = get("version")
        if version > VERSION or version < 1:
            raise FasaError(f"{where}: key fasa.version: expected {VERSION}, found {version}; install a newer fasa_gguf, or {REMAKE}")
        n_layer = get("n_layer")
        n_head_kv, n_chunk = get("n_head_kv"), get("n_chunk")
        if not 1 <= n_layer <= MAX_LAYERS:
            raise fail("n_layer", f"1 to {MAX_LAYERS}", n_layer)
        for key, list_, most in (("n_head_kv", n_head_kv, MAX_HEADS), ("n_chunk", n_chunk, MAX_CHUNKS)):
            if len(list_) != n_layer or not all(0 <= x <= most for x in list_):
                raise fail(key, f"{n_layer} numbers from 0 to {most}", list_)
        if any(c and not h for h, c in zip(n_head_kv, n_chunk)):
            raise fail("n_head_kv", "KV heads in every layer that has chunks", n_head_kv)
        method = get("ranking_method")
        if method not in METHODS:
            raise fail("ranking_method", " or ".join(METHODS), method)

        def layers(key: str, per_head: Sequence[int], dtype: type) -> list[np.ndarray]:
            flat, sizes = get(key), [h * n if c else 0 for h, n, c in zip(n_head_kv, per_head, n_chunk)]
            if len(flat) != sum(sizes):
                raise fail(key, f"{sum(sizes)} numbers", f"{len(flat)} numbers")
            if dtype is np.float32 and not np.isfinite(np.asarray(flat, np.float64)).all():
                raise fail(key, "finite numbers", "NaN or infinity")
            parts = np.split(np.asarray(flat, np.float64), np.cumsum(sizes)[:-1])
            return [p.reshape((h, n) if c else (0, 0)) for p, h, n, c in zip(parts, n_head_kv, per_head, n_chunk)]

        ranking = layers("ranking", n_chunk, np.uint16)
        for il, rows in enumerate(ranking):
            for h, row in enumerate(rows):
                if not np.array_equal(np.sort(row), np.arange(len(row))):
                    bad = next((int(x) for x in row if not 0 <= x < len(row) or (row == x).sum() > 1), 0)
                    what = f"chunk {bad} twice" if 0 <= bad < len(row) else f"chunk {bad}"
                    raise fail("ranking", f"each chunk from 0 to {len(row) - 1} once in layer {il}, KV head {h}", what)
        out = cls(n_head_kv, n_chunk, [r.astype(np.uint16) for r in ranking], method)
        for key in ("weight", "recall"):
            n = get(key + "_k", 0)
            if n > 0 or key in values:
                if not 1 <= n <= max(n_chunk):
                    raise fail(key + "_k", f"1 to {max(n_chunk)}", n)
                setattr(out, key + "_k", n)
                setattr(out, key, [x.astype(np.float32) for x in layers(key, [n] * n_layer, np.float32)])
        out.recall_budget = get("recall_budget", 0)
        if "layer_budget" in values:
            shares = np.asarray(get("layer_budget"), np.float32)
            if len(shares) != n_layer or not ((shares > 0) & (shares < 100)).all():
                raise fail("layer_budget", f"{n_layer} shares above 0", values["layer_budget"])
            out.layer_budget = shares
        for group in ("rope", "default", "calibration"):
            found = {k.split(".", 1)[1]: get(k) for k in values if k.startswith(group + ".")}
            setattr(out, "defaults" if group == "default" else group, found)
        if out.rope.get("layout", "norm") not in ("norm", "neox"):
            raise fail("rope.layout", "norm or neox", out.rope["layout"])
        FasaParams.from_mapping(out.defaults, f"{where}: fasa.default")
        return out

    # ---- JSON ----

    def to_json(self) -> str:
        """Readable, one key a line."""
        body = ",\n".join(f"  {json.dumps(k)}: {json.dumps(_short(v))}" for k, v in self.to_flat().items())
        return "{\n" + body + "\n}\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> "Profile":
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise FasaError(f"{where}: not a FASA profile: expected JSON, found {e}; {REMAKE}") from None
        if not isinstance(values, dict):
            raise FasaError(f"{where}: not a FASA profile: expected a JSON object, found {type(values).__name__}; {REMAKE}")
        return cls.from_flat(values, where)

    def save(self, path: str | os.PathLike) -> None:
        temporary = Path(f"{path}.tmp-{os.getpid()}")
        try:
            temporary.write_text(self.to_json())
            os.replace(temporary, path)
        except OSError as e:
            temporary.unlink(missing_ok=True)
            raise FasaError(f"{path}: cannot be written: {e.strerror or e}") from None

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Profile":
        """From a JSON file, or from a GGUF that has a profile embedded."""
        try:
            with open(path, "rb") as f:
                if f.read(4) == b"GGUF":
                    found = cls.from_gguf(GGUFFile(path))
                    if found is None:
                        raise FasaError(f"{path}: there is no FASA profile in this model; run `fasa-gguf embed-profile {path}`")
                    return found
            text = Path(path).read_text()
        except OSError as e:
            raise FasaError(f"{path}: cannot be read: {e.strerror or e}") from None
        except UnicodeDecodeError:
            raise FasaError(f"{path}: not a FASA profile: expected JSON or GGUF, found other bytes; {REMAKE}") from None
        return cls.from_json(text, str(path))

    # ---- GGUF ----

    def to_gguf_kv(self) -> list[tuple[str, int, Any, int | None]]:
        """(key, GGUF type, value, element type) of every entry."""
        out = []
        for key, value in self.to_flat().items():
            kind = _TYPES["fasa." + key]
            if kind.startswith("["):
                item = {"[u32]": U32, "[f32]": F32}.get(kind, U8 if max(value, default=0) < 256 else U16)
                out.append(("fasa." + key, ARR, value, item))
            else:
                out.append(("fasa." + key, _NUMBERS[kind], value, None))
        return out

    @classmethod
    def from_gguf(cls, model: GGUFFile) -> "Profile | None":
        """The embedded profile; None when there is none. A key of the wrong type raises FasaError."""
        values: dict[str, Any] = {}
        for key, entry in model.kv.items():
            if not key.startswith("fasa."):
                continue
            kind = _TYPES.get(key)
            if kind is not None:
                is_array = entry.type == ARR
                name = f"[{TYPE_NAMES[entry.item_type]}]" if is_array else TYPE_NAMES[entry.type]
                if name not in kind.split(" or "):
                    raise FasaError(f"{model.path}: key {key}: expected {kind}, found {entry.type_name}; {REMAKE}")
                if is_array and len(entry.raw) > 1 << 26:
                    raise FasaError(f"{model.path}: key {key}: expected a small array, found {len(entry.raw)} bytes; {REMAKE}")
            values[key[5:]] = entry.value
        return cls.from_flat(values, str(model.path)) if values else None

    def check(self, n_head_kv: Sequence[int], n_chunk: Sequence[int], where: str) -> None:
        """Raises FasaError naming both shapes when the profile is for another model; arguments per layer."""
        mine = f"{len(self.n_chunk)} layers, {_span(self.n_head_kv)} KV heads, {_span(self.n_chunk)} chunks"
        theirs = f"{len(n_chunk)} layers, {_span(n_head_kv)} KV heads, {_span(n_chunk)} chunks"
        fits = len(self.n_chunk) == len(n_chunk) and all(
            c == 0 or (h == mh and c == mc) for h, c, mh, mc in zip(self.n_head_kv, self.n_chunk, n_head_kv, n_chunk))
        if not fits:
            raise FasaError(f"{where}: the profile is for another model: it has {mine}, the model {theirs}; {REMAKE}")


def _short(value: Any) -> Any:
    """Floats with 5 digits; lists too."""
    if isinstance(value, list):
        return [_short(x) for x in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _span(values: Sequence[int]) -> str:
    low, high = min(values, default=0), max(values, default=0)
    return str(low) if low == high else f"{low} to {high}"


def inspect_table(profile: Profile, chunks: int = 0) -> str:
    """A table for people: one line a layer with the leading chunks of its first KV head and the attention they keep."""
    k = chunks or profile.recall_k or profile.weight_k or max(3 * max(profile.n_chunk) // 8, 1)
    c = profile.calibration
    lines = [f"method {profile.ranking_method}, {len(profile.n_chunk)} layers, {_span(profile.n_head_kv)} KV heads, "
             f"{_span(profile.n_chunk)} chunks per head, rope {profile.rope.get('layout', '?')} base {profile.rope.get('base', '?')}",
             f"calibrated on {c.get('corpus', '?')}: {c.get('tokens', '?')} tokens in windows of {c.get('context', '?')}, from {c.get('source', '?')}"]
    if profile.defaults:
        lines.append("defaults: " + ", ".join(f"{n} {v}" for n, v in profile.defaults.items()))
    lines.append(f"\n{'layer':>5}  {'attention kept':>14}  best {k} chunks of KV head 0 (0 is the fastest frequency)")
    for il, rows in enumerate(profile.ranking):
        if not profile.n_chunk[il]:
            lines.append(f"{il:>5}  {'dense':>14}")
            continue
        kept = "" if profile.recall is None else f"{100 * profile.recall[il][:, min(k, profile.recall_k) - 1].mean():.1f}%"
        lines.append(f"{il:>5}  {kept:>14}  {' '.join(str(x) for x in rows[0][:k])}")
    return "\n".join(lines)
