"""The one exception that users see."""

from __future__ import annotations

import os


class FasaError(Exception):
    """One clear sentence: the file or key, what was expected, what was found, what to run next."""


def check_path(path: str | os.PathLike) -> None:
    """Raises FasaError for a path that no file can have: one with a null character, or that cannot be encoded."""
    try:
        bad = b"\0" in os.fsencode(path)
    except UnicodeEncodeError:
        bad = True
    if bad:
        raise FasaError(f"{os.fspath(path)!r}: expected the path of a file, found characters that no path can have")
