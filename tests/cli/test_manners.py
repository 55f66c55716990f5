"""Completion, exit statuses, colours, and JSON where a table is printed."""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from paths import ROOT

from fasa_gguf.cli import completion
from fasa_gguf.cli import main as cli
from fasa_gguf.cli.main import parser

RUN = [sys.executable, "-m", "fasa_gguf"]
TABLES = {"inspect", "eval", "compare", "sweep", "calibrate-layers", "bench", "plan", "doctor"}


def commands():
    action = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    return action.choices


@pytest.fixture
def shtab():
    return pytest.importorskip("shtab", reason="shtab is not installed")


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_completion_knows_every_command(shtab, shell, capsys):
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in commands()) and "fasa-budget" in script
    if shutil.which(shell):
        done = subprocess.run([shell, "-n"], input=script, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_bash_completes(shtab, capsys, tmp_path):
    cli.main(["completion", "bash"])
    (tmp_path / "c.sh").write_text(capsys.readouterr().out)
    (tmp_path / "my-model.gguf").touch()

    def complete(*words):
        line = " ".join(f"'{w}'" for w in words)
        text = f"source {tmp_path}/c.sh; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; "
        name = subprocess.run(
            ["bash", "-c", f"source {tmp_path}/c.sh; complete -p fasa-gguf"], capture_output=True, text=True
        ).stdout.split("-F ")[1].split()[0]  # fmt: skip
        out = subprocess.run(
            ["bash", "-c", text + f'{name}; printf "%s\\n" "${{COMPREPLY[@]}}"'],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        return out.stdout.split()

    assert "doctor" in complete("fasa-gguf", "do")
    assert complete("fasa-gguf", "plan", "--fasa-bud") == ["--fasa-budget"]
    assert complete("fasa-gguf", "doctor", "my") == ["my-model.gguf"]


def test_every_path_is_completed_as_one():
    """An argument whose help or metavar speaks of a file."""
    for name, p in commands().items():
        for action in p._actions:
            told = f"{action.metavar or ''} {action.help or ''}"
            if "GGUF file" in told or "FILE" in str(action.metavar):
                assert action.dest in completion.PATHS, f"{name}: {action.dest}"


def test_completion_without_shtab_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 1
    assert "pip install 'shtab>=1.13'" in capsys.readouterr().err


def test_tables_come_as_json_too():
    assert {name for name, p in commands().items() if "--json" in p._option_string_actions} == TABLES


# ---- exit statuses ----


@pytest.mark.parametrize(
    "argv, status",
    [
        (["--version"], 0),
        (["--help"], 0),
        (["inspect", "no-such-file.gguf"], 1),
        (["run"], 2),
        (["run", "m.gguf", "-t", "many"], 2),
        (["no-such-command"], 2),
        (["completion", "csh"], 2),
    ],
)
def test_exit_status(argv, status):
    done = subprocess.run([*RUN, *argv], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == status and "Traceback" not in done.stderr


def test_ctrl_c_is_130(library, tmp_path):
    """While a model of 0.8 GB is written."""
    process = subprocess.Popen([*RUN, "bench", "--shape", "1b", "-d", "65536"], cwd=ROOT, stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL, text=True, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))  # fmt: skip
    assert "writing a random" in process.stderr.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.strip().endswith("fasa-gguf: interrupted")


def test_nothing_is_coloured(tmp_path):
    for argv in (["--help"], ["doctor", "--help"], ["inspect", "no-such-file.gguf"]):
        done = subprocess.run([*RUN, *argv], capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"})
        assert "\033[" not in done.stdout + done.stderr
