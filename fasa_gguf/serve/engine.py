"""The engine: one thread that owns the context, and decodes the requests of all slots together.

A prompt is read in pieces, one between two decode steps of the others, so that it does not stall them. Pieces begin at
multiples of their size and the last token stands alone, whoever else is served: the same sums, the same text. Decode
steps hold the sequences that FASA treats alike: in one step it decides for all.
"""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections import deque
from typing import Any

from .. import runtime
from ..errors import FasaError
from ..params import FasaParams
from ..session import Session
from .errors import ApiError, server_error, too_long
from .prefix import PrefixCache, common
from .sampling import log_softmax, top_tokens
from .slots import SHARED, Done, Piece, Request, Slot, last_row
from .stats import Stats

WORTH = 64  # tokens: fewer are evaluated again rather than copied
PAD = 256  # cells: llama.cpp lets a step see a multiple of this


class Engine:
    """Serves requests on a session with n slots (its n_seq_max), from `start` to `stop`.

    params: the FASA settings in force, None: FASA is off. n_queue: requests that may wait. cache_bytes: host memory
    for states of prompts that no slot holds any more.
    """

    def __init__(self, session: Session, params: FasaParams | None, n_queue: int = 64, cache_bytes: int = 0) -> None:
        self.session, self.params, self.n_queue = session, params, n_queue
        self.llama = runtime.library.load()
        self.slots = [Slot(i) for i in range(session.settings.n_seq_max)]
        self.n_ctx = session.n_ctx // len(self.slots)  # tokens of a slot
        self.chunk = min(session.settings.n_ubatch, session.n_batch)
        self.prefixes = PrefixCache(cache_bytes)
        self.stats = Stats()
        self._recurrent = session.is_recurrent
        self._counted = self._counters()
        self._queue: deque[Request] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._turn = itertools.count()
        self._thread = threading.Thread(target=self._run, name="fasa-engine", daemon=True)

    # ---- called from other threads ----

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End what runs, with an error for those who wait, and the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def submit(self, request: Request) -> None:
        """Put a request into the queue. Raises ApiError for one that does not fit, and when the queue is full."""
        if not request.prompt:
            raise ApiError("the prompt is empty, and this model has no token that begins a text", "prompt")
        if len(request.prompt) >= self.n_ctx:
            raise too_long(len(request.prompt), self.n_ctx, "prompt")
        with self._changed:
            if self._stopping:
                raise server_error("the server is shutting down", "shutting_down", 503)
            for gone in [r for r in self._queue if r.cancelled.is_set()]:
                self._queue.remove(gone)
                self._forget(gone)
            if len(self._queue) >= self.n_queue + sum(slot.request is None for slot in self.slots):
                raise server_error(
                    f"all {len(self.slots)} slots are busy and {self.n_queue} requests wait; try again later",
                    "queue_full",
                    503,
                )
            self._queue.append(request)
            self._changed.notify()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    @property
    def n_busy(self) -> int:
        return sum(slot.request is not None for slot in self.slots)

    @property
    def n_waiting(self) -> int:
        return len(self._queue)

    # ---- the thread ----

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._stopping or self._queue or self.n_busy):
                    self._changed.wait()
                if self._stopping:
                    break
            try:
                self._drop_cancelled()
                self._fill_slots()
                self._read_prompt()
                self._decode()
            except BaseException as e:
                self._fail_all(e)
        for slot in self.slots:
            if slot.request:
                self._end(slot, server_error("the server is shutting down", "shutting_down", 503), "failed")
        while self._queue:
            self._queue.popleft().send(server_error("the server is shutting down", "shutting_down", 503))

    def _fail_all(self, e: BaseException) -> None:
        """What should not happen: everybody in a slot is told, and the context begins anew."""
        print(f"fasa-gguf: error: {type(e).__name__}: {e}", file=sys.stderr)
        for slot in self.slots:
            if slot.request:
                self._end(slot, server_error(str(e) if isinstance(e, FasaError) else "internal error"), "failed")
            slot.tokens = []
        try:
            self.session.clear()
        except FasaError as again:
            print(f"fasa-gguf: error: {again}; the server stops", file=sys.stderr)
            with self._changed:
                self._stopping = True

    def _drop_cancelled(self) -> None:
        for slot in self.slots:
            if slot.request and slot.request.cancelled.is_set():
                self._end(slot, None, "cancelled")

    def _end(self, slot: Slot, last: Done | Exception | None, outcome: str) -> None:
        """The request of a slot has ended; what it evaluated stays."""
        request, slot.request = slot.take(), None
        request.sampler.close()
        self.stats.requests[outcome] += 1
        if last is not None:
            request.send(last)

    def _forget(self, request: Request) -> None:
        """A request that was cancelled before it had a slot."""
        self.stats.requests["cancelled"] += 1
        request.sampler.close()

    # ---- slots and prefixes ----

    def _fill_slots(self) -> None:
        while idle := [slot for slot in self.slots if slot.request is None]:
            with self._changed:
                request = self._queue.popleft() if self._queue else None
            if request is None:
                return
            if request.cancelled.is_set():
                self._forget(request)
                continue
            try:
                slot = self._place(request, idle)
            except BaseException as e:
                self.stats.requests["failed"] += 1
                request.send(server_error(str(e) if isinstance(e, FasaError) else "internal error"))
                raise
            slot.begin(request)
            slot.n_reused = len(slot.tokens)
            self.stats.reused_tokens += slot.n_reused

    def _reusable(self, tokens: list[int], prompt: list[int]) -> int:
        """How many of a sequence's tokens can stay for a prompt, whose last token is always evaluated.

        A few in common are evaluated again: where a piece begins changes the rounding, and they are quickly read.
        """
        n = common(tokens, prompt[:-1])
        return 0 if n < min(WORTH, len(prompt) - 1) or (self._recurrent and n < len(tokens)) else n

    def _place(self, request: Request, idle: list[Slot]) -> Slot:
        """An idle slot, with as much of the prompt in its cache as there is anywhere."""
        prompt = request.prompt
        own = {slot: self._reusable(slot.tokens, prompt) for slot in self.slots}
        best = max(idle, key=lambda slot: (own[slot], -slot.used))
        loses = len(best.tokens) - own[best] >= WORTH
        if loses or own[best] < WORTH:  # rather the one whose content is the oldest; nothing at all is older still
            best = min(idle, key=lambda slot: (len(slot.tokens) > 0, slot.used))
        state, keep = self._elsewhere(prompt, best, own)
        lost = len(best.tokens) - (0 if state else own[best])
        if lost >= WORTH and self.prefixes.limit and not self.prefixes.has(best.tokens):
            self.prefixes.put(best.tokens, self.session.state(best.seq))
        if state:
            self.session.set_state(state[1], best.seq)
            best.tokens = state[0]
        else:
            keep = own[best]
        if keep < len(best.tokens):
            self.session.remove(best.seq, keep)
            best.tokens = best.tokens[:keep]
        return best

    def _elsewhere(
        self, prompt: list[int], target: Slot, own: dict[Slot, int]
    ) -> tuple[tuple[list[int], bytes] | None, int]:
        """((tokens, state), tokens to keep) of another slot or of the prefix cache, if one has more of the prompt."""
        here = own[target]
        donor = max((s for s in self.slots if s is not target), key=lambda s: own[s], default=None)
        saved, n_saved = self.prefixes.find(prompt[:-1], self._recurrent)
        n_donor = own[donor] if donor else 0
        if max(n_donor, n_saved) < here + WORTH:
            return None, here
        if donor and n_donor >= n_saved:
            self.stats.prefix_hits["slot"] += 1
            return (list(donor.tokens), self.session.state(donor.seq)), n_donor
        assert saved is not None
        self.stats.prefix_hits["memory"] += 1
        return ([int(t) for t in saved.tokens], saved.state), n_saved

    # ---- steps ----

    def _read_prompt(self) -> None:
        """One piece of one prompt; several prompts take turns."""
        reading = [slot for slot in self.slots if slot.request and slot.token < 0]
        if not reading:
            return
        slot = reading[next(self._turn) % len(reading)]
        request = slot.take()
        at, last = len(slot.tokens), len(request.prompt) - 1
        end = min((at // self.chunk + 1) * self.chunk, last)
        if at < last:
            part = request.prompt[at:end]
            with self.session.fasa.step_kind("prompt"):
                self.session.decode_batch([(t, at + i, slot.seq, False) for i, t in enumerate(part)])
            slot.tokens += part
            self.stats.prompt_tokens += len(part)
        if len(slot.tokens) == last:
            with self.session.fasa.step_kind("prompt"):
                self.session.decode_batch([(request.prompt[last], last, slot.seq, True)])
            slot.tokens.append(request.prompt[last])
            self.stats.prompt_tokens += 1
            self._counted = self._counters()
            self._sample(slot, 0)

    def _group(self, slot: Slot) -> tuple[bool, int]:
        """Sequences with the same answer are treated alike by FASA."""
        request, p = slot.take(), self.params
        if p is None or request.dense:
            return True, 0
        n_kv = -(-(len(slot.tokens) + 1) // PAD) * PAD
        on_gpu = self.session.settings.n_gpu_layers != 0
        return False, (n_kv >= p.min_context) + (on_gpu and n_kv >= self.session.fasa.gpu_limit().cells)

    def _decode(self) -> None:
        """One token more for every sequence whose prompt was read."""
        active = [slot for slot in self.slots if slot.request and slot.token >= 0]
        for (dense, _), slots in itertools.groupby(sorted(active, key=self._group), self._group):
            self._step(list(slots), dense)

    def _step(self, slots: list[Slot], dense: bool) -> None:
        items = [(slot.token, len(slot.tokens), slot.seq, True) for slot in slots]
        start = time.perf_counter()
        with self.session.fasa.step_kind("prompt" if dense else "decode"):
            self.session.decode_batch(items)
        self.stats.step(len(slots), time.perf_counter() - start)
        before, self._counted = self._counted, self._counters()
        counted = {name: self._counted[name] - before[name] for name in before}
        reason = "this request has FASA off" if dense and self.params else self.session.fasa.step_reason()
        for slot in slots:
            slot.count(counted["steps_sparse"] > 0, reason, counted, len(slots))
            slot.tokens.append(slot.token)
        for i, slot in enumerate(slots):
            self._sample(slot, i)

    def _counters(self) -> dict[str, int]:
        found = self.session.fasa.counters()
        return {name: found[name] for name in ("steps_sparse", *SHARED)}

    def _sample(self, slot: Slot, i: int) -> None:
        """The next token of a slot, from the i-th row of the last batch."""
        request, llama = slot.take(), self.llama
        row = last_row(llama.llama_get_logits_ith(self.session.ctx, i), self.session.n_vocab)
        logprobs = log_softmax(row) if request.logprobs is not None else None
        if slot.n_written < request.min_tokens:
            row[self._ends()] = -float("inf")
        token = request.sampler.sample(i)
        if slot.n_written == 0:
            slot.first = time.perf_counter()
            self.stats.first(slot.first - request.created)
        if token is None or llama.llama_vocab_is_eog(self.session.vocab, token):
            self._finish(slot, "stop")
            return
        slot.n_written += 1
        self.stats.written_tokens += 1
        slot.token = token
        offset = slot.text.n_seen
        text = slot.text.push(self._piece(token))
        if logprobs is not None:
            top = {self._shown(t): float(logprobs[t]) for t in top_tokens(logprobs, request.logprobs or 0)}
            shown, value = self._shown(token), float(logprobs[token])
            slot.logprobs.append((shown, offset, value, top | {shown: value}))
        if slot.text.stopped:
            self._finish(slot, "stop", text)
        elif slot.n_written >= request.max_tokens or len(slot.tokens) >= self.n_ctx:
            self._finish(slot, "length", text)
        elif text:
            request.send(Piece(text, slot.flush_logprobs(False)))

    def _finish(self, slot: Slot, reason: Any, text: str = "") -> None:
        request = slot.take()
        text += slot.text.end()
        logprobs = slot.flush_logprobs(True)
        if text or logprobs:
            request.send(Piece(text, logprobs))
        self._end(slot, Done(reason, slot.usage(self.params is not None and not request.dense)), reason)

    def _ends(self) -> list[int]:
        """The tokens that end a text."""
        if not hasattr(self, "_eog"):
            vocab, is_end = self.session.vocab, self.llama.llama_vocab_is_eog
            self._eog = [t for t in range(self.session.n_vocab) if is_end(vocab, t)]
        return self._eog

    def _piece(self, token: int) -> bytes:
        return runtime.pieces.token_bytes(self.llama, self.session.vocab, [token], False)

    def _shown(self, token: int) -> str:
        return self._piece(token).decode("utf-8", "ignore")
