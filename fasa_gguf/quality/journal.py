"""A JSONL file of finished samples, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ..errors import FasaError, check_path


def text_print(text: str | None) -> str | None:
    """A short hash of a text."""
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()[:16]


def model_print(path: str | os.PathLike) -> str:
    """Name, size and a hash of the first and last MiB of a file: the metadata, so the profile, are in it."""
    try:
        with open(path, "rb") as f:
            size = f.seek(0, os.SEEK_END)
            f.seek(0)
            head = f.read(2**20)
            f.seek(max(0, size - 2**20))
            return f"{Path(path).name} {size} {hashlib.sha256(head + f.read()).hexdigest()[:16]}"
    except OSError as e:
        raise FasaError(f"{path}: {(e.strerror or str(e)).lower()}") from None


def _differences(a: Any, b: Any, name: str = "") -> list[str]:
    """What differs between two settings, as 'name: theirs there, ours here'."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for key in {**a, **b} for d in _differences(a.get(key), b.get(key), f"{name}.{key}" if name else key)]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in _differences(x, y, f"{name}[{i}]")]
    if isinstance(a, list) and isinstance(b, list) and a != b:
        a, b = len(a), len(b)
    return [] if a == b else [f"{name}: {a} there, {b} here"]


class Journal:
    """Finished samples by key. Use it in a `with`; without a path it keeps nothing.

    settings: whatever a sample depends on besides its key. The first line of the file holds them, every further one a
    key and a value. An incomplete last line is dropped. Raises FasaError when the file is something else, or has other
    settings.
    """

    def __init__(self, path: str | os.PathLike | None, settings: dict[str, Any]) -> None:
        self.path, self.settings, self.done = path, json.loads(json.dumps(settings)), {}
        self._file: Any = None
        if path is not None:
            check_path(path)
        if path is None or not os.path.exists(path):
            return
        data = Path(path).read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            found = lines[0]["settings"] if lines else {}
            self.done = {line["key"]: line["value"] for line in lines[1:]}
        except (ValueError, KeyError, TypeError, UnicodeDecodeError):
            raise FasaError(f"{path}: not a file of --resume; give another name") from None
        if data and not lines and not data.startswith(b'{"settings": '):  # an incomplete header is ours
            raise FasaError(f"{path}: not a file of --resume; give another name")
        if lines and (changed := _differences(found, self.settings)):
            raise FasaError(
                f"{path}: was begun with other settings ({'; '.join(changed[:3])}); use the same ones or another "
                "--resume file"
            )
        self._cut = len(whole)

    def __enter__(self) -> Journal:
        if self.path is not None:
            fresh = not os.path.exists(self.path) or self._cut == 0
            self._file = open(self.path, "r+b" if os.path.exists(self.path) else "w+b")
            self._file.truncate(0 if fresh else self._cut)
            self._file.seek(0, os.SEEK_END)
            if fresh:
                self._write({"settings": self.settings})
        return self

    def __exit__(self, *_: Any) -> None:
        if self._file:
            self._file.close()
            self._file = None

    def _write(self, value: Any) -> None:
        self._file.write(json.dumps(value).encode() + b"\n")
        self._file.flush()

    def get(self, key: str) -> Any:
        """The value of a finished sample, or None."""
        return self.done.get(key)

    def add(self, key: str, value: Any) -> None:
        """Keep a finished sample; it is on its way to the disk when this returns."""
        self.done[key] = value
        if self._file:
            self._write({"key": key, "value": value})
