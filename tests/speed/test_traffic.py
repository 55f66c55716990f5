"""What `bench` says about FASA-M: its contexts, the arithmetic of a row, and that nothing of it shows where there is no GPU."""

from dataclasses import replace

import pytest
from benching import ON, QUICK, planted, run

from fasa_gguf import FasaError, runtime
from fasa_gguf.cli import main as cli
from fasa_gguf.speed import bench as b
from fasa_gguf.speed import crossover, report
from fasa_gguf.speed.bench import Plan, Row
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
    f.take_counters({**COUNTERS, "bytes_kv_host": 0}, 10)  # a context in mode c
    assert (f.pinned, f.fetched, f.reused, f.floor_s()) == (None,) * 4
    f.take_counters({**COUNTERS, "rows_fetched": 0, "rows_reused": 0}, 10)  # all dense
    assert f.reused is None and f.fetched == 400


def test_counters_of_several_repetitions():
    sums = merge([{"rows_fetched": 3, "bytes_kv": 10}, {"rows_fetched": 4, "bytes_kv": 10}])
    assert sums == {"rows_fetched": 7, "bytes_kv": 10}


def test_the_floor_of_a_step():
    row = Row(
        "fasa",
        100,
        8,
        n_parallel=2,
        samples_ts=[20.0],
        params=ON,
        memory=Figures(fetched=4e9, staged=0.0, copy_rate=5e10, gather_rate=4e10),
    )
    assert row.of_pcie_floor == pytest.approx(
        0.1 / (2 / 20)
    )  # a step is two tokens: 100 ms, of which PCIe takes as much
    assert Row("fasa", 100, 8, samples_ts=[20.0]).of_pcie_floor is None


def test_contexts_of_each_place():
    assert b._places(Plan()) == [(0, "c")]
    assert b._places(Plan(modes=("c", "m"), no_kv_offload=(0, 1))) == [(0, "c"), (0, "m"), (1, "c")]


def test_what_is_refused(library, tiny, profile, profiled, capsys):  # noqa: F811
    with pytest.raises(
        FasaError, match="--fasa-mode: bench measures what it is told to; expected c, m or c,m, found auto"
    ):
        run(tiny, replace(QUICK, modes=["auto"]), profile)
    with pytest.raises(
        FasaError, match="--find-crossover compares with dense in the same context, which --fasa-mode m has not"
    ):
        crossover.find_crossover(tiny, replace(QUICK, modes=["m"]), ON, profile=profile)
    if not runtime.devices.cuda_devices():
        assert cli.main(["bench", str(profiled), "-d", "300", "--fasa-min-context", "0", "--fasa-mode", "c,m"]) == 1
        assert "there is no CUDA device, or no CUDA in this build" in capsys.readouterr().err


def test_nothing_shows_without_a_gpu(library, tiny, profile):  # noqa: F811
    if runtime.devices.cuda_devices():
        pytest.skip("there is a GPU")
    rows = run(tiny, QUICK, profile)
    entry = report.as_json(rows, "m.gguf")[1]
    assert (
        entry["fasa_mode"] == "c"
        and entry["vram_peak"] is None
        and entry["pinned_bytes"] is None
        and entry["pcie_floor_ms"] is None
    )
    head = report.table(rows, "m.gguf").splitlines()[0]
    assert not any(name in head for name in ("mode ", "VRAM", "pinned", "PCIe", "reused"))


def test_the_columns():
    rows = planted(1.5)
    rows[1].setup, rows[1].ratio, rows[1].ratio_best = {"fasa_mode": "m"}, None, 0.5
    rows[1].memory = Figures(
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
        [cell.strip() for cell in line.strip("|").split("|")] for line in report.table(rows, "m.gguf").splitlines()
    ]
    cell = dict(zip(head, fasa))
    assert (cell["mode"], cell.get("ratio"), cell["vs best"], cell["VRAM MiB"], cell["pinned MiB"]) == (
        "m",
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
    assert dict(zip(head, dense))["mode"] == "c"
    entry = report.as_json(rows, "m.gguf")[1]
    assert (entry["vram_before"], entry["pcie_fetch_bytes_per_second"], entry["pcie_copy_bytes_per_second"]) == (
        1 << 30,
        4.4e10,
        5e10,
    )
    assert entry["pcie_floor_ms"] == pytest.approx(1000 * (32 << 20) / 4.5e10) and "fasa mode m" in report.lines(rows)


def test_an_arm_in_pinned_memory(library, tiny, profile, monkeypatch):  # noqa: F811
    """As if there was a GPU whose memory in use grows; its counters are planted."""
    asked, made, used, generate, reopen = [], [], [10 * 2**20], b.Bench.generate, b.Session.reopen

    def open_there(self, **kw):
        made.append(kw.pop("mode", None))
        reopen(self, **kw)

    def measured(self, p, depth, n):
        used[0] += 5
        sample = generate(self, p, depth, n)
        return replace(sample, counters=sample.counters | (COUNTERS if made[-1] == "m" else {}))

    monkeypatch.setattr(b, "why_not_host", lambda *a: "")
    monkeypatch.setattr(b, "vram", lambda: used[0])
    monkeypatch.setattr(runtime.devices, "cuda_devices", lambda: ["CUDA0"])
    monkeypatch.setattr(
        runtime.context.Context,
        "host_rates",
        lambda self, n_cells, n_rows, between: asked.append((n_cells, n_rows)) or (5e10, 4e10, 3e10),
    )
    monkeypatch.setattr(b.Session, "reopen", open_there)
    monkeypatch.setattr(b.Bench, "generate", measured)
    rows = run(tiny, replace(QUICK, modes=("c", "m"), no_kv_offload=(0, 1)), profile)
    assert [(r.arm, r.setup["fasa_mode"], r.setup["no_kv_offload"]) for r in rows] == [
        ("dense", "c", False),
        ("fasa", "c", False),
        ("fasa", "m", False),
        ("dense", "c", True),
    ]
    m = rows[2]
    assert m.ratio is None and m.ratio_best > 0 and m.copy_rate is None and m.sparse_share == 1 and m.of_pcie_floor > 0
    assert (
        (m.memory.fetch_rate, m.memory.gather_rate, m.memory.pinned) == (3e10, 4e10, 1 << 30)
        and len(asked) == 1
        and asked[0][0] == m.n_depth
    )
    assert (
        m.memory.fetched == 2 * 4000 / (2 * QUICK.n_gen)
        and m.memory.vram_peak > m.memory.vram_before > rows[0].memory.vram_before
    )
    assert rows[0].memory.pinned is None and made[1:] == ["c", "m", "c"]
