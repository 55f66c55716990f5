"""The sweep: what is recommended on planted figures, the grid, what is written, resuming."""

import json

import pytest

from fasa_gguf import FasaError, FasaParams
from fasa_gguf.cli import main as cli
from fasa_gguf.profile.embed import rewrite
from fasa_gguf.quality import perplexity
from fasa_gguf.quality.perplexity import WindowSettings
from fasa_gguf.quality.sweep import Grid, advice, format_sweep, make_arms, recommend, sweep
from fasa_gguf.runtime.settings import ContextSettings

BASE = FasaParams(sink=4, recent=8, min_context=0)
SIZE = WindowSettings(windows=2, window=300, score=10)
ONE_THREAD = ContextSettings(n_threads=1, mode="auto")


def row(arm, loss, read, se=0.001, chunks=4, budget=128, mass=0.0):
    return {
        "arm": arm,
        "ppl_ratio": 1 + loss,
        "ppl_ratio_se": se,
        "kv_read_share": read,
        "tokens_attended": 100.0,
        "flags": f"--{arm}",
        "chunks": chunks,
        "budget": budget,
        "mass": mass,
        "kl": 0.01,
        "kl_se": 0.001,
        "same_top": 0.9,
        "kv_bytes_per_token": 2048.0,
        "k_dom_share": 0.07,
    }


def test_the_cheapest_within_the_loss_is_recommended():
    rows = [row("a", 0.02, 0.10), row("b", 0.009, 0.20), row("c", 0.004, 0.20), row("d", 0.001, 0.50)]
    assert recommend(rows, 0.01)["arm"] == "c" and recommend(rows, 0.02)["arm"] == "a" and recommend(rows, 0.0) is None
    assert recommend([row("x", -0.01, 0.3)], 0.0)["arm"] == "x"


def test_the_advice_says_how_sure_it_is():
    rows = [row("a", 0.008, 0.10, se=0.001), row("b", 0.005, 0.20)]
    result = {"rows": rows, "max_loss": 0.01, "best": rows[0]}
    assert advice(result) == "cheapest within 1%: --a (+0.80 +-0.10%, 100 tokens, 10.0% of the KV bytes read)"
    rows[0]["ppl_ratio_se"] = 0.004
    assert advice(result).endswith("; with its standard error it may be above 1%: more --windows would tell")
    assert (
        advice({"rows": rows, "max_loss": 0.001, "best": None})
        == "no setting is within 0.1%; the least loss is +0.50 +-0.10% with --b"
    )


def test_the_table_is_cheapest_first_and_marks_the_best():
    rows = [row("b", 0.005, 0.20, budget=256), row("a", 0.02, 0.10), row("m", 0.001, 0.15, budget=0, mass=0.9)]
    lines = format_sweep({"rows": rows, "max_loss": 0.01, "best": rows[2]}).splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [["4", "128"], ["->", "4"], ["4", "256"]] and "0.9" in lines[2]
    assert lines[4].startswith("cheapest within 1%: --m")


def test_the_grid(profile):
    arms = make_arms(Grid(masses=[0.9]), FasaParams(cap=300), profile)
    assert [a.name for a in arms][:5] == ["k=1 B=128", "k=1 B=256", "k=1 B=512", "k=1 B=1024", "k=2 B=128"] and len(
        arms
    ) == 20
    assert (
        arms[-1].name == "k=4 mass=0.9"
        and arms[-1].params.mass == 0.9
        and arms[-1].params.cap == 300
        and arms[0].params.mass == 0
    )
    with pytest.raises(FasaError, match="--chunks 3,9: expected 1 to 8, the chunks of this model's heads"):
        make_arms(Grid([9, 3]), BASE, profile)
    with pytest.raises(FasaError, match="nothing to sweep: give --budgets or --masses"):
        make_arms(Grid([3], [], []), BASE, profile)


def test_sweep(library, tiny, text, profile, tmp_path):
    told = []
    grid = Grid([2, 8], [60, 400], [0.9])
    out = sweep(tiny, text, tmp_path, grid, 0.001, BASE, profile, SIZE, ONE_THREAD, lambda *x: told.append(x))
    by = {r["arm"]: r for r in out["rows"]}
    assert list(by) == ["k=2 B=60", "k=2 B=400", "k=8 B=60", "k=8 B=400", "k=2 mass=0.9", "k=8 mass=0.9"] and told[
        -1
    ] == ("evaluating", 14, 14)
    whole = by["k=2 B=400"]
    assert whole["kl"] < 1e-4 and whole["tokens_attended"] == 295.5 and by["k=2 B=60"]["tokens_attended"] == 60
    assert (
        by["k=8 B=60"]["kl"] < by["k=2 B=60"]["kl"]
        and by["k=8 B=60"]["kv_read_share"] > by["k=2 B=60"]["kv_read_share"]
    )
    assert (
        out["best"] == recommend(out["rows"], 0.001)
        and by["k=8 mass=0.9"]["flags"] == "--fasa-chunks 8 --fasa-mass 0.9"
    )
    assert whole["kv_bytes_per_token"] == 3 * 2 * (
        295.5 * 64 + 512 * 6
    )  # rows, and 8 dims in q4 of the 512 cells in view
    assert (
        json.loads((tmp_path / "sweep.json").read_text()) == out
        and (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    )


def test_a_cut_off_sweep_goes_on(library, tiny, text, profile, tmp_path, monkeypatch):
    grid, calls, score = Grid([4], [60]), [], perplexity._score_window
    whole = sweep(tiny, text, tmp_path / "a", grid, 0.01, BASE, profile, SIZE, ONE_THREAD)

    def stop(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(*args)

    monkeypatch.setattr(perplexity, "_score_window", stop)
    with pytest.raises(KeyboardInterrupt):
        sweep(tiny, text, tmp_path / "b", grid, 0.01, BASE, profile, SIZE, ONE_THREAD)
    again = sweep(tiny, text, tmp_path / "b", grid, 0.01, BASE, profile, SIZE, ONE_THREAD)
    assert len(calls) == 3 and again["rows"] == whole["rows"]  # only the second window ran again
    other = sweep(
        tiny, text, tmp_path / "b", Grid([2], [60]), 0.01, BASE, profile, SIZE, ONE_THREAD
    )  # another grid, the same folder
    assert len(calls) == 5 and other["rows"][0]["arm"] == "k=2 B=60"


def test_the_command(library, tiny, text, profile, tmp_path, capsys):
    model, file = str(rewrite(tiny, profile, tmp_path / "m.gguf")), tmp_path / "t.txt"
    file.write_text(text)
    base = [
        "sweep",
        model,
        "-f",
        str(file),
        "--windows",
        "1",
        "--window",
        "300",
        "--score",
        "10",
        "--chunks",
        "3",
        "--fasa-min-context",
        "0",
        "-t",
        "1",
        "-o",
        str(tmp_path / "d"),
    ]
    assert cli.main([*base, "--budgets", "60,400", "--max-loss", "0.5%"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split()[:3] == ["chunks", "budget", "mass"] and len(out) == 4 and "within 0.5%" in out[-1]
    assert cli.main([*base, "--masses", "0.9", "--json"]) == 0  # masses alone: no budgets
    result = json.loads(capsys.readouterr().out)
    assert result["max_loss"] == 0.01 and [r["arm"] for r in result["rows"]] == ["k=3 mass=0.9"]
    for value in ("1", "x%", "-1%"):
        with pytest.raises(SystemExit):
            cli.main([*base, f"--max-loss={value}"])
        assert f"--max-loss: expected a percentage such as 1%, found '{value}'" in capsys.readouterr().err


def test_three_eighths_are_those_of_the_setting():
    from fasa_gguf.params import default_chunks
    from fasa_gguf.quality.sweep import _eighths

    assert [_eighths(n) for n in (8, 32, 40, 48, 64)] == [
        [1, 2, 3, 4],
        [4, 8, 12, 16],
        [5, 10, 12, 20],
        [6, 12, 16, 24],
        [8, 16, 24, 32],
    ]
    assert [default_chunks(n) for n in (32, 40, 48, 64)] == [12, 12, 16, 24]
