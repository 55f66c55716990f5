"""States of sequences in host memory, up to a limit, found again by the prompt that begins like them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def common(a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray) -> int:
    """How many tokens two lists begin with in common."""
    n = min(len(a), len(b))
    different = np.nonzero(np.asarray(a[:n]) != np.asarray(b[:n]))[0]
    return int(different[0]) if len(different) else n


@dataclass(eq=False)
class Saved:
    """The state of a sequence of these tokens, as Session.state gives it."""

    tokens: np.ndarray  # int32 [n]
    state: bytes

    @property
    def n_bytes(self) -> int:
        return len(self.state) + self.tokens.nbytes


class PrefixCache:
    """Least recently used states go first when the limit, in bytes, is reached; 0: nothing is kept."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.n_bytes = 0
        self.evicted = 0
        self._saved: list[Saved] = []  # the least recently used first

    def __len__(self) -> int:
        return len(self._saved)

    def has(self, tokens: Sequence[int]) -> bool:
        """Some state begins with all of these tokens."""
        return any(common(s.tokens, tokens) == len(tokens) for s in self._saved)

    def put(self, tokens: Sequence[int], state: bytes) -> bool:
        """Keep a state, in the place of those whose tokens it begins with. False: it is larger than the limit."""
        new = Saved(np.array(tokens, np.int32), state)
        if new.n_bytes > self.limit:
            return False
        for old in [s for s in self._saved if common(s.tokens, new.tokens) == len(s.tokens)]:
            self._drop(old)
        while self.n_bytes + new.n_bytes > self.limit:
            self._drop(self._saved[0])
            self.evicted += 1
        self._saved.append(new)
        self.n_bytes += new.n_bytes
        return True

    def find(self, prompt: Sequence[int], whole: bool) -> tuple[Saved | None, int]:
        """(the state that has most of the prompt, tokens in common). whole: only states whose tokens all are in it."""
        best, most = None, 0
        for saved in self._saved:
            n = common(saved.tokens, prompt)
            if n > most and not (whole and n < len(saved.tokens)):
                best, most = saved, n
        if best:
            self._saved.remove(best)
            self._saved.append(best)
        return best, most

    def _drop(self, saved: Saved) -> None:
        self._saved.remove(saved)
        self.n_bytes -= saved.n_bytes
