"""The command line: usage errors, values out of range, what `run` prints. The commands at work are in test_apps.py."""

import os
import subprocess
import sys

import pytest
from paths import ROOT

from fasa_gguf import FasaError, FasaParams
from fasa_gguf.cli import main as cli
from fasa_gguf.cli import profile as cli_profile
from fasa_gguf.cli import run as cli_run
from fasa_gguf.cli.arguments import read_params
from fasa_gguf.gguf import shape
from fasa_gguf.gguf.file import GGUFFile
from fasa_gguf.params import QUALITIES
from fasa_gguf.profile import embed
from fasa_gguf.speed.random_model import synthetic_profile

X = "x" * 300


@pytest.fixture(scope="module")
def profiled(library, tiny, tmp_path_factory):
    profile = synthetic_profile(*shape.model_shape(GGUFFile(tiny)))
    return str(embed.rewrite(tiny, profile, tmp_path_factory.mktemp("cli") / "tiny.gguf"))


def error(capsys, *argv, code=1):
    """The last line on stderr of a command that fails."""
    if code == 2:
        with pytest.raises(SystemExit) as e:
            cli.main(argv)
        assert e.value.code == 2
    else:
        assert cli.main(argv) == code
    return capsys.readouterr().err.strip().splitlines()[-1]


# ---- without the library ----


@pytest.mark.parametrize(
    "argv, message",
    [
        (["nonsense"], "invalid choice: 'nonsense'"),
        ([], "the following arguments are required: COMMAND"),
        (["run", "-p", "x"], "run: MODEL is missing"),
        (["run", "m", "-c", "-5"], "-c/--ctx-size: expected a number from 0 to 2147483647, found -5"),
        (["run", "m", "-b", "0"], "-b/--batch-size: expected a number from 1"),
        (["run", "m", "-n", "ten"], "-n/--n-predict: expected a whole number, found 'ten'"),
        (["run", "m", "-t", "-1"], "-t/--threads: expected a number from 0"),
        (["calibrate", "m", "-c", "10"], "-c/--ctx-size: expected a number from 256"),
        (["bench", "m", "-d", "0,abc"], "-d/--n-depth: expected a whole number, found 'abc'"),
        (["bench", "m", "-d", ""], "-d/--n-depth: expected a whole number, found ''"),
        (["bench", "m", "-r", "0"], "-r/--repetitions: expected a number from 1"),
        (["run", "m", "--fasa-mode", "gpu"], "--fasa-mode: expected one of auto, device, host"),
        (["bench", "m", "--fasa-mode", "device,auto"], "--fasa-mode: bench measures the modes that it is given"),
        (["eval", "m", "-f", "t", "--windows", "0"], "--windows: expected a number from 1"),
        (["eval", "m", "-f", "t", "--budgets", "256,0"], "--budgets: expected a number from 1"),
    ],
)
def test_usage_errors_exit_2(capsys, argv, message):
    assert message in error(capsys, *argv, code=2)


def test_lists_and_the_two_ways_to_name_the_model():
    a = cli.parser().parse_args(["bench", "-m", "m.gguf"])
    assert a.model_flag == "m.gguf" and a.n_depth is None
    a = cli.parser().parse_args(["bench", "m.gguf", "-d", "1,22"])
    assert a.model == "m.gguf" and a.n_depth == [1, 22]


def test_modes_and_their_letters():
    for text, mode in (("device", "device"), ("c", "device"), ("host", "host"), ("m", "host"), ("auto", "auto")):
        assert cli.parser().parse_args(["run", "m", "--fasa-mode", text]).fasa_mode == mode
    assert cli.parser().parse_args(["bench", "m", "--fasa-mode", "c,host"]).fasa_mode == ["device", "host"]
    assert cli.parser().parse_args(["run", "m"]).fasa_mode is None


def test_a_setting_is_a_flag_over_the_environment_over_the_profile(monkeypatch):
    a = cli.parser().parse_args(["run", "m", "--fasa-budget", "7", "--fasa-k-dom", "q8"])
    monkeypatch.setenv("FASA_BUDGET", "8")
    monkeypatch.setenv("FASA_SINK", "9")
    profile = synthetic_profile([2], [8])
    profile.defaults = {"budget": 1, "sink": 1, "recent": 11}
    assert read_params(a, profile) == (FasaParams(budget=7, sink=9, recent=11, k_dom="q8"), profile)
    a.fasa_mass = "0.9"
    profile.defaults["mean_budget"] = 99
    assert read_params(a, profile)[0] == FasaParams(
        budget=7, sink=9, recent=11, k_dom="q8", mass=0.9
    )  # not the mean budget of the profile
    a.fasa_mass, a.fasa_mean_budget = None, "64"
    profile.defaults["mass"] = profile.defaults.pop("mean_budget") / 100
    assert read_params(a, profile)[0] == FasaParams(
        budget=7, sink=9, recent=11, k_dom="q8", mean_budget=64
    )  # nor its mass
    a.fasa_mean_budget = None
    assert read_params(a, profile)[0] == FasaParams(budget=7, sink=9, recent=11, k_dom="q8")  # a budget is a fixed one
    a.fasa_preset, profile.ranking_method = "paper", "ca"
    assert read_params(a, profile)[0] == FasaParams(
        budget=7, sink=9, recent=0, k_dom="q8", chunks=2, per_head=1, ahead="off", prefill="off"
    )


def test_a_quality_is_a_flag_over_the_environment(monkeypatch):
    monkeypatch.setenv("FASA_QUALITY", "fast")
    monkeypatch.setenv("FASA_SINK", "9")
    profile = synthetic_profile([2], [8])
    profile.defaults = {"budget": 100, "k_dom": "q8"}
    read = lambda *flags: read_params(cli.parser().parse_args(["run", "m", *flags]), profile)[0]  # noqa: E731
    own = FasaParams(budget=100, k_dom="q8", sink=9)
    assert read() == own.replace(**QUALITIES["fast"])
    assert read("--fasa-quality", "careful") == own.replace(**QUALITIES["careful"])
    assert read("--fasa-quality", "careful", "--fasa-cap", "300") == own.replace(**{**QUALITIES["careful"], "cap": 300})
    assert read("--fasa-budget", "50").mass == 0 and read("--fasa-budget", "50").budget == 50
    with pytest.raises(FasaError, match="command line: quality: expected one of fast, balanced, careful, found 'x'"):
        read("--fasa-quality", "x")
    with pytest.raises(FasaError, match="--fasa-quality fast and --fasa-preset paper: expected one of them"):
        read("--fasa-quality", "fast", "--fasa-preset", "paper")


def test_bench_makes_an_arm_of_every_quality():
    from fasa_gguf.cli.bench import _arms

    a = cli.parser().parse_args(["bench", "m", "--fasa-quality", "fast,careful"])
    arms = _arms(a, synthetic_profile([2], [8]))[0]
    assert {name: p.mass for name, p in arms.items()} == {"fasa quality=fast": 0.9, "fasa quality=careful": 0.985}


def test_errors_without_a_model(capsys, tmp_path):
    assert error(capsys, "run", "m").endswith("nothing to run: give -p PROMPT or -f FILE")
    said = error(capsys, "run", "m", "-f", str(tmp_path / "none.txt"))
    assert said.count("none.txt") == 1 and "cannot be read: No such file or directory; check the path" in said
    assert "--profile was given, and --remove needs none" in error(
        capsys, "embed-profile", "m", "--remove", "--profile", "p"
    )
    assert "--profile was given, and -f needs none" in error(capsys, "embed-profile", "m", "-f", "t", "--profile", "p")


def test_a_file_that_cannot_be_written_is_one_line(capsys, monkeypatch):
    def fail(a):
        raise PermissionError(13, "Permission denied", "p.json")

    monkeypatch.setattr(cli_profile, "cmd_inspect", fail)
    assert error(capsys, "inspect", "m") == "fasa-gguf: error: p.json: Permission denied"
    with pytest.raises(PermissionError):
        cli.main(["--debug", "inspect", "m"])


def test_interrupted(capsys, monkeypatch):
    def stop(a):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_profile, "cmd_inspect", stop)
    assert error(capsys, "inspect", "m", code=130) == "fasa-gguf: interrupted"


def test_the_line_of_figures():
    s = {
        "steps_sparse": 9,
        "steps_dense": 1,
        "tokens_attended": 640,
        "tokens_visible": 6400,
        "lists": 10,
        "bytes_tip": 5,
        "bytes_fac": 15,
        "bytes_dense": 100,
        "step_reason": "",
    }
    assert cli_run.summary(s, 600, 2.0, 11, 0.5) == (
        "prompt 600 tokens in 2.0 s (300.0 t/s); 11 tokens at 20.0 t/s; FASA in 9 steps, 1 dense; "
        "64 of 640 tokens attended, 20.0% of the KV bytes read"
    )
    m = {**s, "bytes_kv_host": 1, "bytes_fetched": 18_000_000, "rows_reused": 1, "rows_fetched": 3}
    assert "; host mode, 2.0 MB a step over PCIe, 25% of the rows reused; FASA in 9 steps" in cli_run.summary(
        m, 600, 2.0, 11, 0.5
    )
    dense = {**s, "steps_sparse": 0, "step_reason": "FASA is off"}
    assert (
        cli_run.summary(dense, 600, 2.0, 1, 0.0)
        == "prompt 600 tokens in 2.0 s (300.0 t/s); 1 tokens; dense: FASA is off"
    )


# ---- with it ----


def test_run(capsys, profiled):
    assert (
        cli.main(["run", profiled, "-p", X, "-n", "6", "-c", "512", "--fasa-min-context", "0", "--fasa-budget", "64"])
        == 0
    )
    out, err = capsys.readouterr()
    assert out.endswith("\n") and err.count("\n") == 1  # the text; one line of figures
    assert "FASA in 5 steps, 0 dense; 64 of" in err and "; 6 tokens at " in err
    assert cli.main(["run", profiled, "-p", X, "-n", "6", "-c", "512"]) == 0  # auto: dense is a note
    assert capsys.readouterr().err.endswith("dense: the context is shorter than min_context\n")
    assert cli.main(["run", profiled, "-p", X, "-n", "6", "-c", "512", "--no-fasa"]) == 0
    assert capsys.readouterr().err.endswith("dense: FASA is off\n")


def test_run_writes_until_the_context_is_full(capsys, profiled, monkeypatch):
    monkeypatch.setattr(cli_run, "_is_end", lambda llm, token: False)
    assert cli.main(["run", profiled, "-p", "x", "-n", "-1", "-c", "200"]) == 0  # llama.cpp makes it 256
    n_prompt, n = (int(part.split()[i]) for part, i in zip(capsys.readouterr().err.split("; "), (1, 0), strict=False))
    assert n_prompt + n == 256


def test_run_says_what_does_not_fit(capsys, profiled, tiny, tmp_path):
    assert "the prompt has 304 tokens and the context 256; use -c " in error(
        capsys, "run", profiled, "-p", X, "-c", "256"
    )
    assert "cache type 'q9': expected one of f32, f16" in error(capsys, "run", profiled, "-p", "x", "-ctk", "q9")
    line = error(capsys, "run", profiled, "-p", "x", "-ctk", "q8_0")  # the flag reaches llama.cpp, and its reason us
    assert "llama.cpp says: " in line and "K cache type q8_0" in line
    assert "there is no FASA profile in this model; run `fasa-gguf embed-profile" in error(
        capsys, "run", str(tiny), "-p", "x", "--fasa-budget", "9"
    )
    text = tmp_path / "text.gguf"
    text.write_text("not a model")
    assert "not a GGUF file" in error(capsys, "run", str(text), "-p", "x")


def test_a_reader_that_goes_away_is_no_error(profiled):
    run = subprocess.run(
        f"{sys.executable} -m fasa_gguf run {profiled} -p x -n 200 -c 512 | head -c 1 >/dev/null; "
        "exit ${PIPESTATUS[0]}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == 0 and "Traceback" not in run.stderr


def test_calibrate_into_a_missing_folder(capsys, tiny, library):
    assert "/nowhere/p.json: the folder does not exist; make it, or give another -o" in error(
        capsys, "calibrate", str(tiny), "-c", "512", "-o", "/nowhere/p.json"
    )
    with pytest.raises(FasaError):
        cli.main(["--debug", "inspect", "/nowhere/p.json"])
