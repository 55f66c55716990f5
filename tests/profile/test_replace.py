"""Replacing a model file: which file changes, what else uses it, and two runs at once."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time

import pytest
from gguf import GGUFReader
from paths import ROOT
from profiles import has_profile, plain_profile
from tiny_gguf import write_tiny

from fasa_gguf import FasaError
from fasa_gguf.cli import main as cli
from fasa_gguf.gguf import shape
from fasa_gguf.gguf.file import GGUFFile
from fasa_gguf.profile import embed
from fasa_gguf.profile.profile import Profile


def tensors(path):
    return {t.name: t.data.tobytes() for t in GGUFReader(path).tensors}


# ---- files named by their content ----


@pytest.mark.parametrize(
    "name, folders",
    [
        ("hub/models--a--b/blobs/{sha256}", ["hub/models--a--b/snapshots"]),
        ("hub/models--a--b/blobs/odd-etag", ["hub/models--a--b/refs"]),
        ("ollama/blobs/sha256-{sha256}", []),
        (".git/lfs/objects/ab/cd/{sha256}", []),
        ("annex/SHA256E-s100--{sha256}.gguf", []),
        ("cache/{md5}", []),
    ],
)
def test_a_file_named_by_its_content_is_never_changed(tiny, tmp_path, name, folders):
    data = tiny.read_bytes()
    blob = tmp_path / name.format(sha256=hashlib.sha256(data).hexdigest(), md5=hashlib.md5(data).hexdigest())
    blob.parent.mkdir(parents=True)
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(tiny, blob)
    link = tmp_path / "m.gguf"
    link.symlink_to(blob)
    want = "expected a file that may change, found one of a cache that names files by their content"
    for change in (
        lambda: embed.embed(link, plain_profile()),
        lambda: embed.embed(link, plain_profile(), force=True),
        lambda: embed.embed(blob, plain_profile(), force=True),
        lambda: embed.embed(tiny, plain_profile(), link, force=True),
        lambda: embed.check_embeddable(link),
        lambda: embed.remove(link),
    ):
        with pytest.raises(FasaError, match=rf"{want}.*; write to a file outside the cache with -o$"):
            change()
    assert blob.read_bytes() == data and link.is_symlink() and os.listdir(blob.parent) == [blob.name]
    assert has_profile(embed.embed(link, plain_profile(), tmp_path / "new.gguf")) and blob.read_bytes() == data


def test_names_that_look_a_little_like_a_hash_are_plain_files(tiny, tmp_path):
    (tmp_path / "blobs").mkdir()
    for name in ("blobs/m.gguf", "deadbeef.gguf", "Qwen3-4B-a1b2c3d.gguf", "x" * 64):
        shutil.copy(tiny, tmp_path / name)
        assert has_profile(embed.embed(tmp_path / name, plain_profile()))


# ---- what else has the file ----


def test_links_are_told(model, tmp_path):
    heard, link = [], tmp_path / "link.gguf"
    embed.rewrite(model, plain_profile(), warn=heard.append)
    assert heard == []
    link.symlink_to(model)
    embed.rewrite(link, plain_profile(), warn=heard.append)
    assert heard == [f"{link} is a symbolic link; the file that it leads to is written: {model}"]
    embed.rewrite(link, plain_profile(), tmp_path / "copy.gguf", warn=heard.append)  # which changes no link
    embed.rewrite(GGUFFile(link), plain_profile(), warn=heard.append)
    assert len(heard) == 2 and heard[1] == heard[0]
    other = tmp_path / "other.gguf"
    os.link(model, other)
    before = other.read_bytes()
    embed.rewrite(model, None, warn=heard.append)
    assert heard[2:] == [f"{model} has another name (hard links), which will keep the old file"]
    assert other.read_bytes() == before and Profile.from_gguf(GGUFFile(model)) is None


def test_a_read_only_file_needs_force(model, tiny, tmp_path):
    os.chmod(model, 0o444)
    want = r"m.gguf: the file is read-only; use --force to replace it, or write to another with -o"
    with pytest.raises(FasaError, match=want):
        embed.embed(model, plain_profile())
    with pytest.raises(FasaError, match=want):
        embed.check_embeddable(model)
    assert model.read_bytes() == tiny.read_bytes()
    assert has_profile(embed.embed(model, plain_profile(), tmp_path / "copy.gguf"))
    embed.embed(model, plain_profile(), force=True)
    assert has_profile(model) and os.stat(model).st_mode & 0o777 == 0o444


def test_an_owner_that_cannot_be_kept_is_told(model, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    heard, real = [], os.stat

    def of_another(path, **kw):
        s = real(path, **kw)
        return os.stat_result([*s[:4], 12345, *s[5:]]) if str(path) == str(model) else s

    monkeypatch.setattr(os, "fchown", refuse)
    st = os.stat(model)
    monkeypatch.setattr(embed.os, "stat", of_another)
    with embed._temporary(model.parent) as (fd, _):
        embed._keep_owner_and_mode(fd, model, st, heard.append)
    assert heard == [
        f"{model}: its owner (user:group) could not be kept; it was 12345:{st.st_gid} and becomes "
        f"{os.getuid()}:{os.getgid()}"
    ]


def test_a_file_system_without_permissions_is_no_reason_to_fail(model, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    heard = []
    monkeypatch.setattr(os, "fchmod", refuse)
    monkeypatch.setattr(os, "fchown", refuse)
    os.chmod(model, 0o644)
    embed.rewrite(model, plain_profile(), warn=heard.append)
    assert has_profile(model)
    assert heard == [f"{model}: its permissions could not be set to 644; they are 600"]


# ---- syncing ----


@pytest.mark.parametrize("number, told", [(22, False), (5, True)])
def test_what_is_said_when_the_folder_cannot_be_synced(model, monkeypatch, number, told):
    """22: the file system cannot sync folders at all. The model is replaced by then, and no message says otherwise."""
    real = os.fsync

    def fsync(fd):
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(number, os.strerror(number))
        real(fd)

    heard = []
    monkeypatch.setattr(os, "fsync", fsync)
    assert embed.rewrite(model, plain_profile(), warn=heard.append) == model and has_profile(model)
    want = f"{model}: is written; its folder could not be flushed to disk (Input/output error), so a power cut "
    assert len(heard) == told and all(x.startswith(want) for x in heard)


def test_a_file_system_that_cannot_sync_files(model, monkeypatch):
    def refuse(_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "fsync", refuse)
    heard = []
    embed.rewrite(model, plain_profile(), warn=heard.append)
    assert has_profile(model) and heard == []


# ---- other programs, and two runs ----

CHANGED = r"m.gguf: the file was changed or replaced while it was read; nothing was written"


def grow(path):
    with open(path, "ab") as f:
        f.write(b"more")


def write_inside(path):
    with open(path, "r+b") as f:
        f.seek(-1, 2)
        f.write(b"\x01")


def put_another(path):
    write_tiny(path.with_suffix(".new"), seed=7)
    os.replace(path.with_suffix(".new"), path)


@pytest.mark.parametrize("change", [grow, write_inside, put_another, os.unlink], ids=lambda f: f.__name__)
@pytest.mark.parametrize("beside", [False, True], ids=["in place", "to another file"])
def test_a_file_that_changes_meanwhile(model, monkeypatch, change, beside):
    def once(done, total):
        if not changed:
            changed.append(1)
            time.sleep(0.02)  # the clock of a file system has steps
            change(model)
            changed.append(model.read_bytes() if model.exists() else None)

    changed = []
    monkeypatch.setattr(embed, "CHUNK", 20_000)
    with pytest.raises(FasaError, match=CHANGED):
        embed.embed(model, plain_profile(), model.parent / "out.gguf" if beside else None, progress=once)
    assert (model.read_bytes() if model.exists() else None) == changed[1]
    assert os.listdir(model.parent) == (["m.gguf"] if model.exists() else [])


def test_a_file_replaced_between_its_header_and_its_tensors(model, monkeypatch):
    """The tensors are those of the header, whatever stands under the name by then."""

    def doubts(*_):
        put_another(model)
        return []

    monkeypatch.setattr(embed, "doubts", doubts)
    with pytest.raises(FasaError, match=CHANGED):
        embed.embed(model, plain_profile())
    write_tiny(model.with_name("want.gguf"), seed=7)
    assert model.read_bytes() == model.with_name("want.gguf").read_bytes()


def test_weights_are_hashed_by_the_header_that_was_read(model):
    """Otherwise the tensors of one file would be looked for at the offsets of another."""
    old = GGUFFile(model)
    embed.embed(model, plain_profile())
    with pytest.raises(FasaError, match=r"m.gguf: the file changed after its header was read; run the command again"):
        shape.weights_sha256(old)


def test_a_file_replaced_while_it_is_calibrated(model, monkeypatch, capsys):
    def calibrate(a, out):
        p = plain_profile()
        p.calibration = {"source": "gguf", "weights_sha256": shape.weights_sha256(GGUFFile(a.model))}
        changes.pop()()
        return p

    # the second run meets another one, which leaves the same weights
    changes = [lambda: embed.embed(model, plain_profile()), lambda: put_another(model)]
    monkeypatch.setattr("fasa_gguf.cli.profile._calibrate", calibrate)
    assert cli.main(["embed-profile", str(model)]) == 1
    assert "was replaced by one with other weights while it was calibrated" in capsys.readouterr().err
    assert Profile.from_gguf(GGUFFile(model)) is None

    assert cli.main(["embed-profile", str(model)]) == 0
    assert "other weights" not in capsys.readouterr().err


def test_two_runs_leave_a_whole_model(model, tiny, tmp_path):
    """They begin within a few milliseconds of each other, in 5 ways; each reads what the other may be replacing."""
    plain_profile().save(tmp_path / "p.json")
    code = (
        "import sys, time; from fasa_gguf.profile import Profile, embed\n"
        "p = Profile.load(sys.argv[2]); embed.CHUNK = 20_000; print(flush=True); sys.stdin.readline()\n"
        "time.sleep(float(sys.argv[3])); embed.embed(sys.argv[1], p, progress=lambda *_: time.sleep(0.001))"
    )
    want = tensors(tiny)
    for i in range(5):
        shutil.copy(tiny, model)
        runs = [
            subprocess.Popen(
                [sys.executable, "-c", code, model, tmp_path / "p.json", str(delay)],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for delay in (0, i * 0.003)
        ]
        for r in runs:
            r.stdout.readline()
        for r in runs:
            r.stdin.write("\n")
            r.stdin.flush()
        errors = [r.communicate(timeout=60)[1] for r in runs]
        assert [r.returncode for r in runs] == [0, 0], errors
        assert tensors(model) == want and has_profile(model) and os.listdir(model.parent) == ["m.gguf"]


def test_a_run_waits_for_another_and_reads_what_it_wrote(model, tiny):
    """The lock is on the file that is replaced, so the waiting run opens the path anew."""
    import threading

    other, heard = open(model, "rb"), []  # noqa: SIM115 - closed below
    fcntl.flock(other, fcntl.LOCK_EX)
    run = threading.Thread(target=embed.rewrite, args=(model, plain_profile()), kwargs={"warn": heard.append})
    run.start()
    end = time.monotonic() + 30
    while not heard and time.monotonic() < end:
        time.sleep(0.005)
    assert heard == [f"{model}: another run is writing it; waiting for that to end"] and run.is_alive()
    put_another(model)
    want = tensors(model)
    other.close()
    run.join(30)
    assert tensors(model) == want != tensors(tiny) and has_profile(model)


def test_an_output_that_appears_meanwhile_is_not_overwritten(tiny, tmp_path):
    out = tmp_path / "out.gguf"
    with pytest.raises(FasaError, match=r"out.gguf: was made by another program meanwhile; use --force"):
        embed.embed(tiny, plain_profile(), out, progress=lambda *_: out.write_text("precious"))
    assert out.read_text() == "precious" and os.listdir(tmp_path) == ["out.gguf"]


def test_a_temporary_file_that_another_run_removed_is_made_again(tmp_path, monkeypatch):
    """Between its making and its locking a file looks like one that a killed run left."""
    import tempfile

    real, made = tempfile.mkstemp, []

    def mkstemp(**kw):
        fd, name = real(**kw)
        made.append(name)
        if len(made) == 1:
            os.unlink(name)
        return fd, name

    monkeypatch.setattr(tempfile, "mkstemp", mkstemp)
    with embed._temporary(tmp_path) as (_, path):
        assert len(made) == 2 and path.exists()


def test_what_is_not_a_profile_or_a_path(tiny):
    with pytest.raises(FasaError, match=r"profile: expected a Profile, found dict"):
        embed.rewrite(tiny, {})
    for call in (lambda p: embed.embed(p, plain_profile()), GGUFFile, Profile.load, plain_profile().save):
        with pytest.raises(
            FasaError, match=r"^'a\\x00b': expected the path of a file, found characters that no path can have$"
        ):
            call("a\0b")
