"""The settings of FASA decoding: one dataclass here, one struct in native/fasa.h, the same names in both."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import FasaError

K_DOM_TYPES = ("f16", "q8", "q4")
MODES = (
    "auto",
    "c",
    "m",
)  # where a context's K and V lie (placement.py): no setting, since a live context cannot change it
GPU_WAITS = "the context is shorter than min_context_gpu"  # fasa_step_reason where only layers on GPUs could be sparse


def not_used(reason: str) -> str:
    """The sentence for a run that asked for FASA and in which no step used it; `reason` of step_reason."""
    way = {
        GPU_WAITS: "use --fasa-min-context-gpu 0",
        "the context is shorter than min_context": "use a smaller --fasa-min-context",
    }.get(reason)
    return f"FASA was asked for and no step used it: {reason}" + (f"; {way} or a longer context" if way else "")


def _setting(default: Any, unit: str, help: str) -> Any:
    return field(default=default, metadata={"unit": unit, "help": help})


@dataclass(frozen=True, kw_only=True)  # settings come and go, so positions mean nothing
class FasaParams:
    """How to decode with FASA; a token is one KV cell.

    Every setting is also a command-line flag (`--fasa-budget`) and an environment variable (`FASA_BUDGET`).
    Raises FasaError from `check` when a value is out of range.
    """

    chunks: int = _setting(
        0, "frequency chunks per KV head", "dominant chunks that score the tokens; 0: 3/8 of the head's"
    )
    budget: int = _setting(512, "tokens per step and KV head", "tokens attended; sinks and recent tokens count in it")
    mass: float = _setting(
        0.0, "share, 0 to 1", "take tokens until this share of the estimated attention is held; 0: fixed budget"
    )
    floor: int = _setting(64, "tokens", "fewest tokens attended when mass > 0")
    cap: int = _setting(1024, "tokens", "most tokens attended when mass > 0")
    sink: int = _setting(4, "tokens", "first tokens of a sequence, always attended")
    recent: int = _setting(32, "tokens", "last tokens of a sequence, always attended")
    min_context: int = _setting(1024, "cells", "a step that sees fewer cached cells than this is dense")
    min_context_gpu: int = _setting(
        16384, "cells", "the same for a layer on a GPU; without effect when min_context is 0"
    )
    max_tokens: int = _setting(8, "tokens per sequence", "a batch with more tokens than this is prefill, and dense")
    k_dom: str = _setting("q4", "f16, q8 or q4", "how the dominant keys are stored")
    per_head: int = _setting(
        0, "0 or 1", "1: every query head selects for itself, as published; 0: those of a KV head together"
    )
    mean_budget: int = _setting(
        0,
        "tokens in the mean",
        "> 0: tokens attended in the mean; mass is then looked up in the profile, floor is a quarter of it (at least 64), cap twice",
    )
    row_cache: int = _setting(
        -1,
        "MiB",
        "FASA-M: device memory, over all layers, that keeps recently attended rows; 0: none, -1: twice what a step attends",
    )

    def replace(self, **changes: Any) -> FasaParams:
        """A copy with some settings changed."""
        return dataclasses.replace(self, **changes)

    def least_above(self, n_cells: int, reason: str) -> int:
        """min_context or min_context_gpu, where `n_cells` are below it and a step is dense for that (`reason`, of step_reason); else 0."""
        return self.min_context if n_cells < self.min_context else self.min_context_gpu if reason == GPU_WAITS else 0

    def check(self) -> FasaParams:
        """Returns self, or raises FasaError naming the first setting that is out of range."""
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name == "k_dom":
                if value not in K_DOM_TYPES:
                    raise FasaError(f"setting k_dom: expected one of {', '.join(K_DOM_TYPES)}, found {value!r}")
            elif f.name == "mass":
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
                    raise FasaError(f"setting mass: expected a number from 0 to 1, found {value!r}")
            elif (
                isinstance(value, bool)
                or not isinstance(value, int)
                or not (least := -1 if f.name == "row_cache" else 0) <= value < 2**31
            ):
                raise FasaError(
                    f"setting {f.name}: expected a whole number from {least} to {2**31 - 1}, found {value!r}"
                )
        if self.budget < 1:
            raise FasaError("setting budget: expected at least 1 token, found 0")
        if self.mass > 0 and not 1 <= self.floor <= self.cap:
            raise FasaError(f"settings floor and cap: expected 1 <= floor <= cap, found {self.floor} and {self.cap}")
        if self.mass > 0 and self.mean_budget > 0:
            raise FasaError(
                f"settings mass and mean_budget: expected one of them, found {self.mass:g} and {self.mean_budget}"
            )
        if self.per_head > 1:
            raise FasaError(f"setting per_head: expected 0 or 1, found {self.per_head}")
        if self.max_tokens < 1:
            raise FasaError("setting max_tokens: expected at least 1, found 0")
        return self

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str, base: FasaParams | None = None) -> FasaParams:
        """Settings by name, numbers may be text; unknown names and unreadable values raise FasaError naming `where`. Of
        budget, mass and mean_budget the one that is given takes the place of the base's."""
        known = {f.name: f for f in dataclasses.fields(cls)}
        changes: dict[str, Any] = {}
        for name, value in values.items():
            if name not in known:
                raise FasaError(f"{where}: unknown setting {name!r}; known are {', '.join(known)}")
            kind = {"mass": float, "k_dom": str}.get(name, int)
            try:
                changes[name] = kind(value)
            except (TypeError, ValueError):
                raise FasaError(
                    f"{where}: setting {name}: expected {known[name].metadata['unit']}, found {value!r}"
                ) from None
        if changes.get("mass", 0) > 0 or ("budget" in changes and "mass" not in changes):
            changes.setdefault("mean_budget", 0)
        if changes.get("mean_budget", 0) > 0 or ("budget" in changes and "mean_budget" not in values):
            changes.setdefault("mass", 0.0)
        return (base or cls()).replace(**changes).check()

    @classmethod
    def from_env(cls, base: FasaParams | None = None, environ: Mapping[str, str] | None = None) -> FasaParams:
        """`base` (or the defaults) with every FASA_<SETTING> environment variable applied."""
        environ = os.environ if environ is None else environ
        found = {
            f.name: environ["FASA_" + f.name.upper()]
            for f in dataclasses.fields(cls)
            if environ.get("FASA_" + f.name.upper())
        }
        return cls.from_mapping(found, "environment", base)
