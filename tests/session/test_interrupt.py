"""Ctrl-C that strikes inside a callback of the library: the command ends all the same."""

import os
import signal
import subprocess
import sys
import threading

import pytest
from paths import ROOT

from fasa_gguf.runtime.interrupt import deferred, in_thread, in_threads

# Ctrl-C during the first line of the log, where CPython raises what ctypes then drops
STRIKE = """
import os, signal, sys
from fasa_gguf import Llama, runtime, session
llama, struck, contexts = runtime.library.load(), [], []
real, make = llama.llama_log_callback, llama.llama_init_from_model
def log(fn):
    def call(level, text, user):
        if not struck and armed[0]:
            struck.append(1)
            os.kill(os.getpid(), signal.SIGINT)
        fn(level, text, user)
    return real(call)
llama.llama_log_callback = log
llama.llama_init_from_model = lambda *a: (contexts.append(1), make(*a))[1]
armed = [True]
"""
AFTER = """
    print("went on")
except KeyboardInterrupt:
    print("ended", len(struck), len(contexts))
"""
CALLS = {
    "a session loads": "    session.Session(sys.argv[1], n_ctx=256, n_threads=1)",
    "the drop-in loads": (
        "    session.quiet()\n    Llama(sys.argv[1], n_ctx=256, n_threads=1, fasa='off', verbose=False)"
    ),
    "the drop-in loads, with llama_cpp's log": (
        "    keep = log(lambda *a: None)\n    llama.llama_log_set(keep, None)\n"
        "    Llama(sys.argv[1], n_ctx=256, n_threads=1, fasa='off', verbose=False)"
    ),
    "a session's context is made": (
        "    armed[0] = False\n    s = session.Session(sys.argv[1], n_ctx=256, n_threads=1)\n"
        "    armed[0] = True\n    s.reopen(n_ctx=512)"
    ),
    "an observer runs": (
        "    armed[0] = False\n    s = session.Session(sys.argv[1], n_ctx=256, n_threads=1)\n"
        "    def see(o):\n        struck or (struck.append(1), os.kill(os.getpid(), signal.SIGINT))\n"
        "    s.fasa.observe(see)\n    s.decode([1, 2, 3], 0)"
    ),
    "a prompt is read": (
        "    armed[0] = False\n    s = session.Session(sys.argv[1], n_ctx=512, n_threads=1)\n    seen = []\n"
        "    def see(o):\n        seen.append(o.il)\n"
        "        struck or (struck.append(1), os.kill(os.getpid(), signal.SIGINT))\n"
        "    s.fasa.observe(see)\n    try:\n        s.decode([1] * 64, 0)\n"
        "    finally:\n        assert seen == [0], seen"
    ),
    "long calls run side by side": (
        "    from fasa_gguf.runtime.interrupt import in_threads\n    import threading, time\n    struck.append(1)\n"
        "    threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()\n"
        "    contexts.append(1)\n    in_threads(lambda i: time.sleep(100), 4, 2)"
    ),
    "a long call runs": (
        "    from fasa_gguf.runtime.interrupt import in_thread\n    import threading, time\n    struck.append(1)\n"
        "    threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()\n"
        "    contexts.append(1)\n    in_thread(lambda: time.sleep(100))"
    ),
}


@pytest.mark.parametrize("what", CALLS)
def test_it_ends(library, tiny, what):
    code = f"{STRIKE}try:\n{CALLS[what]}{AFTER}"
    start = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    args = [sys.executable, "-c", code, str(tiny)]
    run = subprocess.run(args, capture_output=True, text=True, cwd=ROOT, timeout=120, **start)
    made = 0 if "loads" in what else 1  # a load that was struck is not continued
    assert run.stdout.split() == ["ended", "1", str(made)], run.stdout + run.stderr


@pytest.fixture(autouse=True)
def usual_handler():
    """A job in the background begins with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def strike():
    os.kill(os.getpid(), signal.SIGINT)


def test_the_signal_is_answered_on_leaving():
    done = []
    with pytest.raises(KeyboardInterrupt), deferred() as stopped:
        assert not stopped()
        strike()
        done.append(stopped())
        with deferred():  # in another one
            strike()
        raise ValueError("what the call then reports")
    assert done == [True] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with deferred() as stopped:
        done.append(stopped())
    assert done == [True, False]


def test_the_handler_of_an_app_gets_it():
    """It may only take note, as a server's does: a call that loads is not ended by it."""
    got = []
    before = signal.signal(signal.SIGINT, lambda number, frame: got.append(number))
    try:
        with deferred() as stopped:
            strike()
            assert not stopped() and not got
        assert got == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_are_left_alone():
    seen = []

    def work():
        with deferred() as stopped:
            seen.append((stopped(), signal.getsignal(signal.SIGINT) is signal.default_int_handler))

    t = threading.Thread(target=work)
    t.start()
    t.join()
    assert seen == [(False, True)]


def test_what_a_long_call_raises_is_raised():
    def fail():
        raise ValueError("its reason")

    with pytest.raises(ValueError, match="its reason"):
        in_thread(fail)
    with pytest.raises(ValueError, match="its reason"):
        in_threads(lambda i: fail() if i == 2 else i, 9, 3)


def test_calls_in_threads():
    """Side by side; what a call returns is at its number."""
    both = threading.Barrier(2, timeout=30)
    assert in_threads(lambda i: (i, both.wait())[0], 6, 2) == [0, 1, 2, 3, 4, 5]
    assert in_threads(lambda i: 2 * i, 3, 5) == [0, 2, 4]
