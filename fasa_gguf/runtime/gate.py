"""What many threads may use at once, until it is closed."""

from __future__ import annotations

import threading


class Gate:
    """`with gate:` around each use of something that another thread may free; `acquire` waits until nobody is inside.

    It does not say that the thing is gone: whoever enters looks whether it is still there.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._inside = 0

    def __enter__(self) -> None:
        with self._changed:
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    def acquire(self, blocking: bool = True) -> bool:
        """Keep everybody out until `release`, when nobody is inside; False: somebody is, and blocking is False."""
        if not self._changed.acquire(blocking=blocking):
            return False
        while self._inside:
            if not blocking:
                self._changed.release()
                return False
            self._changed.wait()
        return True

    def release(self) -> None:
        """Let them in again."""
        self._changed.release()
