"""Layers that may miss more than others, and the table of mean budgets: planted curves, files, resuming, refusals."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest

from fasa_gguf import FasaError, FasaParams
from fasa_gguf.calibrate import layers as L
from fasa_gguf.cli import main as cli
from fasa_gguf.profile.embed import rewrite
from fasa_gguf.profile.profile import Profile
from fasa_gguf.quality.arms import ArmSwitch
from fasa_gguf.speed.random_model import synthetic_profile

BASE = FasaParams(sink=2, recent=4, floor=6, chunks=4, min_context=0)
SIZE = {"windows": 1, "window": 300, "score": 10, "n_threads": 1}
GRID = L.LayerGrid(masses=(0.5, 0.9), budgets=(80, 120, 200))


# ---- arithmetic ----


def test_planted_powers_are_found_and_the_factors_are_the_best():
    masses, m = (0.5, 0.75, 0.9, 0.95), 1 - np.array([0.5, 0.75, 0.9, 0.95])
    a, c = np.array([0.01, 0.04, 0.02, 0.3]), np.array([20.0, 25.0, 60.0, 10.0])
    tokens, kl = c[:, None] * m**-0.8, a[:, None] * m**1.5
    rng = np.random.default_rng(0)
    fit = L.fit_layers(masses, tokens, kl + rng.normal(0, 1e-5, kl.shape), np.full(kl.shape, 1e-5))
    assert (
        np.isclose(fit.b, 1.5, atol=0.06)
        and np.isclose(fit.d, 0.8)
        and np.allclose(fit.loss, a, rtol=0.05)
        and np.allclose(fit.tokens, c)
    )
    assert np.isclose(np.log(fit.factor).mean(), 0) and np.allclose(
        fit.factor / fit.factor[0], ((c / a) / (c[0] / a[0])) ** (1 / 2.3), rtol=0.03
    )

    def loss(factor, mean):  # sum of KL where the tokens' mean is `mean`
        missed = ((c * factor**-0.8).mean() / mean) ** (1 / 0.8)
        assert np.isclose((c * (missed * factor) ** -0.8).mean(), mean)
        return (a * (missed * factor) ** 1.5).sum()

    for mean in (100, 400):
        best = loss(fit.factor, mean)
        assert best < 0.9 * loss(np.ones(4), mean)
        for i in range(4):  # no neighbour is better
            for step in (0.8, 1.25):
                assert best < loss(np.where(np.arange(4) == i, fit.factor * step, fit.factor), mean)


def test_noise_does_not_decide():
    tokens = np.full((4, 2), 100.0) * [1, 2]
    kl = np.array([[1e-3, 1e-4], [1e-3, 1e-4], [1e-3, 1e-4], [-1e-3, -1e-4]])  # the last one drowned
    factor = L.fit_layers((0.5, 0.9), tokens, kl, np.full(kl.shape, 1e-4)).factor
    assert factor[3] / factor[0] > 1 and factor.max() <= L.MOST and np.isfinite(factor).all()
    flat = L.fit_layers((0.5, 0.9), tokens, -np.abs(kl), np.full(kl.shape, 1e-4)).factor
    assert np.allclose(flat, 1)
    wild = L.fit_layers(
        (0.5, 0.9), tokens * np.array([[1], [1], [1], [10**9]]), np.abs(kl), np.full(kl.shape, 1e-4)
    ).factor
    assert wild.max() <= L.MOST and wild.min() >= 1 / L.MOST
    assert (
        np.allclose(L.smooth_noise(np.array([3.0, 1.0, 2.0, 0.0])), np.maximum(2.7 - 0.8 * np.arange(4), 0))
        and L.smooth_noise(np.array([2.0])) == 2
    )


def test_the_gain_is_at_equal_tokens():
    rows = [{"tokens_attended": n, "kl": 1 / n} for n in (50, 100, 200)]
    less = [{"tokens_attended": n, "kl": 0.75 / n} for n in (80, 160, 400)]
    assert np.isclose(L.gain(rows, less), 0.25) and np.isclose(L.gain(less, rows), -1 / 3)

    assert L.gain(rows, [{"tokens_attended": 900, "kl": 0.1}]) == 0 == L.gain(rows, [])


def test_masses_of_mean_budgets_are_found():
    asked = []

    def rows_at(masses):  # 900 tokens hold all: beyond it no mass takes more
        asked.append(masses)
        return [{"tokens_attended": min(900, 30 * (1 - m) ** -0.9 + 20), "fasa": {"mass": m}} for m in masses.values()]

    found = L.find_masses((512, 128, 256, 1024, 930), rows_at)
    assert (
        list(found) == [128, 256, 512, 930]
        and asked[0] == dict.fromkeys((128, 256, 512, 930, 1024), 0.9)
        and len(asked) <= L.TRIES
    )
    assert all(abs(found[n]["tokens_attended"] / n - 1) <= L.NEAR for n in (128, 256, 512))
    table = L.mean_budget_table(found)
    exact = {n: 1 - ((n - 20) / 30) ** (-1 / 0.9) for n in (128, 256, 512)}
    assert list(table) == [128, 256, 512, 930] and all(abs((1 - table[n]) / (1 - exact[n]) - 1) < 0.01 for n in exact)
    row = {"tokens_attended": 100, "fasa": {"mass": 0.9}}
    assert L.mean_budget_table({100: row, 101: {**row, "tokens_attended": 104}}) == {100: 0.9}  # must ascend


def test_groups_and_arms(profile):
    assert L.make_groups(profile, 2) == [[0, 1], [2]]
    dense = synthetic_profile([0, 2, 2], [0, 8, 8])
    assert L.make_groups(dense, 1) == [[1], [2]]
    arms = L.layer_arms(profile, [[0, 1], [2]], (0.5, 0.9), BASE.replace(mean_budget=9), 300)
    assert [a.name for a in arms] == [
        "layer 0-1 all",
        "layer 0-1 mass=0.5",
        "layer 0-1 mass=0.9",
        "layer 2 all",
        "layer 2 mass=0.5",
        "layer 2 mass=0.9",
    ]
    assert (
        [a.profile.n_chunk for a in arms[2:4]] == [[8, 8, 0], [0, 0, 8]]
        and arms[3].params == BASE.replace(budget=300)
        and arms[4].params.mass == 0.5
    )
    arms[0].profile.check_values("p")  # a whole profile, with weights and recall where there are some


# ---- the calibration ----


def test_calibrate_layers(library, tiny, text, profile, tmp_path):
    told, out = [], tmp_path / "p.json"
    profile.layer_miss, profile.mean_budget = (
        np.array([5, 5, 5], np.float32),
        {3: 0.5},
    )  # what was there does not matter
    done, result = L.calibrate_layers(tiny, text, out, GRID, BASE, profile, progress=lambda *x: told.append(x), **SIZE)
    profile.layer_miss, profile.mean_budget = None, {}
    assert [r["layers"] for r in result["layers"]] == [[0], [1], [2]] and all(
        r["tokens"][0] < r["tokens"][1] for r in result["layers"]
    )
    assert all(r["kl"][0] > r["kl"][1] for r in result["layers"])
    assert [" ".join(r["arm"].split()[:-1]) for r in result["table"]] == [
        f"{name} mean {n}" for name in ("all alike", "by layer") for n in GRID.budgets
    ]
    assert ("all alike", 4, 4) in told and ("layer by layer", 10, 10) in told and ("by layer", 4, 4) in told
    assert result["kept"] == (result["gain"] > 0) == (done.layer_miss is not None)
    used = result["table"][3:] if result["kept"] else result["table"][:3]
    assert list(done.mean_budget) == [80, 120, 200] and all(
        abs(r["tokens_attended"] / n - 1) < 0.05 for r, n in zip(used, GRID.budgets, strict=True)
    )
    assert [(r["fasa"]["floor"], r["fasa"]["cap"]) for r in used] == [(64, 160), (64, 240), (64, 400)]
    assert os.listdir(tmp_path) == ["p.json"] and Profile.load(out).mean_budget == done.mean_budget
    assert done.defaults == {"sink": 2, "recent": 4, "chunks": 4} and done.ranking_method == profile.ranking_method
    assert f"the factors change KL by {-100 * result['gain']:+.1f}%: they are " in L.format_layers(
        result
    ) and json.dumps(result)

    # what was asked for in the mean is what is taken, through the library
    from fasa_gguf.quality.arms import Arm
    from fasa_gguf.quality.perplexity import WindowSettings, evaluate
    from fasa_gguf.runtime.settings import ContextSettings

    sizes = WindowSettings(SIZE["windows"], SIZE["window"], SIZE["score"])
    settings = ContextSettings(n_threads=SIZE.get("n_threads", 0), mode="auto")

    for n in (80, 100, 120, 170):  # in the table, and between
        row = evaluate(
            tiny,
            text,
            [Arm("mean", done.params().replace(mean_budget=n, min_context=0))],
            sizes,
            settings,
            profile=done,
        )[1]
        assert abs(row["tokens_attended"] / n - 1) < 0.1


def test_only_the_table(library, tiny, text, profile, tmp_path):
    done, result = L.calibrate_layers(
        tiny, text, tmp_path / "p.json", L.LayerGrid((), (80, 120)), BASE.replace(per_head=1), profile, **SIZE
    )
    assert (
        result["layers"] == []
        and len(result["table"]) == 2
        and done.layer_miss is None
        and list(done.mean_budget) == [80, 120]
    )
    assert done.defaults["per_head"] == 1 and L.format_layers(result).splitlines()[0].split() == [
        "whole",
        "model",
        "tokens",
        "ppl",
        "ratio",
        "KL",
    ]


def test_a_calibration_that_was_cut_off_goes_on(library, tiny, text, profile, tmp_path, monkeypatch):
    whole, result = L.calibrate_layers(tiny, text, tmp_path / "a.json", GRID, BASE, profile, **SIZE)
    use, calls, stopped = ArmSwitch.use, [], []

    def stop(self, arm):
        calls.append(arm)
        if [a.name for a in calls if a][-1:] == ["layer 0 mass=0.9"] and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        use(self, arm)

    monkeypatch.setattr(ArmSwitch, "use", stop)
    with pytest.raises(KeyboardInterrupt):
        L.calibrate_layers(tiny, text, tmp_path / "b.json", GRID, BASE, profile, **SIZE)
    assert (tmp_path / "b.json.partial.jsonl").exists() and not (tmp_path / "b.json").exists()
    again, same = L.calibrate_layers(tiny, text, tmp_path / "b.json", GRID, BASE, profile, **SIZE)
    names = [a.name for a in calls if a]
    assert names.count("layer 0 mass=0.9") == 2 and len(names) == len(set(names)) + 1  # nothing else ran twice
    assert same == result and again.to_flat() == whole.to_flat()
    assert sorted(os.listdir(tmp_path)) == ["a.json", "b.json"]
    L.calibrate_layers(tiny, text, tmp_path / "c.json", GRID, BASE, profile, resume=tmp_path / "r.jsonl", **SIZE)
    calls.clear()
    more = L.LayerGrid((0.5, 0.8, 0.9), GRID.budgets)  # only what is new runs: a mass a layer, then the factors
    L.calibrate_layers(tiny, text, tmp_path / "c.json", more, BASE, profile, resume=tmp_path / "r.jsonl", **SIZE)
    names = [a.name for a in calls if a]
    assert (
        names[:3] == [f"layer {il} mass=0.8" for il in range(3)]
        and all(x.startswith("by layer mean") for x in names[3:])
        and (tmp_path / "r.jsonl").exists()
    )


@pytest.mark.parametrize(
    "plan, base, message",
    [
        (L.LayerGrid(masses=(0.5, 1.0)), BASE, "--masses 0.5,1: expected different numbers between 0 and 1"),
        (L.LayerGrid(masses=(0.5, 0.5)), BASE, "--masses 0.5,0.5: expected different numbers between 0 and 1"),
        (
            L.LayerGrid(budgets=(6, 80)),
            BASE,
            "--budgets 6,80: expected different numbers from 7, above sink and recent, to 299, below --window",
        ),
        (
            L.LayerGrid(budgets=(80, 300)),
            BASE,
            "--budgets 80,300: expected different numbers from 7, above sink and recent, to 299, below --window",
        ),
        (L.LayerGrid(budgets=()), BASE, "--budgets : expected different numbers"),
        (L.LayerGrid(budgets=(80,), group=0), BASE, "--group 0: expected at least 1"),
        (
            GRID,
            BASE.replace(min_context=1536),
            "--window 300: min_context is 1536, so nothing would be sparse; use a longer --window or a "
            "smaller --fasa-min-context",
        ),
    ],
)
def test_what_is_refused(tiny, text, profile, tmp_path, plan, base, message):
    with pytest.raises(FasaError, match=message):
        L.calibrate_layers(tiny, text, tmp_path / "p.json", plan, base, profile, **SIZE)
    with pytest.raises(
        FasaError, match="--budgets 80,120,200: expected numbers that reach 256, the profile's default mean_budget"
    ):
        L.calibrate_layers(
            tiny, text, tmp_path / "p.json", GRID, BASE, replace(profile, defaults={"mean_budget": 256}), **SIZE
        )
    with pytest.raises(FasaError, match=r"none/p.json: the folder does not exist; make it, or give another -o"):
        L.calibrate_layers(tiny, text, tmp_path / "none" / "p.json", GRID, BASE, profile, **SIZE)


def test_the_command(library, tiny, text, profile, tmp_path, capsys):
    model, file = str(rewrite(tiny, profile, tmp_path / "m.gguf")), tmp_path / "t.txt"
    file.write_text(text)
    base = [
        "calibrate-layers",
        model,
        "-f",
        str(file),
        "--windows",
        "1",
        "--window",
        "300",
        "--score",
        "5",
        "--fasa-min-context",
        "0",
        "-t",
        "1",
        "--fasa-floor",
        "6",
        "--fasa-sink",
        "2",
        "--fasa-recent",
        "4",
        "--budgets",
        "80,120",
    ]
    assert cli.main([*base, "--masses", "0.5,0.9", "--group", "3", "-o", str(tmp_path / "p.json")]) == 0
    out, err = capsys.readouterr()
    assert (
        out.splitlines()[2].split()[0] == "0-2"
        and "at equal mean tokens the factors change KL by" in out
        and err.strip().endswith("p.json: the profile")
    )
    assert cli.main([*base, "--table-only", "--json"]) == 0  # beside the model
    assert json.loads(capsys.readouterr().out)["layers"] == []
    assert list(Profile.load(tmp_path / "m.fasa.json").mean_budget) == [80, 120]
    common = [
        "eval",
        model,
        "-f",
        str(file),
        "--windows",
        "1",
        "--window",
        "300",
        "--score",
        "5",
        "-t",
        "1",
        "--fasa-min-context",
        "0",
        "--json",
    ]
    assert (
        cli.main([*common, "--arms", f"profile={tmp_path / 'm.fasa.json'},mean_budget=100;budget=20,recent=4;dense"])
        == 0
    )
    rows = json.loads(capsys.readouterr().out)
    assert abs(rows[1]["tokens_attended"] - 100) < 10 and rows[2]["tokens_attended"] == 20 and rows[3]["fasa"] is None
    assert cli.main([*common, "--fasa-mean-budget", "100"]) == 0  # with the profile beside the model
    assert abs(json.loads(capsys.readouterr().out)[1]["tokens_attended"] - 100) < 10
    (tmp_path / "m.fasa.json").unlink()
    assert cli.main([*common, "--fasa-mean-budget", "20"]) == 1
    assert (
        "mean_budget 20: the profile has no table of mean budgets; make one with `fasa-gguf calibrate-layers"
        in capsys.readouterr().err
    )
    assert cli.main([*common, "--arms", "mass"]) == 1
    assert "--arms: arm 'mass': expected SETTING=VALUE" in capsys.readouterr().err


def test_mean_budgets_that_nothing_reaches(library, tiny, text, profile, tmp_path, monkeypatch):
    monkeypatch.setattr(L, "find_masses", lambda budgets, rows_at: {})
    with pytest.raises(
        FasaError,
        match="--budgets 280: no mass takes as many tokens of a window of 300; use other --budgets or a "
        "longer --window",
    ):
        L.calibrate_layers(tiny, text, tmp_path / "p.json", L.LayerGrid((), (280,)), BASE, profile, **SIZE)
