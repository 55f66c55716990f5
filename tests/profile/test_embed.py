"""Embedding: tensors stay byte-equal, a file is old or new and never half, and what does not fit is refused."""

import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from gguf import GGUFReader
from paths import ROOT
from profiles import full_profile, has_profile, plain_profile
from tiny_gguf import gguf_bytes, insert, write_tiny

from fasa_gguf import FasaError
from fasa_gguf.gguf import shape
from fasa_gguf.gguf.file import I32, STR, U16, U32, GGUFFile, pack_kv
from fasa_gguf.profile import embed
from fasa_gguf.profile.profile import Profile
from fasa_gguf.speed.random_model import synthetic_profile

# ---- what is written ----


@pytest.mark.parametrize("alignment, dtype", [(None, np.float32), (64, np.float16), (4096, np.float32)])
def test_tensors_and_other_keys_stay_byte_equal(tmp_path, alignment, dtype):
    old_path = tmp_path / "old.gguf"
    write_tiny(old_path, alignment=alignment, dtype=dtype)
    seen = []
    new_path = embed.embed(old_path, plain_profile(), tmp_path / "new.gguf", progress=lambda *a: seen.append(a))
    old, new = GGUFReader(old_path), GGUFReader(new_path)
    assert [(t.name, t.tensor_type, t.data.tobytes()) for t in old.tensors] == [
        (t.name, t.tensor_type, t.data.tobytes()) for t in new.tensors
    ]
    assert set(new.fields) - set(old.fields) == {"fasa." + k for k in plain_profile().to_flat()}
    a, b = GGUFFile(old_path), GGUFFile(new_path)
    assert [b.kv[k].raw for k in a.kv] == [kv.raw for kv in a.kv.values()] and a.info_raw == b.info_raw
    assert b.alignment == (alignment or 32) and b.data_offset % b.alignment == 0
    assert seen[-1] == (a.size - a.data_offset,) * 2 and [d for d, _ in seen] == sorted(d for d, _ in seen)


def test_again_replaces_and_remove_gives_the_old_file_back(model, tiny):
    embed.embed(model, full_profile())
    size = os.path.getsize(model)
    embed.embed(model, plain_profile())
    assert has_profile(model) and os.path.getsize(model) <= size
    keys = list(GGUFFile(model).kv)
    assert len(keys) == len(set(keys)) and keys.count("fasa.ranking") == 1
    embed.remove(model)
    assert model.read_bytes() == tiny.read_bytes()
    with pytest.raises(
        FasaError, match=r"m.gguf: there is no FASA profile in this model, so there is nothing to remove"
    ):
        embed.remove(model)


def test_a_broken_profile_in_the_model_is_replaced_and_removed(tiny, tmp_path):
    broken = insert(
        tiny,
        tmp_path / "b.gguf",
        pack_kv("fasa.ranking", STR, "?"),
        pack_kv("fasa.version", U32, 99),
        pack_kv("fasa.odd", U32, 9),
    )
    assert has_profile(embed.embed(broken, plain_profile(), tmp_path / "c.gguf"))
    assert embed.remove(broken, tmp_path / "d.gguf").read_bytes() == tiny.read_bytes()


def test_mode_and_links_are_kept(model, tmp_path):
    link = tmp_path / "link.gguf"
    link.symlink_to(model)
    os.chmod(model, 0o640)
    assert embed.embed(link, plain_profile()) == model
    assert link.is_symlink() and has_profile(model) and os.stat(model).st_mode & 0o777 == 0o640
    out = embed.embed(model, plain_profile(), tmp_path / "new.gguf")
    assert os.stat(out).st_mode & 0o777 == 0o640
    other = tmp_path / "out-link.gguf"
    other.symlink_to(out)
    embed.remove(model, other, force=True)  # -o through a link: the file behind it
    assert other.is_symlink() and Profile.from_gguf(GGUFFile(out)) is None


def test_overwriting_needs_force(tiny, tmp_path):
    out = tmp_path / "m.gguf"
    out.write_text("precious")
    with pytest.raises(FasaError, match=r"m.gguf: exists already; use --force to overwrite it"):
        embed.embed(tiny, plain_profile(), out)
    assert out.read_text() == "precious"
    embed.embed(tiny, plain_profile(), out, force=True)
    assert has_profile(out)
    with pytest.raises(
        FasaError, match="expected the name of a file to write, found something else there; give another -o"
    ):
        embed.embed(tiny, plain_profile(), tmp_path, force=True)


def test_copying_without_copy_file_range(tiny, tmp_path, monkeypatch):
    """As on a file system, or between two, where the kernel cannot copy."""
    monkeypatch.setattr(embed, "CHUNK", 10_007)
    pieces = embed.embed(tiny, plain_profile(), tmp_path / "a.gguf").read_bytes()

    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    assert embed.embed(tiny, plain_profile(), tmp_path / "b.gguf").read_bytes() == pieces
    assert embed.remove(tmp_path / "b.gguf").read_bytes() == tiny.read_bytes()


def test_memory_is_constant(tmp_path):
    """A file of 1 GiB is rewritten by a process that never holds more than 300 MiB."""
    n = 1 << 28  # f32 values
    if shutil.disk_usage(tmp_path).free < 4 * 4 * n:
        pytest.skip(f"needs {4 * 4 * n} bytes of free disk")
    big, small = tmp_path / "big.gguf", tmp_path / "small.gguf"
    big.write_bytes(gguf_bytes([pack_kv(*e) for e in plain_profile().to_gguf_kv()], [("t", (n,), 0, 0, b"")]))
    os.truncate(big, os.path.getsize(big) + 4 * n)
    # VmHWM, not ru_maxrss: that one keeps the peak of the process that made the child, which may be a large test run
    code = (
        "import re\nembed.remove(sys.argv[1], sys.argv[2])\n"
        "print(re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())[1])"
    )
    out = in_child(code, big, small)
    size = os.path.getsize(small)
    small.unlink(), big.unlink()
    assert int(out.stdout) < 300 << 10 and 4 * n < size < 4 * n + 1024


# ---- full disks and kills ----


def in_child(code, *args, **kw):
    head = "import os, signal, sys; from fasa_gguf import FasaError; from fasa_gguf.profile import Profile, embed\n"
    return subprocess.run(
        [sys.executable, "-c", head + code, *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=60, **kw
    )


@pytest.mark.parametrize("at", [0.0, 0.5, 1.0])
def test_a_kill_leaves_the_old_file_and_the_next_run_tidies_up(model, tiny, tmp_path, at):
    plain_profile().save(tmp_path / "p.json")
    code = (
        "embed.CHUNK = 20_000\n"
        "def kill(done, total):\n    if done >= float(sys.argv[3]) * total: os.kill(os.getpid(), signal.SIGKILL)\n"
        "embed.embed(sys.argv[1], Profile.load(sys.argv[2]), progress=kill)"
    )
    assert in_child(code, model, tmp_path / "p.json", at).returncode == -signal.SIGKILL
    assert model.read_bytes() == tiny.read_bytes()
    left = set(os.listdir(model.parent)) - {"m.gguf"}
    assert len(left) == 1 and left.pop().startswith(embed.TEMPORARY)
    embed.embed(model, plain_profile())
    assert has_profile(model) and os.listdir(model.parent) == ["m.gguf"]


def test_a_kill_at_the_rename_leaves_one_of_the_two(model, tiny, tmp_path):
    plain_profile().save(tmp_path / "p.json")
    code = (
        "replace = os.replace\n"
        "def kill(*a):\n    replace(*a); os.kill(os.getpid(), signal.SIGKILL)\n"
        "p = Profile.load(sys.argv[2]); os.replace = kill; embed.embed(sys.argv[1], p)"
    )
    assert in_child(code, model, tmp_path / "p.json").returncode == -signal.SIGKILL
    assert has_profile(model) and os.listdir(model.parent) == ["m.gguf"]


def test_a_full_disk_leaves_the_old_file(model, tiny, tmp_path):
    """A limit on the size of a file: the copy stops in the middle, as it does when the disk is full."""
    plain_profile().save(tmp_path / "p.json")
    code = "p = Profile.load(sys.argv[2])\ntry: embed.embed(sys.argv[1], p)\nexcept FasaError as e: print(e)"
    limit = os.path.getsize(model) // 2
    out = in_child(
        code, model, tmp_path / "p.json", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    assert out.stdout == f"{model}: cannot be written: File too large; the model is as it was\n"
    assert model.read_bytes() == tiny.read_bytes() and os.listdir(model.parent) == ["m.gguf"]


def test_an_interrupt_and_a_failing_sync_leave_nothing(model, tiny, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed.embed(model, plain_profile(), progress=interrupt)
    assert model.read_bytes() == tiny.read_bytes() and os.listdir(model.parent) == ["m.gguf"]

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FasaError, match=r"m.gguf: cannot be written: No space left on device; the model is as it was"):
        embed.embed(model, plain_profile())
    assert model.read_bytes() == tiny.read_bytes() and os.listdir(model.parent) == ["m.gguf"]


def test_a_model_cut_while_it_is_copied(model):
    def cut(done, total):
        os.truncate(model, 1000)

    embed_chunk, embed.CHUNK = embed.CHUNK, 20_000
    try:
        with pytest.raises(FasaError, match=r"the model was cut short while it was copied, .* bytes are missing"):
            embed.embed(model, plain_profile(), model.parent / "out.gguf", progress=cut)
    finally:
        embed.CHUNK = embed_chunk
    assert os.listdir(model.parent) == ["m.gguf"]


def test_too_little_space_is_said_before(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(embed.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(
        FasaError,
        match=r"not enough space: [0-9]+ bytes are needed beside the model and 10 are free; make room, or "
        r"write to another disk",
    ):
        embed.embed(tiny, plain_profile(), tmp_path / "m.gguf")
    assert os.listdir(tmp_path) == []


def test_temporaries_of_a_live_run_stay(model):
    def other(done, total):
        assert len(os.listdir(model.parent)) == 2
        with embed._temporary(model.parent):
            assert len(os.listdir(model.parent)) == 3

    embed.embed(model, plain_profile(), progress=other)
    assert has_profile(model)


def test_a_folder_that_cannot_be_written(tiny, tmp_path):
    with pytest.raises(FasaError, match=r"none/m.gguf: the folder does not exist; make it, or give another -o"):
        embed.embed(tiny, plain_profile(), tmp_path / "none" / "m.gguf")


# ---- what fits ----


def test_profile_of_another_model_names_both_shapes(tiny, tmp_path):
    out = tmp_path / "x.gguf"
    with pytest.raises(
        FasaError,
        match="for another model: it has 30 layers, 3 KV heads, 32 chunks, the model 3 layers, 2 KV heads, 8 chunks",
    ):
        embed.embed(tiny, synthetic_profile([3] * 30, [32] * 30), out)
    p = plain_profile()
    p.rope["dims"] = 8
    with pytest.raises(FasaError, match="for another model: it has 8 rotated dimensions per head, the model 16"):
        embed.embed(tiny, p, out)
    assert not out.exists()


def test_other_weights_and_another_base_are_doubted(tiny, tmp_path, capsys):
    p = plain_profile()
    p.calibration["weights_sha256"] = shape.weights_sha256(GGUFFile(tiny))
    heard = []
    embed.rewrite(tiny, p, tmp_path / "a.gguf", warn=heard.append)
    assert heard == []
    write_tiny(tmp_path / "other.gguf", seed=5, rope_base=5e5)
    embed.rewrite(tmp_path / "other.gguf", p, tmp_path / "b.gguf", warn=heard.append)
    assert len(heard) == 2 and heard[0].endswith("made under a RoPE base of 10000, and the model has 500000")
    assert heard[1].endswith("calibrated on other weights: another quantisation, or another model of this shape")
    embed.embed(tmp_path / "other.gguf", p, tmp_path / "c.gguf")
    assert capsys.readouterr().err.count("fasa_gguf: ") == 2


def test_weights_hash_is_of_the_q_and_k_bytes(tiny):
    want = hashlib.sha256()
    for t in GGUFReader(tiny).tensors:
        if t.name.endswith(("attn_q.weight", "attn_k.weight")):
            want.update(t.name.encode() + t.data.tobytes())
    assert shape.weights_sha256(GGUFFile(tiny)) == want.hexdigest()


# ---- split models ----


@pytest.fixture
def split(tiny, tmp_path):
    """The tiny model in two files, as llama-gguf-split writes it: all keys in the first."""
    g, data = GGUFFile(tiny), tiny.read_bytes()
    half, paths = len(g.tensors) // 2, []
    for i, part in enumerate((g.tensors[:half], g.tensors[half:])):
        tensors, at = [], 0
        for t in part:
            begin = g.data_offset + t.offset
            tensors.append((t.name, t.shape, t.type, at, data[begin : begin + t.n_bytes]))
            at += t.n_bytes + -t.n_bytes % 32
        keys = [
            pack_kv("split.no", U16, i),
            pack_kv("split.count", U16, 2),
            pack_kv("split.tensors.count", I32, len(g.tensors)),
        ]
        paths.append(tmp_path / f"m-{i + 1:05d}-of-00002.gguf")
        paths[i].write_bytes(gguf_bytes([kv.raw for kv in g.kv.values() if i == 0] + keys, tensors))
    return paths


def test_split_models_have_it_in_the_first_file(split, tiny):
    second = split[1].read_bytes()
    p = plain_profile()
    p.calibration["weights_sha256"] = shape.weights_sha256(GGUFFile(tiny))  # the same, split or not
    heard = []
    embed.rewrite(split[0], p, warn=heard.append)
    assert heard == [] and Profile.load(split[0]).to_flat() == p.to_flat() and split[1].read_bytes() == second
    with pytest.raises(
        FasaError,
        match=r"00002-of-00002.gguf: this is file 2 of 2 of a split model, and the profile belongs in the "
        r"first; use .*m-00001-of-00002.gguf",
    ):
        embed.embed(split[1], p)
    split[1].unlink()
    embed.rewrite(split[0], p, warn=heard.append)
    assert (
        len(heard) == 1 and "could not be compared with the model's weights" in heard[0] and "No such file" in heard[0]
    )


# ---- before a calibration, and after a quantisation ----


def test_what_cannot_be_embedded_is_refused_before_the_calibration(tiny, tmp_path, monkeypatch, capsys):
    from fasa_gguf.calibrate import gguf as calibrate
    from fasa_gguf.cli import main as cli

    monkeypatch.setattr(calibrate, "calibrate", lambda *a, **k: pytest.fail("calibrated first"))
    gpt2 = tmp_path / "gpt2.gguf"
    write_tiny(gpt2, arch="gpt2")
    there = tmp_path / "there.gguf"
    there.write_bytes(b"x")
    for argv, message in [
        ([str(gpt2)], "architecture gpt2 has no RoPE"),
        ([str(tiny), "-o", str(there)], "exists already; use --force"),
        ([str(tiny), "-o", str(tmp_path / "none" / "m.gguf")], "the folder does not exist"),
    ]:
        assert cli.main(["embed-profile", *argv]) == 1
        assert message in capsys.readouterr().err
    assert there.read_bytes() == b"x"


def test_quantising_keeps_the_profile(library, model, tmp_path):
    """llama_model_quantize is all that llama-quantize calls."""
    import ctypes

    from fasa_gguf.runtime.library import load

    lib = load()
    embed.embed(model, plain_profile())
    params = lib.llama_model_quantize_default_params()
    params.ftype = lib.LLAMA_FTYPE_MOSTLY_Q8_0
    out = tmp_path / "q8.gguf"
    assert lib.llama_model_quantize(os.fsencode(model), os.fsencode(out), ctypes.byref(params)) == 0
    assert has_profile(out)
    assert {t.tensor_type.name for t in GGUFReader(out).tensors} >= {"Q8_0"}
