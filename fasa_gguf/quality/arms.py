"""Arms: what is decoded beside dense, and how a session switches from one to the next."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .. import runtime
from ..errors import FasaError
from ..params import FasaParams
from ..profile.find import require_profile
from ..profile.profile import Profile
from ..profile.rope import rope_note
from ..runtime.settings import ContextSettings
from ..session import Session
from .journal import model_print, text_print

Progress = Callable[[str, int, int], None]  # what, done, total

COUNTERS = (  # of a session, as samples and results keep them
    "steps_sparse",
    "steps_dense",
    "layers_sparse",
    "layers_dense",
    "tokens_attended",
    "lists",
    "bytes_fac",
    "bytes_tip",
    "bytes_dense",
    "bytes_layers_dense",
)


def dense_share(counters: dict[str, int]) -> float:
    """The share of the layers that were dense in sparse steps; 0 without sparse steps."""
    sparse, dense = counters["steps_sparse"], counters["steps_dense"]
    if not sparse:
        return 0.0
    n = sparse * (counters["layers_sparse"] + counters["layers_dense"]) / (sparse + dense)  # layers of sparse steps
    return 1 - counters["layers_sparse"] / n if n else 0.0


@dataclass
class Arm:
    """What is decoded: params None is dense; profile None is the model's own."""

    name: str
    params: FasaParams | None = None
    profile: Profile | None = None


def parse_arms(text: str, settings: Callable[[str | None], tuple[FasaParams, Profile]], prefix: str = "") -> list[Arm]:
    """Arms from a text such as "mass=0.9,cap=4096;mass=0.9,floor=16": settings of FasaParams by name.

    They change the settings that `settings(None)` returns. `profile=FILE` takes another profile, and the settings that
    `settings(FILE)` returns; `dense` alone is dense, decoded step by step. An arm's name is the prefix and its text.
    Raises FasaError naming the arm.
    """
    return [_parse_arm(part.strip(), settings, prefix) for part in text.split(";")]


def _parse_arm(text: str, settings: Callable[[str | None], tuple[FasaParams, Profile]], prefix: str) -> Arm:
    if text == "dense":
        return Arm("dense by steps")
    where = f"--arms: arm {text!r}"
    values: dict[str, str] = {}
    for item in text.split(","):
        name, equals, value = (x.strip() for x in item.partition("="))
        if not equals or not value:
            raise FasaError(
                f"{where}: expected SETTING=VALUE, found {item!r}; such as --arms 'mass=0.9,cap=4096;budget=256'"
            )
        if name in values:
            raise FasaError(f"{where}: {name} is given twice")
        values[name] = value
    base, profile = settings(values.pop("profile", None))
    return Arm(prefix + text, FasaParams.from_mapping(values, where, base), profile)


def needed_profile(model: str | os.PathLike, arms: Sequence[Arm], profile: Profile | None) -> Profile | None:
    """`profile`, or that of the model when an arm needs it. Raises FasaError when there is none."""
    if profile is None and any(a.params and not a.profile for a in arms):
        return require_profile(model)
    return profile


def describe_arm(arm: Arm, profile: Profile | None) -> dict[str, Any]:
    """What an arm's samples depend on: its settings and a hash of its profile."""
    if arm.params is None:
        return {"arm": arm.name, "fasa": None, "profile": None}
    used = arm.profile or profile
    return {"arm": arm.name, "fasa": dict(arm.params.__dict__), "profile": text_print(used.to_json() if used else None)}


def describe(
    model: str | os.PathLike,
    arms: Sequence[Arm],
    profile: Profile | None,
    text: str | None,
    settings: ContextSettings,
) -> dict[str, Any]:
    """What a finished sample depends on, whatever the task: a file to resume must agree in all of it."""
    return {
        "model": model_print(model),
        "library": runtime.library.version(),
        "text": text_print(text),
        "arms": [describe_arm(a, profile) for a in arms],
        "threads": settings.threads,
        "n_gpu_layers": settings.n_gpu_layers,
        "type_k": settings.type_k,
        "type_v": settings.type_v,
        **({"n_ubatch": settings.n_ubatch} if settings.n_ubatch != ContextSettings().n_ubatch else {}),
    }


class ArmSwitch:
    """Switches a session from one arm to the next; `profile` serves the arms without one of their own."""

    def __init__(self, session: Session, profile: Profile | None) -> None:
        self.fasa, self.profile = session.fasa, profile
        self.attached: Profile | None = None
        self._said: set[str] = set()

    def use(self, arm: Arm | None) -> None:
        """Apply this arm's settings and profile, and reset the counters; None is dense."""
        params = arm.params if arm else None
        wanted = (arm.profile if arm else None) or self.profile
        if params is not None and self.attached is not wanted:
            self.fasa.set_params(None)
            self.fasa.set_profile(wanted)
            line = rope_note(wanted, self.fasa.model_info()) if wanted else ""
            if line and line not in self._said:
                print(f"fasa_gguf: {line}", file=sys.stderr)
                self._said.add(line)
            self.attached = wanted
        self.fasa.set_params(params)
        self.fasa.reset_counters()
