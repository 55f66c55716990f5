"""The results of `bench` as a table, JSON, CSV, and a picture."""

import csv
import io
import json
import re

import pytest
from benching import ON, planted

from fasa_gguf import FasaError
from fasa_gguf.cli import main as cli
from fasa_gguf.speed import report
from fasa_gguf.speed.results import Result


def figures(results, **config):
    """The results with weights of 8 MB, a device that copies 2 GB/s, and a config."""
    for r in results:
        r.weight_bytes, r.copy_rate, r.config = 8_000_000, 2e9, config
    return results


def test_the_table():
    lines = report.format_bench(figures(planted(None, 1.5)), "dir/model.gguf").splitlines()
    assert lines == [
        "| model      | arm   |       test |           t/s | ratio "
        "| attended | KV MiB/token | MiB/token | GB/s | of copy rate | note           |",
        "| ---------- | ----- | ---------: | ------------: | ----: "
        "| -------: | -----------: | --------: | ---: | -----------: | -------------- |",
        "| model.gguf | dense |   tg8 @ d0 | 50.00 +- 1.41 |       "
        "|      all |         1.91 |      9.54 |  0.5 |          25% |                |",
        "| model.gguf | fasa  |   tg8 @ d0 | 50.00 +- 0.00 | 1.00x "
        "|      all |         1.91 |      9.54 |  0.5 |          25% | dense (n < 64) |",
        "| model.gguf | dense | tg8 @ d100 | 50.00 +- 1.41 |       "
        "|      all |         1.91 |      9.54 |  0.5 |          25% |                |",
        "| model.gguf | fasa  | tg8 @ d100 | 75.00 +- 0.00 | 1.50x "
        "|       64 |         0.48 |      8.11 |  0.6 |          32% |                |",
    ]


def test_columns_with_only_default_values_are_hidden():
    first, other = planted(1.5), planted(2.0)
    results = figures(first, n_gpu_layers=99, type_k="f16", type_v="f16") + figures(
        other, n_gpu_layers=99, type_k="q8_0", type_v="q8_0", no_kv_offload=True
    )
    results[3].n_parallel, results[3].ratio_best = 4, 1.9
    results.append(Result("dense", 100, 8, note="not measured: no room", config={"n_gpu_layers": 99}))
    head, _, *lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in report.format_bench(results, "m.gguf").splitlines()
    ]
    assert head == [
        "model",
        "arm",
        "ngl",
        "type_k",
        "type_v",
        "nkvo",
        "np",
        "test",
        "t/s",
        "ratio",
        "vs best",
        "attended",
        "KV MiB/token",
        "MiB/token",
        "GB/s",
        "of copy rate",
        "note",
    ]
    assert lines[3] == [
        "m.gguf",
        "fasa",
        "99",
        "q8_0",
        "q8_0",
        "1",
        "4",
        "tg8 @ d0",
        "100.00 +- 0.00",
        "2.00x",
        "1.90x",
        "64",
        "0.48",
        "2.38",
        "0.2",
        "12%",
        "",
    ]
    assert lines[4] == [
        "m.gguf",
        "dense",
        "99",
        "f16",
        "f16",
        "0",
        "1",
        "tg8 @ d100",
        "",
        "",
        "",
        "",
        "",
        "",
        "",
        "",
        "not measured: no room",
    ]
    prompt = Result("fasa", 0, 0, 512, samples_ts=[9.0], ratio=1.0, params=ON)
    assert (
        report.format_bench([prompt], "m.gguf").splitlines()[2]
        == "| m.gguf | fasa | pp512 @ d0 | 9.00 +- 0.00 | 1.00x |"
    )


def test_the_formats(library):
    results = figures(planted(None, 1.5), type_k="f16", n_gpu_layers=0)
    entries = json.loads(report.format_results(results, "model.gguf", "json"))
    last = entries[3]
    assert (last["test"], last["arm"], last["n_prompt"], last["n_gen"], last["n_depth"], last["n_parallel"]) == (
        "tg8 @ d100",
        "fasa",
        0,
        8,
        100,
        1,
    )
    assert (last["avg_ts"], last["stddev_ts"], last["samples_ts"], last["ratio"]) == (75.0, 0.0, [75.0, 75.0], 1.5)
    assert (last["bytes_per_token"], last["bytes_per_second"], last["copy_bytes_per_second"], last["of_copy_rate"]) == (
        8.5e6,
        637.5e6,
        2e9,
        0.31875,
    )
    assert (
        last["fasa"]["budget"] == 64
        and entries[2]["fasa"] is None
        and last["model_filename"] == "model.gguf"
        and "0.3.36" in last["build_commit"]
    )
    assert [json.loads(line) for line in report.format_results(results, "model.gguf", "jsonl").splitlines()] == entries
    flat = list(csv.DictReader(io.StringIO(report.format_results(results, "model.gguf", "csv"))))
    assert (
        len(flat) == 4
        and flat[3]["samples_ts"] == "75 75"
        and flat[3]["fasa_budget"] == "64"
        and flat[2]["fasa_budget"] == ""
    )
    assert flat[1]["note"] == "dense (n < 64)" and flat[0]["type_k"] == "f16" and flat[0]["ttft_ms"] == ""
    assert report.format_results(results, "model.gguf") == report.format_bench(results, "model.gguf")
    with pytest.raises(FasaError, match="-o 'sql': expected one of md, json, jsonl, csv"):
        report.format_results(results, "model.gguf", "sql")


def test_the_lines_of_the_picture():
    results = figures(planted(1.5, 2.0)[::-1], type_k="f16", type_v="f16")
    assert {name: [r.n_depth for r in line] for name, line in report.plot_lines(results).items()} == {
        "fasa": [0, 100],
        "dense": [0, 100],
    }
    results += figures(planted(1.0)[:1], type_k="q8_0", type_v="f16", no_kv_offload=True)
    results += [Result("dense", 0, 0, 512, samples_ts=[1.0]), Result("dense", 7, 8)]
    assert list(report.plot_lines(results)) == ["fasa KV f16", "dense KV f16", "dense -nkvo KV q8_0/f16"]


def test_the_picture(tmp_path):
    for results in (planted(1.5, 2.0), planted(1.5, 2.0)[2:]):  # with depth 0 and without
        path = tmp_path / "plot.png"
        report.save_plot(results, path, "model.gguf")
        assert path.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(FasaError, match=r"/nowhere/p\.png: cannot be written"):
        report.save_plot(results, "/nowhere/p.png", "model.gguf")
    with pytest.raises(FasaError, match="no decode result was measured, so there is nothing to draw"):
        report.save_plot([], tmp_path / "p.png", "model.gguf")
    with pytest.raises(
        FasaError, match=r"--plot p\.bmp: expected a name that ends in \.svg or \.png or \.pdf, found \.bmp"
    ):
        report.save_plot(results, "p.bmp", "model.gguf")


def texts(svg):
    """The texts of an SVG, in its order."""
    return re.findall(r"<text [^>]*>([^<]*)</text>", svg.read_text())


def test_the_picture_says_what_it_shows(tmp_path):
    """Axes with units, model, cache type, machine, arms; the ratio where FASA ran."""
    config = {"cpu_info": "A CPU", "gpu_info": "A GPU", "n_threads": 3, "type_k": "q8_0", "type_v": "q8_0"}
    results, path = figures(planted(None, 1.5, 2.0), **config), tmp_path / "plot.svg"
    report.save_plot(results, path, "folder/model.gguf")
    shown = texts(path)
    assert {"decode, tokens/s", "depth: tokens in the cache", "dense", "fasa", "0", "100", "200"} <= set(shown)
    assert {"model.gguf: K and V in q8_0", "A CPU, 3 threads"} <= set(shown)  # the GPU had no layers
    assert [x for x in shown if x.endswith("x")] == ["1.5x", "2.0x"]  # at depth 0 both were dense
    report.save_plot(figures(results, **config, n_gpu_layers=99), tmp_path / "gpu.svg", "model.gguf")
    assert "A GPU + A CPU, 3 threads" in texts(tmp_path / "gpu.svg")


def test_the_picture_suits_light_and_dark_pages(tmp_path):
    """No background, and no colour near white or black."""
    report.save_plot(planted(1.5, 2.0), tmp_path / "p.svg", "model.gguf")
    svg = (tmp_path / "p.svg").read_text()
    colours = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", svg))
    assert colours and all(90 < sum(int(c[i : i + 2], 16) for i in (1, 3, 5)) / 3 < 190 for c in colours), colours
    report.save_plot(planted(1.5, 2.0), tmp_path / "again.svg", "model.gguf")
    assert (tmp_path / "again.svg").read_text() == svg  # no date, no random ids


def test_results_are_read_again(library, tmp_path):
    """What a picture shows is the same from the JSON as from the measurement."""
    results = figures(planted(None, 1.5), type_k="f16", n_gpu_layers=0, n_threads=2, cpu_info="A CPU")
    for output in ("json", "jsonl"):
        path = tmp_path / f"bench.{output}"
        path.write_text(report.format_results(results, "model.gguf", output))
        again, model = report.read_results(path)
        assert model == "model.gguf"
        for r, first in zip(again, results, strict=True):
            for name in ("arm", "n_depth", "n_gen", "n_parallel", "samples_ts", "ratio", "sparse_share", "params"):
                assert getattr(r, name) == getattr(first, name), name
        report.save_plot(results, tmp_path / "a.svg", "model.gguf")
        report.save_plot(again, tmp_path / "b.svg", model)
        assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


@pytest.mark.parametrize(
    "text, why",
    [
        ("", "expected results of `fasa-gguf bench --json`, found none"),
        ("[]", "expected results of `fasa-gguf bench --json`, found none"),
        ("| a | table |", "expected what `fasa-gguf bench --json` printed, found Expecting value"),
        ("[1]", "expected results of `fasa-gguf bench --json`, found none"),
        ('[{"model_filename": "m"}]', "result 0: field arm: expected str, found nothing; measure anew"),
        ('{"model_filename": "m", "arm": 3}', "result 0: field arm: expected str, found 3; measure anew"),
    ],
)
def test_a_file_that_bench_did_not_write_is_refused(tmp_path, text, why):
    path = tmp_path / "bench.json"
    path.write_text(text)
    with pytest.raises(FasaError, match=re.escape(f"--from {path}: {why}")):
        report.read_results(path)


def test_wrong_samples_and_no_file_are_refused(library, tmp_path):
    entry = report.as_json(planted(1.5), "m.gguf")[1] | {"samples_ts": ["fast"]}
    (tmp_path / "bench.json").write_text(json.dumps([entry]))
    with pytest.raises(FasaError, match="field samples_ts: expected numbers, found"):
        report.read_results(tmp_path / "bench.json")
    with pytest.raises(FasaError, match=r"--from /nowhere/b\.json: cannot be read: No such file"):
        report.read_results("/nowhere/b.json")


def test_bench_draws_an_earlier_run(library, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bench.json").write_text(report.format_results(planted(1.5, 2.0), "model.gguf", "json"))
    assert cli.main(["bench", "--plot", "speed.svg", "--from", "bench.json"]) == 0
    assert capsys.readouterr() == ("", "picture: speed.svg\n") and "fasa" in texts(tmp_path / "speed.svg")
    for flags, why in (
        (["--from", "bench.json"], "give the picture's name with --plot"),
        (["model.gguf", "--from", "bench.json", "--plot", "p.svg"], "no model is measured; omit MODEL and --shape"),
        (["nowhere.gguf", "--plot", "p.bmp"], "expected a name that ends in .svg or .png or .pdf, found .bmp"),
        (["nowhere.gguf", "--plot", "p"], "expected a name that ends in .svg or .png or .pdf, found no end"),
    ):
        assert cli.main(["bench", *flags]) == 1
        assert why in capsys.readouterr().err


def test_a_dense_row_far_below_a_plain_read_says_so():
    def dense(speed, **kw):
        return Result("dense", 8192, 32, samples_ts=[speed], kv_bytes=2e8, base_s=0.005, read_rate=20e9, **kw)

    slow, good = dense(5.0), dense(50.0)  # 195 and 15 ms for 200 MB, which a plain read takes 10 ms for
    assert slow.kv_rate == pytest.approx(2e8 / 0.195) and good.kv_rate == pytest.approx(2e8 / 0.015)
    assert slow.plain_ts == pytest.approx(1 / 0.015) == good.plain_ts
    assert slow.slow_read == "dense reads the cache at 1 GB/s, a plain read at 20" and good.slow_read == ""
    assert dense(25.0, n_parallel=4).kv_rate == pytest.approx(4 * 2e8 / 0.155)  # a step reads four caches
    assert dense(180.0).kv_rate is None  # nearly all of the step is something else
    unknown = Result("dense", 8192, 32, samples_ts=[5.0], kv_bytes=2e8)
    assert (unknown.kv_rate, unknown.plain_ts, unknown.slow_read) == (None, None, "")
    entry = report.as_dict(slow, "m.gguf", "b")
    assert (entry["kv_bytes_per_second"], entry["plain_read_bytes_per_second"], entry["plain_read_ts"]) == (
        slow.kv_rate,
        20e9,
        slow.plain_ts,
    )
