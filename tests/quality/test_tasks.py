"""Tasks with an answer: the runner's steps and counters, arms apart, resuming, figures, the needle map, long generation."""

import json

import numpy as np
import pytest
from tiny_gguf import insert

from fasa_gguf import FasaError, FasaParams
from fasa_gguf.calibrate.gguf import default_corpus
from fasa_gguf.cli import main as cli
from fasa_gguf.gguf import shape
from fasa_gguf.gguf.file import GGUFFile
from fasa_gguf.profile import embed
from fasa_gguf.quality import long_text as generation
from fasa_gguf.quality import tasks
from fasa_gguf.quality.arms import Arm
from fasa_gguf.quality.journal import Journal
from fasa_gguf.quality.long_text import distinct_share, longest_repeat, run_long
from fasa_gguf.quality.tasks import (
    Job,
    Prompter,
    Setup,
    greedy,
    paired,
    run_jobs,
    sign_test,
    t_quantile,
)
from fasa_gguf.session import Session
from fasa_gguf.speed.random_model import synthetic_profile

ON = FasaParams(chunks=4, budget=60, sink=4, recent=8, min_context=0)
TEXT = default_corpus()[1][:40000]
SETUP = Setup(TEXT, n_predict=12, n_threads=1)
JOBS = [Job("niah_single_2", 700, i) for i in range(2)]


@pytest.fixture(scope="module")
def profile(tiny):
    return synthetic_profile(*shape.model_shape(GGUFFile(tiny)))


@pytest.fixture(scope="module")
def profiled(library, tiny, profile, tmp_path_factory):
    return str(embed.rewrite(tiny, profile, tmp_path_factory.mktemp("tasks") / "tiny.gguf"))


def text_entry(key, value):
    """A packed metadata string."""
    import struct

    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<IQ", 8, len(value)) + value.encode()


# ---- the runner ----


def test_every_answer_token_is_a_decode_step(library, tiny, profile):
    samples = run_jobs(tiny, JOBS, [Arm("f", ON), Arm("steps"), Arm("all", ON.replace(budget=700))], SETUP, profile)
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
    jobs = [Job("niah_single_2", 700, i) for i in (0, 2)]
    for setup in (
        Setup(TEXT, n_predict=6, n_threads=1),
        Setup(TEXT, n_predict=6, n_threads=1, type_k="f32", type_v="f32"),
    ):
        for r in run_jobs(tiny, jobs, [Arm("all", ON.replace(budget=700))], setup, profile):
            assert r["arms"][0]["text"][0] == r["arms"][1]["text"][0]


def test_the_answer_is_what_the_session_writes_by_itself(library, tiny, profile):
    r = run_jobs(tiny, JOBS[:1], [Arm("f", ON)], SETUP, profile)[0]
    record = tasks.make_records(tiny, JOBS[:1], SETUP)[0]
    with Session(tiny, n_ctx=768, n_threads=1) as s:
        tokens = Prompter(s)(record["input"], record["answer_prefix"])
        assert len(tokens) == r["n_prompt"] and record["length"] == len(tokens) + 12
        for arm, params in zip(r["arms"], (None, ON)):
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
    setup = Setup(n_predict=8, n_threads=1)
    a, b, c = run_jobs(tiny, tasks.record_jobs(tiny, records, setup), [Arm("f", ON)], setup, profile)
    assert (a["arms"][0]["score"], a["arms"][0]["n_tokens"]) == (1, 1) and a["length"] == len(tokens) + 8
    assert (b["arms"][0]["score"], b["arms"][0]["n_tokens"]) == (1, 8) and (
        c["arms"][0]["score"],
        c["arms"][0]["n_tokens"],
    ) == (0.5, 8)


def test_what_is_refused(library, tiny, profile):
    with pytest.raises(
        FasaError,
        match="arm f: FASA was asked for and no step could use it: no prompt reaches min_context, 1536; use a smaller --fasa-min",
    ):
        run_jobs(tiny, JOBS, [Arm("f", ON.replace(min_context=1536))], SETUP, profile)
    with pytest.raises(
        FasaError, match="no step could use it: no prompt reaches min_context, 768"
    ):  # the cells that are seen are 768, at the most
        run_jobs(tiny, [Job("niah_single_2", 500, 0)], [Arm("f", ON.replace(min_context=768))], SETUP, profile)
    with pytest.raises(FasaError, match="there is no FASA profile in this model"):
        run_jobs(tiny, JOBS, [Arm("f", ON)], SETUP)
    with pytest.raises(FasaError, match="--lengths 5000: .* was trained on 4096 tokens of context; use a shorter one"):
        run_jobs(tiny, [Job("fwe", 5000, 0)], [], SETUP)
    with pytest.raises(FasaError, match="task 'fewe': expected one of"):
        run_jobs(tiny, [JOBS[0], Job("fewe", 700, 0)], [], SETUP)
    with pytest.raises(FasaError, match="no samples were asked for"):
        run_jobs(tiny, [], [], SETUP)
    unranked = synthetic_profile(profile.n_head_kv, profile.n_chunk)
    unranked.n_chunk, unranked.ranking = [0, 0, 0], [np.zeros((0, 0), np.uint16)] * 3
    with pytest.raises(FasaError):  # no layer can run sparse
        run_jobs(tiny, JOBS, [Arm("f", ON, unranked)], SETUP)


def test_lengths_below_min_context_are_dense_and_say_so(library, tiny, profile):
    jobs = [Job("niah_single_2", n, 0) for n in (500, 900)]
    rows = tasks.summarize(run_jobs(tiny, jobs, [Arm("f", ON.replace(min_context=800))], SETUP, profile))
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
    lines = tasks.table(rows).splitlines()
    assert "dense (< 800)" in lines[2] and len(lines) == 7


# ---- chat template ----


def test_chat_template(library, tiny, tmp_path):
    template = "{% for m in messages %}<s>[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[me]{% endif %}"
    chat = insert(tiny, tmp_path / "chat.gguf", text_entry("tokenizer.chat_template", template))
    with Session(chat, n_ctx=256) as s:
        told = s.detokenize(Prompter(s)("hi", " so:")).replace("\u2581", "")  # this tokenizer's space
        assert told == "<s>[user]hi[me]so:"  # one BOS, the template's
        assert Prompter(s)("hi")[0] == 1 and Prompter(s)("hi").count(1) == 1
        assert s.detokenize(Prompter(s, raw=True)("hi", " so:")).replace("\u2581", "") == "<s>hiso:"
    with Session(tiny, n_ctx=256) as s:
        assert Prompter(s)("hi", " so:") == Prompter(s, raw=True)("hi", " so:")
    for i, bad in enumerate(("{% for %}", "{{ raise_exception('no user') }}")):
        with Session(
            insert(tiny, tmp_path / f"bad{i}.gguf", text_entry("tokenizer.chat_template", bad)), n_ctx=256
        ) as s:
            with pytest.raises(FasaError, match=r"bad\d.gguf: its chat template .*; use --raw"):
                Prompter(s)("hi")


# ---- resume ----


def test_a_run_that_was_cut_off_goes_on(library, tiny, profile, tmp_path, monkeypatch):
    path, arms = tmp_path / "run.jsonl", [Arm("f", ON)]
    whole = run_jobs(tiny, JOBS, arms, SETUP, profile)
    first = run_jobs(tiny, JOBS[:1], arms, SETUP, profile, resume=path)
    assert first == whole[:1] and len(path.read_text().splitlines()) == 2
    with path.open("a") as f:
        f.write('{"key": "niah_single_2/700/no')  # killed while writing
    asked, run = [], tasks._run_sample
    monkeypatch.setattr(tasks, "_run_sample", lambda *a: asked.append(a[4]["index"]) or run(*a))
    assert run_jobs(tiny, JOBS, arms, SETUP, profile, resume=path) == whole and asked == [1]
    assert run_jobs(tiny, JOBS, arms, SETUP, profile, resume=path) == whole and asked == [1]
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()[1:]] == [j.key for j in JOBS]
    for changed, message in (
        (Setup(TEXT, n_predict=13, n_threads=1), r"n_predict: 12 there, 13 here"),
        (Setup(TEXT[1:], n_predict=12, n_threads=1), "text: "),
        (Setup(TEXT, n_predict=12, n_threads=2), "threads: 1 there, 2 here"),
    ):
        with pytest.raises(
            FasaError,
            match=rf"run.jsonl: was begun with other settings \({message}.*\); use the same ones or another --resume file",
        ):
            run_jobs(tiny, JOBS, arms, changed, profile, resume=path)
    with pytest.raises(FasaError, match=r"arms: 1 there, 2 here"):
        run_jobs(tiny, JOBS, arms * 2, SETUP, profile, resume=path)


def test_a_file_that_is_no_journal_is_left_alone(tmp_path):
    for content in (b"hello\n", b"hello", b'{"a": 1}\n', b"[1]\n", b"\xff\n"):
        path = tmp_path / "x"
        path.write_bytes(content)
        with pytest.raises(FasaError, match="x: not a file of --resume; give another name"):
            Journal(path, {})
        assert path.read_bytes() == content
    for start in (b"", b'{"settings": {"a'):  # nothing finished yet
        path.write_bytes(start)
        with Journal(path, {"a": [1, (2, 3)]}) as j:
            j.add("k", {"v": 1})
        assert Journal(path, {"a": [1, [2, 3]]}).get("k") == {"v": 1}
    with Journal(None, {}) as j:
        j.add("k", 1)
        assert j.get("k") == 1 and j.get("other") is None


# ---- figures ----


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
    p, q, mean = tasks.summarize(samples)
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
    lines = tasks.table([p, q, mean]).splitlines()
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
    jobs = tasks.needle_jobs([1000, 2000], 3, 2)
    assert (
        len(jobs) == 12 and [j.depth for j in jobs[:6]] == [0, 0, 0.5, 0.5, 1, 1] and len({j.key for j in jobs}) == 12
    )
    found = [sample(j.task, j.length, j.index, 1, float(j.depth != 0.5 or j.index == 0), depth=j.depth) for j in jobs]
    grid = tasks.needle_grid(found)
    assert grid["depths"] == [0, 0.5, 1] and grid["lengths"] == [1000, 2000] and grid["n"] == 2
    assert grid["arms"][0]["found"] == [[1, 1]] * 3 and grid["arms"][1]["found"] == [[1, 1], [0.5, 0.5], [1, 1]]
    text = tasks.needle_table(tasks.summarize(found), grid).splitlines()
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
    with pytest.raises(FasaError, match="/nowhere/map.png: cannot be written"):
        save_needle_map(grid, "/nowhere/map.png")


# ---- long generation ----


def test_degeneration():
    assert distinct_share([1, 2, 3, 4, 5, 6]) == 1 and distinct_share([1] * 7) == 0.25 and distinct_share([1, 2]) == 1
    assert (
        longest_repeat([1, 2, 3, 9, 1, 2, 3, 8]) == 3 and longest_repeat([1, 2, 3, 4]) == 0 and longest_repeat([]) == 0
    )
    assert (
        longest_repeat([5] * 10) == 9 and longest_repeat([256, 1, 2, 65536, 1, 2]) == 2
    )  # whole tokens, not bytes of them


def test_long_generation(library, tiny, profile, monkeypatch, tmp_path):
    monkeypatch.setattr(generation, "BLOCK", 10)
    setup, told = Setup(TEXT, n_threads=1), []
    out = run_long(
        tiny,
        [Arm("f", ON), Arm("steps")],
        25,
        300,
        2,
        setup,
        profile,
        lambda *a: told.append(a),
        tmp_path / "long.jsonl",
    )
    dense, f, steps = out["rows"]
    assert told[-1] == ("generating", 250, 250) and [r["arm"] for r in out["rows"]] == ["dense", "f", "steps"]
    assert (
        dense["agreement"] == 1
        and dense["equal_prefix"] == [25, 25]
        and steps["equal_prefix"] == [25, 25]
        and steps["agreement_blocks"] == [1, 1, 1]
    )
    assert (
        f["steps_sparse"] == 2 * 25 + sum(24 - e for e in f["equal_prefix"])
        and f["tokens_attended"] == 60
        and f["agreement"] < 1
    )
    assert (
        np.isclose(np.dot(f["agreement_blocks"], [10, 10, 5]) / 25, f["agreement"])
        and len(out["texts"][1]["texts"]) == 2
    )
    again = run_long(tiny, [Arm("f", ON), Arm("steps")], 25, 300, 2, setup, profile, None, tmp_path / "long.jsonl")
    assert again == out and len((tmp_path / "long.jsonl").read_text().splitlines()) == 7
    assert generation.table(out["rows"]).splitlines()[0].split()[:8] == [
        "arm",
        "tokens",
        "equal",
        "prefix",
        "same",
        "top",
        "to",
        "10",
    ]

    with Session(tiny, n_ctx=512, n_threads=1) as s:  # the arm's own text, written by itself
        prompt = generation.cut_windows(s, TEXT, 2, 300)[0][:300]
        s.fasa.set_profile(profile)
        s.decode(prompt[:-1], 0, logits="none")
        s.fasa.set_params(ON)
        w = generation._Writer(s, None, 0)
        assert w.barred == [2] and s.detokenize(w.write(prompt[-1], 299, 25)) == out["texts"][1]["texts"][0]


def test_long_generation_refuses(library, tiny, profile):
    with pytest.raises(FasaError, match="--task long continues a text: give -f FILE"):
        run_long(tiny, [], 10, 100)
    with pytest.raises(
        FasaError,
        match="4000 tokens of text and 100 written: .* was trained on 4096 tokens of context; use a smaller --window or -n",
    ):
        run_long(tiny, [], 100, 4000, 1, SETUP)
    with pytest.raises(
        FasaError, match="arm f: FASA was asked for and no step used it: the context is shorter than min_context"
    ):
        run_long(tiny, [Arm("f", ON.replace(min_context=2000))], 5, 100, 1, SETUP, profile)


# ---- the command line ----


def test_eval_commands(profiled, tmp_path, capsys):
    text = tmp_path / "t.txt"
    text.write_text(TEXT)
    common = ["-f", str(text), "-t", "1", "--fasa-min-context", "0", "--fasa-chunks", "4", "--fasa-recent", "8"]
    ruler = [
        "eval",
        profiled,
        "--task",
        "ruler",
        "--tasks",
        "niah_single_1,fwe",
        "--lengths",
        "900",
        "--samples",
        "1",
        "-n",
        "3",
        *common,
    ]
    assert (
        cli.main(
            [*ruler, "--budgets", "60", "--masses", "0.5,0.9", "--json", "--save-records", str(tmp_path / "r.jsonl")]
        )
        == 0
    )
    out = json.loads(capsys.readouterr().out)
    assert (
        [r["task"] for r in out["rows"]] == ["niah_single_1", "fwe", "mean"]
        and out["config"]["seed"] == 42
        and out["config"]["n_predict"] == 3
    )
    assert [a["arm"].split()[-1] for a in out["rows"][0]["arms"]] == ["dense", "B=60", "mass=0.5", "mass=0.9"]
    assert [a["fasa"]["mass"] for a in out["config"]["arms"]] == [0, 0.5, 0.9]
    assert (
        cli.main(["eval", profiled, "--task", "ruler", "--records", str(tmp_path / "r.jsonl"), "-n", "3", *common]) == 0
    )
    assert capsys.readouterr().out.splitlines()[0].split()[:3] == ["task", "length", "n"]
    png = tmp_path / "n.png"
    assert (
        cli.main(
            [
                "eval",
                profiled,
                "--task",
                "needle",
                "--lengths",
                "500,600",
                "--depths",
                "2",
                "-n",
                "2",
                "--png",
                str(png),
                "--resume",
                str(tmp_path / "n.jsonl"),
                *common,
            ]
        )
        == 0
    )
    printed = capsys.readouterr()
    assert (
        printed.out.splitlines()[0].split() == ["length", "arm", "found", "0%", "100%"]
        and png.read_bytes()[:4] == b"\x89PNG"
        and "needle map: " in printed.err
    )
    assert cli.main(["eval", profiled, "--task", "long", "--window", "300", "-n", "10", *common]) == 0
    assert capsys.readouterr().out.splitlines()[0].split()[:4] == ["arm", "tokens", "equal", "prefix"]
    assert cli.main(["eval", profiled, "--windows", "1", "--window", "300", "--score", "5", *common]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["dense", "all"]


def test_a_model_without_a_profile_whose_arms_name_one(library, tiny, profile, text, tmp_path, capsys):
    file = tmp_path / "p.json"
    profile.save(file)
    (tmp_path / "t.txt").write_text(text)
    common = [
        "eval",
        str(tiny),
        "-f",
        str(tmp_path / "t.txt"),
        "--windows",
        "1",
        "--window",
        "300",
        "--score",
        "6",
        "-t",
        "1",
        "--fasa-min-context",
        "0",
        "--json",
    ]
    assert cli.main([*common, "--score-batch", "3", "--arms", f"dense;profile={file},budget=60"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [r["tokens_attended"] for r in rows] == [None, None, 60] and rows[2]["steps_sparse"] == 6
    assert (
        cli.main([*common, "--arms", f"profile={file},budget=60;budget=50"]) == 1
        and "profile" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--depths", "3"], "--depths is for --task needle, not for --task ppl; leave it away"),
        (["--task", "needle", "--score", "3"], "--score is for --task ppl, not for --task needle"),
        (["--task", "long", "--seed", "3"], "--seed is for --task ruler and --task needle, not for --task long"),
        ([], "--task ppl needs a text; give -f FILE"),
        (["--task", "long"], "--task long needs a text; give -f FILE"),
    ],
)
def test_flags_of_another_task(capsys, argv, message):
    assert cli.main(["eval", "m", *argv]) == 1
    assert message in capsys.readouterr().err


def test_a_list_of_masses(capsys):
    for bad in ("0", "1.1", "a", "nan", ""):
        with pytest.raises(SystemExit) as e:
            cli.main(["eval", "m", "--masses", bad])
        assert e.value.code == 2 and "expected numbers above 0, up to 1" in capsys.readouterr().err
