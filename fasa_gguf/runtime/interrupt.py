"""Ctrl-C during a call into C that calls Python back, for its log, its progress or an observer.

The interpreter raises KeyboardInterrupt in whatever Python runs, which is then the callback, and ctypes and cffi drop
what a callback raises. So the signal is only noted during such a call, and answered when the call has returned.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")
ABORTED_FROM = 32  # tokens of a batch; asking between the nodes of a graph would be felt in a smaller one


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """Inside, SIGINT is noted; on leaving, the handler that was there gets it, and the usual one raises.

    Yields a function that says whether Ctrl-C was noted and will raise KeyboardInterrupt: a callback may end the call
    by it. Does nothing in other threads, where Python runs no handlers.
    """
    before: Any = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield lambda: False
        return
    noted: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: noted.append((number, frame)))
    try:
        yield lambda: bool(noted) and before is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
        if noted:
            before(*noted[0])


@contextlib.contextmanager
def deferred_decode(llama: Any, ctx: Any, n_tokens: int, abort: Callable[[], bool] | None = None) -> Iterator[None]:
    """`deferred` for one llama_decode; a batch of a prompt, which may take long on a CPU, is ended within.

    llama: the module llama_cpp. ctx: its pointer. abort: the caller's own reason to end a batch of any size, asked
    between the nodes of a graph. llama.cpp has one place for a callback and does not tell what is there, so one set
    with llama_set_abort_callback is lost.
    """
    with deferred() as stopped:
        if n_tokens < ABORTED_FROM and abort is None:
            yield
            return
        callback = llama.ggml_abort_callback(lambda _user: stopped() or (abort is not None and abort()))
        llama.llama_set_abort_callback(ctx, callback, None)
        try:
            yield
        finally:
            llama.llama_set_abort_callback(ctx, llama.ggml_abort_callback(), None)


def in_thread(call: Callable[[], None]) -> None:
    """Run a long call into C that leaves nothing behind, so that Ctrl-C is answered while it runs.

    The main thread waits and can be interrupted; the call then goes on by itself, or ends with the process. Raises what
    `call` raised.
    """
    if threading.current_thread() is not threading.main_thread():
        call()
    else:
        in_threads(lambda _i: call(), 1, 1)


def in_threads(call: Callable[[int], T], n: int, n_threads: int) -> list[T]:
    """[call(0), ..., call(n - 1)], n_threads of them at a time, which Ctrl-C interrupts as in `in_thread`.

    Raises what the first of them that failed raised; those that have not begun are left out then.
    """
    results: dict[int, T] = {}
    raised: list[BaseException] = []
    numbers = iter(range(n))

    def run() -> None:
        for i in numbers:
            try:
                results[i] = call(i)
            except BaseException as e:
                raised.append(e)
            if raised:
                return

    threads = [threading.Thread(target=run, daemon=True) for _ in range(n_threads)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException as e:
        raised.append(e)
    if raised:
        raise raised[0]
    return [results[i] for i in range(n)]
