"""What `bench` says about FASA-M: its contexts, the arithmetic of a result, nothing of it without a GPU."""

from dataclasses import replace

import pytest
from benching import ON, QUICK, planted, run

from fasa_gguf import FasaError, runtime
from fasa_gguf.cli import main as cli
from fasa_gguf.speed import bench as b
from fasa_gguf.speed import crossover, report, timing
from fasa_gguf.speed.bench import BenchSettings
from fasa_gguf.speed.results import Result
from fasa_gguf.speed.timing import Timer
from fasa_gguf.speed.traffic import Figures, merge

COUNTERS = {
    "bytes_kv_host": 1 << 30,
    "bytes_row_cache": 7,
    "bytes_fetched": 4000,
    "bytes_staged": 1000,
    "rows_fetched": 30,
    "rows_reused": 10,
}


def test_traffic_per_step():
    f = Figures(copy_rate=50.0, gather_rate=40.0)
    assert f.floor_s() is None  # nothing was counted
    f.take_counters(COUNTERS, 10)
    assert (f.pinned, f.row_cache, f.fetched, f.staged, f.reused) == (
        1 << 30,
        7,
        400,
        100,
        0.25,
    ) and f.floor_s() == 400 / 40 + 100 / 50
    f = Figures(copy_rate=50.0, gather_rate=40.0)
    f.take_counters({**COUNTERS, "bytes_kv_host": 0}, 10)  # a context in device mode
    assert (f.pinned, f.fetched, f.reused, f.floor_s()) == (None,) * 4
    f.take_counters({**COUNTERS, "rows_fetched": 0, "rows_reused": 0}, 10)  # all dense
    assert f.reused is None and f.fetched == 400


def test_counters_of_several_repetitions():
    sums = merge([{"rows_fetched": 3, "bytes_kv": 10}, {"rows_fetched": 4, "bytes_kv": 10}])
    assert sums == {"rows_fetched": 7, "bytes_kv": 10}


def test_the_floor_of_a_step():
    result = Result(
        "fasa",
        100,
        8,
        n_parallel=2,
        samples_ts=[20.0],
        params=ON,
        memory=Figures(fetched=4e9, staged=0.0, copy_rate=5e10, gather_rate=4e10),
    )
    assert result.of_pcie_floor == pytest.approx(
        0.1 / (2 / 20)
    )  # a step is two tokens: 100 ms, of which PCIe takes as much
    assert Result("fasa", 100, 8, samples_ts=[20.0]).of_pcie_floor is None


def test_contexts_of_each_place():
    assert BenchSettings().places() == [(0, "device")]
    both = BenchSettings(modes=("device", "host"), no_kv_offload=(0, 1))
    assert both.places() == [(0, "device"), (0, "host"), (1, "device")]


def test_what_is_refused(library, tiny, profile, profiled, capsys):
    with pytest.raises(
        FasaError,
        match="--fasa-mode: bench measures the modes that it is given; expected device, host or both, found auto",
    ):
        run(tiny, replace(QUICK, modes=["auto"]), profile)
    with pytest.raises(
        FasaError,
        match="--find-crossover compares with dense in the same context, which --fasa-mode host does not have",
    ):
        crossover.find_crossover(tiny, replace(QUICK, modes=["host"]), ON, profile=profile)
    if not runtime.devices.cuda_devices():
        assert cli.main(["bench", str(profiled), "-d", "300", "--fasa-min-context", "0", "--fasa-mode", "c,m"]) == 1
        assert "there is no CUDA device, or no CUDA in this build" in capsys.readouterr().err


def test_nothing_shows_without_a_gpu(library, tiny, profile):
    if runtime.devices.cuda_devices():
        pytest.skip("there is a GPU")
    results = run(tiny, QUICK, profile)
    entry = report.as_json(results, "m.gguf")[1]
    assert (
        entry["fasa_mode"] == "device"
        and entry["vram_peak"] is None
        and entry["pinned_bytes"] is None
        and entry["pcie_floor_ms"] is None
    )
    head = report.format_bench(results, "m.gguf").splitlines()[0]
    assert not any(name in head for name in ("mode ", "VRAM", "pinned", "PCIe", "reused"))


def test_the_columns():
    results = planted(1.5)
    results[1].config, results[1].ratio, results[1].ratio_best = {"fasa_mode": "host"}, None, 0.5
    results[1].memory = Figures(
        vram_before=1 << 30,
        vram_peak=3 << 30,
        pinned=2 << 30,
        row_cache=0,
        fetched=32 << 20,
        staged=0.0,
        reused=0.25,
        copy_rate=5e10,
        gather_rate=4.5e10,
        fetch_rate=4.4e10,
    )
    head, _, dense, fasa = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in report.format_bench(results, "m.gguf").splitlines()
    ]
    cell = dict(zip(head, fasa, strict=True))
    assert (cell["mode"], cell.get("ratio"), cell["vs best"], cell["VRAM MiB"], cell["pinned MiB"]) == (
        "host",
        None,
        "0.50x",
        "3072",
        "2048",
    )
    assert (cell["PCIe MiB/step"], cell["reused"], cell["PCIe GB/s"], cell["bare"], cell["of PCIe floor"]) == (
        "32.00",
        "25%",
        "44.0",
        "45.0",
        "6%",
    )
    assert dict(zip(head, dense, strict=True))["mode"] == "device"
    entry = report.as_json(results, "m.gguf")[1]
    assert (entry["vram_before"], entry["pcie_fetch_bytes_per_second"], entry["pcie_copy_bytes_per_second"]) == (
        1 << 30,
        4.4e10,
        5e10,
    )
    assert entry["pcie_floor_ms"] == pytest.approx(1000 * (32 << 20) / 4.5e10) and "fasa host" in report.plot_lines(
        results
    )


def test_an_arm_in_pinned_memory(library, tiny, profile, monkeypatch):
    """As if there was a GPU whose memory in use grows; its counters are planted."""
    asked, made, used, generate, reopen = [], [], [10 * 2**20], Timer.generate, b.Session.reopen

    def open_there(self, **kw):
        made.append(kw.pop("mode", None))
        reopen(self, **kw)

    def measured(self, p, depth, n):
        used[0] += 5
        sample = generate(self, p, depth, n)
        return replace(sample, counters=sample.counters | (COUNTERS if made[-1] == "host" else {}))

    monkeypatch.setattr(b, "why_not_host", lambda *a: "")
    for module in (b, timing):
        monkeypatch.setattr(module, "vram", lambda: used[0])
    monkeypatch.setattr(runtime.devices, "cuda_devices", lambda: ["CUDA0"])
    monkeypatch.setattr(
        runtime.context.Context,
        "host_rates",
        lambda self, n_cells, n_rows, between: asked.append((n_cells, n_rows)) or (5e10, 4e10, 3e10),
    )
    monkeypatch.setattr(b.Session, "reopen", open_there)
    monkeypatch.setattr(Timer, "generate", measured)
    results = run(tiny, replace(QUICK, modes=("device", "host"), no_kv_offload=(0, 1)), profile)
    assert [(r.arm, r.config["fasa_mode"], r.config["no_kv_offload"]) for r in results] == [
        ("dense", "device", False),
        ("fasa", "device", False),
        ("fasa", "host", False),
        ("dense", "device", True),
    ]
    m = results[2]
    assert m.ratio is None and m.ratio_best > 0 and m.copy_rate is None and m.sparse_share == 1 and m.of_pcie_floor > 0
    assert (
        (m.memory.fetch_rate, m.memory.gather_rate, m.memory.pinned) == (3e10, 4e10, 1 << 30)
        and len(asked) == 1
        and asked[0][0] == m.n_depth
    )
    assert (
        m.memory.fetched == 2 * 4000 / (2 * QUICK.n_gen)
        and m.memory.vram_peak > m.memory.vram_before > results[0].memory.vram_before
    )
    assert results[0].memory.pinned is None and made[1:] == ["device", "host", "device"]


def test_a_probe_without_memory_does_not_end_the_run(tiny, profile, monkeypatch):
    """The results are there when the rates are measured; a device may be full by then."""

    def full(*_):
        raise FasaError("no memory left")

    context = type("Context", (), {"host_rates": full})()
    m = Figures(fetched=1000.0, pinned=1 << 20)
    assert m.take_rates(context, 100, 1000, 1, 0) == "PCIe rates not measured: no memory left"
    assert (m.copy_rate, m.gather_rate, m.fetch_rate, m.floor_s()) == (None, None, None, None)
    assert Figures().take_rates(context, 100, 1000, 1, 0) == ""  # nothing was fetched, nothing is asked
    monkeypatch.setattr(runtime.devices, "copy_rate", full)
    results = run(tiny, QUICK, profile)
    assert [r.avg_ts > 0 and r.copy_rate is None for r in results] == [True] * len(results)
    assert any("copy rate not measured: no memory left" in r.note for r in results)
