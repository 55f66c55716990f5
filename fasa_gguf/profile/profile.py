"""The profile: which frequency chunks of every KV head are dominant. JSON in a file, or keys in the model's own GGUF."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FasaError
from ..gguf.file import ARR, F32, STR, TYPE_NAMES, U8, U16, U32, GGUFFile, printable
from ..params import FasaParams, default_chunks

VERSION = 1
METHODS = ("recall", "energy", "ca", "synthetic")
PRESETS = ("default", "paper")
MAX_LAYERS, MAX_HEADS, MAX_CHUNKS = 4096, 4096, 4096
MAX_NUMBERS = 1 << 22  # elements of one array; 80 layers of 8 KV heads of 64 chunks have 41,000
MAX_JSON = 1 << 26  # bytes
MAX_TEXT = 4096  # characters
MAX_F32 = float(np.finfo(np.float32).max)
REMAKE = "make the profile anew with `fasa-gguf embed-profile MODEL`"

# The one table of keys: name, type, meaning. A type in brackets is an array's element type.
KEYS = (
    ("fasa.version", "u32", "format version; a newer one is refused"),
    ("fasa.n_layer", "u32", "layers of the model"),
    ("fasa.n_head_kv", "[u32]", "KV heads of every layer"),
    (
        "fasa.n_chunk",
        "[u32]",
        "frequency chunks per KV head of every layer; 0: the layer has no ranking and stays dense",
    ),
    ("fasa.ranking", "[u8] or [u16]", "every chunk of every KV head of every layer, best first"),
    ("fasa.ranking_method", "str", "recall (greedy set), energy or ca (as published)"),
    ("fasa.weight_k", "u32", "how many leading chunks have a weight; 0: none"),
    ("fasa.weight", "[f32]", "weight of each leading chunk's score"),
    (
        "fasa.recall",
        "[f32]",
        "share of the attention kept, per KV head, with the leading 1, 2, ... n chunks at fasa.recall_budget",
    ),
    ("fasa.recall_k", "u32", "n of fasa.recall; 0: none"),
    ("fasa.recall_budget", "u32", "tokens attended while fasa.recall was measured"),
    ("fasa.layer_budget", "[f32]", "share of a fixed budget for every layer, mean 1"),
    (
        "fasa.layer_miss",
        "[f32]",
        "with a target mass, a layer's is 1 - (1 - mass) * layer_miss: how much more than others it may miss",
    ),
    ("fasa.mean_budget", "[u32]", "table of mean budgets: tokens per step and KV head in the mean, ascending"),
    (
        "fasa.mean_budget_mass",
        "[f32]",
        "the target mass that takes as many tokens, ascending; between two, log(1 - mass) is linear in log(tokens)",
    ),
    (
        "fasa.rope.layout",
        "str",
        "norm: a chunk is dims (2i, 2i+1); neox: (i, i + dims/2). Chunk ids do not depend on it",
    ),
    ("fasa.rope.dims", "u32", "rotated dimensions per head"),
    ("fasa.rope.base", "f32", "frequency base under which the ranking was made"),
    ("fasa.rope.scale", "f32", "frequency scale under which the ranking was made"),
    *(
        (f"fasa.default.{f.name}", {"mass": "f32", "k_dom": "str"}.get(f.name, "u32"), f.metadata["help"])
        for f in fields(FasaParams)
    ),
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

    n_head_kv: list[int]  # [n_layer]
    n_chunk: list[int]  # [n_layer], 0: no ranking
    ranking: list[np.ndarray]  # per layer uint16 [n_head_kv, n_chunk]; [0, 0] where there is none
    ranking_method: str = "recall"
    rope: dict[str, Any] = field(default_factory=dict)  # layout, dims, base, scale
    weight: list[np.ndarray] | None = None  # per layer float32 [n_head_kv, weight_k]
    weight_k: int = 0
    recall: list[np.ndarray] | None = None  # per layer float32 [n_head_kv, recall_k]
    recall_k: int = 0
    recall_budget: int = 0
    layer_budget: np.ndarray | None = None  # float32 [n_layer]
    layer_miss: np.ndarray | None = None  # float32 [n_layer]
    mean_budget: dict[int, float] = field(default_factory=dict)  # mean tokens -> target mass, both ascending
    defaults: dict[str, Any] = field(default_factory=dict)  # some of FasaParams
    calibration: dict[str, Any] = field(
        default_factory=dict
    )  # tool, corpus, corpus_sha256, tokens, context, source, ...

    def params(self) -> FasaParams:
        """The profile's default settings on top of the package's."""
        return FasaParams.from_mapping(self.defaults, "profile defaults")

    def preset(self, name: str) -> tuple[FasaParams, Profile]:
        """(settings, profile) of a named way to decode: `default` is `params` and this profile; `paper` is FASA as published
        (arXiv 2602.03152): chunks ranked one by one by contextual agreement, a quarter of them, in f16 and unweighted, a
        selection per query head, no forced tokens. Raises FasaError for another name, or a ranking that is not `ca`."""
        if name == "default":
            return self.params(), self
        if name != "paper":
            raise FasaError(f"preset {name!r}: expected one of {', '.join(PRESETS)}")
        if self.ranking_method != "ca":
            raise FasaError(
                f"preset paper: expected a profile ranked by ca, found {self.ranking_method}; "
                "make one with `fasa-gguf calibrate MODEL --method ca -o ca.json`, and give it with --profile ca.json"
            )
        params = FasaParams(chunks=max(max(self.n_chunk) // 4, 1), sink=0, recent=0, k_dom="f16", per_head=1)
        return params, replace(self, weight=None, weight_k=0)

    # ---- flat form: names of KEYS without "fasa." ----

    def to_flat(self) -> dict[str, Any]:
        """Plain numbers, strings and lists by key name."""
        ranked = [il for il, n in enumerate(self.n_chunk) if n]

        def flat(layers: list[np.ndarray], kind: type) -> list:
            return [kind(x) for il in ranked for x in np.asarray(layers[il]).ravel()]

        out: dict[str, Any] = {
            "version": VERSION,
            "n_layer": len(self.n_chunk),
            "n_head_kv": [int(n) for n in self.n_head_kv],
            "n_chunk": [int(n) for n in self.n_chunk],
            "ranking_method": self.ranking_method,
        }
        out |= {f"rope.{k}": v for k, v in self.rope.items()}
        out |= {f"default.{k}": v for k, v in self.defaults.items()}
        out |= {f"calibration.{k}": v for k, v in self.calibration.items()}
        if self.weight is not None:
            out |= {"weight_k": self.weight_k, "weight": flat(self.weight, float)}
        if self.recall is not None:
            out |= {"recall_k": self.recall_k, "recall_budget": self.recall_budget, "recall": flat(self.recall, float)}
        if self.layer_budget is not None:
            out["layer_budget"] = [float(x) for x in self.layer_budget]
        if self.layer_miss is not None:
            out["layer_miss"] = [float(x) for x in self.layer_miss]
        if self.mean_budget:
            out |= {
                "mean_budget": [int(n) for n in self.mean_budget],
                "mean_budget_mass": [float(x) for x in self.mean_budget.values()],
            }
        out["ranking"] = flat(self.ranking, int)
        return out

    @classmethod
    def from_flat(cls, values: dict[str, Any], where: str) -> Profile:
        """The opposite of to_flat; every value is checked: type, length, range, chunks ranked twice."""

        def fail(key: str, expected: str, found: Any) -> FasaError:
            text = "nothing" if found is None else found if isinstance(found, _Said) else _brief(found)
            return FasaError(f"{where}: key fasa.{key}: expected {expected}, found {text}; {REMAKE}")

        def get(key: str, default: Any = ...) -> Any:
            kind = _TYPES["fasa." + key]
            if key not in values:
                if default is ...:
                    raise fail(key, kind, None)
                return default
            value = values[key]
            good = _is_f32 if "f32" in kind else _is_u32
            if kind == "str":
                if not isinstance(value, str) or len(value) >= MAX_TEXT:
                    raise fail(key, f"text of fewer than {MAX_TEXT} characters", value)
            elif kind.startswith("["):
                if not isinstance(value, list):
                    raise fail(key, f"an array, {kind}", value)
                bad = next((i for i, x in enumerate(value) if not good(x)), None)
                if bad is not None:
                    raise fail(key, f"an array, {kind}", _Said(f"{_brief(value[bad])} at index {bad}"))
            elif not good(value):
                raise fail(key, kind, value)
            return value

        version = get("version")  # first: a newer format may have keys and types that are unknown here
        if version > VERSION:
            raise FasaError(
                f"{where}: key fasa.version: expected at most {VERSION}, found {version}; install a newer fasa_gguf, or {REMAKE}"
            )
        if version < 1:
            raise fail("version", str(VERSION), version)
        for key in values:
            if "fasa." + key not in _TYPES:
                raise FasaError(
                    f"{where}: key fasa.{printable(key)}: expected one of the keys of format version {VERSION}, found an unknown one; {REMAKE}"
                )
        n_layer = get("n_layer")
        n_head_kv, n_chunk = get("n_head_kv"), get("n_chunk")
        if not 1 <= n_layer <= MAX_LAYERS:
            raise fail("n_layer", f"1 to {MAX_LAYERS}", n_layer)
        for key, list_, most in (("n_head_kv", n_head_kv, MAX_HEADS), ("n_chunk", n_chunk, MAX_CHUNKS)):
            if len(list_) != n_layer:
                raise fail(key, f"{n_layer} numbers, one a layer", _Said(f"{len(list_)} numbers"))
            il = next((il for il, x in enumerate(list_) if x > most), None)
            if il is not None:
                raise fail(key, f"numbers from 0 to {most}", _Said(f"{list_[il]} in layer {il}"))
        if not any(n_chunk):
            raise fail("n_chunk", "chunks in at least one layer", _Said("none in any"))
        il = next((il for il, (h, c) in enumerate(zip(n_head_kv, n_chunk)) if c and not h), None)
        if il is not None:
            raise fail("n_head_kv", "KV heads in every layer that has chunks", _Said(f"0 in layer {il}"))
        least = min(c for c in n_chunk if c)
        method = get("ranking_method")
        if method not in METHODS:
            raise fail("ranking_method", " or ".join(METHODS), method)

        def layers(key: str, per_head: Sequence[int], dtype: Any) -> list[np.ndarray]:
            flat, sizes = get(key), [h * n if c else 0 for h, n, c in zip(n_head_kv, per_head, n_chunk)]
            if len(flat) != sum(sizes):
                raise fail(key, f"{sum(sizes)} numbers for this shape", _Said(f"{len(flat)} numbers"))
            parts = np.split(np.asarray(flat, dtype), np.cumsum(sizes)[:-1])
            return [p.reshape((h, n) if c else (0, 0)) for p, h, n, c in zip(parts, n_head_kv, per_head, n_chunk)]

        ranking = layers("ranking", n_chunk, np.uint32)
        for il, rows in enumerate(ranking):
            for h, row in enumerate(rows):
                if not np.array_equal(np.sort(row), np.arange(len(row))):
                    bad = next(int(x) for x in row if x >= len(row) or (row == x).sum() > 1)
                    what = f"chunk {bad} twice" if bad < len(row) else f"chunk {bad}"
                    raise fail(
                        "ranking", f"each chunk from 0 to {len(row) - 1} once in layer {il}, KV head {h}", _Said(what)
                    )
        out = cls(n_head_kv, n_chunk, [r.astype(np.uint16) for r in ranking], method)
        for key in ("weight", "recall"):
            n = get(key + "_k", 0)
            if n > 0 or key in values:
                if not 1 <= n <= least:
                    raise fail(key + "_k", f"1 to {least}", n)
                setattr(out, key + "_k", n)
                setattr(out, key, layers(key, [n] * n_layer, np.float32))
        for il, kept in enumerate(out.recall or []):
            if kept.size and not (kept.min() >= 0 and kept.max() <= 1.001):  # 1 up to rounding
                raise fail("recall", "shares from 0 to 1", _Said(f"{kept.min():.4g} to {kept.max():.4g} in layer {il}"))
        out.recall_budget = get("recall_budget", 0)
        for key, what in (("layer_budget", "shares"), ("layer_miss", "factors")):
            if key in values:
                each = np.asarray(get(key), np.float32)
                if len(each) != n_layer or not ((each > 0) & (each < 100)).all():
                    raise fail(key, f"{n_layer} {what} above 0 and below 100", values[key])
                setattr(out, key, each)
        if "mean_budget" in values or "mean_budget_mass" in values:
            tokens, masses = get("mean_budget"), get("mean_budget_mass")
            if not tokens or tokens[0] < 1 or any(a >= b for a, b in zip(tokens, tokens[1:])):
                raise fail(
                    "mean_budget",
                    "numbers of tokens, each larger than the one before",
                    _Said(_brief(tokens) if not tokens else str(tokens[:8])),
                )
            if len(masses) != len(tokens):
                raise fail(
                    "mean_budget_mass",
                    f"{len(tokens)} numbers, one for each of mean_budget",
                    _Said(f"{len(masses)} numbers"),
                )
            small = np.asarray(masses, np.float32)
            if not (small[0] > 0 and small[-1] < 1 and (np.diff(small) > 0).all()):
                raise fail(
                    "mean_budget_mass",
                    "masses between 0 and 1, each larger than the one before",
                    _Said(str([_short(float(x)) for x in masses[:8]])),
                )
            out.mean_budget = dict(zip(tokens, (float(x) for x in masses)))
        for group in ("rope", "default", "calibration"):
            found = {k.split(".", 1)[1]: get(k) for k in values if k.startswith(group + ".")}
            setattr(out, "defaults" if group == "default" else group, found)
        if out.rope.get("layout", "norm") not in ("norm", "neox"):
            raise fail("rope.layout", "norm or neox", out.rope["layout"])
        for key in ("base", "scale"):
            if out.rope.get(key, 1.0) <= 0:
                raise fail("rope." + key, "a number above 0", out.rope[key])
        try:
            FasaParams.from_mapping(out.defaults, "fasa.default")
        except FasaError as e:
            raise FasaError(f"{where}: keys fasa.default.*: {e}; {REMAKE}") from None
        if (n := out.defaults.get("mean_budget", 0)) and not min(out.mean_budget, default=n + 1) <= n <= max(
            out.mean_budget, default=0
        ):
            reach = f"{min(out.mean_budget)} to {max(out.mean_budget)} tokens" if out.mean_budget else "none"
            raise fail(
                "default.mean_budget",
                "a number that the table fasa.mean_budget reaches",
                _Said(f"{n}, and the table has {reach}"),
            )
        return out

    def check_values(self, where: str) -> None:
        """Raises FasaError when any value could not be read back: what a file must not get."""
        Profile.from_flat(self.to_flat(), where)

    # ---- JSON ----

    def to_json(self) -> str:
        """Readable, one key a line; floats have 5 digits."""
        body = ",\n".join(f"  {json.dumps(k)}: {json.dumps(_short(v))}" for k, v in self.to_flat().items())
        return "{\n" + body + "\n}\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Profile:
        """The opposite of to_json; raises FasaError naming `where`."""

        def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            found = dict(pairs)
            if len(found) < len(pairs):
                names = [name for name, _ in pairs]
                twice = next(name for name in names if names.count(name) > 1)
                raise FasaError(f"{where}: key fasa.{printable(twice)}: expected it once, found it twice; {REMAKE}")
            return found

        try:
            values = json.loads(text, object_pairs_hook=unique)
        except (ValueError, RecursionError) as e:
            raise FasaError(f"{where}: not a FASA profile: expected JSON, found {e}; {REMAKE}") from None
        if not isinstance(values, dict):
            raise FasaError(
                f"{where}: not a FASA profile: expected a JSON object, found {type(values).__name__}; {REMAKE}"
            )
        return cls.from_flat(values, where)

    def save(self, path: str | os.PathLike) -> None:
        """To a JSON file, whole or not at all. Raises FasaError when a value is out of range or the file cannot be written."""
        self.check_values(str(path))
        temporary = Path(f"{path}.tmp-{os.getpid()}")
        try:
            temporary.write_text(self.to_json())
            os.replace(temporary, path)
        except OSError as e:
            raise FasaError(f"{path}: cannot be written: {e.strerror or e}; give another path with -o") from None
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()

    @classmethod
    def load(cls, path: str | os.PathLike) -> Profile:
        """From a JSON file, or from a GGUF that has a profile embedded."""
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise FasaError(f"{path}: not a FASA profile: expected a regular file, JSON or GGUF; {REMAKE}")
            with open(path, "rb") as f:
                data = f.read(4)
                if data != b"GGUF":
                    data += f.read(MAX_JSON)
            if data == b"GGUF":
                found = cls.from_gguf(GGUFFile(path))
                if found is None:
                    raise FasaError(
                        f"{path}: there is no FASA profile in this model; run `fasa-gguf embed-profile {path}`"
                    )
                return found
            if len(data) > MAX_JSON:
                raise FasaError(
                    f"{path}: not a FASA profile: expected at most {MAX_JSON} bytes of JSON, found more; {REMAKE}"
                )
            text = data.decode()
        except OSError as e:
            raise FasaError(f"{path}: cannot be read: {e.strerror or e}; check the path") from None
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
    def from_gguf(cls, model: GGUFFile) -> Profile | None:
        """The embedded profile; None when there is none. A key of the wrong type raises FasaError."""
        entries = {key[5:]: entry for key, entry in model.kv.items() if key.startswith("fasa.")}
        if not entries:
            return None
        version = entries.get("version")
        if version is not None and version.type == U32 and version.value > VERSION:
            return cls.from_flat(
                {"version": version.value}, str(model.path)
            )  # refused there, whatever the other keys are
        values: dict[str, Any] = {}
        for key, entry in entries.items():
            kind = _TYPES.get("fasa." + key)
            if kind is None:
                raise FasaError(
                    f"{model.path}: key fasa.{printable(key)}: expected one of the keys of format version {VERSION}, found an unknown one; {REMAKE}"
                )
            name = f"[{TYPE_NAMES[entry.item_type]}]" if entry.type == ARR else TYPE_NAMES[entry.type]
            if name not in kind.split(" or "):
                raise FasaError(f"{model.path}: key fasa.{key}: expected {kind}, found {entry.type_name}; {REMAKE}")
            if entry.count > MAX_NUMBERS:
                raise FasaError(
                    f"{model.path}: key fasa.{key}: expected at most {MAX_NUMBERS} elements, found {entry.count}; {REMAKE}"
                )
            values[key] = entry.value
        return cls.from_flat(values, str(model.path))

    def check(self, n_head_kv: Sequence[int], n_chunk: Sequence[int], where: str) -> None:
        """Raises FasaError naming both shapes when the profile is for another model; arguments per layer, n_chunk -1: not known."""
        bad = [
            il
            for il, (h, c, mh, mc) in enumerate(zip(self.n_head_kv, self.n_chunk, n_head_kv, n_chunk))
            if c and (h != mh or mc not in (c, -1))
        ]
        if len(self.n_chunk) == len(n_chunk) and not bad:
            return
        mine = f"{len(self.n_chunk)} layers, {_span(self.n_head_kv)} KV heads, {_span(self.n_chunk)} chunks"
        theirs = f"{len(n_chunk)} layers, {_span(n_head_kv)} KV heads, {_span(n_chunk)} chunks"
        if mine == theirs:
            il = bad[0]
            mine = f"{self.n_head_kv[il]} KV heads and {self.n_chunk[il]} chunks in layer {il}"
            theirs = f"{n_head_kv[il]} and {n_chunk[il]}"
        raise FasaError(f"{where}: the profile is for another model: it has {mine}, the model {theirs}; {REMAKE}")


class _Said(str):
    """Text of a message, not a value to be shown in quotes."""


def _brief(value: Any) -> str:
    """A value as it was found, at most 60 characters; big numbers and long lists are not spelt out."""
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return "a number of more than 64 bits"
    if isinstance(value, (list, dict)):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    text = ascii(value[:60] if isinstance(value, str) else value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_u32(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 1 << 32


def _is_f32(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and -MAX_F32 <= x <= MAX_F32  # false for NaN


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
    k = chunks or profile.recall_k or profile.weight_k or default_chunks(max(profile.n_chunk))
    c = profile.calibration
    lines = [
        f"method {profile.ranking_method}, {len(profile.n_chunk)} layers, {_span(profile.n_head_kv)} KV heads, "
        f"{_span(profile.n_chunk)} chunks per head, rope {profile.rope.get('layout', '?')} base {profile.rope.get('base', '?')}",
        f"calibrated on {c.get('corpus', '?')}: {c.get('tokens', '?')} tokens in windows of {c.get('context', '?')}, from {c.get('source', '?')}",
    ]
    if profile.defaults:
        lines.append("defaults: " + ", ".join(f"{n} {v}" for n, v in profile.defaults.items()))
    if profile.mean_budget:
        lines.append("mean budgets: " + ", ".join(f"{n} at mass {m:.4g}" for n, m in profile.mean_budget.items()))
    if profile.layer_miss is not None:
        lines.append(f"layers may miss {profile.layer_miss.min():.3g} to {profile.layer_miss.max():.3g} times 1 - mass")
    lines.append(f"\n{'layer':>5}  {'attention kept':>14}  best {k} chunks of KV head 0 (0 is the fastest frequency)")
    for il, rows in enumerate(profile.ranking):
        if not profile.n_chunk[il]:
            lines.append(f"{il:>5}  {'dense':>14}")
            continue
        kept = (
            "" if profile.recall is None else f"{100 * profile.recall[il][:, min(k, profile.recall_k) - 1].mean():.1f}%"
        )
        lines.append(f"{il:>5}  {kept:>14}  {' '.join(str(x) for x in rows[0][:k])}")
    return "\n".join(lines)
