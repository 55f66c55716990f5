"""Which profile a model is decoded with, where several places may have one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ..errors import FasaError
from ..gguf.file import GGUFFile, read_header
from ..gguf.shape import first_shard, model_shape
from .profile import Profile

VARIABLE = "FASA_PROFILE"


def beside(model: str | os.PathLike) -> Path | None:
    """The file beside a model that holds its profile: NAME.fasa.json or NAME.gguf.fasa.json; None: there is none."""
    path = Path(model)
    names = (path.with_suffix(".fasa.json"), path.with_name(path.name + ".fasa.json"))
    return next((p for p in names if p.is_file()), None)


def find_profile(
    model: GGUFFile | str | os.PathLike,
    given: Profile | str | os.PathLike | None = None,
    say: Callable[[str], None] | None = None,
) -> Profile | None:
    """The profile of a model: `given`, or what FASA_PROFILE names, or the file beside the model, or the model's own.

    The first that is there; None when there is none. say: called with one line when the file beside a model is used
    and the model has another profile of its own. Raises FasaError when the first that is there is not usable.
    """
    if given is not None:
        return given if isinstance(given, Profile) else Profile.load(given)
    header = read_header(model)
    first_shard(header)
    if named := os.environ.get(VARIABLE):
        try:
            return _load_for(header, named)
        except FasaError as e:
            raise FasaError(f"environment: {VARIABLE}: {e}") from None
    file = beside(header.path)
    if file is None:
        return Profile.from_gguf(header)
    found = _load_for(header, file)
    if say and _own_differs(header, found):
        say(f"{file} is used instead of the profile in {header.path.name}; remove the one that is not wanted")
    return found


def require_profile(
    model: GGUFFile | str | os.PathLike,
    given: Profile | str | os.PathLike | None = None,
    say: Callable[[str], None] | None = None,
) -> Profile:
    """As find_profile. Raises FasaError, with what to run, when there is none."""
    found = find_profile(model, given, say)
    if found is None:
        path = read_header(model).path
        raise FasaError(f"{path}: there is no FASA profile in this model; run `fasa-gguf embed-profile {path}`")
    return found


def _load_for(header: GGUFFile, file: str | os.PathLike) -> Profile:
    """The profile of a file, which is named where it is for another model."""
    found = Profile.load(file)
    try:
        shape = model_shape(header)
    except FasaError:
        return found  # out of scope, or damaged: who uses the model says so
    found.check(*shape, str(file))
    return found


def _own_differs(header: GGUFFile, found: Profile) -> bool:
    try:
        own = Profile.from_gguf(header)
    except FasaError:
        return True
    return own is not None and own.to_json() != found.to_json()
