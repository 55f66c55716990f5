"""Quality: metrics on planted logits, windows of a text, arms that share a prefix, what is refused."""

from dataclasses import replace

import numpy as np
import pytest

from fasa_gguf import FasaError, FasaParams
from fasa_gguf.gguf.file import GGUFFile
from fasa_gguf.gguf.shape import model_shape
from fasa_gguf.profile.profile import Profile
from fasa_gguf.quality import perplexity
from fasa_gguf.quality.arms import Arm, ArmSwitch, parse_arms
from fasa_gguf.quality.perplexity import (
    Score,
    WindowSettings,
    evaluate,
    format_scores,
    log_softmax,
    one_by_one,
    score_tokens,
)
from fasa_gguf.quality.text import cut_windows, detokenize_wikitext
from fasa_gguf.session import Session
from fasa_gguf.speed.random_model import synthetic_profile

ON = FasaParams(chunks=4, budget=60, sink=4, recent=8, min_context=0)
SIZE = WindowSettings(windows=2, window=300, score=20)


@pytest.fixture(scope="module")
def profile(tiny):
    return synthetic_profile(*model_shape(GGUFFile(tiny)))


# ---- metrics ----


def test_log_softmax_of_large_logits():
    assert np.allclose(log_softmax(np.array([[1e4, 1e4 + np.log(3)]])), np.log([[0.25, 0.75]]))


def test_kl_is_from_dense_to_the_arm():
    dense, arm = np.log(np.array([[0.9, 0.1]])), np.log(np.array([[0.5, 0.5]]))
    _, kl, _ = score_tokens(dense, arm, np.array([0]))
    assert np.allclose(kl, 0.9 * np.log(0.9 / 0.5) + 0.1 * np.log(0.1 / 0.5))


def test_means_and_standard_errors():
    nll = np.array([1.0, 2.0, 3.0, 2.0])
    dense = Score("dense", [nll[:2], nll[2:]], [np.zeros(2)] * 2, [np.ones(2)] * 2)
    arm = Score("arm", [nll[:2] + 0.1, nll[2:] + 0.1], [np.array([0.0, 0.2])] * 2, [np.array([1.0, 0.0])] * 2)
    row = arm.figures(dense)
    assert (
        row["n_scored"] == 4
        and np.isclose(row["ppl"], np.exp(2.1))
        and np.isclose(row["ppl_se"], np.exp(2.1) * nll.std(ddof=1) / 2)
    )
    assert (
        np.isclose(row["ppl_ratio"], np.exp(0.1)) and row["ppl_ratio_se"] < 1e-12
    )  # paired: every token is worse by the same
    assert np.isclose(row["kl"], 0.1) and np.isclose(row["kl_se"], np.std([0, 0.2, 0, 0.2], ddof=1) / 2)
    assert row["same_top"] == 0.5 and np.isclose(row["same_top_se"], np.std([1, 0, 1, 0], ddof=1) / 2)
    dp = np.exp(-nll - 0.1) - np.exp(-nll)
    assert np.isclose(row["dp_rms"], np.sqrt(np.mean(dp**2))) and np.isclose(row["dp_mean"], dp.mean())
    spread = np.mean(dp**4) - np.mean(dp**2) ** 2  # llama-perplexity's mean_and_uncertainty
    assert np.isclose(row["dp_rms_se"], 0.5 / row["dp_rms"] * np.sqrt(spread / 3))
    assert (
        np.isclose(row["kl_median"], 0.1) and np.isclose(row["kl_99"], 0.2) and dense.figures(dense)["dp_rms_se"] == 0
    )
    assert row["tokens_attended"] is None and row["kv_read_share"] == 1.0
    single = Score("one", [np.array([1.0])], [np.array([0.5])], [np.array([1.0])])
    assert single.figures(single)["ppl_se"] == 0 and single.figures(single)["kl"] == 0.5


def test_counters_add_up_and_memory_does_not():
    s = Score("arm", [np.ones(2)], [np.zeros(2)], [np.ones(2)])
    for _ in range(2):
        s.add_counters(
            {
                "tokens_attended": 640,
                "lists": 10,
                "layers_sparse": 5,
                "bytes_fac": 100,
                "bytes_tip": 20,
                "bytes_dense": 480,
                "bytes_k_dom": 7,
                "bytes_kv": 100,
            }
        )
    row = s.figures(s)
    assert row["tokens_attended"] == 64 and row["kv_read_share"] == 0.25 and row["k_dom_share"] == 0.07


# ---- texts ----


def test_detokenize_wikitext():
    raw = "the 7 @-@ year old , born in 1 @,@ 234 ( about 1 @.@ 5 m ) , said : it 's <unk> here ."
    assert detokenize_wikitext(raw) == "the 7-year old, born in 1,234 (about 1.5 m), said: it's here."


class Letters:
    """A session whose tokens are positions of the text."""

    def tokenize(self, text):
        return [int(x) for x in text.split()]


def test_windows_are_spread_evenly():
    text = " ".join(f"{i:04}" for i in range(10000))  # 5 characters a token
    cut = cut_windows(Letters(), text, 4, 1000)
    starts = [w[1] - 1 for w in cut]
    assert all(len(w) == 1001 for w in cut) and starts[0] == 400 and starts[-1] + 1001 < 10000
    assert np.ptp(np.diff(starts)) <= 1 and 1900 < np.diff(starts)[0] < 2500  # even, and over the whole text
    with pytest.raises(
        FasaError,
        match="the text has 5000 characters, which is too short for 4 windows of 1000 tokens; use a longer -f TEXT",
    ):
        cut_windows(Letters(), text[:5000], 4, 1000)
    assert len(cut_windows(Letters(), text[:12000], 4, 1000, score=100)) == 4
    with pytest.raises(FasaError, match="too short for 4 windows"):  # the same tokens would be scored twice
        cut_windows(Letters(), text[:12000], 4, 1000, score=300)


def test_a_run_that_was_cut_off_goes_on(library, tiny, text, profile, tmp_path, monkeypatch):
    whole = evaluate(tiny, text, [Arm("a", ON)], SIZE, profile=profile)
    path, clear, calls = tmp_path / "r.jsonl", Session.clear, []

    def stop(self):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        clear(self)

    monkeypatch.setattr(Session, "clear", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny, text, [Arm("a", ON)], SIZE, profile=profile, resume=path)
    assert len(path.read_text().splitlines()) == 3  # the settings, and two arms of one window
    assert evaluate(tiny, text, [Arm("a", ON)], SIZE, profile=profile, resume=path) == whole and len(calls) == 3
    assert evaluate(tiny, text, [Arm("a", ON)], SIZE, profile=profile, resume=path) == whole and len(calls) == 3
    with pytest.raises(
        FasaError, match=r"r.jsonl: was begun with other settings \(score: 20 there, 21 here\); use the same"
    ):
        evaluate(tiny, text, [Arm("a", ON)], replace(SIZE, score=21), profile=profile, resume=path)
    before = path.read_text()
    arms = [Arm("a", ON.replace(budget=61)), Arm("a", ON), Arm("c", ON)]  # other arms in the same file: only they run
    fresh = evaluate(tiny, text, arms, SIZE, profile=profile)
    assert evaluate(tiny, text, arms, SIZE, profile=profile, resume=path) == fresh and [fresh[0], fresh[2]] == whole
    added = path.read_text().removeprefix(before).splitlines()
    assert [line[9:12] for line in added] == ["0 a", "0 c", "1 a", "1 c"] and len(calls) == 7


def test_an_arm_that_was_cut_off_leaves_the_others(library, tiny, text, profile, tmp_path, monkeypatch):
    arms, path, use, calls = [Arm("a", ON), Arm("b", ON.replace(budget=61))], tmp_path / "r.jsonl", ArmSwitch.use, []
    whole = evaluate(tiny, text, arms, SIZE, profile=profile)

    def stop(self, arm):
        calls.append(arm and arm.name)
        if calls == [None, "a", "b"]:
            raise KeyboardInterrupt
        use(self, arm)

    monkeypatch.setattr(ArmSwitch, "use", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny, text, arms, SIZE, profile=profile, resume=path)
    assert evaluate(tiny, text, arms, SIZE, profile=profile, resume=path) == whole
    assert calls[3:] == [None, "b", None, "a", "b"]


def test_arms_by_text(profile):
    other, asked = synthetic_profile(profile.n_head_kv, profile.n_chunk, seed=3), []

    def settings(path):
        asked.append(path)
        return (ON.replace(mass=0.5), profile) if path is None else (ON, other)

    arms = parse_arms(
        "mass=0.9,cap=4096; mean_budget=99 ;budget=30,floor=2;profile=x.json,k_dom=q8;dense", settings, "p "
    )
    cut, both = parse_arms("dense,ubatch=256;mass=0.9,ubatch=64", lambda path: (ON, profile), "p ")
    assert (cut.name, cut.params, cut.ubatch) == ("dense,ubatch=256", None, 256)
    assert (both.name, both.params, both.ubatch) == ("p mass=0.9,ubatch=64", ON.replace(mass=0.9), 64)
    assert [a.name for a in arms] == [
        "p mass=0.9,cap=4096",
        "p mean_budget=99",
        "p budget=30,floor=2",
        "p profile=x.json,k_dom=q8",
        "dense by steps",
    ]
    assert [a.params for a in arms] == [
        ON.replace(mass=0.9, cap=4096),
        ON.replace(mean_budget=99),
        ON.replace(budget=30, floor=2),
        ON.replace(k_dom="q8"),
        None,
    ]
    assert [a.profile for a in arms] == [profile, profile, profile, other, None] and asked == [None] * 3 + ["x.json"]
    for bad, message in (
        ("mass", "arm 'mass': expected SETTING=VALUE, found 'mass'; such as --arms"),
        ("mass=0.9;", "arm '': expected SETTING=VALUE, found ''"),
        ("mass=", "expected SETTING=VALUE, found 'mass='"),
        ("cap=1,cap=2", "arm 'cap=1,cap=2': cap is given twice"),
        ("magic=1", "arm 'magic=1': unknown setting 'magic'; known are chunks"),
        ("mass=x", "arm 'mass=x': setting mass: expected a number \\(share, 0 to 1\\), found 'x'"),
        ("mass=0.9,cap=3", "settings floor and cap: expected 1 <= floor <= cap, found 64 and 3"),
        ("mass=0.9,mean_budget=9", "settings mass and mean_budget"),
        ("dense,ubatch=x", "arm 'dense,ubatch=x': ubatch: expected a whole number of tokens from 1, found 'x'"),
        ("dense,ubatch=0", "ubatch: expected a whole number of tokens from 1, found '0'"),
        ("dense,mass=0.9", "arm 'dense,mass=0.9': dense takes ubatch=N only, found mass; omit one of the two"),
    ):
        with pytest.raises(FasaError, match=message):
            parse_arms(bad, settings)


# ---- arms ----


@pytest.mark.parametrize("kind, most", [("bf16", 1e-4), ("f16", 5e-2)])
def test_dense_logits_in_a_batch_and_in_steps_agree(library, tiny, text, kind, most):
    """With an f16 cache upstream's attention of one token on several threads sums V in f16, that of a batch in f32."""
    from fasa_gguf.session import Session

    with Session(tiny, n_ctx=512, type_k=kind, type_v=kind) as s:
        tokens = s.tokenize(text)[:300]
        s.decode(tokens[:280], 0, logits="none")
        batch = s.decode(tokens[280:], 280, logits="all")
        s.remove(0, 280)
        steps = np.stack([s.decode([t], 280 + i) for i, t in enumerate(tokens[280:])])
    assert batch.shape == steps.shape == (20, s.n_vocab) and batch.std() > 1 and np.abs(batch - steps).max() < most


def test_a_list_for_every_query_head(library, tiny, text, profile):
    heads = evaluate(
        tiny, text, [Arm("kv", ON), Arm("q", ON.replace(per_head=1, sink=0, recent=0))], SIZE, profile=profile
    )
    assert heads[1]["tokens_attended"] == heads[2]["tokens_attended"] == ON.budget and heads[2]["kl"] > 0
    assert heads[2]["kv_read_share"] > 1.5 * heads[1]["kv_read_share"]  # two query heads a KV head: rows are read twice


def test_a_budget_of_the_whole_context_is_dense(library, tiny, text, profile):
    rows = evaluate(tiny, text, [Arm("all", ON.replace(budget=300))], SIZE, profile=profile)
    assert rows[1]["steps_sparse"] == 40 and rows[1]["layers_sparse"] == 120 and rows[1]["layers_dense"] == 0
    assert rows[1]["kl"] < 1e-4 and abs(rows[1]["ppl_ratio"] - 1) < 1e-3 and rows[1]["same_top"] > 0.97
    assert rows[1]["tokens_attended"] == np.mean(np.arange(281, 301))


def test_arms_do_not_touch_each_other(library, tiny, text, profile):
    other = synthetic_profile(profile.n_head_kv, profile.n_chunk, seed=3)
    told = []
    arms = [Arm("a", ON), Arm("b", ON.replace(budget=120)), Arm("c", ON, other), Arm("steps"), Arm("a again", ON)]
    rows = evaluate(tiny, text, arms, SIZE, profile=profile, progress=lambda *x: told.append(x))
    dense, a, wide, c, steps, again = rows
    assert [r["arm"] for r in rows] == ["dense", "a", "b", "c", "steps", "a again"] and told[-1] == (
        "evaluating",
        12,
        12,
    )
    keys = ("ppl", "kl", "same_top", "tokens_attended", "steps_sparse", "kv_read_share")
    assert [a[k] for k in keys] == [again[k] for k in keys]  # bit-equal: the tail is forgotten between arms
    assert a["kl"] != c["kl"] and wide["kl"] < a["kl"] and wide["tokens_attended"] == 120
    assert (
        steps["tokens_attended"] is None and steps["kl"] < 1e-4 and steps["fasa"] is None and a["fasa"]["budget"] == 60
    )
    assert dense["kl"] == 0 and dense["same_top"] == 1 and dense["ppl_ratio"] == 1 and dense["n_scored"] == 40
    assert a["n_ctx"] == 300 and a["n_windows"] == 2 and a["model_filename"] == str(tiny) and a["type_k"] == "f16"


def test_scored_tokens_in_batches_give_the_figures_of_steps(library, tiny, text, profile, tmp_path):
    """Every token of a batch has a selection of its own; what a batch reads once is counted for each of its tokens."""
    arms = [
        Arm("a", ON),
        Arm("m", ON.replace(mass=0.5, floor=20, cap=100)),
        Arm("q", ON.replace(per_head=1)),
        Arm("steps"),
    ]
    one = evaluate(tiny, text, arms, SIZE, profile=profile)
    path = tmp_path / "r.jsonl"
    many = evaluate(
        tiny, text, arms, replace(SIZE, score_batch=8), profile=profile, resume=path
    )  # batches of 8, 8 and 4
    for a, b in zip(one[1:4], many[1:4], strict=True):
        assert all(
            a[k] == b[k] for k in ("tokens_attended", "steps_sparse", "layers_sparse", "layers_dense", "n_scored")
        )
        assert all(abs(a[k] - b[k]) < 1e-3 for k in ("kl", "ppl_ratio")) and a["kv_read_share"] == pytest.approx(
            b["kv_read_share"], rel=0.05
        )
        assert b["fasa"]["max_tokens"] == 64 and b["score_batch"] == 8
    assert many[4]["kl"] == one[4]["kl"]  # dense by steps stays so
    with pytest.raises(FasaError, match=r"was begun with other settings \(score_batch"):
        evaluate(tiny, text, arms, SIZE, profile=profile, resume=path)
    with pytest.raises(FasaError, match="--score-batch 0: expected at least 1"):
        evaluate(tiny, text, arms, replace(SIZE, score_batch=0), profile=profile)
    assert one_by_one(
        {
            "steps_sparse": 3,
            "steps_dense": 0,
            "layers_sparse": 9,
            "layers_dense": 0,
            "bytes_tip": 30,
            "bytes_dense": 300,
            "bytes_fac": 7,
        },
        12,
    ) == {
        "steps_sparse": 12,
        "steps_dense": 0,
        "layers_sparse": 36,
        "layers_dense": 0,
        "bytes_tip": 120,
        "bytes_dense": 1200,
        "bytes_fac": 7,
    }


def test_a_batch_of_an_arm_is_a_decode_step(library, tiny, text, profile):
    """Also behind a dense batch that is longer than max_tokens and so counts as a prompt."""
    size = replace(SIZE, windows=1, score=100, score_batch=64)
    a, b = (evaluate(tiny, text, [Arm("a", ON)], x, profile=profile)[1] for x in (size, replace(size, score_batch=1)))
    assert a["steps_sparse"] == b["steps_sparse"] == 100 and abs(a["kl"] - b["kl"]) < 1e-3


def test_a_large_vocabulary_is_scored_in_pieces(library, tiny, text, profile, monkeypatch):
    """Logits go by in batches of LOGITS bytes, and dense's rows beyond MEMORY bytes into a file: the same figures."""
    arms = [Arm("a", ON), Arm("steps")]
    whole, decoded, decode = evaluate(tiny, text, arms, SIZE, profile=profile), [], Session.decode_batch

    def spy(self, items):
        decoded.append(sum(wants for *_, wants in items))
        decode(self, items)

    with Session(tiny, n_ctx=256) as s:
        row = 4 * s.n_vocab
    monkeypatch.setattr(Session, "decode_batch", spy)
    monkeypatch.setattr(perplexity, "LOGITS", 8 * row)
    monkeypatch.setattr(perplexity._Rows, "MEMORY", 3 * row)
    pieces = evaluate(tiny, text, arms, SIZE, profile=profile)
    assert decoded.count(8) == 4 and decoded.count(4) == 2 and max(decoded) == 8
    for a, b in zip(whole, pieces, strict=True):
        assert abs(a["kl"] - b["kl"]) < 1e-5 and abs(a["ppl"] / b["ppl"] - 1) < 1e-4


def test_no_room_for_the_rows(library, tiny, text, profile, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(perplexity.tempfile.SpooledTemporaryFile, "write", full)
    with pytest.raises(FasaError, match="logits cannot be kept there: No space left on device; set TMPDIR"):
        evaluate(tiny, text, [Arm("a", ON)], SIZE, profile=profile)


def test_the_table(library, tiny, text, profile):
    half = Profile(
        profile.n_head_kv, [8, 0, 8], [profile.ranking[0], np.zeros((0, 0), np.uint16), profile.ranking[2]], "synthetic"
    )
    rows = evaluate(tiny, text, [Arm("a", ON), Arm("half", ON, half)], SIZE, profile=profile)
    lines = format_scores(rows).splitlines()
    assert len(lines) == 5 and len({len(line) for line in lines[:4]}) == 1
    assert lines[0].split() == [
        "arm",
        "tokens",
        "ppl",
        "ppl",
        "ratio",
        "KL",
        "same",
        "top",
        "KV",
        "read",
        "K_dom/KV",
        "RMS",
        "dp",
        "KL",
        "median",
        "KL",
        "99%",
    ]
    assert lines[1].split()[:2] == ["dense", "all"] and lines[2].split()[:2] == ["a", "60"]
    assert lines[4] == "half: 33% of the layers were dense; tokens are the sparse layers'"


def test_steps_that_stay_dense_are_told(library, tiny, text, profile):
    # the view of the cache grows from 256 to 512 cells within the scored tokens
    rows = evaluate(tiny, text, [Arm("late", ON.replace(min_context=300))], WindowSettings(1, 260, 10), profile=profile)
    assert (rows[1]["steps_sparse"], rows[1]["steps_dense"]) == (4, 6)
    assert format_scores(rows).splitlines()[-1] == "late: 6 of 10 steps were dense"


def test_evaluate_refuses(library, tiny, text, profile):
    arm = [Arm("f", ON)]
    with pytest.raises(
        FasaError, match="arm f: FASA was asked for and no step used it: the context is shorter than min_context"
    ):
        evaluate(tiny, text, [Arm("f", ON.replace(min_context=4096))], SIZE, profile=profile)
    with pytest.raises(FasaError, match="there is no FASA profile in this model; run `fasa-gguf embed-profile"):
        evaluate(tiny, text, arm, SIZE)
    with pytest.raises(FasaError, match="--score 300: expected 1 to 299"):
        evaluate(tiny, text, arm, WindowSettings(1, 300, 300), profile=profile)
    with pytest.raises(FasaError, match="--windows 0: expected at least 1"):
        evaluate(tiny, text, arm, WindowSettings(0, 300, 20), profile=profile)
    with pytest.raises(
        FasaError, match=r"--window 8192: .*tiny\.gguf was trained on 4096 tokens of context; use a shorter --window"
    ):
        evaluate(tiny, text, arm, WindowSettings(1, 8192, 20), profile=profile)
    with pytest.raises(
        FasaError,
        match="too short for 2 windows of 300 tokens; use a longer -f TEXT, fewer --windows or a shorter --window",
    ):
        evaluate(tiny, text[:310], arm, SIZE, profile=profile)
