"""How far a command is, on stderr: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

PAUSE = 30.0  # seconds between lines
QUICK = 2.0  # seconds that loading a model may take without a bar


class _Lines:
    """A line every PAUSE seconds from now on: what was told last, of what is not done.

    They come from a thread of their own, so a step that takes twenty minutes is not silent either.
    """

    def __init__(self) -> None:
        self._open: dict[str, tuple[int, int]] = {}  # by what is done: done, total
        self._lock, self._over, self._start = threading.Lock(), threading.Event(), time.monotonic()
        threading.Thread(target=self._speak, daemon=True).start()

    def __call__(self, what: str, done: int, total: int) -> None:
        with self._lock:
            self._open[what] = done, total
            if done >= total:
                del self._open[what]

    def _speak(self) -> None:
        while not self._over.wait(PAUSE):
            with self._lock:
                if not self._over.is_set():
                    self._say()

    def _say(self) -> None:
        parts = [f"{what} {done:,} of {total:,}" for what, (done, total) in self._open.items()]
        minutes, seconds = divmod(int(time.monotonic() - self._start), 60)
        print(f"fasa-gguf: {', '.join(parts) or 'working'} ({minutes}:{seconds:02})", file=sys.stderr, flush=True)

    def stop(self) -> None:
        """No more lines, not even the end of one."""
        with self._lock:
            self._over.set()


_speaking: list[_Lines] = []


def stop_progress() -> None:
    """No more lines, of anything: the command is at its end."""
    while _speaking:
        _speaking.pop().stop()


def progress_bar() -> Callable[[str, int, int], None]:
    """A callback (what, done, total) that draws a progress bar on stderr.

    Where stderr is no terminal, a line says every 30 seconds how far it is, until stop_progress.
    """
    if not sys.stderr.isatty():
        stop_progress()
        _speaking.append(_Lines())
        return _speaking[-1]
    from tqdm import tqdm

    bars: dict[str, Any] = {}

    def report(what: str, done: int, total: int) -> None:
        if what not in bars:
            bars[what] = tqdm(total=total, desc=what, file=sys.stderr, leave=False)
        bars[what].update(done - bars[what].n)
        if done >= total:
            bars.pop(what).close()

    return report


def loading_bar() -> Callable[[int, int], None]:
    """A callback (done, total) for models that are loaded, which shows what takes longer than QUICK seconds."""
    start, bar = 0.0, None

    def report(done: int, total: int) -> None:
        nonlocal start, bar
        now = time.monotonic()
        if done == 0 or not start:
            start, bar = now, None
        if bar is None and now - start > QUICK and done < total:
            bar = progress_bar()
        if bar is not None:
            bar("loading the model", done, total)

    return report
