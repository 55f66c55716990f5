"""Gate: many inside at once, one who waits for all to leave and is not passed by."""

import threading
import time

from fasa_gguf.runtime.gate import Gate


def test_one_who_closes_is_not_passed_by():
    gate, stop, together = Gate(), threading.Event(), threading.Barrier(2, timeout=10)

    def use(first):
        while not stop.is_set():
            with gate, gate:
                if first:
                    together.wait()  # two are inside at once
                    first = False
                time.sleep(0.002)

    threads = [threading.Thread(target=use, args=(True,)) for _ in range(2)]
    for t in threads:
        t.start()
    for _ in range(20):
        start = time.monotonic()
        assert gate.acquire()
        assert gate._inside == 0 and time.monotonic() - start < 10
        assert not gate.acquire(blocking=False)
        gate.release()
    stop.set()
    for t in threads:
        t.join()


def test_one_who_does_not_wait():
    gate = Gate()
    with gate:
        other = []
        thread = threading.Thread(target=lambda: other.append(gate.acquire(blocking=False)))
        thread.start()
        thread.join()
    assert other == [False] and gate.acquire(blocking=False)
    gate.release()
    with gate:
        pass
