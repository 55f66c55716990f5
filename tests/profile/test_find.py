"""Which profile is used: argument, variable, file beside the model, keys in the model, in this order."""

import os
import subprocess
import sys

import pytest
from paths import ROOT

from fasa_gguf import FasaError, FasaParams
from fasa_gguf.cli import main as cli
from fasa_gguf.gguf.file import GGUFFile
from fasa_gguf.gguf.shape import model_shape
from fasa_gguf.profile import embed
from fasa_gguf.profile.find import find_profile, require_profile
from fasa_gguf.profile.profile import Profile
from fasa_gguf.speed.random_model import synthetic_profile

ON = FasaParams(chunks=4, budget=64, min_context=0)


@pytest.fixture
def places(tiny, tmp_path, monkeypatch):
    """A read-only model with a profile of its own (4), and profiles to be given (1), named (2) and laid beside (3)."""
    monkeypatch.delenv("FASA_PROFILE", raising=False)
    shape = model_shape(GGUFFile(tiny))
    made = {i: synthetic_profile(*shape, seed=i) for i in (1, 2, 3, 4)}
    model = embed.rewrite(tiny, made[4], tmp_path / "m.gguf")
    os.chmod(model, 0o444)
    for i, p in made.items():
        p.save(tmp_path / f"{i}.json")
    return model, {p.to_json(): i for i, p in made.items()}, tmp_path


def test_the_order(places, monkeypatch):
    model, number, folder = places
    said = []

    def used(given=None):
        return number[find_profile(model, given, said.append).to_json()]

    assert used() == 4
    os.rename(folder / "3.json", folder / "m.gguf.fasa.json")
    assert used() == 3 and said == [
        f"{folder}/m.gguf.fasa.json is used instead of the profile in m.gguf; remove the one that is not wanted"
    ]
    os.rename(folder / "m.gguf.fasa.json", folder / "m.fasa.json")  # what `calibrate` writes
    assert used() == 3
    said.clear()
    monkeypatch.setenv("FASA_PROFILE", str(folder / "2.json"))
    assert used() == 2 and used(folder / "1.json") == 1 and used(Profile.load(folder / "1.json")) == 1 and not said
    monkeypatch.setenv("FASA_PROFILE", "")
    assert used() == 3


def test_one_profile_in_two_places_is_no_conflict(places):
    model, _, folder = places
    os.rename(folder / "4.json", folder / "m.fasa.json")
    said = []
    assert find_profile(model, None, said.append) and not said


def test_what_is_named_and_cannot_be_used(places, tiny, monkeypatch):
    model, _, folder = places
    monkeypatch.setenv("FASA_PROFILE", "/nowhere.json")
    with pytest.raises(FasaError, match=r"environment: FASA_PROFILE: /nowhere\.json: cannot be read"):
        find_profile(model)
    synthetic_profile([2] * 2, [8] * 2).save(folder / "other.json")
    monkeypatch.setenv("FASA_PROFILE", str(folder / "other.json"))
    with pytest.raises(FasaError, match=r"FASA_PROFILE: .*other\.json: the profile is for another model: .*2 layers"):
        find_profile(model)
    monkeypatch.delenv("FASA_PROFILE")
    (folder / "m.fasa.json").write_text("{")
    with pytest.raises(FasaError, match=r"m\.fasa\.json: not a FASA profile"):
        find_profile(model)
    assert find_profile(tiny) is None
    with pytest.raises(FasaError, match=r"tiny\.gguf: there is no FASA profile in this model; run `fasa-gguf embed"):
        require_profile(tiny)


def steps_of(code, model, **env):
    code = f"import sys, fasa_gguf\nON = fasa_gguf.FasaParams(chunks=4, budget=64, min_context=0)\n{code}\n"
    code += (
        "import llama_cpp\nm = llama_cpp.Llama(sys.argv[1], n_ctx=512, n_threads=1, verbose=False)\n"
        "m.create_completion('a' * 200, max_tokens=5, temperature=0)\nprint(m.fasa_stats()['steps_sparse'] > 0)\n"
    )
    args = [sys.executable, "-c", code, str(model)]
    return subprocess.run(args, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **env})


def test_code_that_is_not_ours(library, places, tiny):
    _, _, folder = places
    given = str(folder / "1.json")
    run = steps_of("fasa_gguf.enable(ON)", tiny, FASA_PROFILE=given)
    assert run.stdout == "True\n", run.stderr
    run = steps_of(f"fasa_gguf.enable(ON, profile={given!r})", tiny)
    assert run.stdout == "True\n", run.stderr
    run = steps_of("fasa_gguf.enable(profile='/nowhere.json')", tiny)
    assert "FasaError: /nowhere.json: cannot be read" in run.stderr
    run = steps_of("fasa_gguf.enable()", tiny, FASA_PROFILE="/nowhere.json")  # auto: a line, and dense
    assert run.stdout == "False\n" and "FASA_PROFILE: /nowhere.json: cannot be read" in run.stderr
    synthetic_profile([2] * 2, [8] * 2).save(folder / "other.json")
    run = steps_of(f"fasa_gguf.enable(profile={str(folder / 'other.json')!r})", tiny)
    assert run.stdout == "False\n" and "model of 2 layers" in run.stderr and "decoding is dense" in run.stderr


def test_commands_find_it_too(library, places, tiny, capsys, monkeypatch):
    _, _, folder = places
    monkeypatch.setenv("FASA_PROFILE", str(folder / "1.json"))
    argv = ["run", str(tiny), "-p", "x" * 300, "-n", "4", "-c", "512", "-t", "1", "--fasa-min-context", "0"]
    assert cli.main([*argv, "--fasa-budget", "64"]) == 0
    assert "FASA in " in capsys.readouterr().err
    monkeypatch.setenv("FASA_MIN_CONTEXT", "0")
    assert cli.main(argv[:-2]) == 0
    assert "FASA in " in capsys.readouterr().err
    assert cli.main(["bench", str(tiny), "-d", "256", "-n", "2", "-r", "1", "-p", "0", "--fasa-budget", "64"]) == 0
