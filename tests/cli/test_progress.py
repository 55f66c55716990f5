"""What a command says of how far it is: a line now and then where stderr is a file."""

import re
import threading
import time

import pytest

from fasa_gguf.cli import progress
from fasa_gguf.cli.main import main
from fasa_gguf.gguf.file import GGUFFile
from fasa_gguf.gguf.shape import model_shape
from fasa_gguf.profile.embed import rewrite
from fasa_gguf.speed.random_model import synthetic_profile


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(progress, "PAUSE", 0.02)
    yield
    progress.stop_progress()


@pytest.fixture(scope="module")
def embedded(library, tiny, tmp_path_factory):
    profile = synthetic_profile(*model_shape(GGUFFile(tiny)))
    return rewrite(tiny, profile, tmp_path_factory.mktemp("progress") / "tiny.gguf")


def lines(capfd):
    return [line for line in capfd.readouterr().err.splitlines() if re.search(r"\(\d+:\d\d\)$", line)]


def test_lines_off_a_terminal(capfd):
    bar = progress.progress_bar()
    time.sleep(0.1)
    assert set(lines(capfd)) == {"fasa-gguf: working (0:00)"}
    bar("reading", 1000, 4000)
    bar("ranking", 2, 3)
    time.sleep(0.1)
    assert lines(capfd)[-1] == "fasa-gguf: reading 1,000 of 4,000, ranking 2 of 3 (0:00)"
    bar("reading", 4000, 4000)
    time.sleep(0.1)
    assert lines(capfd)[-1] == "fasa-gguf: ranking 2 of 3 (0:00)"
    progress.stop_progress()
    time.sleep(0.05)
    capfd.readouterr()
    time.sleep(0.1)
    assert not lines(capfd)


def test_another_bar_replaces_the_first(capfd):
    progress.progress_bar()("reading", 1, 2)
    progress.progress_bar()("writing", 1, 2)
    time.sleep(0.1)
    assert "reading" not in lines(capfd)[-1]


def test_nothing_is_said_behind_the_end(monkeypatch):
    """A line that is being written when the command ends is written before stop_progress returns."""
    begun, said = threading.Event(), []

    class Slow:
        def isatty(self):
            return False

        def write(self, text):
            begun.set()
            time.sleep(0.05)
            said.append(text)

        def flush(self):
            pass

    monkeypatch.setattr("sys.stderr", Slow())
    progress.progress_bar()
    assert begun.wait(5)
    progress.stop_progress()
    at_end = list(said)
    time.sleep(0.2)
    assert said == at_end != []


EVAL = ["eval", "{m}", "-f", "{t}", "--windows", "2", "--window", "300", "--score", "20", "--fasa-min-context", "0"]
COMMANDS = {
    "calibrate": (["calibrate", "{m}", "-f", "{t}", "-c", "1024", "-o", "{d}/p.json"], "reading|ranking"),
    "embed-profile": (["embed-profile", "{m}", "-f", "{t}", "-c", "1024", "-o", "{d}/m.gguf"], "reading|ranking"),
    "run": (["run", "{m}", "-f", "{t}", "-c", "4096", "-n", "1", "-b", "32", "--no-fasa"], "reading the prompt"),
    "eval": ([*EVAL, "--budgets", "60"], "evaluating"),
    "needle": (
        ["eval", "{m}", "--task", "needle", "--lengths", "1000", "--depths", "3", "--budgets", "60", "-f", "{t}",
         "--fasa-min-context", "0"],
        "evaluating",
    ),
    "long": (["eval", "{m}", "--task", "long", "-f", "{t}", "--window", "256", "-n", "60", "--budgets", "60",
              "--fasa-min-context", "0"], "generating"),
    "sweep": (["sweep", *EVAL[1:], "--budgets", "60,80", "-o", "{d}/s"], "evaluating"),
    "calibrate-layers": (["calibrate-layers", *EVAL[1:], "--budgets", "60,120", "--masses", "0.5,0.9",
                          "-o", "{d}/l.json"], "all alike|layer by layer"),
    "bench": (["bench", "{m}", "-d", "64,300", "-n", "16", "-r", "2", "-p", "0", "--fasa-min-context", "0"],
              "benchmarking|prefilling"),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_every_long_command(library, embedded, text, tmp_path, capfd, name):
    words, said = COMMANDS[name]
    (tmp_path / "t.txt").write_text(text[:2500] if name == "run" else text)
    assert main([w.format(m=embedded, t=tmp_path / "t.txt", d=tmp_path) for w in words]) == 0
    assert any(re.search(f"^fasa-gguf: .*({said}).* of ", line) for line in lines(capfd))
    assert not progress._speaking  # nothing speaks on behind the command's end


def test_a_model_that_loads_slowly_shows_how_far(monkeypatch, library, tiny):
    """Of a quick one nothing is shown; llama.cpp tells both the drop-in and a session."""
    from fasa_gguf.runtime import loading
    from fasa_gguf.session import Session

    clock, shown, seen = [0.0], [], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(progress, "progress_bar", lambda: lambda what, done, total: shown.append((what, done, total)))
    report = progress.loading_bar()
    for seconds, done in ((0, 0), (1, 300), (1.9, 1000), (10, 0), (11, 100), (12.5, 600), (13, 1000), (20, 0), (21, 5)):
        clock[0] = 100.0 + seconds
        report(done, 1000)
    assert shown == [("loading the model", 600, 1000), ("loading the model", 1000, 1000)]
    monkeypatch.setattr(loading, "report", lambda done, total: seen.append(done / total))
    Session(tiny, n_ctx=256).close()
    assert seen[-1] == 1 and seen == sorted(seen)
