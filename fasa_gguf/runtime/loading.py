"""How far a model is loaded, for whoever shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# (done, total) of every model that this process loads; None: nobody wants to know
report: Callable[[int, int], None] | None = None


def callback(llama: Any, stopped: Callable[[], bool]) -> Any:
    """llama.cpp's progress_callback of a model; loading ends when stopped() says so."""

    def told(progress: float, _user: Any) -> bool:
        if report is not None:
            report(int(1000 * progress), 1000)
        return not stopped()

    return llama.llama_progress_callback(told)
