"""docs/reference/json.md and the fields of bench.md against what the commands print on a tiny model."""

import json
import re

import pytest
from paths import ROOT

from fasa_gguf.cli import main as cli
from fasa_gguf.gguf.file import GGUFFile
from fasa_gguf.gguf.shape import model_shape
from fasa_gguf.profile.embed import rewrite
from fasa_gguf.speed import report, traffic
from fasa_gguf.speed.random_model import synthetic_profile
from fasa_gguf.speed.results import Result

PAGE = (ROOT / "docs" / "reference" / "json.md").read_text()
WHOLE = {"fasa", "counters", "config", "numbers"}  # objects that the page explains as one
EVAL = "eval model.gguf -t 1 -f text.txt"


def tables(title):
    """The names of the tables below a heading of the page, a set for each table."""
    part = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    found = []
    for table in re.findall(r"(?:^\|.*\n)+", part, re.M):
        names = {
            x for line in table.split("\n")[2:] for x in re.findall(r"`([^`]*)`", line.split("|")[1] if line else "")
        }
        found.append(names)
    return found


def names(value, before="", whole=WHOLE):
    """The paths of all fields of a JSON value, as the page writes them."""
    if isinstance(value, list):
        return set().union(*(names(x, before, whole) for x in value)) if value else set()
    out = set()
    for key, x in value.items():
        path = f"{before}{key}"
        is_list = isinstance(x, list) and x and isinstance(x[0], dict)
        if key in whole or not (isinstance(x, dict) or is_list):
            out.add(path)
        else:
            out |= names(x, f"{path}[]." if is_list else f"{path}.", whole)
    return out


@pytest.fixture(scope="module")
def printed(library, tiny, text, tmp_path_factory):
    """A function: the JSON that a command prints, in a folder with a model and a text."""
    folder = tmp_path_factory.mktemp("json")
    profile = synthetic_profile(*model_shape(GGUFFile(tiny)), seed=2)
    rewrite(tiny, profile, folder / "model.gguf")
    profile.save(folder / "a.json")
    (folder / "text.txt").write_text(text[:12000])

    def call(command, capsys, monkeypatch):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(traffic, "COPY_BYTES", 8 << 20)
        assert cli.main([*command.split(), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return call


@pytest.fixture
def call(printed, capsys, monkeypatch):
    return lambda command: printed(command, capsys, monkeypatch)


SHORT = "--windows 2 --window 1024 --score 8 --fasa-min-context 0"


def test_perplexity(call):
    assert names(call(f"{EVAL} {SHORT} --budgets 64")) == tables("eval")[0]


def test_tasks(call):
    rows, long = tables("eval, tasks")
    grid = {x for x in rows if x.startswith("grid.")}
    one = "--samples 1 --lengths 1200 -n 2 --fasa-min-context 0"
    assert names(call(f"{EVAL} --task ruler --tasks niah_single_1 {one}")) == rows - grid
    assert names(call(f"{EVAL} --task needle --depths 1 {one}")) == rows
    assert names(call(f"{EVAL} --task long -n 4 --windows 1 --window 1200")) == long


def test_plan(call):
    assert names(call("plan model.gguf -c 4096 --vram 1G --ram 1G")) == tables("plan")[0]


def test_inspect(call):
    assert names(call("inspect model.gguf --against a.json")) == tables("inspect")[0]
    assert set(call("inspect model.gguf")) >= {"version", "n_layer", "ranking"}


def test_sweep(call):
    found = call(f"sweep model.gguf -t 1 -f text.txt {SHORT} --chunks 4 --budgets 64 --masses 0.9 -o sweep")
    eval_fields = tables("eval")[0]
    assert {x.rstrip("[]") for x in tables("sweep")[0]} == set(found)
    assert names(found["dense"]) == eval_fields
    assert names(found["rows"]) == eval_fields | {"chunks", "budget", "mass", "flags"}


def test_layers(call):
    flags = "--windows 1 --window 1024 --score 8 --masses 0.9 --budgets 64,256 --group 9"
    found = call(f"calibrate-layers model.gguf -t 1 -f text.txt -o q.json {flags}")
    shown = tables("calibrate-layers")[0]
    assert names({k: v for k, v in found.items() if k != "table"}) == shown - {"table[]"}
    assert names(found["table"]) == tables("eval")[0]


def test_doctor(call):
    whole = {"system", "packages", "cpu", "threads", "gpu", "libraries", "environment"}
    assert names(call("doctor"), whole=whole) == tables("doctor")[0]


def test_bench():
    """Every field of a result is in bench.md."""
    page = (ROOT / "docs" / "reference" / "bench.md").read_text()
    shown = set(re.findall(r"`(\w+)`", page))
    entry = report.as_dict(Result("dense", 0, 8), "model.gguf", "build")
    config = {"model_size", "cpu_info", "gpu_info", "n_threads", "n_batch", "n_ubatch", "flash_attn"}
    config |= {"n_gpu_layers", "type_k", "type_v", "no_kv_offload", "fasa_mode"}
    assert set(entry) | config <= shown, sorted((set(entry) | config) - shown)
