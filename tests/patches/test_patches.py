import importlib.util
import shutil

import pytest
from paths import ROOT

spec = importlib.util.spec_from_file_location("queue_tool", ROOT / "patches" / "queue.py")
Q = importlib.util.module_from_spec(spec)
spec.loader.exec_module(Q)

TEXT = ["a", "b", "c", "d", "e"]
HUNK = ["@@ -2,3 +2,4 @@", " b", "-c", "+C", "+x", " d"]


def test_hunks_apply_exactly_and_never_with_fuzz():
    assert Q.apply_hunks(TEXT, HUNK, "f") == ["a", "b", "C", "x", "d", "e"]
    with pytest.raises(Q.QueueError, match="f: the hunk at line 2 does not apply"):
        Q.apply_hunks(["0", *TEXT], HUNK, "f")  # moved by a line
    with pytest.raises(Q.QueueError, match="does not apply"):
        Q.apply_hunks(["a", "b", "c", "D", "e"], HUNK, "f")  # other context
    assert Q.apply_hunks(["0", *TEXT], HUNK, "f", exact=False)[1:] == ["a", "b", "C", "x", "d", "e"]


def queue(monkeypatch, folder, patch, series="p.patch\n"):
    (folder / "series").write_text(series)
    (folder / "p.patch").write_text(patch)
    monkeypatch.setattr(Q, "HERE", folder)


GOOD = "Subject: s\n\nWhy: w\nDrop when: d\n\ndiff --git a/f b/f\n--- a/f\n+++ b/f\n@@ -1 +1,2 @@\n a\n+b\n"


def test_headers_series_and_size(monkeypatch, tmp_path):
    queue(monkeypatch, tmp_path, GOOD)
    assert Q.check_headers() == 1
    queue(monkeypatch, tmp_path, GOOD.replace("Why:", "Because:"))
    with pytest.raises(Q.QueueError, match=r"p.patch: the header has no line 'Why: '"):
        Q.check_headers()
    queue(monkeypatch, tmp_path, GOOD, series="")
    with pytest.raises(Q.QueueError, match=r"series and folder differ: p.patch"):
        Q.check_headers()
    queue(monkeypatch, tmp_path, GOOD + "+b\n" * 200)
    with pytest.raises(Q.QueueError, match="add 201 lines, more than 100"):
        Q.check_headers()


def test_another_source_is_refused(monkeypatch, tmp_path):
    (tmp_path / "UPSTREAM").write_text("package = pkg\nversion = 1\nsha256 = 00\nfolder = v\n")
    monkeypatch.setattr(Q, "HERE", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "fasa_gguf").mkdir()
    (tmp_path / "fasa_gguf" / "pkg-1.tar.gz").write_bytes(b"other")
    with pytest.raises(Q.QueueError, match=r"pkg-1.tar.gz: expected sha256 00, found"):
        Q.fetch()


def changed(patch):
    """The added and removed lines. Sorted: an equal change may begin a line earlier."""
    return sorted(line for _, hunks in Q.split(patch)[1] for line in hunks if line[:1] in "+-")


def test_the_series_applies_to_the_pinned_source_and_refresh_keeps_it(monkeypatch, tmp_path):
    try:
        Q.fetch()
    except Q.QueueError as e:
        pytest.skip(str(e))
    assert "all apply" in Q.check()
    Q.unpack(tmp_path / "a")
    Q.apply(tmp_path / "a")
    shutil.copytree(Q.HERE, tmp_path / "patches")
    monkeypatch.setattr(Q, "HERE", tmp_path / "patches")
    before = {p: changed(p) for p in Q.patches()}
    Q.refresh(tmp_path / "a")
    assert {p: changed(p) for p in Q.patches()} == before
    Q.unpack(tmp_path / "b")
    Q.apply(tmp_path / "b")
    for name in {name for p in Q.patches() for name, _ in Q.split(p)[1]}:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_refresh_gives_each_change_of_a_shared_file_to_its_patch():
    old, new = (text.splitlines(keepends=True) for text in ("a\nb\nc\nd\ne\n", "a\nB2\nc\nd\nx\ny\ne\n"))
    first, second = Q.stages(old, new, [["@@ -4 +4,2 @@", " d", "+x", " e"], ["@@ -2 +2 @@", "-b", "+B"]])
    assert "".join(first) == "a\nb\nc\nd\nx\ny\ne\n"
    assert second == new


def test_a_local_tree_is_copied_whole_without_its_builds(monkeypatch, tmp_path):
    queue(monkeypatch, tmp_path, GOOD)
    (tmp_path / "UPSTREAM").write_text("package = pkg\nversion = 1\nsha256 = 00\nfolder = v\n")
    source, target = tmp_path / "source", tmp_path / "target"
    for name in ("f", "cmake/build-info.cmake", "build-gpu/CMakeCache.txt", ".git/HEAD"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("a\n")
    Q.prepare(target, source, True)
    assert sorted(str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()) == [
        ".fasa-prepared",
        "cmake/build-info.cmake",
        "f",
    ]
    assert (target / "f").read_text() == "a\nb\n" and (source / "f").read_text() == "a\n"


def test_a_pin_changes_every_file_that_has_it_or_none(monkeypatch, tmp_path):
    """On a copy of UPSTREAM, and another file that has the version."""
    for name, _ in Q.PINNED:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    old = Q.upstream()
    (tmp_path / "pyproject.toml").write_text(f'"llama-cpp-python=={old["version"]}"\n')
    monkeypatch.setattr(Q, "PINNED", (*Q.PINNED, ("pyproject.toml", "llama-cpp-python=={}")))
    monkeypatch.setattr(Q, "HERE", tmp_path / "patches")
    Q.write_pin(tmp_path, "9.9.9", "ab" * 32)
    assert Q.upstream() == {**old, "version": "9.9.9", "sha256": "ab" * 32}
    for name, form in Q.PINNED:
        text = (tmp_path / name).read_text()
        assert form.format("9.9.9") in text and form.format(old["version"]) not in text
    (tmp_path / "pyproject.toml").write_text("nothing here\n")
    with pytest.raises(Q.QueueError, match=r"pyproject.toml: expected 'llama-cpp-python==9.9.9', which is not there"):
        Q.write_pin(tmp_path, "9.9.10", "cd" * 32)
    assert Q.upstream()["version"] == "9.9.9"


def test_the_binding_is_the_python_files_and_the_licence(tmp_path):
    if not Q.cached().exists():
        pytest.skip("the pinned sdist was not fetched here")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale.py").touch()
    Q.binding(tmp_path / "out")
    files = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert {"LICENSE.md", "llama_cpp/__init__.py", "llama_cpp/py.typed", "llama_cpp/server/app.py"} <= files
    assert all(name == "LICENSE.md" or name.endswith((".py", ".typed")) for name in files) and "stale.py" not in files
    assert "MIT License" in (tmp_path / "out" / "LICENSE.md").read_text()


def test_the_version_stands_nowhere_else():
    version = Q.upstream()["version"]
    files = [ROOT / "Makefile", ROOT / "CMakeLists.txt", *(ROOT / "fasa_gguf").rglob("*.py")]
    files += [p for p in (ROOT / "native").rglob("*") if p.is_file()]
    assert [p for p in files if version in p.read_text()] == []
