"""Questions inside a prompt: where they stand, what is scored, and that a sparse prompt's answers are its own."""

import json

import numpy as np
import pytest
from tiny_gguf import insert, text_entry

from fasa_gguf import FasaError, FasaParams
from fasa_gguf.calibrate.gguf import default_corpus
from fasa_gguf.cli import main as cli
from fasa_gguf.gguf.file import GGUFFile
from fasa_gguf.gguf.shape import model_shape
from fasa_gguf.quality.answers import summarize
from fasa_gguf.quality.arms import Arm
from fasa_gguf.quality.needles import needle_questions
from fasa_gguf.quality.prompts import Prompter
from fasa_gguf.quality.questions import PLACES, _asked_at, format_questions, place_question, shared_tile
from fasa_gguf.quality.ruler import essay_words
from fasa_gguf.quality.tasks import TaskSettings, run_questions
from fasa_gguf.runtime.settings import ContextSettings
from fasa_gguf.session import Session
from fasa_gguf.speed.random_model import synthetic_profile

TEXT = default_corpus()[1][:40000]
WORDS = essay_words(TEXT)
ONE = ContextSettings(n_threads=1, mode="auto")
SOME = FasaParams(
    chunks=4, min_context=10**6, prefill="on", prefill_mass=0.0, prefill_budget=40, prefill_tile=64, prefill_band=8
)
ALL = SOME.replace(prefill_budget=10**6)
TEMPLATE = (
    "{% for m in messages %}<s>[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[me]{% endif %}"
)


@pytest.fixture(scope="module")
def profile(tiny):
    return synthetic_profile(*model_shape(GGUFFile(tiny)))


@pytest.fixture(scope="module", params=["raw", "chat"])
def prompter(request, library, tiny, tmp_path_factory):
    path = tiny
    if request.param == "chat":
        path = insert(
            tiny, tmp_path_factory.mktemp("chat") / "chat.gguf", text_entry("tokenizer.chat_template", TEMPLATE)
        )
    with Session(path, n_ctx=256) as s:
        yield Prompter(s)


@pytest.mark.parametrize("place", PLACES)
def test_a_prompt_has_its_tokens_needle_question_and_answer(prompter, place):
    s = prompter.session
    for index, depth in ((0, 0.0), (1, 0.5), (2, 1.0)):
        p = place_question(prompter, place, 2500, index, depth, 1024, words=WORDS)
        assert p == place_question(prompter, place, 2500, index, depth, 1024, words=WORDS)
        assert len(p.tokens) == 2500 and p.haystack == "essay" and p.tokens.count(1) <= 3
        answer = s.detokenize(p.tokens[p.at : p.at + p.n_answer]).replace("\u2581", " ")
        assert answer.strip() == p.value and len(p.value) == 7
        asks = s.detokenize(p.tokens[p.asked : p.at]).replace("\u2581", " ")
        assert "What is the special magic number for " in asks and asks.rstrip().endswith("provided text is:")
        key = asks.split("number for ")[1].split(" mentioned")[0]
        before = s.detokenize(p.tokens[: p.asked]).replace("\u2581", " ")
        needle = f"One of the special magic numbers for {key} is: {p.value}."
        assert before.count(needle) == 1 and before.count(p.value) == 1
        before = before.split("afterwards.\n")[1]
        at = before.index(needle) / (len(before) - len(needle))
        assert abs(at - depth) < 0.15
        behind = len(p.tokens) - p.at - p.n_answer
        assert behind == 0 if place == "end" else 400 < behind < 1500


def test_where_a_question_stands(prompter):
    for tile in (1024, 512):
        for index in range(6):
            p = place_question(prompter, "middle", 4000, index, 0.5, tile)
            assert p.asked // tile == (p.at + p.n_answer - 1) // tile and p.haystack == "noise"
            p = place_question(prompter, "edge", 4000, index, 0.5, tile)
            assert p.asked // tile + 1 == (p.at + p.n_answer - 1) // tile
    edges = {place_question(prompter, "edge", 4000, i, 0.5, 512).asked % 512 for i in range(6)}
    assert len(edges) > 3  # not always at the same place of the question


def test_a_question_longer_than_a_tile_has_its_answer_inside():
    import random

    for seed in range(20):
        asked = _asked_at("middle", random.Random(seed), 2000, n_span=70, n_answer=8, tile=32)
        assert (asked + 62) // 32 == (asked + 69) // 32


def test_answers_are_those_of_the_prompts_logits(library, tiny, profile):
    questions = needle_questions([1600], 2, 1, places=["end", "middle"], tile=64)
    assert [q.task for q in questions] == ["needle_end"] * 2 + ["needle_middle"] * 2
    settings = TaskSettings(TEXT, own_prompt=True, context=ONE)
    arms = [Arm("some", SOME), Arm("all", ALL), Arm("cut", ubatch=100)]
    samples = run_questions(tiny, questions, arms, settings, profile)
    with Session(tiny, n_ctx=1792, n_threads=1) as s:
        prompter = Prompter(s)
        for q, r in zip(questions, samples, strict=True):
            p = place_question(prompter, q.place, 1600, q.index, q.depth, 64, words=WORDS)
            assert (r["asked_at"], r["answer_at"], r["outputs"]) == (p.asked, p.at, [p.value])
            s.clear()
            rows = s.decode(p.tokens, 0, logits="all")[p.at - 1 : p.at + p.n_answer - 1].astype(float)
            answer = p.tokens[p.at : p.at + p.n_answer]
            logp = np.mean([row[t] - np.logaddexp.reduce(row) for row, t in zip(rows, answer, strict=True)])
            dense, some, everything, cut = r["arms"]
            assert dense["logp"] == pytest.approx(logp, abs=1e-3) and dense["counters"]["steps_prefill_sparse"] == 0
            assert dense["score"] == (rows.argmax(-1).tolist() == answer)
            assert everything["logp"] == pytest.approx(logp, abs=1e-2) and cut["logp"] == pytest.approx(logp, abs=1e-2)
            assert abs(some["logp"] - logp) > 1e-2
            assert some["counters"]["steps_prefill_sparse"] == some["counters"]["steps_prefill"] == 4
            assert some["n_tokens"] == p.n_answer and s.detokenize(rows.argmax(-1)) == dense["text"]
    row = summarize(samples)[0]["arms"]
    logp = [np.array([r["arms"][i]["logp"] for r in samples[:2]]) for i in (0, 1)]
    assert row[1]["logp"] == pytest.approx(logp[1].mean())
    assert row[1]["logp_diff"] == pytest.approx((logp[1] - logp[0]).mean()) and row[2]["prefill_share"] == 1
    table = format_questions(summarize(samples)).splitlines()
    assert table[0].split()[:5] == ["task", "length", "n", "arm", "cells"]
    assert table[1].split()[:5] == ["needle_end", "1600", "2", "dense", "all"] and " +-" in table[2]


def test_what_is_refused(library, tiny, profile, capsys):
    with pytest.raises(FasaError, match="expected arms with one prefill_tile, found 32, 64; run them one by one"):
        shared_tile([Arm("a", SOME), Arm("b", SOME.replace(prefill_tile=32)), Arm("c")])
    assert shared_tile([Arm("a", SOME)]) == 64 and shared_tile([Arm("c")]) == FasaParams().prefill_tile
    settings = TaskSettings(TEXT, own_prompt=True, context=ONE)
    for place, more in (("end", ""), ("middle", " or a prefill_tile below 1024")):
        questions = needle_questions([300], 1, 1, places=[place], tile=1024)
        with pytest.raises(FasaError, match=rf"--lengths 300: a question .*no room there; use larger --lengths{more}$"):
            run_questions(tiny, questions, [], settings)
    with pytest.raises(FasaError, match=r"arm off: FASA was asked .*sparse prefill is off; use --fasa-prefill auto"):
        run_questions(
            tiny,
            needle_questions([1600], 1, 1, places=["end"]),
            [Arm("off", SOME.replace(prefill="off"))],
            settings,
            profile,
        )
    with pytest.raises(SystemExit) as e:
        cli.main(["eval", "m", "--task", "needle", "--question", "end,start"])
    assert e.value.code == 2 and "expected a comma list of end, middle, edge, found 'start'" in capsys.readouterr().err


def test_a_template_that_changes_its_turns(library, tiny, tmp_path):
    one = "{{ messages[0].content }}[me]"
    path = insert(tiny, tmp_path / "one.gguf", text_entry("tokenizer.chat_template", one))
    with Session(path, n_ctx=256) as s:
        with pytest.raises(FasaError, match=r"one.gguf: its chat template does not keep the text of a turn; use --raw"):
            place_question(Prompter(s), "middle", 3000, 0, 0.5, 64)
        assert len(place_question(Prompter(s), "end", 3000, 0, 0.5, 64).tokens) == 3000


def test_the_command(library, profiled, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    argv = ["eval", profiled, "-t", "1", "--task", "needle", "--question", "middle,edge", "--lengths", "1600"]
    argv += ["--depths", "1", "-f", str(tmp_path / "text.txt"), "--fasa-prefill", "on", "--resume"]
    argv += [str(tmp_path / "r.jsonl")]
    assert cli.main([*argv, "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert [(r["task"], r["n_prompt"]) for r in out["rows"]] == [
        ("needle_middle", 1600),
        ("needle_edge", 1600),
        ("mean", 1600),
    ]
    assert all(r["arms"][1]["counters"]["steps_prefill_sparse"] for r in out["samples"])
    assert cli.main(argv) == 0 and "needle_edge" in capsys.readouterr().out  # from the file
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 3
    assert cli.main([*argv, "-n", "4"]) == 1
    assert "--n-predict: nothing is written with --question; omit one of the two" in capsys.readouterr().err


def test_other_numbers_by_the_command(library, profiled, tmp_path, capsys):
    argv = [
        "eval",
        profiled,
        "-t",
        "1",
        "--task",
        "ruler",
        "--tasks",
        "niah_multivalue",
        "--lengths",
        "1600",
        "-n",
        "2",
    ]
    argv += ["--samples", "1", "--num-needle-v", "2"]
    assert cli.main([*argv, "--json", "--save-records", str(tmp_path / "r.jsonl")]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["rows"][0]["numbers"] == {"num_needle_v": 2} and len(out["samples"][0]["outputs"]) == 2
    assert cli.main(argv) == 0 and "niah_multivalue at 1600: num_needle_v 2" in capsys.readouterr().out
    assert cli.main([*argv, "--records", str(tmp_path / "r.jsonl")]) == 1
    assert "--num-needle-v makes records; omit it, or --records" in capsys.readouterr().err
