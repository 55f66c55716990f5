"""Tasks with an answer: the runner's steps and counters, chat templates, resuming, what is refused."""

import json

import numpy as np
import pytest
from tiny_gguf import insert, text_entry

from fasa_gguf import FasaError, FasaParams
from fasa_gguf.calibrate.gguf import default_corpus
from fasa_gguf.gguf import shape
from fasa_gguf.gguf.file import GGUFFile
from fasa_gguf.quality import tasks
from fasa_gguf.quality.answers import format_answers, summarize
from fasa_gguf.quality.arms import Arm
from fasa_gguf.quality.prompts import Prompter, greedy
from fasa_gguf.quality.tasks import Question, TaskSettings, run_questions
from fasa_gguf.runtime.settings import ContextSettings
from fasa_gguf.session import Session
from fasa_gguf.speed.random_model import synthetic_profile

ON = FasaParams(chunks=4, budget=60, sink=4, recent=8, min_context=0)
TEXT = default_corpus()[1][:40000]
ONE_THREAD = ContextSettings(n_threads=1, mode="auto")
SETTINGS = TaskSettings(TEXT, n_predict=12, context=ONE_THREAD)
QUESTIONS = [Question("niah_single_2", 700, i) for i in range(2)]


@pytest.fixture(scope="module")
def profile(tiny):
    return synthetic_profile(*shape.model_shape(GGUFFile(tiny)))


# ---- the runner ----


def test_every_answer_token_is_a_decode_step(library, tiny, profile):
    samples = run_questions(
        tiny, QUESTIONS, [Arm("f", ON), Arm("steps"), Arm("all", ON.replace(budget=700))], SETTINGS, profile
    )
    for r in samples:
        dense, f, plain, everything = r["arms"]
        assert [a["arm"] for a in r["arms"]] == ["dense", "f", "steps", "all"]
        for a in (f, everything):  # also the first token, which comes from the prompt's last one
            steps = a["n_tokens"] + (a["n_tokens"] < 12)  # one more finds the end of the generation
            assert a["counters"]["steps_sparse"] == steps > 1 and a["counters"]["steps_dense"] == 0
        assert dense["counters"]["steps_sparse"] == 0 and plain["text"] == dense["text"]
        assert f["counters"]["tokens_attended"] == 60 * f["counters"]["lists"] and f["text"] != dense["text"]
        n = r["n_prompt"]
        assert everything["counters"]["tokens_attended"] / everything["counters"]["lists"] == np.mean(
            np.arange(n, n + steps)
        )
        assert 680 < n + 12 <= 700 == r["length"] and r["task"] == "niah_single_2"


def test_a_budget_of_everything_writes_dense_token(library, tiny, profile):
    """Of prompts after which dense's best token leads by more than rounding (0.09 and 0.3)."""
    questions = [Question("niah_single_2", 700, i) for i in (0, 2)]
    for settings in (
        TaskSettings(TEXT, n_predict=6, context=ONE_THREAD),
        TaskSettings(TEXT, n_predict=6, context=ONE_THREAD.replace(type_k="f32", type_v="f32")),
    ):
        for r in run_questions(tiny, questions, [Arm("all", ON.replace(budget=700))], settings, profile):
            assert r["arms"][0]["text"][0] == r["arms"][1]["text"][0]


def test_the_answer_is_what_the_session_writes_by_itself(library, tiny, profile):
    r = run_questions(tiny, QUESTIONS[:1], [Arm("f", ON)], SETTINGS, profile)[0]
    record = tasks.make_records(tiny, QUESTIONS[:1], SETTINGS)[0]
    with Session(tiny, n_ctx=768, n_threads=1) as s:
        tokens = Prompter(s)(record["input"], record["answer_prefix"])
        assert len(tokens) == r["n_prompt"] and record["length"] == len(tokens) + 12
        for arm, params in zip(r["arms"], (None, ON), strict=True):
            s.clear()
            s.fasa.set_params(None)
            if params:
                s.fasa.set_profile(profile)
            s.decode(tokens[:-1], 0, logits="none")
            s.fasa.set_params(params)
            assert s.detokenize(greedy(s, tokens[-1], len(tokens) - 1, 12)) == arm["text"]


class Script:
    """A session that writes what it is told to: token 9 ends the generation."""

    class llama:
        @staticmethod
        def llama_vocab_is_eog(vocab, token):
            return token == 9

    vocab = None

    def __init__(self, tokens):
        self.tokens, self.seen = list(tokens), []

    def decode(self, tokens, pos):
        self.seen.append((tokens[0], pos))
        return np.eye(10)[self.tokens[len(self.seen) - 1]]


def test_greedy_ends():
    s = Script([3, 4, 5, 9])
    assert greedy(s, 7, 100, 8) == [3, 4, 5] and s.seen == [(7, 100), (3, 101), (4, 102), (5, 103)]
    assert greedy(Script([3, 4, 5]), 7, 0, 2) == [3, 4]
    assert greedy(Script([3, 4, 5]), 7, 0, 3, lambda out: out[-1] == 4) == [3, 4]


def test_an_answer_that_is_there_ends_the_decoding(library, tiny, profile):
    """The reference is the first letter that dense writes: found by dense after one step."""
    prompt = "x" * 400
    with Session(tiny, n_ctx=512, n_threads=1) as s:
        tokens = s.tokenize(prompt)
        s.decode(tokens[:-1], 0, logits="none")
        out = greedy(s, tokens[-1], len(tokens) - 1, 8)
        first, last = s.detokenize(out[:1]), s.detokenize(out)
    records = [
        {"task": "t", "index": 0, "input": prompt, "answer_prefix": "", "outputs": [first]},
        {"task": "t", "index": 1, "input": prompt, "answer_prefix": "", "outputs": [last]},
        {"task": "t", "index": 2, "input": prompt, "answer_prefix": "", "outputs": ["nowhere", first]},
    ]
    settings = TaskSettings(n_predict=8, context=ONE_THREAD)
    a, b, c = run_questions(tiny, tasks.record_questions(tiny, records, settings), [Arm("f", ON)], settings, profile)
    assert (a["arms"][0]["score"], a["arms"][0]["n_tokens"]) == (1, 1) and a["length"] == len(tokens) + 8
    assert (b["arms"][0]["score"], b["arms"][0]["n_tokens"]) == (1, 8) and (
        c["arms"][0]["score"],
        c["arms"][0]["n_tokens"],
    ) == (0.5, 8)


def test_what_is_refused(library, tiny, profile):
    with pytest.raises(
        FasaError,
        match="arm f: FASA was asked for and no step could use it: no prompt reaches min_context, 1536; "
        "use a smaller --fasa-min",
    ):
        run_questions(tiny, QUESTIONS, [Arm("f", ON.replace(min_context=1536))], SETTINGS, profile)
    with pytest.raises(
        FasaError, match="no step could use it: no prompt reaches min_context, 768"
    ):  # the cells that are seen are 768, at the most
        run_questions(
            tiny, [Question("niah_single_2", 500, 0)], [Arm("f", ON.replace(min_context=768))], SETTINGS, profile
        )
    with pytest.raises(FasaError, match="there is no FASA profile in this model"):
        run_questions(tiny, QUESTIONS, [Arm("f", ON)], SETTINGS)
    with pytest.raises(FasaError, match=r"--lengths 5000: .* was trained on 4096 tokens of context; use a shorter one"):
        run_questions(tiny, [Question("fwe", 5000, 0)], [], SETTINGS)
    with pytest.raises(FasaError, match="task 'fewe': expected one of"):
        run_questions(tiny, [QUESTIONS[0], Question("fewe", 700, 0)], [], SETTINGS)
    with pytest.raises(FasaError, match="no samples were asked for"):
        run_questions(tiny, [], [], SETTINGS)
    unranked = synthetic_profile(profile.n_head_kv, profile.n_chunk)
    unranked.n_chunk, unranked.ranking = [0, 0, 0], [np.zeros((0, 0), np.uint16)] * 3
    with pytest.raises(FasaError):  # no layer can run sparse
        run_questions(tiny, QUESTIONS, [Arm("f", ON, unranked)], SETTINGS)


def test_lengths_below_min_context_are_dense_and_say_so(library, tiny, profile):
    questions = [Question("niah_single_2", n, 0) for n in (500, 900)]
    rows = summarize(run_questions(tiny, questions, [Arm("f", ON.replace(min_context=800))], SETTINGS, profile))
    assert [(r["length"], r["arms"][1]["steps_sparse"], r["arms"][1]["steps_dense"]) for r in rows] == [
        (500, 0, 12),
        (900, 12, 0),
        (None, 12, 12),
    ]
    assert (
        rows[0]["arms"][1]["diff"] == 0
        and rows[0]["arms"][1]["tokens_attended"] is None
        and rows[1]["arms"][1]["tokens_attended"] == 60
    )
    lines = format_answers(rows).splitlines()
    assert "dense (< 800)" in lines[2] and len(lines) == 7


# ---- chat template ----


def test_chat_template(library, tiny, tmp_path):
    template = (
        "{% for m in messages %}<s>[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[me]{% endif %}"
    )
    chat = insert(tiny, tmp_path / "chat.gguf", text_entry("tokenizer.chat_template", template))
    with Session(chat, n_ctx=256) as s:
        told = s.detokenize(Prompter(s)("hi", " so:")).replace("\u2581", "")  # this tokenizer's space
        assert told == "<s>[user]hi[me]so:"  # one BOS, the template's
        assert Prompter(s)("hi")[0] == 1 and Prompter(s)("hi").count(1) == 1
        assert s.detokenize(Prompter(s, raw=True)("hi", " so:")).replace("\u2581", "") == "<s>hiso:"
    with Session(tiny, n_ctx=256) as s:
        assert Prompter(s)("hi", " so:") == Prompter(s, raw=True)("hi", " so:")
    for i, bad in enumerate(("{% for %}", "{{ raise_exception('no user') }}")):
        model = insert(tiny, tmp_path / f"bad{i}.gguf", text_entry("tokenizer.chat_template", bad))
        with (
            Session(model, n_ctx=256) as s,
            pytest.raises(FasaError, match=r"bad\d.gguf: its chat template .*; use --raw"),
        ):
            Prompter(s)("hi")


# ---- resume ----


def test_a_run_that_was_cut_off_goes_on(library, tiny, profile, tmp_path, monkeypatch):
    path, arms = tmp_path / "run.jsonl", [Arm("f", ON)]
    whole = run_questions(tiny, QUESTIONS, arms, SETTINGS, profile)
    first = run_questions(tiny, QUESTIONS[:1], arms, SETTINGS, profile, resume=path)
    assert first == whole[:1] and len(path.read_text().splitlines()) == 2
    with path.open("a") as f:
        f.write('{"key": "niah_single_2/700/no')  # killed while writing
    asked, run = [], tasks._run_sample
    monkeypatch.setattr(tasks, "_run_sample", lambda *a: asked.append(a[4]["index"]) or run(*a))
    assert run_questions(tiny, QUESTIONS, arms, SETTINGS, profile, resume=path) == whole and asked == [1]
    assert run_questions(tiny, QUESTIONS, arms, SETTINGS, profile, resume=path) == whole and asked == [1]
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()[1:]] == [j.key for j in QUESTIONS]
    for changed, message in (
        (TaskSettings(TEXT, n_predict=13, context=ONE_THREAD), r"n_predict: 12 there, 13 here"),
        (TaskSettings(TEXT[1:], n_predict=12, context=ONE_THREAD), "text: "),
        (TaskSettings(TEXT, n_predict=12, context=ONE_THREAD.replace(n_threads=2)), "threads: 1 there, 2 here"),
    ):
        with pytest.raises(
            FasaError,
            match=rf"run.jsonl: was begun with other settings \({message}.*\); "
            "use the same ones or another --resume file",
        ):
            run_questions(tiny, QUESTIONS, arms, changed, profile, resume=path)
    with pytest.raises(FasaError, match=r"arms: 1 there, 2 here"):
        run_questions(tiny, QUESTIONS, arms * 2, SETTINGS, profile, resume=path)
