"""ContextSettings and Machine: defaults, what they refuse, what a run records."""

import dataclasses

import pytest

from fasa_gguf import FasaError, runtime
from fasa_gguf.runtime.machine import Machine
from fasa_gguf.runtime.settings import ContextSettings, parse_mode, thread_count


def test_modes_and_their_short_names():
    found = [parse_mode(x) for x in ("auto", "device", "host", "c", "m")]
    assert found == ["auto", "device", "host", "device", "host"]
    assert [ContextSettings(mode=x).mode for x in ("c", "m", "auto")] == ["device", "host", "auto"]
    for bad in ("M", "", None, 1):
        with pytest.raises(FasaError, match=r"where: expected one of auto, device, host \(or c, m\), found "):
            parse_mode(bad, "where")


def test_settings_are_checked_wherever_they_are_made():
    with pytest.raises(FasaError, match="cache type 'f17': expected one of f32, f16"):
        ContextSettings(type_k="f17")
    with pytest.raises(FasaError, match="cache type 'x': expected one of"):
        ContextSettings().replace(type_v="x")
    with pytest.raises(FasaError, match=r"mode: expected one of auto, device, host \(or c, m\), found 'gpu'"):
        ContextSettings().replace(mode="gpu")
    for name, value in (
        ("n_ctx", -1),
        ("n_ctx", 2**32),
        ("n_batch", 0),
        ("n_ubatch", 0),
        ("n_seq_max", 257),
        ("n_threads", 10**6),
        ("n_ctx", 1.5),
    ):
        with pytest.raises(FasaError, match=f"{name}: expected a whole number from .*, found {value}"):
            ContextSettings(**{name: value})
    with pytest.raises(TypeError, match="n_ctxx"):
        ContextSettings().replace(n_ctxx=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        ContextSettings().n_ctx = 1
    s = ContextSettings(n_ctx=1)
    assert s.replace(n_batch=7) == ContextSettings(n_ctx=1, n_batch=7) and s.n_batch == 512


def test_threads(monkeypatch):
    monkeypatch.setattr("fasa_gguf.runtime.settings.usable_cores", lambda: 12)
    assert [thread_count(), thread_count(3)] == [12, 3]
    assert ContextSettings().threads == 12 and ContextSettings(n_threads=5).threads == 5


def test_the_machine(library, monkeypatch):
    devices = [
        runtime.devices.Device("CUDA0", "Big GPU", True),
        runtime.devices.Device("CUDA1", "Small GPU", True),
        runtime.devices.Device("CPU", "Some CPU", False),
    ]
    monkeypatch.setattr(runtime.devices, "devices", lambda: devices)
    version = runtime.library.version()
    assert Machine.here(3).as_dict() == {
        "build_commit": f"fasa_gguf {version}, llama-cpp-python {runtime.library.upstream_version()}",
        "cpu_info": "Some CPU",
        "gpu_info": "Big GPU, Small GPU",
        "n_threads": 3,
    }
