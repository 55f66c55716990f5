"""Arms: what is decoded beside dense, and how a session switches from one to the next."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

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
    """What is decoded: params None is dense; profile None is the model's own.

    ubatch: tokens that its prompt is computed in at once, 0: the context's; for arms with a prompt of their own."""

    name: str
    params: FasaParams | None = None
    profile: Profile | None = None
    ubatch: int = 0

    def read_prompt(self, s: Session, tokens: Sequence[int], wants: range = range(0)) -> list[np.ndarray]:
        """Process a prompt from position 0 on with the settings in use; the logits of the positions in `wants`."""
        s.clear()
        n = min(self.ubatch or s.n_batch, s.n_batch)  # tokens decoded at once, up to the context's n_ubatch: one ubatch
        rows: list[np.ndarray] = []
        with s.fasa.step_kind("prompt"):
            for at in range(0, len(tokens), n):
                part = tokens[at : at + n]
                s.decode_batch([(token, at + i, 0, at + i in wants) for i, token in enumerate(part)])
                rows += [s.logits(i) for i in range(len(part)) if at + i in wants]
        return rows


def prompt_reason(s: Session, arm: Arm) -> str | None:
    """Why the arm's own prompt was dense in its last ubatch, as a whole or in a layer; None: it was not."""
    return s.fasa.prefill_reason_code().name if arm.params and s.fasa.prefill_reason_code() else None


def check_ubatches(arms: Sequence[Arm], own_prompt: bool, settings: ContextSettings) -> None:
    """Raises FasaError for an arm's ubatch without prompts of its own, or above the context's."""
    for arm in arms:
        if arm.ubatch and not own_prompt:
            raise FasaError(f"arm {arm.name}: ubatch is of an arm's own prompt; add --own-prompt, or use -ub for all")
        if arm.ubatch > settings.n_ubatch:
            raise FasaError(
                f"arm {arm.name}: expected a ubatch of 1 to {settings.n_ubatch} tokens, the context's, found "
                f"{arm.ubatch}; use a larger -ub"
            )


def parse_arms(text: str, settings: Callable[[str | None], tuple[FasaParams, Profile]], prefix: str = "") -> list[Arm]:
    """Arms from a text such as "mass=0.9,cap=4096;mass=0.9,floor=16": settings of FasaParams by name.

    They change the settings that `settings(None)` returns. `profile=FILE` takes another profile, and the settings that
    `settings(FILE)` returns; `dense` alone is dense, decoded step by step. `ubatch=N` is of the arm's own prompt,
    dense's too (`dense,ubatch=256`). An arm's name is the prefix and its text. Raises FasaError naming the arm.
    """
    return [_parse_arm(part.strip(), settings, prefix) for part in text.split(";")]


def _parse_arm(text: str, settings: Callable[[str | None], tuple[FasaParams, Profile]], prefix: str) -> Arm:
    where, items = f"--arms: arm {text!r}", text.split(",")
    if text == "dense":
        return Arm("dense by steps")
    values: dict[str, str] = {}
    is_dense = items[0].strip() == "dense"
    for item in items[is_dense:]:
        name, equals, value = (x.strip() for x in item.partition("="))
        if not equals or not value:
            raise FasaError(
                f"{where}: expected SETTING=VALUE, found {item!r}; such as --arms 'mass=0.9,cap=4096;budget=256'"
            )
        if name in values:
            raise FasaError(f"{where}: {name} is given twice")
        values[name] = value
    ubatch = _ubatch(values.pop("ubatch"), where) if "ubatch" in values else 0
    if is_dense:
        if values:
            raise FasaError(f"{where}: dense takes ubatch=N only, found {next(iter(values))}; omit one of the two")
        return Arm(text, ubatch=ubatch)
    base, profile = settings(values.pop("profile", None))
    return Arm(prefix + text, FasaParams.from_mapping(values, where, base), profile, ubatch)


def _ubatch(text: str, where: str) -> int:
    if not text.isdecimal() or not int(text):
        raise FasaError(f"{where}: ubatch: expected a whole number of tokens from 1, found {text!r}")
    return int(text)


def needed_profile(model: str | os.PathLike, arms: Sequence[Arm], profile: Profile | None) -> Profile | None:
    """`profile`, or that of the model when an arm needs it. Raises FasaError when there is none."""
    if profile is None and any(a.params and not a.profile for a in arms):
        return require_profile(model)
    return profile


def describe_arm(arm: Arm, profile: Profile | None) -> dict[str, Any]:
    """What an arm's samples depend on: its settings and a hash of its profile."""
    ubatch = {"ubatch": arm.ubatch} if arm.ubatch else {}
    if arm.params is None:
        return {"arm": arm.name, "fasa": None, "profile": None} | ubatch
    used = arm.profile or profile
    kept = text_print(used.to_json() if used else None)
    return {"arm": arm.name, "fasa": dict(arm.params.__dict__), "profile": kept} | ubatch


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
        self.session, self.fasa, self.profile = session, session.fasa, profile
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
