"""Figures of answers: paired intervals, summaries, the needle grid and its map."""

import numpy as np
import pytest

from fasa_gguf import FasaError
from fasa_gguf.quality.answers import format_answers, summarize
from fasa_gguf.quality.needles import format_needles, needle_grid, needle_questions
from fasa_gguf.quality.paired import paired, sign_test, t_quantile


def test_the_quantile_of_students_t():
    for df, t in ((1, 12.7062), (2, 4.3027), (5, 2.5706), (19, 2.0930), (1000, 1.9623)):
        assert t_quantile(df) == pytest.approx(t, abs=2e-4)


def test_paired_intervals():
    mean, low, high = paired([-1, 0, 0, 0, -1])
    assert (
        mean == -0.4
        and high - mean == pytest.approx(2.7764 * np.std([1, 0, 0, 0, 1], ddof=1) / np.sqrt(5), abs=1e-3)
        and low == -1
    )
    mean, low, high = paired([0] * 20)
    assert mean == 0 and high == -low == pytest.approx(0.1684, abs=1e-4)  # Clopper-Pearson, 0 of 20
    assert paired([-1, -1])[1:] == (-1, pytest.approx(-1 + 2 * 0.8419, abs=1e-4)) and paired([0])[2] == pytest.approx(
        0.975
    )
    assert sign_test(5, 0) == 2 / 32 and sign_test(0, 0) == 1 and sign_test(1, 1) == 1 and sign_test(1, 6) == 16 / 128


def sample(task, length, index, *scores, depth=None, sparse=True):
    zero = dict.fromkeys(
        (
            "steps_sparse",
            "steps_dense",
            "tokens_attended",
            "lists",
            "bytes_fac",
            "bytes_tip",
            "bytes_dense",
            "bytes_layers_dense",
            "layers_sparse",
            "layers_dense",
        ),
        0,
    )
    some = {
        **zero,
        "steps_sparse": 2,
        "tokens_attended": 600,
        "lists": 10,
        "bytes_fac": 30,
        "bytes_tip": 10,
        "bytes_dense": 400,
        "layers_sparse": 4,
    }
    return {
        "task": task,
        "length": length,
        "index": index,
        "depth": depth,
        "haystack": "essay",
        "n_prompt": length - 10,
        "outputs": ["x"],
        "arms": [
            {
                "arm": f"a{i}" if i else "dense",
                "score": s,
                "counters": some if i and sparse else zero,
                "min_context": 0 if i else None,
            }
            for i, s in enumerate(scores)
        ],
    }


def test_summaries_are_paired_and_tasks_weigh_the_same():
    samples = [sample("p", 1000, i, 1, s) for i, s in enumerate((1, 1, 0, 1))] + [
        sample("q", 1000, i, 0.5, s) for i, s in enumerate((1.0, 0.5))
    ]
    p, q, mean = summarize(samples)
    assert (p["n"], p["arms"][0]["score"], p["arms"][1]["score"], p["arms"][1]["diff"]) == (4, 100, 75, -25) and p[
        "n_prompt"
    ] == 990
    assert (p["arms"][1]["lost"], p["arms"][1]["gained"], p["arms"][1]["sign_p"]) == (1, 0, 1) and (
        q["arms"][1]["lost"],
        q["arms"][1]["gained"],
    ) == (0, 1)
    assert p["arms"][1]["diff_ci"] == [pytest.approx(-100), pytest.approx(-25 + 3.1824 * 25, abs=0.01)]
    assert (mean["task"], mean["n"], mean["arms"][0]["score"], mean["arms"][1]["score"], mean["arms"][1]["diff"]) == (
        "mean",
        6,
        75,
        75,
        0,
    )
    se = np.sqrt(np.var([0, 0, 1, 0], ddof=1) / 4 + np.var([0.5, 0], ddof=1) / 2) / 2
    assert mean["arms"][1]["diff_ci"][1] == pytest.approx(100 * 2.7764 * se, abs=0.02)  # 4 degrees of freedom
    assert (
        p["arms"][1]["tokens_attended"] == 60
        and p["arms"][1]["kv_read_share"] == 0.1
        and p["arms"][0]["tokens_attended"] is None
    )
    lines = format_answers([p, q, mean]).splitlines()
    assert lines[0].split() == [
        "task",
        "length",
        "n",
        "arm",
        "tokens",
        "KV",
        "read",
        "score",
        "diff",
        "95%",
        "lost",
        "gained",
        "p",
    ]
    assert lines[1].split() == ["p", "1000", "4", "dense", "all", "100.0%", "100.0"] and lines[2].split()[:4] == [
        "a1",
        "60",
        "10.0%",
        "75.0",
    ]


# ---- needles ----


def test_needle_grid_and_map(tmp_path):
    questions = needle_questions([1000, 2000], 3, 2)
    assert (
        len(questions) == 12
        and [q.depth for q in questions[:6]] == [0, 0, 0.5, 0.5, 1, 1]
        and len({q.key for q in questions}) == 12
    )
    found = [
        sample(j.task, j.length, j.index, 1, float(j.depth != 0.5 or j.index == 0), depth=j.depth) for j in questions
    ]
    grid = needle_grid(found)
    assert grid["depths"] == [0, 0.5, 1] and grid["lengths"] == [1000, 2000] and grid["n"] == 2
    assert grid["arms"][0]["found"] == [[1, 1]] * 3 and grid["arms"][1]["found"] == [[1, 1], [0.5, 0.5], [1, 1]]
    text = format_needles(summarize(found), grid).splitlines()
    assert text[0].split() == ["length", "arm", "found", "0%", "50%", "100%"] and text[2].split() == [
        "a1",
        "5/6",
        "2",
        "1",
        "2",
    ]

    from fasa_gguf.report.pictures import save_needle_map

    image = pytest.importorskip("matplotlib.image")
    save_needle_map(grid, tmp_path / "map.png")
    pixels = image.imread(tmp_path / "map.png")[..., :3]
    green, pale = [
        np.abs(pixels - c).max(-1) < 0.02 for c in ((0.0, 0.408, 0.216), (1.0, 0.998, 0.745))
    ]  # RdYlGn at 1 and at 1/2
    assert green.sum() > 4 * pale.sum() > 400  # 10 cells are green, 2 are pale
    with pytest.raises(FasaError, match=r"/nowhere/map\.png: cannot be written"):
        save_needle_map(grid, "/nowhere/map.png")
