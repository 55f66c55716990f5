import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from gguf import GGUFReader

from fasa_gguf import FasaError, embed
from fasa_gguf.gguf_file import ARR, F32, I32, STR, U8, U32, GGUFFile, pack_kv
from fasa_gguf.heatmap import save_heatmap
from fasa_gguf.profile import KEYS, Profile, inspect_table
from fasa_gguf.synthetic import synthetic_profile

from conftest import ROOT
from tiny_gguf import N_HEAD_KV, N_LAYER, WIDTH, write_tiny


def profile():
    p = synthetic_profile([N_HEAD_KV] * N_LAYER, [WIDTH // 2] * N_LAYER, seed=1)
    p.weight_k, p.weight = 2, [np.full((N_HEAD_KV, 2), 0.5 + il, np.float32) for il in range(N_LAYER)]
    p.recall_k, p.recall_budget, p.recall = 1, 64, [np.full((N_HEAD_KV, 1), 0.9, np.float32)] * N_LAYER
    p.layer_budget = np.array([0.5, 1.5, 1], np.float32)
    p.rope = {"layout": "norm", "dims": WIDTH, "base": 10000.0, "scale": 1.0}
    p.defaults = {"budget": 256, "k_dom": "q8", "mass": 0.0}
    p.calibration = {"tool": "t", "corpus": "c", "tokens": 10, "context": 5, "source": "gguf"}
    return p


def same(a, b):
    return a.to_flat() == b.to_flat()


def test_json_and_gguf_both_ways(tiny, tmp_path):
    p = profile()
    p.save(tmp_path / "p.json")
    assert same(p, Profile.load(tmp_path / "p.json"))
    out = embed.rewrite(tiny, p, tmp_path / "m.gguf")
    assert same(p, Profile.load(out))
    assert "layer" in inspect_table(p)
    with pytest.raises(FasaError, match="no FASA profile in this model; run `fasa-gguf embed-profile"):
        Profile.load(tiny)


def test_every_key_is_in_the_table(tiny):
    assert {"fasa." + k for k in profile().to_flat()} <= {name for name, _, _ in KEYS}


@pytest.mark.parametrize("change, message", [
    (lambda f: f.update(version=2), "key fasa.version: expected 1, found 2; install a newer fasa_gguf"),
    (lambda f: f.pop("version"), "key fasa.version: expected u32, found None"),
    (lambda f: f.update(n_layer="x"), "key fasa.n_layer: expected u32, found 'x'"),
    (lambda f: f.update(n_layer=True), "key fasa.n_layer: expected u32, found True"),
    (lambda f: f.update(n_layer=10**6), "key fasa.n_layer: expected 1 to 4096"),
    (lambda f: f.update(n_chunk=[8, 8]), r"key fasa.n_chunk: expected 3 numbers from 0 to 4096, found \[8, 8\]"),
    (lambda f: f.update(n_head_kv=[0, 2, 2]), "key fasa.n_head_kv: expected KV heads in every layer"),
    (lambda f: f["ranking"].pop(), "key fasa.ranking: expected 48 numbers, found '47 numbers'"),
    (lambda f: f["ranking"].__setitem__(0, f["ranking"][1]), "each chunk from 0 to 7 once in layer 0, KV head 0, found 'chunk . twice'"),
    (lambda f: f["ranking"].__setitem__(9, 200), "each chunk from 0 to 7 once in layer 0, KV head 1, found 'chunk 200'"),
    (lambda f: f["ranking"].__setitem__(9, -1), "key fasa.ranking: expected each chunk"),
    (lambda f: f.update(ranking=[0.5] * 48), "key fasa.ranking: expected .u8. or .u16."),
    (lambda f: f.update(ranking_method="guess"), "key fasa.ranking_method: expected recall or energy"),
    (lambda f: f.update(weight_k=99), "key fasa.weight_k: expected 1 to 8, found 99"),
    (lambda f: f["weight"].__setitem__(0, float("nan")), "key fasa.weight: expected finite numbers"),
    (lambda f: f.update(layer_budget=[0.0, 1, 1]), "key fasa.layer_budget: expected 3 shares above 0"),
    (lambda f: f.update({"rope.layout": "odd"}), "key fasa.rope.layout: expected norm or neox"),
    (lambda f: f.update({"default.budget": 0}), "setting budget: expected at least 1 token"),
    (lambda f: f.update({"default.k_dom": "q5"}), "setting k_dom: expected one of f16, q8, q4, found 'q5'"),
    (lambda f: f.update(surprise=1), "key fasa.surprise is unknown"),
])
def test_bad_profiles(change, message):
    flat = json.loads(profile().to_json())
    change(flat)
    with pytest.raises(FasaError, match=message):
        Profile.from_flat(flat, "p.json")


def test_bad_json(tmp_path):
    for text, message in (("{", "not a FASA profile: expected JSON"), ("[1]", "expected a JSON object, found list"), ("\x00", "not a FASA profile")):
        path = tmp_path / "p.json"
        path.write_text(text)
        with pytest.raises(FasaError, match=message):
            Profile.load(path)
    (tmp_path / "b").write_bytes(b"\xff\xfe\xfd\xfc\xfb")
    with pytest.raises(FasaError, match="not a FASA profile"):
        Profile.load(tmp_path / "b")
    with pytest.raises(FasaError, match="cannot be read: No such file"):
        Profile.load(tmp_path / "none")


def insert(model, out, *entries):
    """The model with raw metadata entries more."""
    g = GGUFFile(model)
    import struct

    body = b"".join([kv.raw for kv in g.kv.values()] + list(entries)) + g.info_raw
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(g.tensors), len(g.kv) + len(entries)) + body
    head += bytes(-len(head) % g.alignment)
    out.write_bytes(head + model.read_bytes()[g.data_offset:])
    return out


@pytest.mark.parametrize("entry, message", [
    (pack_kv("fasa.version", STR, "1"), "key fasa.version: expected u32, found str"),
    (pack_kv("fasa.ranking", ARR, [1.0], F32), "key fasa.ranking: expected .u8. or .u16., found array of f32"),
    (pack_kv("fasa.ranking", U8, 3), "key fasa.ranking: expected .u8. or .u16., found u8"),
    (pack_kv("fasa.n_head_kv", ARR, [1], I32), "key fasa.n_head_kv: expected .u32., found array of i32"),
    (pack_kv("fasa.odd", U32, 1), "key fasa.odd is unknown"),
])
def test_embedded_keys_of_the_wrong_type(tiny, tmp_path, entry, message):
    with pytest.raises(FasaError, match=message):
        Profile.load(insert(tiny, tmp_path / "m.gguf", entry))


def test_profile_of_another_model_names_both_shapes(tiny, tmp_path):
    with pytest.raises(FasaError, match="for another model: it has 30 layers, 3 KV heads, 32 chunks, the model 3 layers, 2 KV heads, 8 chunks"):
        embed.rewrite(tiny, synthetic_profile([3] * 30, [32] * 30), tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


# ---- embedding ----


def test_tensors_stay_byte_equal_and_other_readers_agree(tiny, tmp_path):
    out = embed.rewrite(tiny, profile(), tmp_path / "m.gguf")
    old, new = GGUFReader(tiny), GGUFReader(out)
    assert [(t.name, t.tensor_type, t.data.tobytes()) for t in old.tensors] == [(t.name, t.tensor_type, t.data.tobytes()) for t in new.tensors]
    assert set(new.fields) - set(old.fields) == {"fasa." + k for k in profile().to_flat()}
    assert all(old.fields[k].parts[-1].tobytes() == new.fields[k].parts[-1].tobytes() for k in old.fields if not k.startswith("GGUF."))
    embed.rewrite(out, profile())  # again, in place: replaces
    assert same(Profile.load(out), profile())
    embed.rewrite(out, None)       # removed: the file that was
    assert out.read_bytes() == tiny.read_bytes()


def test_overwriting_needs_force(tiny, tmp_path):
    out = tmp_path / "m.gguf"
    out.write_text("precious")
    with pytest.raises(FasaError, match="exists already; use --force"):
        embed.rewrite(tiny, profile(), out)
    assert out.read_text() == "precious"
    embed.rewrite(tiny, profile(), out, force=True)
    assert same(Profile.load(out), profile())


def test_a_link_is_followed(tiny, tmp_path):
    real, link = tmp_path / "real.gguf", tmp_path / "link.gguf"
    real.write_bytes(tiny.read_bytes())
    link.symlink_to(real)
    embed.rewrite(link, profile())
    assert link.is_symlink() and same(Profile.load(real), profile())


def test_full_disk_leaves_the_old_file(tiny, tmp_path, monkeypatch):
    model = tmp_path / "m.gguf"
    model.write_bytes(tiny.read_bytes())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embed, "_copy", full)
    with pytest.raises(FasaError, match="cannot be written: No space left on device; the model is as it was"):
        embed.rewrite(model, profile())
    assert model.read_bytes() == tiny.read_bytes() and os.listdir(tmp_path) == ["m.gguf"]


def test_too_little_space_is_said_before(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(embed.shutil, "disk_usage", lambda _: type("U", (), {"free": 10})())
    with pytest.raises(FasaError, match="not enough space: .* bytes are needed beside the model and 10 are free"):
        embed.rewrite(tiny, profile(), tmp_path / "m.gguf")


def test_a_kill_leaves_the_old_file_and_the_next_run_tidies_up(tiny, tmp_path):
    model = tmp_path / "m.gguf"
    model.write_bytes(tiny.read_bytes())
    code = ("import sys, time; from fasa_gguf import embed; from fasa_gguf.profile import Profile\n"
            "copy = embed._copy\n"
            "def slow(*a):\n    copy(*a); print('copied', flush=True); time.sleep(60)\n"
            "embed._copy = slow\nembed.rewrite(sys.argv[1], Profile.load(sys.argv[2]))")
    profile().save(tmp_path / "p.json")
    child = subprocess.Popen([sys.executable, "-c", code, model, tmp_path / "p.json"], stdout=subprocess.PIPE, cwd=ROOT)
    assert child.stdout.readline() == b"copied\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert model.read_bytes() == tiny.read_bytes() and len(os.listdir(tmp_path)) == 3
    embed.rewrite(model, profile())
    assert same(Profile.load(model), profile()) and sorted(os.listdir(tmp_path)) == ["m.gguf", "p.json"]


def test_models_out_of_scope(tiny, tmp_path):
    mla = insert(tiny, tmp_path / "mla.gguf", pack_kv("llama.attention.kv_lora_rank", U32, 512))
    with pytest.raises(FasaError, match="architecture llama has multi-head latent attention"):
        embed.rewrite(mla, profile())
    shard = tmp_path / "m-00002-of-00003.gguf"
    insert(tiny, shard, pack_kv("split.no", 2, 1), pack_kv("split.count", 2, 3))
    with pytest.raises(FasaError, match="file 2 of 3 of a split model.*use .*m-00001-of-00003.gguf"):
        embed.rewrite(shard, profile())


# ---- damaged files ----


def test_files_that_are_not_gguf(tmp_path):
    for data, message in ((b"", "it has 0 bytes"), (b"PK\x03\x04" + bytes(100), "not a GGUF file: it begins with"),
                          (b"GGUF" + bytes([9, 0, 0, 0]) + bytes(100), "version 9, expected 2 or 3"),
                          (b"GGUF" + bytes([3, 0, 0, 0]) + b"\xff" * 16, "it claims 18446744073709551615 keys"),
                          (b"GGUF" + bytes([0, 0, 0, 3]) + bytes(100), "big-endian")):
        path = tmp_path / "x.gguf"
        path.write_bytes(data)
        with pytest.raises(FasaError, match=message):
            GGUFFile(path)
    with pytest.raises(FasaError, match="cannot be read"):
        GGUFFile(tmp_path)


def test_every_truncation_is_noticed(tiny, tmp_path):
    data = tiny.read_bytes()
    end = GGUFFile(tiny).data_offset
    path = tmp_path / "cut.gguf"
    for n in [*range(0, end, 7), *range(end, len(data), len(data) // 40), len(data) - 1]:
        path.write_bytes(data[:n])
        with pytest.raises(FasaError):
            GGUFFile(path)


def test_flipped_bytes_never_crash(tiny, tmp_path):
    data, end = bytearray(tiny.read_bytes()), GGUFFile(tiny).data_offset
    rng, path = np.random.default_rng(0), tmp_path / "flip.gguf"
    embed.rewrite(tiny, profile(), tmp_path / "m.gguf")
    data, end = bytearray((tmp_path / "m.gguf").read_bytes()), GGUFFile(tmp_path / "m.gguf").data_offset
    for _ in range(400):
        copy = bytearray(data)
        for at in rng.integers(0, end, 3):
            copy[at] = rng.integers(256)
        path.write_bytes(copy)
        try:
            p = Profile.from_gguf(GGUFFile(path))
            embed.model_shape(GGUFFile(path))
            assert p is None or len(p.n_chunk) >= 1
        except FasaError as e:
            assert len(str(e)) < 500


def test_heat_map(tmp_path):
    save_heatmap(profile(), tmp_path / "h.png")
    assert (tmp_path / "h.png").read_bytes()[:4] == b"\x89PNG"
