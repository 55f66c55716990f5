"""The command `eval`: its tasks, arms, and flags of another task."""

import json

import pytest

from fasa_gguf.calibrate.gguf import default_corpus
from fasa_gguf.cli import main as cli
from fasa_gguf.gguf import shape
from fasa_gguf.gguf.file import GGUFFile
from fasa_gguf.profile import embed
from fasa_gguf.speed.random_model import synthetic_profile

TEXT = default_corpus()[1][:40000]


@pytest.fixture(scope="module")
def profile(tiny):
    return synthetic_profile(*shape.model_shape(GGUFFile(tiny)))


@pytest.fixture(scope="module")
def profiled(library, tiny, profile, tmp_path_factory):
    return str(embed.rewrite(tiny, profile, tmp_path_factory.mktemp("tasks") / "tiny.gguf"))


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
        (["--depths", "3"], "--depths is for --task needle, not for --task ppl; omit it"),
        (["--task", "needle", "--score", "3"], "--score is for --task ppl, not for --task needle"),
        (["--task", "long", "--seed", "3"], "--seed is for --task ruler and --task needle, not for --task long"),
        (["--task", "needle", "--num-hops", "1"], "--num-hops is for --task ruler, not for --task needle; omit it"),
        (["--question", "end"], "--question is for --task needle, not for --task ppl; omit it"),
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


def test_another_ubatch_is_another_run(tiny):
    from fasa_gguf.cli.eval import _context
    from fasa_gguf.quality.arms import describe

    sizes = {}
    for ub in (64, 512, 1024):
        settings = _context(cli.parser().parse_args(["eval", "m", "-ub", str(ub)]))
        sizes[ub] = settings.n_ubatch, settings.n_batch, describe(tiny, [], None, "x", settings).get("n_ubatch")
    assert sizes == {64: (64, 512, 64), 512: (512, 512, None), 1024: (1024, 1024, 1024)}
