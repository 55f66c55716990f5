"""Arms: what is decoded beside dense, and how a session turns from one to the next."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .. import runtime
from ..errors import FasaError
from ..params import FasaParams
from ..profile.profile import Profile
from ..session import Session
from .journal import model_print, text_print


@dataclass
class Arm:
    """What is decoded: params None is dense; profile None is the model's own."""

    name: str
    params: FasaParams | None = None
    profile: Profile | None = None


def parse_arms(text: str, settings: Callable[[str | None], tuple[FasaParams, Profile]], prefix: str = "") -> list[Arm]:
    """Arms from a text such as "mass=0.9,cap=4096;mass=0.9,floor=16": settings of FasaParams by name on top of those that
    `settings(None)` gives. `profile=FILE` takes another profile, whose own settings `settings(FILE)` gives; `dense` alone is dense
    decoded step by step. An arm's name is its text behind the prefix. Raises FasaError naming the arm."""
    arms = []
    for part in text.split(";"):
        part, values, path = part.strip(), {}, None
        where = f"--arms: arm {part!r}"
        if part == "dense":
            arms.append(Arm("dense by steps"))
            continue
        for item in part.split(","):
            name, equals, value = (x.strip() for x in item.partition("="))
            if not equals or not value:
                raise FasaError(
                    f"{where}: expected SETTING=VALUE, found {item!r}; such as --arms 'mass=0.9,cap=4096;budget=256'"
                )
            if name in values or (name == "profile" and path):
                raise FasaError(f"{where}: {name} is given twice")
            if name == "profile":
                path = value
            else:
                values[name] = value
        base, profile = settings(path)
        arms.append(Arm(prefix + part, FasaParams.from_mapping(values, where, base), profile))
    return arms


def describe(
    model: str | os.PathLike,
    arms: Sequence[Arm],
    profile: Profile | None,
    text: str | None,
    n_threads: int,
    n_gpu_layers: int,
    type_k: str,
    type_v: str,
) -> dict[str, Any]:
    """What a finished sample depends on, whatever the task: a file to resume must agree in all of it."""
    return {
        "model": model_print(model),
        "library": runtime.library.version(),
        "text": text_print(text),
        "arms": [
            {
                "arm": a.name,
                "fasa": None if a.params is None else dict(a.params.__dict__),
                "profile": None if a.params is None else text_print((a.profile or profile).to_json()),
            }
            for a in arms
        ],
        "threads": n_threads or os.cpu_count() or 1,
        "n_gpu_layers": n_gpu_layers,
        "type_k": type_k,
        "type_v": type_v,
    }


class ArmSwitch:
    """Turns a session from one arm to the next; `profile` serves the arms that bring none."""

    def __init__(self, session: Session, profile: Profile | None) -> None:
        self.fasa, self.profile = session.fasa, profile
        self.attached: Profile | None = None

    def use(self, arm: Arm | None) -> None:
        """Settings and profile of this arm, counters at zero; None is dense."""
        params = arm.params if arm else None
        wanted = (arm.profile if arm else None) or self.profile
        if params is not None and self.attached is not wanted:
            self.fasa.set_params(None)
            self.fasa.set_profile(wanted)
            self.attached = wanted
        self.fasa.set_params(params)
        self.fasa.reset_counters()
