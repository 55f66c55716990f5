"""What many threads may use at once, until it is closed."""

from __future__ import annotations

import threading


class Gate:
    """`with gate:` around each use of something that another thread may free; `acquire` waits until nobody is inside.

    Whoever waits to enter goes behind one who waits in `acquire`. It does not say that the thing is gone: whoever
    enters looks whether it is still there.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._inside = 0
        self._shut = False
        self._own = threading.local()  # .depth: how often this thread is inside

    def __enter__(self) -> None:
        depth = getattr(self._own, "depth", 0)
        if depth == 0:
            with self._changed:
                while self._shut:
                    self._changed.wait()
                self._inside += 1
        self._own.depth = depth + 1

    def __exit__(self, *_: object) -> None:
        self._own.depth -= 1
        if self._own.depth == 0:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def acquire(self, blocking: bool = True) -> bool:
        """Keep everybody out until `release`, when nobody is inside; False: somebody is, and blocking is False."""
        if not self._changed.acquire(blocking=blocking):
            return False
        try:
            if not blocking and (self._inside or self._shut):
                return False
            while self._shut:
                self._changed.wait()
            self._shut = True
            while self._inside:
                self._changed.wait()
            return True
        finally:
            self._changed.release()

    def release(self) -> None:
        """Let them in again."""
        with self._changed:
            self._shut = False
            self._changed.notify_all()
