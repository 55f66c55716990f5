"""FASA's side of a llama_context: profile, settings, counters, observer."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..counters import COUNTERS
from ..errors import FasaError
from ..params import SETTINGS, FasaParams
from ..reasons import Reason
from .attach import Attached
from .gpu_limit import GpuLimit
from .library import api, check, last_error, struct


@contextlib.contextmanager
def kv_mode(mode: str) -> Iterator[None]:
    """The mode, device or host, of a context that this thread makes inside.

    Raises FasaError in place of an exception raised inside when the library says why the memory could not be had.
    """
    if mode != "host":
        yield
        return
    _, lib = api()
    check(lib.fasa_set_mode(lib.FASA_MODE_HOST))  # which clears the last error
    try:
        yield
    except Exception as e:
        if last_error():
            raise FasaError(last_error()) from e
        raise
    finally:
        lib.fasa_set_mode(lib.FASA_MODE_DEVICE)


@dataclass
class Observation:
    """Post-RoPE q and k of one layer of one ubatch (struct fasa_observation)."""

    il: int
    q: np.ndarray  # float32 [n_tokens, n_head, head_dim], a copy
    k: np.ndarray  # float16 or float32 [n_kv, n_head_kv, head_dim], valid during the call only
    scale: float
    soft_cap: float
    q_ahead: np.ndarray | None  # as q, foreseen from the residual before the feed-forward; None: they cannot be
    ahead_reason: Reason  # why not


def not_pinned(context: Context) -> str:
    """Why a context of mode host has nothing in pinned host memory; "" when it has."""
    if context.counters()["bytes_kv_host"]:
        return ""
    return (
        "fasa_mode host: this context has no K and V in pinned host memory; it needs flash attention, keys per head, a "
        "GPU of compute capability 7.5 or later and layers split by layer; use mode device"
    )


STEPS = ("auto", "prompt", "decode")  # in the order of enum fasa_step


class Context:
    """FASA's side of a llama_context: profile, settings, counters, observer. `ctx_ptr` is its address.

    Whoever decodes with the context holds `turn` meanwhile. What changes what a decode uses (settings, profile, lists,
    observer, counters set to zero) waits for it; what only reads does not. Whoever frees the context calls `close`
    before. Every call after that raises FasaError, which says `closed`.
    """

    def __init__(self, ctx_ptr: int, closed: str = "this context is closed") -> None:
        self.turn = threading.RLock()
        self._used = threading.RLock()  # held while the library has the pointer; taken after `turn`
        self._closed = closed
        self._process = os.getpid()
        self._inside = threading.local()  # .observer: this thread is inside one
        self._step = "auto"
        self._without = False  # steps have no attention
        self._ffi, self._lib = api()
        self._ctx = self._ffi.cast("struct llama_context *", ctx_ptr)  # None: closed
        self._observer = None
        self._observer_error: BaseException | None = None

    def close(self, wait: bool = True) -> bool:
        """The context is freed next: waits for the decode and the calls that use it, and refuses later ones.

        wait: False returns False, and nothing is closed, when some thread uses it.
        """
        if not self.turn.acquire(blocking=wait):
            return False
        try:
            if not self._used.acquire(blocking=wait):
                return False
            self._ctx = None
            self._used.release()
            return True
        finally:
            self.turn.release()

    @contextlib.contextmanager
    def _use(self) -> Iterator[Any]:
        """The pointer, which is not freed inside. Raises FasaError when it was."""
        with self._used:
            if self._ctx is None:
                raise FasaError(self._closed)
            yield self._ctx

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        """What a function of the library returns, which takes the context first."""
        with self._use() as ctx:
            return function(ctx, *args)

    def _change(self, function: Callable[..., int], *args: Any) -> None:
        """Call what changes the context, between two decodes. Raises FasaError, also inside an observer."""
        if getattr(self._inside, "observer", False):
            raise FasaError("an observer runs inside a decode, which a change would have to wait for; change it later")
        with self.turn, self._use() as ctx:
            check(function(ctx, *args))

    def check_process(self, n_threads: int) -> None:
        """FasaError in a process forked after the context was made: its threads of computation are not there."""
        if n_threads > 1 and os.getpid() != self._process:
            raise FasaError(
                "the model was loaded before this process was forked, which leaves its threads behind; load it in each "
                "process, or start them with multiprocessing's spawn"
            )

    @property
    def step(self) -> str:
        """What step_kind says now: auto, prompt or decode."""
        return self._step

    @contextlib.contextmanager
    def step_kind(self, kind: str) -> Iterator[None]:
        """What the tokens decoded inside are: "prompt" (dense), "decode" (tokens that continue sequences, drafts too),
        or "auto", which is decided sequence by sequence (fasa_set_step of native/fasa.h). Holds `turn`.

        Raises FasaError for another kind.
        """
        if kind not in STEPS:
            raise FasaError(f"step kind {kind!r}: expected one of {', '.join(STEPS)}")
        with self.turn:
            self._call(self._lib.fasa_set_step, STEPS.index(kind))  # fails where nothing is ever sparse
            before, self._step = self._step, kind
            try:
                yield
            finally:
                self._step = before
                if self._ctx is not None:
                    self._call(self._lib.fasa_set_step, STEPS.index(before))

    def set_profile(self, profile: Any) -> None:
        """Attach a Profile, which may be made by hand.

        Raises FasaError naming what does not fit: the shapes of profile and model, an array that is shorter or longer
        than the shape, a value out of range.
        """
        attached = Attached(profile)  # owns the arrays, so it must outlive the call
        self._change(self._lib.fasa_set_profile, attached.struct)

    def set_params(self, params: FasaParams | None) -> None:
        """Turn FASA on with these settings, or off with None; the context stays live."""
        p = self._ffi.new("fasa_params *", self._lib.fasa_params_default())
        p.enabled = params is not None
        if params is not None:
            params.check()
            for row in SETTINGS:
                value = getattr(params, row.name)
                setattr(p, row.name, row.choices.index(value) if row.choices else value)
        self._change(self._lib.fasa_set_params, p)

    def params(self) -> FasaParams | None:
        """The settings in force; None when FASA is off."""
        p = struct("fasa_params")
        check(self._call(self._lib.fasa_get_params, p))
        return self._fromstruct(p) if p.enabled else None

    def gpu_limit(self) -> GpuLimit:
        """What min_context_gpu is: the setting, or what was measured when that is -1."""
        limit = struct("fasa_gpu_limit")
        check(self._call(self._lib.fasa_get_gpu_limit, limit))
        return GpuLimit.of(limit)

    def measured(self, params: FasaParams) -> FasaParams:
        """`params`, which are set, with the number that a min_context_gpu of -1 means here."""
        self.set_params(params)
        limit = self.gpu_limit()
        return params.replace(min_context_gpu=limit.cells) if limit.source not in ("none", "setting") else params

    @contextlib.contextmanager
    def without_attention(self) -> Iterator[None]:
        """The steps decoded inside have no attention, for timing what it adds: what they compute means nothing.

        Raises FasaError inside another one, and where the context has no cache that FASA knows.
        """
        if self._without:
            raise FasaError("without_attention: it is on already")
        self._change(self._lib.fasa_set_attention, 0)
        self._without = True
        try:
            yield
        finally:
            self._without = False
            self._change(self._lib.fasa_set_attention, 1)

    def layer_params(self, il: int) -> FasaParams | None:
        """The settings in force in one layer, with its own mass, floor and cap; None when FASA is off."""
        p = struct("fasa_params")
        check(self._call(self._lib.fasa_get_layer_params, il, p))
        return self._fromstruct(p) if p.enabled else None

    @staticmethod
    def _fromstruct(p: Any) -> FasaParams:
        values = {row.name: getattr(p, row.name) for row in SETTINGS}
        # C has floats: the shortest number that is this one, 0.9 and not 0.8999999761581421
        values |= {row.name: float(str(np.float32(values[row.name]))) for row in SETTINGS if row.kind is float}
        return FasaParams(
            **{row.name: row.choices[values[row.name]] if row.choices else values[row.name] for row in SETTINGS}
        )

    def counters(self) -> dict[str, int]:
        """struct fasa_counters by name; what each counts is in fasa_gguf/counters.py."""
        c = struct("fasa_counters")
        check(self._call(self._lib.fasa_get_counters, c))
        return {row.name: getattr(c, row.name) for row in COUNTERS}

    def reset_counters(self) -> None:
        """All counters but the memory sizes go to zero."""
        self._change(self._lib.fasa_reset_counters)

    def invalidate(self) -> None:
        """Mark all dominant keys stale: the next sparse step derives them anew from the stored K."""
        self._change(self._lib.fasa_invalidate)

    def fill_random(self, n_cells: int, seed: int = 0) -> None:
        """Give every sequence `n_cells` cells of random K and V instead of what it has (fasa_fill_random)."""
        self._change(self._lib.fasa_fill_random, n_cells, seed)

    def read_rate(self, n_cells: int) -> float:
        """Bytes per second at which the context's threads read the first n_cells cells of K and V of every sequence.

        Nothing else is done with them. Raises FasaError where the cache is in device memory.
        """
        rate = self._ffi.new("double *")
        check(self._call(self._lib.fasa_read_rate, n_cells, rate))
        return rate[0]

    def host_rates(self, n_cells: int, n_rows: int, between: int) -> tuple[float, float, float]:
        """(copy, gather, fetch): bytes per second that the device takes from K and V in pinned host memory (FASA-M).

        copy: in one piece. gather: the rows of n_rows random cells of the first n_cells, K and V of every KV head,
        layer by layer, each behind `between` bytes of device memory (a layer's weights), by a kernel that does nothing
        else. fetch: the same by the kernel that fetches rows for attention. Raises FasaError.
        """
        rates = struct("fasa_rates")
        check(self._call(self._lib.fasa_host_rates, n_cells, n_rows, between, rates))
        return rates.copy, rates.gather, rates.fetch

    def borrow_list(self, il: int, lender: int | None) -> None:
        """Layer il attends from now on to the cells that layer `lender`, one before it, selects; None: to its own.

        The borrower is dense where its lender is. Stays so until the next call for this layer. Raises FasaError when
        FASA is off, the lender does not select, or the two differ in heads, cache or device.
        """
        self._change(self._lib.fasa_borrow_list, il, -1 if lender is None else lender)

    def layer_reason_codes(self) -> list[Reason]:
        """Per layer, why it stays dense in a sparse step; NONE where it runs sparse."""
        n_layer = self.model_info()["n_layer"]
        return [Reason(self._call(self._lib.fasa_layer_reason_code, il)) for il in range(n_layer)]

    def layer_ahead_codes(self) -> list[Reason]:
        """Per layer, why it selects with its own queries; NONE where it selects ahead in a sparse step."""
        n_layer = self.model_info()["n_layer"]
        return [Reason(self._call(self._lib.fasa_layer_ahead_code, il)) for il in range(n_layer)]

    def layer_reasons(self) -> list[str | None]:
        """The texts of layer_reason_codes; None where a layer runs sparse."""
        return [reason.text or None for reason in self.layer_reason_codes()]

    def step_reason_code(self) -> Reason:
        """Why the last ubatch was dense as a whole; NONE when it was sparse."""
        return Reason(self._call(self._lib.fasa_step_reason_code))

    def step_reason(self) -> str:
        """The text of step_reason_code; "" when the ubatch was sparse."""
        return self.step_reason_code().text

    def prefill_reason_code(self) -> Reason:
        """Why the last ubatch of a prompt, or a layer in it, was dense; NONE when all of it was sparse."""
        return Reason(self._call(self._lib.fasa_prefill_reason_code))

    def model_info(self) -> dict[str, Any]:
        """n_layer, rope_layout (0 NORM, 1 NEOX, -1 none), rope_base, rope_scale, is_mla."""
        i = struct("fasa_model_info")
        check(self._call(self._lib.fasa_get_model_info, i))
        return {name: getattr(i, name) for name, _ in self._ffi.typeof("fasa_model_info").fields if name != "size"}

    def layer_shape(self, il: int) -> tuple[int, int, int, int]:
        """(n_head, n_head_kv, head_dim, n_rot) of one layer; n_head_kv is 0 where there is no attention."""
        out = self._ffi.new("int32_t[4]")
        check(self._call(self._lib.fasa_get_layer_shape, il, out))
        return tuple(out)

    def observe(self, fn: Callable[[Observation], None] | None) -> None:
        """Call fn for every attention layer of every ubatch, from a compute thread; None removes the observer.

        An exception in fn does not stop the decode: it is kept, and `raise_observed` raises it.
        """
        if fn is None:
            self._change(self._lib.fasa_set_observer, self._ffi.NULL, self._ffi.NULL)
            self._observer = None
            return

        def call(seen: Any, _user: Any) -> None:
            self._inside.observer = True
            try:
                shape = (seen.n_tokens, seen.n_head, seen.n_embd_head)

                def queries(at: Any) -> np.ndarray:
                    return np.frombuffer(self._ffi.buffer(at, 4 * math.prod(shape)), np.float32).reshape(shape).copy()

                dtype = np.dtype(np.float16 if seen.k_is_f16 else np.float32)
                nk = seen.n_kv * seen.n_head_kv * seen.n_embd_head
                k = np.frombuffer(self._ffi.buffer(seen.k, nk * dtype.itemsize), dtype).reshape(
                    seen.n_kv, seen.n_head_kv, -1
                )
                q_ahead = queries(seen.q_ahead) if seen.q_ahead != self._ffi.NULL else None
                fn(
                    Observation(
                        seen.il, queries(seen.q), k, seen.scale, seen.soft_cap, q_ahead, Reason(seen.ahead_reason)
                    )
                )
            except BaseException as e:  # must not cross the C frame; raise_observed raises it
                self._observer_error = self._observer_error or e
            finally:
                self._inside.observer = False

        callback = self._ffi.callback("fasa_observer", call)
        self._change(self._lib.fasa_set_observer, callback, self._ffi.NULL)
        self._observer = callback

    def raise_observed(self) -> None:
        """Raise the first exception that an observer left, if any."""
        error, self._observer_error = self._observer_error, None
        if error is not None:
            raise error
