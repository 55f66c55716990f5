"""The settings of FASA decoding: the one table. A field of FasaParams is a row; everything that names a setting follows
from it: the command-line flag, the environment variable, the GGUF key and struct fasa_params of native/fasa.h.

After a change run `make tables`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import FasaError
from .reasons import Reason

K_DOM_TYPES = ("f16", "q8", "q4")  # in the order of enum fasa_k_dom_type
AHEAD = ("auto", "off", "on")  # in the order of enum fasa_ahead_type
PREFILL = ("auto", "off", "on")  # in the order of enum fasa_prefill_type
MODES = ("auto", "device", "host")  # where K and V lie. No setting: a live context cannot change it
MODE_ALIASES = {"c": "device", "m": "host"}  # the paper's letters
INT_MAX = 2**31 - 1

# what `quality` stands for. Chosen by measurement: docs/lab/quality.md
QUALITIES: dict[str, dict[str, Any]] = {
    "fast": {"mass": 0.9, "floor": 64, "cap": 1024},
    "balanced": {"mass": 0.95, "floor": 64, "cap": 2048},
    "careful": {"mass": 0.985, "floor": 128, "cap": 8192},
}
QUALITY_VARIABLE = "FASA_QUALITY"


def parse_mode(text: Any, where: str = "fasa_mode") -> str:
    """auto, device or host; c and m are short for device and host. Raises FasaError, which names `where`."""
    mode = MODE_ALIASES.get(text, text) if isinstance(text, str) else text
    if mode not in MODES:
        short = ", ".join(MODE_ALIASES)
        raise FasaError(f"{where}: expected one of {', '.join(MODES)} (or {short}), found {text!r}")
    return mode


def default_chunks(n_chunk: int) -> int:
    """Dominant chunks of a head of n_chunk when the setting is 0: 3/8, rounded down to a multiple of 4, at least 4.

    The library's fasa_default_chunks. A head with fewer than 4 chunks uses all of them.
    """
    return max(4, 3 * n_chunk // 8 // 4 * 4)


def quality_settings(name: Any, where: str) -> dict[str, Any]:
    """The settings that a quality stands for. Raises FasaError, which names `where`."""
    if not isinstance(name, str) or name not in QUALITIES:
        raise FasaError(f"{where}: quality: expected one of {', '.join(QUALITIES)}, found {name!r}")
    return QUALITIES[name]


@dataclass(frozen=True)
class Setting:
    """One row of the table, as `SETTINGS` lists them."""

    name: str
    default: Any
    low: float  # the range, both ends included; of an enumerated setting: of the index into `choices`
    high: float
    choices: tuple[str, ...]  # () for a number
    unit: str
    help: str

    @property
    def kind(self) -> type:
        """float, int or str, the type of its value in Python."""
        return type(self.default)

    @property
    def flag(self) -> str:
        return "--fasa-" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return "FASA_" + self.name.upper()

    @property
    def key(self) -> str:
        """The GGUF key of a profile's default."""
        return "fasa.default." + self.name

    @property
    def gguf_type(self) -> str:
        return {float: "f32", str: "str"}.get(self.kind, "i32" if self.low < 0 else "u32")

    @property
    def c_type(self) -> str:
        """Its type in struct fasa_params. Enumerated settings are the index into `choices`."""
        return "float" if self.kind is float else "int32_t" if self.choices or self.low < 0 else "uint32_t"

    def expected(self) -> str:
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        return f"a {'number' if self.kind is float else 'whole number'} from {self.low} to {self.high}"

    def check(self, value: Any) -> None:
        """Raises FasaError when `value` is out of range."""
        if self.choices:
            fits = value in self.choices
        else:
            kinds = (int, float) if self.kind is float else (int,)
            fits = isinstance(value, kinds) and not isinstance(value, bool) and self.low <= value <= self.high
        if not fits:
            raise FasaError(f"setting {self.name}: expected {self.expected()}, found {value!r}")


def _row(
    default: Any, unit: str, help: str, low: float = 0, high: float = INT_MAX, choices: tuple[str, ...] = ()
) -> Any:
    if choices:
        low, high = 0, len(choices) - 1
    return field(default=default, metadata={"unit": unit, "help": help, "low": low, "high": high, "choices": choices})


@dataclass(frozen=True, kw_only=True)  # settings come and go, so positions mean nothing
class FasaParams:
    """How to decode with FASA; a token is one KV cell.

    Every setting is also a command-line flag (`--fasa-budget`) and an environment variable (`FASA_BUDGET`).
    Raises FasaError from `check` when a value is out of range.
    """

    chunks: int = _row(
        0,
        "frequency chunks per KV head",
        "dominant chunks that score the tokens; 0: 3/8 of the head's chunks, rounded down to a multiple of 4, at "
        "least 4",
    )
    budget: int = _row(
        512, "tokens per step and KV head", "tokens attended; sinks and recent tokens count in it", low=1
    )
    mass: float = _row(
        0.0,
        "share, 0 to 1",
        "take tokens until this share of the estimated attention is held; 0: fixed budget",
        high=1,
    )
    floor: int = _row(64, "tokens", "fewest tokens attended when mass > 0")
    cap: int = _row(1024, "tokens", "most tokens attended when mass > 0")
    sink: int = _row(4, "tokens", "first tokens of a sequence, always attended", high=65536)
    recent: int = _row(32, "tokens", "last tokens of a sequence, always attended", high=65536)
    min_context: int = _row(1024, "cells", "a step that sees fewer cached cells than this is dense")
    min_context_gpu: int = _row(
        -1,
        "cells",
        "the same for a layer on a GPU; -1: found by a short probe of the GPU; without effect when min_context is 0",
        low=-1,
    )
    max_tokens: int = _row(
        64, "tokens per sequence", "a ubatch with more tokens of one sequence than this is a prompt", low=1
    )
    k_dom: str = _row("q4", "f16, q8 or q4", "how the dominant keys are stored", choices=K_DOM_TYPES)
    per_head: int = _row(
        0,
        "0 or 1",
        "1: every query head selects for itself, as published; 0: those of a KV head together",
        high=1,
    )
    mean_budget: int = _row(
        0,
        "tokens on average",
        "> 0: tokens attended on average; mass is then looked up in the profile, floor is a quarter of it (at least "
        "64), cap twice",
    )
    row_cache: int = _row(
        -1,
        "MiB",
        "FASA-M: device memory, over all layers, that keeps recently attended rows; 0: none, -1: twice what a step "
        "attends",
        low=-1,
    )
    ahead: str = _row(
        "auto",
        "auto, off or on",
        "select a layer's tokens while the feed-forward before it runs, by foreseen queries; auto: on a GPU, in steps "
        "of one token, where the dominant keys are no more bytes than the feed-forward",
        choices=AHEAD,
    )
    prefill: str = _row(
        "auto",
        "auto, off or on",
        "process prompts sparsely; auto: from prefill_min_context cells on, and not in layers on the CPU whose prompts "
        "a GPU computes",
        choices=PREFILL,
    )
    prefill_min_context: int = _row(
        1024, "cells", "with prefill auto, a ubatch of a prompt that sees fewer cells than this is dense"
    )
    prefill_min_context_gpu: int = _row(
        8192,
        "cells",
        "for layers on a GPU: the same, and the larger of the two counts; in mode host twice this",
    )
    prefill_tile: int = _row(
        128, "tokens", "tokens of a prompt that share a list of cells per KV head", low=16, high=1024
    )
    prefill_mass: float = _row(
        0.98,
        "share, 0 to 1",
        "a tile takes cells until this share of the estimated attention is held; 0: prefill_budget cells",
        high=1,
    )
    prefill_budget: int = _row(
        1024, "cells", "cells that a tile attends when prefill_mass is 0; those always attended count in it", low=1
    )
    prefill_floor: int = _row(256, "cells", "fewest cells that a tile attends when prefill_mass > 0", low=1)
    prefill_cap: int = _row(4096, "cells", "most cells that a tile attends when prefill_mass > 0", low=1)
    prefill_band: int = _row(
        128, "cells", "cells before a tile that it always attends, beside sinks and its own", high=65536
    )

    def replace(self, **changes: Any) -> FasaParams:
        """A copy with some settings changed."""
        return dataclasses.replace(self, **changes)

    @property
    def longest(self) -> int:
        """The most tokens that a list holds (fasa_list_length), whatever the context."""
        most = (
            self.cap
            if self.mass > 0
            else 2 * self.mean_budget
            if self.mean_budget
            else max(self.budget, self.sink + self.recent + 1)
        )
        return max(most, self.sink + self.recent, 1)

    def least_above(self, n_cells: int, reason: Reason, gpu_cells: int | None = None) -> int:
        """The setting that keeps a step of n_cells cells dense: min_context or, when that is the step's reason,
        min_context_gpu, which is gpu_cells in the context; 0 when neither does."""
        if n_cells < self.min_context:
            return self.min_context
        gpu = max(self.min_context_gpu, 0) if gpu_cells is None else gpu_cells
        return gpu if reason == Reason.MIN_CONTEXT_GPU else 0

    def check(self) -> FasaParams:
        """Returns self, or raises FasaError naming the first setting that is out of range."""
        for row in SETTINGS:
            row.check(getattr(self, row.name))
        if self.mass > 0 and not 1 <= self.floor <= self.cap:
            raise FasaError(f"settings floor and cap: expected 1 <= floor <= cap, found {self.floor} and {self.cap}")
        if self.prefill_floor > self.prefill_cap:
            raise FasaError(
                f"settings prefill_floor and prefill_cap: expected prefill_floor <= prefill_cap, found "
                f"{self.prefill_floor} and {self.prefill_cap}"
            )
        if self.mass > 0 and self.mean_budget > 0:
            raise FasaError(
                f"settings mass and mean_budget: expected one of them, found {self.mass:g} and {self.mean_budget}"
            )
        return self

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str, base: FasaParams | None = None) -> FasaParams:
        """Settings by name; numbers may be text. Of budget, mass and mean_budget, the one given replaces the base's; so
        does prefill_budget the base's prefill_mass. `quality` is a name too: it stands for several settings, of which
        those that `values` gives itself win.

        Raises FasaError naming `where` for unknown names and values that cannot be read.
        """
        values = dict(values)
        if (quality := values.pop("quality", None)) is not None:
            chosen = quality_settings(quality, where)
            base = (base or cls()).replace(**chosen, mean_budget=0)
        known = {row.name: row for row in SETTINGS}
        changes: dict[str, Any] = {}
        for name, value in values.items():
            if name not in known:
                raise FasaError(f"{where}: unknown setting {name!r}; known are {', '.join(known)}, quality")
            try:
                changes[name] = known[name].kind(value)
                if isinstance(value, float) and changes[name] != value:
                    raise ValueError("a fraction")
            except (TypeError, ValueError, OverflowError):
                kind = {int: "a whole number", float: "a number"}.get(known[name].kind)
                what = f"{kind} ({known[name].unit})" if kind else known[name].unit
                raise FasaError(f"{where}: setting {name}: expected {what}, found {value!r}") from None
        if changes.get("mass", 0) > 0 or ("budget" in changes and "mass" not in changes):
            changes.setdefault("mean_budget", 0)
        if changes.get("mean_budget", 0) > 0 or ("budget" in changes and "mean_budget" not in values):
            changes.setdefault("mass", 0.0)
        if "prefill_budget" in changes:
            changes.setdefault("prefill_mass", 0.0)
        return (base or cls()).replace(**changes).check()

    @classmethod
    def from_env(cls, base: FasaParams | None = None, environ: Mapping[str, str] | None = None) -> FasaParams:
        """`base` (or the defaults) with FASA_QUALITY and every FASA_<SETTING> environment variable applied."""
        environ = os.environ if environ is None else environ
        found = {row.name: environ[row.variable] for row in SETTINGS if environ.get(row.variable)}
        if environ.get(QUALITY_VARIABLE):
            found["quality"] = environ[QUALITY_VARIABLE]
        return cls.from_mapping(found, "environment", base)


SETTINGS: tuple[Setting, ...] = tuple(Setting(f.name, f.default, **f.metadata) for f in dataclasses.fields(FasaParams))
