"""A request, and the slot of the context that works on it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from .sampling import Sampler
from .text import TextStream

SHARED = ("tokens_attended", "tokens_visible", "lists")  # counters of the steps that a request took part in


@dataclass(frozen=True)
class Piece:
    """Text that may be sent, with the logprobs of its tokens, in the form of llama_cpp's completions, or None."""

    text: str
    logprobs: dict[str, list[Any]] | None = None


@dataclass(frozen=True)
class Done:
    """The end of a completion."""

    finish_reason: Literal["stop", "length"]
    usage: dict[str, Any]


Event = Piece | Done | Exception


@dataclass(eq=False)
class Request:
    """What is to be written. `send` is called from the engine's thread, with Piece after Piece, then Done or an error.

    logprobs: how many alternatives are wanted, None: no logprobs. dense: without FASA.
    """

    prompt: list[int]
    max_tokens: int
    send: Callable[[Event], None]
    sampler: Sampler
    stops: tuple[str, ...] = ()
    min_tokens: int = 0
    logprobs: int | None = None
    dense: bool = False
    cancelled: threading.Event = field(default_factory=threading.Event)
    created: float = field(default_factory=time.perf_counter)

    def cancel(self) -> None:
        """Nobody waits for it any more; its slot is free before the next step."""
        self.cancelled.set()


@dataclass(eq=False)
class Slot:
    """One sequence of the context. tokens: those whose K and V are in the cache; they stay when a request has ended."""

    seq: int
    tokens: list[int] = field(default_factory=list)
    request: Request | None = None
    used: float = 0.0  # when its last request began
    # of the request
    text: TextStream = field(default_factory=lambda: TextStream(()))
    token: int = -1  # sampled last and not yet evaluated; -1: the prompt is not yet read
    n_written: int = 0
    n_reused: int = 0  # tokens of the prompt that were not evaluated
    first: float = 0.0  # when the first token came
    logprobs: list[tuple[str, int, float, dict[str, float]]] = field(default_factory=list)  # not yet sent
    stats: dict[str, Any] = field(default_factory=dict)

    def begin(self, request: Request) -> None:
        self.request, self.used = request, time.perf_counter()
        self.text, self.token = TextStream(request.stops), -1
        self.n_written, self.n_reused, self.first, self.logprobs = 0, 0, 0.0, []
        self.stats = dict.fromkeys(("steps_sparse", "steps_dense", *SHARED, "sequences"), 0) | {"reason": ""}

    def take(self) -> Request:
        """Its request, which it must have."""
        assert self.request is not None
        return self.request

    def count(self, sparse: bool, reason: str, counted: dict[str, int], n_sequences: int) -> None:
        """One decode step, with n_sequences in it."""
        self.stats["steps_sparse" if sparse else "steps_dense"] += 1
        if not sparse:
            self.stats["reason"] = reason
            return
        for name in SHARED:
            self.stats[name] += counted[name]
        self.stats["sequences"] += n_sequences

    def usage(self, enabled: bool) -> dict[str, Any]:
        n = len(self.take().prompt)
        return {
            "prompt_tokens": n,
            "completion_tokens": self.n_written,
            "total_tokens": n + self.n_written,
            "prompt_tokens_details": {"cached_tokens": self.n_reused},
            "fasa": {"enabled": enabled} | self.stats,
        }

    def flush_logprobs(self, end: bool) -> dict[str, list[Any]] | None:
        """The logprobs of tokens whose text was sent; at the end, of all that are left before a stop string."""
        n = sum(x[1] < self.text.n_sent or (end and not self.text.stopped) for x in self.logprobs)
        ready, self.logprobs = self.logprobs[:n], self.logprobs[n:]
        if not ready:
            return None
        return {
            "tokens": [x[0] for x in ready],
            "text_offset": [x[1] for x in ready],
            "token_logprobs": [x[2] for x in ready],
            "top_logprobs": [x[3] for x in ready],
        }


def last_row(logits: Any, n_vocab: int) -> np.ndarray:
    """llama.cpp's own row of logits, to be read or changed before it is sampled from; float32 [n_vocab]."""
    return np.ctypeslib.as_array(logits, (n_vocab,))
