"""The picture, the table of the lab and the row of README are of one run of `bench`: docs/lab/speed.json."""

import json
import re

from paths import ROOT

from fasa_gguf.speed.report import read_results, save_plot

DATA = ROOT / "docs" / "lab" / "speed.json"
RESULTS = {(r.n_depth, r.arm): r for r in read_results(DATA)[0]}
DEPTHS = sorted({depth for depth, _ in RESULTS})


def test_the_table_of_the_lab():
    page = (ROOT / "docs" / "lab" / "cpu-speed.md").read_text()
    start = page.index("| depth | dense t/s | FASA t/s | ratio |")
    rows = [[x.strip() for x in line.split("|")[1:-1]] for line in page[start:].split("\n\n")[0].split("\n")[2:]]
    for depth, row in zip(DEPTHS, rows, strict=True):
        dense, fasa = RESULTS[depth, "dense"], RESULTS[depth, "fasa"]
        speeds = [f"{r.avg_ts:.1f} +- {r.stddev_ts:.1f}" for r in (dense, fasa)]
        assert [row[0], *row[1:3], row[3].split()[0]] == [f"{depth:,}", *speeds, f"{fasa.ratio:.2f}x"]
        assert ("dense" in row[3]) == (fasa.sparse_share == 0)


def test_the_picture_is_of_that_run(tmp_path):
    """Its texts, and as many points; not its bytes, which another version of matplotlib may order otherwise."""
    results, model = read_results(DATA)
    save_plot(results, tmp_path / "again.svg", model)

    def texts(path):
        return re.findall(r"<text [^>]*>([^<]*)</text>", path.read_text())

    shown = texts(ROOT / "docs" / "speed.svg")
    assert shown == texts(tmp_path / "again.svg") and len([x for x in shown if x.endswith("x")]) == len(DEPTHS) - 1


def test_the_row_of_readme():
    dense, fasa = RESULTS[8192, "dense"], RESULTS[8192, "fasa"]
    row = re.search(r"\| SmolLM2-135M[^|]* 8,192[^|]*\|([^|]*)\|([^|]*)\|", (ROOT / "README.md").read_text())
    shown = f"{fasa.avg_ts:.1f} ({fasa.ratio:.1f}x)"
    assert [x.strip() for x in row.groups()] == [f"{dense.avg_ts:.1f}", shown]


def test_the_run_is_of_the_demos_model():
    entries = json.loads(DATA.read_text())
    assert {e["model_filename"] for e in entries} == {"models/cache/SmolLM2-135M-Instruct.Q4_1.fasa.gguf"}
    assert {e["cpu_info"] for e in entries} == {"AMD EPYC"} and {e["n_threads"] for e in entries} == {2}
