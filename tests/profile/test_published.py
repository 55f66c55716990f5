"""The profiles in models/: they load, are in today's format, fit their models, and their provenance is complete."""

import hashlib
import json
import platform
import re

import pytest
from paths import ROOT

from fasa_gguf.calibrate.gguf import default_corpus
from fasa_gguf.cli import main as cli
from fasa_gguf.gguf.file import GGUFFile
from fasa_gguf.gguf.shape import model_shape
from fasa_gguf.profile.profile import Profile

MODELS = ROOT / "models"
ENTRIES = json.loads((MODELS / "profiles.json").read_text())
entries = pytest.mark.parametrize("e", ENTRIES, ids=lambda e: e["profile"])


def test_every_profile_has_an_entry():
    assert {e["profile"] for e in ENTRIES} == {p.name for p in MODELS.glob("*.fasa.json")}
    assert len({e["profile"] for e in ENTRIES}) == len(ENTRIES) == 2


@entries
def test_it_is_in_todays_format(e):
    path = MODELS / e["profile"]
    assert Profile.load(path).to_json() == path.read_text()


@entries
def test_the_shapes_are_the_models(e):
    profile = Profile.load(MODELS / e["profile"])
    n_chunk, dense = e["head_dim"] // 2, e["dense_layers"]
    assert profile.n_head_kv == [e["n_head_kv"]] * e["n_layer"]
    assert sorted(profile.n_chunk) == [0] * dense + [n_chunk] * (e["n_layer"] - dense)
    assert e["settings"].endswith(f"{profile.weight_k} of {n_chunk} chunks") and profile.weight_k == 3 * n_chunk // 8
    assert profile.ahead is not None and profile.ahead_ranking is not None and profile.recall is not None
    assert all(sorted(row) == list(range(n_chunk)) for rows in profile.ranking for row in rows if len(row))


@entries
def test_the_provenance_is_the_profiles(e):
    found = Profile.load(MODELS / e["profile"]).calibration
    assert found["tool"] == f"fasa_gguf {e['version']}" and found["source"] == "gguf"
    assert f"-c {found['context']}" in e["settings"] and found["tokens"] == 4096
    assert e["command"] == f"fasa-gguf calibrate {e['model_file']}" and e["text"].startswith("pydoc topics of CPython")
    assert e["text_license"] == "PSF-2.0" and e["model_license"] and re.fullmatch(r"\d{4}-\d\d-\d\d", e["date"])
    assert re.fullmatch("[0-9a-f]{7,40}", e["commit"]) and re.fullmatch("[0-9a-f]{64}", e["model_sha256"])


def test_they_were_calibrated_on_one_text():
    """That of the default, where the tests' Python has the topics of the same version."""
    hashes = {Profile.load(MODELS / e["profile"]).calibration["corpus_sha256"] for e in ENTRIES}
    assert len(hashes) == 1
    if platform.python_version() == "3.11.7":
        assert hashes == {hashlib.sha256(default_corpus()[1].encode()).hexdigest()}


@entries
def test_the_model_in_the_cache_is_the_one_that_was_calibrated(e):
    path = MODELS / "cache" / e["model_file"]
    if not path.exists():
        pytest.skip(f"{path} is missing")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == e["model_sha256"]
    n_head_kv, n_chunk = model_shape(GGUFFile(path))
    Profile.load(MODELS / e["profile"]).check(n_head_kv, n_chunk, str(path))


def test_a_model_runs_with_its_profile(smollm2, capfd):
    """As models/README.md shows it."""
    flags = ["-p", "One, two, three,", "-n", "2", "-c", "256", "-t", "1", "--fasa-min-context", "0"]
    assert cli.main(["run", str(smollm2), *flags, "--profile", str(MODELS / ENTRIES[0]["profile"])]) == 0
    assert "FASA in 1 steps, 0 dense" in capfd.readouterr().err
