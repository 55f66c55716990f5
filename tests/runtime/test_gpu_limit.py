"""min_context_gpu by a probe: the search, what is kept of it, and who is told."""

import os
import stat
import threading

import numpy as np
import pytest

from fasa_gguf import FasaError, FasaParams
from fasa_gguf.memory.gpu_limit import planned
from fasa_gguf.memory.model import read_model
from fasa_gguf.runtime.settings import ContextSettings

NEVER = 2**31 - 1
SHAPE = {"n_head": 4, "n_head_kv": 2, "head_dim": 16, "n_dom": 8, "attended": 512}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the user's; the folder that the limits go into."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fasa_gguf" / "min_context_gpu"


@pytest.fixture
def find(library):
    return lambda timer, **kw: library.gpu_limit.find_gpu_limit("CPU", **{**SHAPE, **kw}, timer=timer)


class Line:
    """Dense takes `per_cell` a cell; FASA `fixed`, and a share of dense's time."""

    def __init__(self, fixed, share=0.1, per_cell=1.0, most=NEVER):
        self.fixed, self.share, self.per_cell, self.most, self.asked = fixed, share, per_cell, most, []

    def __call__(self, n_cells):
        self.asked.append(n_cells)
        dense = self.per_cell * n_cells
        return (dense, self.fixed + self.share * dense) if n_cells <= self.most else None


@pytest.mark.parametrize(
    ("fixed", "share", "cells", "asked"),
    [
        (9000, 0.1, 10240, 5),  # 9000 / 0.9 is 10,000: the next multiple of 256
        (0, 0.5, 2048, 2),  # faster at the first two
        (900, 0.1, 2048, 2),
        (45000, 0.1, 50176, 6),
        (90000, 0.1, 100096, 6),  # behind the last depth, by a straight line
        (500, 1.0, NEVER, 6),  # never faster
        (5e6, 0.1, NEVER, 6),  # too far away to say
        (1e4, 1.5, NEVER, 6),
    ],
)
def test_the_crossover_of_times(cache, find, fixed, share, cells, asked):
    line = Line(fixed, share)
    found = find(line)
    assert (found.cells, found.source, found.note, found.is_never) == (cells, "probe", "", cells == NEVER)
    assert line.asked == [2048, 4096, 8192, 16384, 32768, 65536][:asked]


def test_one_fast_depth_among_slow_ones_is_noise(cache, find):
    gains = {2048: -1, 4096: 1, 8192: -1, 16384: 1, 32768: 2}
    found = find(lambda n: (10.0, 10.0 - gains[n]))
    assert found.cells == 8192 + 4096  # between -1 and 1


def test_a_device_with_little_room(cache, find):
    assert find(Line(9000, most=4096)).cells == 10240  # by the line through two depths
    few = Line(9000, most=2048)
    found = find(few, head_dim=32)
    assert (found.cells, found.source, found.note) == (16384, "default", "the device could not be probed")
    assert len(list(cache.glob("[0-9a-f]*"))) == 1  # only the first is kept
    assert "16,384 cells (not measured; the device could not be probed)" in found.text


def test_what_was_found_is_kept(cache, find):
    line = Line(9000)
    first, again = find(line), find(line)
    assert (first.source, again.source, again.cells) == ("probe", "kept", 10240) and len(line.asked) == 5
    [file] = cache.glob("[0-9a-f]*")
    key, value = file.read_text().splitlines()
    assert value == "10240" and "heads=4 kv=2 dim=16 k=f16 v=f16 k_dom=2 n_dom=8 attended=512" in key
    assert "device=" in key and "build=" in key and "version=" in key
    assert "earlier probe" in again.text and "10,240 cells" in again.text


@pytest.mark.parametrize(
    "other",
    [
        {"n_head": 8},
        {"n_head_kv": 4},
        {"head_dim": 32},
        {"n_dom": 16},
        {"attended": 256},
        {"type_k": "q8_0"},
        {"type_v": "q8_0"},
        {"k_dom": "q8"},
        {"n_forced": 8},
        {"per_head": 1},
        {"beside": 4096},
    ],
)
def test_what_it_depends_on_is_in_the_key(cache, find, other):
    find(Line(9000))
    assert find(Line(45000), **other).cells == 50176
    assert find(Line(0)).cells == 10240


@pytest.mark.parametrize(
    "content", [b"", b"x", b"\xff\xfe\n5\n", b"KEY\n", b"KEY\n0\n", b"KEY\n-5\n", b"KEY\n99999999999\n", b"KEY\n7\nx\n"]
)
def test_a_file_that_cannot_be_read_is_measured_anew(cache, find, content):
    find(Line(9000))
    [file] = cache.glob("[0-9a-f]*")
    key = file.read_bytes().splitlines()[0]
    file.write_bytes(content.replace(b"KEY", key))
    assert find(Line(45000)).source == "probe"
    assert find(Line(0)).cells == 50176 and len(list(cache.glob("[0-9a-f]*"))) == 1


def test_a_cache_that_cannot_be_written_is_a_note(tmp_path, monkeypatch, find):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    found = find(Line(9000))
    assert (found.cells, found.source) == (10240, "probe")
    assert found.note == f"it is not kept: {tmp_path}/file/fasa_gguf/min_context_gpu cannot be written"
    assert "by a probe of the GPU; it is not kept" in found.text


def test_two_at_once_measure_once(cache, find):
    asked, got = [], []

    def slow(n):
        asked.append(n)
        threading.Event().wait(0.02)
        return float(n), 9000 + 0.1 * n

    threads = [threading.Thread(target=lambda: got.append(find(slow))) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(x.source for x in got) == ["kept", "kept", "probe"] and len(asked) == 5
    assert stat.S_ISREG(os.stat(cache / "lock").st_mode)


def test_the_probe_itself(cache, library):
    """On the CPU, with a feed-forward beside and without; FASA reads a fraction of a long context."""
    for beside in (0, 1 << 20):
        found = library.gpu_limit.find_gpu_limit("CPU", **{**SHAPE, "attended": 64}, beside=beside, max_bytes=1 << 30)
        assert found.source == "probe" and 2048 <= found.cells <= NEVER, found
    found = library.gpu_limit.find_gpu_limit("CPU", **SHAPE, max_bytes=1 << 16)
    assert found.source == "default" and found.note.endswith("the device has no room for more")
    found = library.gpu_limit.find_gpu_limit("NONE", **SHAPE, max_bytes=1 << 30)
    assert found.source == "default" and "there is no backend NONE" in found.note


# ---- contexts ----


def test_without_a_gpu_nothing_is_probed(tiny, profile, cache):
    from fasa_gguf.session import Session

    with Session(tiny, n_ctx=512, n_threads=2) as s:
        s.fasa.set_profile(profile)
        s.fasa.set_params(FasaParams(min_context=1))
        assert s.fasa.gpu_limit().source == "none" and s.fasa.gpu_limit().text == ""
        assert s.fasa.params().min_context_gpu == -1
        s.decode(list(range(3, 40)), 0)
        s.decode([5], 37)
        assert s.fasa.counters()["steps_sparse"] == 1
    assert not cache.exists()


@pytest.mark.parametrize("given", [-1, 700])
def test_on_a_gpu(tiny, profile, cache, cuda, given):
    from fasa_gguf.session import Session

    for source in ("probe", "kept") if given < 0 else ("setting",):
        with Session(tiny, n_ctx=4096, n_threads=2, n_gpu_layers=99) as s:
            s.fasa.set_profile(profile)
            s.fasa.set_params(FasaParams(min_context=1, min_context_gpu=given))
            found = s.fasa.gpu_limit()
            assert found.source == source and (found.cells == given if given > 0 else found.cells >= 2048)
    assert cache.exists() == (given < 0)
    settings = ContextSettings(n_ctx=4096, n_gpu_layers=-1)
    _, plan = planned(read_model(tiny, profile), settings, FasaParams(min_context=1, min_context_gpu=given))
    assert plan is None if given > 0 else plan.source == "kept"  # a plan and its context ask for the same
    with Session(tiny, n_ctx=1024, n_threads=2, n_gpu_layers=99) as s:
        s.fasa.set_profile(profile)
        s.fasa.set_params(FasaParams(min_context=1, budget=77))
        assert s.fasa.gpu_limit().source == "short" and len(list(cache.glob("[0-9a-f]*"))) == (given < 0)


def test_a_step_without_attention(tiny, profile):
    """For timing: K and V are stored, and nothing attends; behind it the context is as if it had not been."""
    from fasa_gguf.session import Session

    with Session(tiny, n_ctx=512, n_threads=2) as s:
        s.fasa.set_profile(profile)
        s.fasa.set_params(FasaParams(min_context=1, budget=40, min_context_gpu=0))
        s.decode(list(range(3, 203)), 0)
        wanted = s.decode([5], 200)
        s.remove(0, 200)
        with s.fasa.without_attention():
            s.fasa.reset_counters()
            without = s.decode([5], 200)
            assert s.fasa.counters()["tokens_attended"] == 0
            with pytest.raises(FasaError), s.fasa.without_attention():
                pass
        s.remove(0, 200)
        assert np.array_equal(s.decode([5], 200), wanted) and not np.array_equal(without, wanted)
