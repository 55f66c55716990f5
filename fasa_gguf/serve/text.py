"""The text of a completion as its tokens come: whole characters, nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Bytes of tokens in, text out that may be sent.

    Text is held back while it may be the start of a stop string, and bytes while they may be the start of a character.
    stopped: a stop string was found; what stands before it has been given out.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [s for s in stops if s]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False
        self.n_sent = 0  # characters given out
        self.n_seen = 0  # characters decoded, those held back included

    def push(self, piece: bytes) -> str:
        """The text that may be sent after one more token."""
        return self._take(self._decoder.decode(piece))

    def end(self) -> str:
        """The rest, when no more tokens come."""
        if self.stopped:
            return ""
        text = self._take(self._decoder.decode(b"", True)) + self._held
        self.n_sent += len(self._held)
        self._held = ""
        return text

    def _take(self, new: str) -> str:
        if self.stopped:
            return ""
        self.n_seen += len(new)
        text = self._held + new
        found = [at for at in (text.find(s) for s in self._stops) if at >= 0]
        if found:
            self.stopped, ready = True, min(found)
        else:
            ready = len(text) - self._start_of_stop(text)
        out, self._held = text[:ready], "" if self.stopped else text[ready:]
        self.n_sent += len(out)
        return out

    def _start_of_stop(self, text: str) -> int:
        """Characters at the end of the text that may begin a stop string."""
        longest = 0
        for stop in self._stops:
            for n in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:n]):
                    longest = n
                    break
        return longest
