"""Profiles that other programs rewrote, and profiles made to harm: integer types, time, memory, terminals."""

import itertools
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from paths import ROOT
from profiles import full_profile
from tiny_gguf import gguf_bytes, insert

from fasa_gguf import FasaError
from fasa_gguf.cli import main as cli
from fasa_gguf.gguf.file import (
    ARR,
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    INTEGERS,
    STR,
    TYPE_NAMES,
    U8,
    U16,
    U32,
    U64,
    GGUFFile,
    pack_kv,
)
from fasa_gguf.profile import embed
from fasa_gguf.profile import flat as flat_module
from fasa_gguf.profile.inspect import format_profile
from fasa_gguf.profile.keys import VERSION
from fasa_gguf.profile.profile import Profile

# ---- integer types ----


def entries(change):
    """full_profile() as packed entries; change(key, type, value, item type) gives the types."""
    return [pack_kv(k, *change(k, *e)) for k, *e in full_profile().to_gguf_kv()]


@pytest.mark.parametrize("kind", sorted(INTEGERS), ids=lambda t: TYPE_NAMES[t])
def test_integers_of_any_type_are_read(tiny, tmp_path, kind):
    def change(key, t, value, item):
        most = max(value) if isinstance(value, list) and item != F32 else value
        fits = (
            not isinstance(most, (int, np.integer)) or struct.calcsize("<" + "BbHhIiQq"[index]) * 8 > most.bit_length()
        )
        if t == ARR and item != F32 and fits:
            return t, value, kind
        return (kind, value, None) if t in INTEGERS and fits else (t, value, item)

    index = [U8, I8, U16, I16, U32, I32, U64, I64].index(kind)
    model = insert(tiny, tmp_path / "m.gguf", *entries(change))
    assert GGUFFile(model).kv["fasa.ranking"].item_type == GGUFFile(model).kv["fasa.n_layer"].type == kind
    assert Profile.load(model).to_flat() == full_profile().to_flat()


def test_floats_of_either_type_are_read(tiny, tmp_path):
    wide = entries(lambda k, t, v, i: (F64 if t == F32 else t, v, F64 if i == F32 else i))
    assert Profile.load(insert(tiny, tmp_path / "m.gguf", *wide)).to_flat() == full_profile().to_flat()


def test_a_file_that_gguf_py_wrote_anew_is_read(tiny, tmp_path):
    """Lists of Python's integers become i32 there."""
    model = embed.embed(tiny, full_profile(), tmp_path / "m.gguf")
    reader, writer = GGUFReader(model), GGUFWriter(tmp_path / "new.gguf", "llama")
    for f in reader.fields.values():
        if not f.name.startswith(("GGUF.", "general.architecture")):
            sub = f.types[-1] if len(f.types) > 1 else None
            sub = GGUFValueType.INT32 if sub in (GGUFValueType.UINT8, GGUFValueType.UINT32) else sub
            writer.add_key_value(f.name, f.contents(), f.types[0], sub_type=sub)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert GGUFFile(tmp_path / "new.gguf").kv["fasa.ranking"].item_type == I32
    assert Profile.load(tmp_path / "new.gguf").to_flat() == full_profile().to_flat()


@pytest.mark.parametrize(
    "key, entry, message",
    [
        ("ranking", (ARR, [-1] * 48, I8), r"expected an array, .u8. or .u16., found -1 at index 0"),
        ("ranking", (ARR, [1 << 40] * 48, I64), r"expected an array, .u8. or .u16., found 1099511627776 at index 0"),
        ("ranking", (ARR, [1 << 17] * 48, U32), r"expected each chunk from 0 to 7 once in layer 0, .* chunk 131072"),
        ("n_layer", (I32, -3), r"expected u32, found -3"),
        ("default.row_cache", (I64, -(1 << 40)), r"expected i32, found -1099511627776"),
        ("default.row_cache", (I32, -2), r"setting row_cache: expected a whole number from -1 to"),
        ("rope.base", (F64, 1e300), r"expected f32, found 1e\+300"),
        ("rope.base", (F64, 1e-300), r"expected a number above 0, found 1e-300"),
    ],
)
def test_values_that_do_not_fit(tiny, tmp_path, key, entry, message):
    packed = entries(lambda k, *e: entry if k == "fasa." + key else e)
    with pytest.raises(FasaError, match=f"m.gguf: keys? fasa.*{message}"):
        Profile.load(insert(tiny, tmp_path / "m.gguf", *packed))


def test_row_cache_holds_its_own_default(tiny, tmp_path):
    p = full_profile()
    p.defaults["row_cache"] = -1
    p.save(tmp_path / "p.json")
    model = embed.embed(tiny, p, tmp_path / "m.gguf")
    assert GGUFFile(model).kv["fasa.default.row_cache"].type == I32
    for path in (model, tmp_path / "p.json"):
        assert Profile.load(path).params().row_cache == -1


def test_what_is_written_is_what_0_1_0_reads(tiny, tmp_path):
    """The format's version stays 1 only as long as this holds."""
    kinds = {k: (t, i) for k, t, _, i in full_profile().to_gguf_kv()}
    assert VERSION == 1 and kinds["fasa.ranking"] == (ARR, U8) and kinds["fasa.n_head_kv"] == (ARR, U32)
    assert {t for t, _ in kinds.values()} == {U32, F32, STR, ARR}


# ---- time and memory ----


def names(n):
    return "{" + ",".join(f'"k{i}":0' for i in range(n)) + ',"z":0,"z":1}'


def in_child(path):
    """(peak bytes, seconds, message) of a child that loads `path`."""
    code = (
        "import re, sys, time\nfrom fasa_gguf import FasaError, Profile\nstart, message = time.perf_counter(), ''\n"
        "base = int(re.search(r'VmRSS:\\s*(\\d+)', open('/proc/self/status').read())[1])\n"
        "try: Profile.load(sys.argv[1])\nexcept FasaError as e: message = e\n"
        "peak = int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])\n"
        "print((peak - base) << 10, time.perf_counter() - start, message)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    peak, seconds, message = out.stdout.split(" ", 2)
    return int(peak), float(seconds), message


@pytest.mark.parametrize(
    "text, message",
    [
        (names(60_000), "key fasa.z: expected it once, found it twice"),
        (names(200_000), "expected JSON, found more than 65536 names, texts and lists"),
        ('{"version": [' + "[]," * 5_000_000 + "0]}", "expected JSON, found more than 65536 names, texts and lists"),
        ('{"version": [' + "{}," * 5_000_000 + "0]}", "expected JSON, found more than 65536 names, texts and lists"),
        ('{"version": [' + "[]," * 20_000_000 + "0]}", "expected at most 16777216 bytes of JSON, found more"),
        ('{"version": 1, "n_layer": 1, "n_head_kv": [' + "1.5," * 4_000_000 + "1]}", "expected 1 numbers, one a layer"),
    ],
    ids=["name twice", "names", "lists", "objects", "bytes", "numbers"],
)
def test_json_made_to_harm(tmp_path, text, message):
    (tmp_path / "p.json").write_text(text)
    peak, seconds, found = in_child(tmp_path / "p.json")
    assert message in found and peak < 300 << 20 and seconds < 20


def test_large_arrays_in_a_gguf_are_refused_by_their_lengths(tmp_path):
    """Arrays of 4 million numbers in a model of 3 layers: none of them is decoded."""
    large = pack_kv("fasa.X", ARR, [0] * (1 << 22), U32)
    keys = ["n_head_kv", "n_chunk", "ranking", "weight", "recall", "layer_miss", "mean_budget", "mean_budget_mass"]
    keys += ["ahead.layers", "ahead.ranking"]
    raw = []
    for key in keys:
        name, kind = ("fasa." + key).encode(), F32 if key in ("weight", "recall", "layer_miss") else U32
        head = struct.pack("<Q", len(name)) + name + struct.pack("<IIQ", ARR, kind, 1 << 22)
        raw.append(head + large[-(4 << 22) :])
    (tmp_path / "m.gguf").write_bytes(
        gguf_bytes([pack_kv("fasa.version", U32, 1), pack_kv("fasa.n_layer", U32, 3), *raw])
    )
    peak, _, found = in_child(tmp_path / "m.gguf")
    assert "key fasa.n_head_kv: expected 3 numbers, one a layer, found 4194304 numbers" in found
    assert peak < 430 << 20  # the file's bytes twice


@pytest.mark.parametrize(
    "key, n, message",
    [
        ("n_chunk", 4, "key fasa.n_chunk: expected 3 numbers, one a layer, found 4 numbers"),
        ("ranking", 49, "key fasa.ranking: expected 48 numbers for this shape, found 49 numbers"),
        ("weight", 13, "key fasa.weight: expected 12 numbers for this shape, found 13 numbers"),
        ("recall", 7, "key fasa.recall: expected 6 numbers for this shape, found 7 numbers"),
        ("ahead.layers", 4, "key fasa.ahead.layers: expected 3 numbers, 0 or 1, one a layer, found 4 numbers"),
        ("ahead.ranking", 49, "key fasa.ahead.ranking: expected 48 numbers for this shape, found 49 numbers"),
        ("ahead.weight", 13, "key fasa.ahead.weight: expected 12 numbers for this shape, found 13 numbers"),
        ("layer_miss", 4, "key fasa.layer_miss: expected 3 factors above 0 and below 100, found a list of 4"),
        ("mean_budget", 5000, "key fasa.mean_budget: expected at most 4096 numbers, found 5000 numbers"),
        ("mean_budget_mass", 5000, "key fasa.mean_budget_mass: expected at most 4096 numbers, found 5000 numbers"),
    ],
)
def test_an_array_of_the_wrong_length_is_not_decoded(tiny, tmp_path, monkeypatch, key, n, message):
    from fasa_gguf.gguf.file import KeyValue

    packed = entries(lambda k, t, v, i: (ARR, [0] * n, i) if k == "fasa." + key else (t, v, i))
    model, decoded, value = GGUFFile(insert(tiny, tmp_path / "m.gguf", *packed)), [], KeyValue.value
    monkeypatch.setattr(KeyValue, "value", property(lambda kv: decoded.append(kv.key) or value.fget(kv)))
    with pytest.raises(FasaError, match=message):
        Profile.load(model)
    assert "fasa." + key not in decoded


def test_many_heads_are_checked_in_little_time():
    """4 million heads of one chunk each are one comparison a layer."""
    n = 1024
    p = Profile([4096] * n, [1] * n, [np.zeros((4096, 1), np.uint16)] * n)
    values = p.to_flat()
    start = time.perf_counter()
    assert len(Profile.from_flat(values, "p").ranking) == n
    assert time.perf_counter() - start < 10


def test_a_pattern_of_windows_is_bounded(tmp_path):
    from fasa_gguf.gguf.shape import sliding_windows

    keys = [
        pack_kv("general.architecture", STR, "gemma3"),
        pack_kv("gemma3.attention.sliding_window", U32, 512),
        pack_kv("gemma3.attention.sliding_window_pattern", ARR, [1] * 5000, U8),
    ]
    (tmp_path / "m.gguf").write_bytes(gguf_bytes(keys))
    with pytest.raises(FasaError, match=r"sliding_window_pattern: expected at most 4096 values, found 5000"):
        sliding_windows(GGUFFile(tmp_path / "m.gguf"), 4096)


# ---- text ----


def test_a_lone_surrogate_is_refused(tmp_path):
    text = full_profile().to_json().replace('"c"', '"a\\ud800b"')
    assert "ud800" in text
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(FasaError) as e:
        Profile.load(tmp_path / "p.json")
    assert r"key fasa.calibration.corpus: expected text that can be written as UTF-8, found 'a\ud800b'" in str(e.value)
    str(e.value).encode()


def test_a_corpus_with_an_odd_name_is_saved_and_shown_safely(tiny, tmp_path, capsys):
    """A file name may hold bytes that are no text, which Python reads as lone surrogates, and control characters."""
    p = full_profile()
    p.calibration["corpus"] = "\x1b]0;owned\x07\x1b[2Ja\udcff\nb"
    p.calibration["source"] = "\x1b[31mgguf"
    p.save(tmp_path / "p.json")
    model = embed.embed(tiny, p, tmp_path / "m.gguf")
    for path in (tmp_path / "p.json", model):
        assert Profile.load(path).calibration["corpus"] == "\x1b]0;owned\x07\x1b[2Ja?\nb"
        for flags in ([], ["--json"]):
            assert cli.main(["inspect", str(path), *flags]) == 0
            out = capsys.readouterr().out
            assert out.isascii() and all(c.isprintable() or c == "\n" for c in out)
    assert "calibrated on ?]0;owned??[2Ja??b: 10 tokens" in format_profile(Profile.load(model))


@pytest.mark.parametrize("value", [{}, [], 3, b"p.json"])
def test_what_is_no_path(value):
    found = type(value).__name__
    with pytest.raises(FasaError, match=f"profile: expected the path of a file, JSON or GGUF, found {found}"):
        Profile.load(value)


def test_a_flat_form_that_is_no_mapping():
    with pytest.raises(FasaError, match="p: not a FASA profile: expected keys and values, found list"):
        Profile.from_flat([], "p")


def test_saving_over_what_is_no_file(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FasaError, match="pipe: expected the name of a file to write, found something else there"):
        full_profile().save(tmp_path / "pipe")
    assert os.listdir(tmp_path) == ["pipe"]


# ---- saved and loaded ----


def close_masses(rng, n):
    """n masses, many of them neighbours in f32."""
    x = [np.float32(rng.choice([0.5, 0.9, 0.99999, 0.1 * rng.random() + 1e-6]))]
    while len(x) < n:
        x.append(np.nextafter(x[-1], np.float32(2)) if rng.random() < 0.7 else x[-1] + (np.float32(1) - x[-1]) / 2)
    x = sorted({float(m) for m in x if m < 1})
    return x


@pytest.mark.parametrize("seed", range(50))
def test_what_is_saved_is_loaded(tiny, tmp_path, seed):
    rng = np.random.default_rng(seed)
    p = full_profile()
    masses = close_masses(rng, int(rng.integers(1, 30)))
    p.mean_budget = dict(zip(np.cumsum(rng.integers(1, 50, len(masses))).tolist(), masses, strict=True))
    edge = np.nextafter(np.float32([100, 0, 50]), np.float32([0, 1, 0]))
    p.layer_miss = np.where(rng.random(3) < 0.5, edge, rng.random(3).astype(np.float32) * 99 + 1e-3).astype(np.float32)
    p.recall = [np.clip(rng.random((2, 1)), 0, 1).astype(np.float32) * np.float32(1.0009999) for _ in range(3)]
    p.weight = [(rng.standard_normal((2, 2)) * 10.0 ** rng.integers(-44, 38)).astype(np.float32) for _ in range(3)]
    p.ahead_weight = [
        (rng.standard_normal((2, 2)) * 10.0 ** rng.integers(-44, 38)).astype(np.float32) for _ in range(3)
    ]
    p.rope |= {"base": float(rng.random() * 1e6 + 1e-3), "scale": float(rng.choice([1, 1 / 3, 1e-40, 0.99999999]))}
    p.defaults |= {"mass": float(np.nextafter(np.float32(1), np.float32(0))), "row_cache": int(rng.integers(-1, 99))}
    p.save(tmp_path / "p.json")
    model = embed.embed(tiny, p, tmp_path / "m.gguf", force=True)
    for q in (Profile.load(tmp_path / "p.json"), Profile.load(model)):
        assert list(q.mean_budget) == list(p.mean_budget)
        assert [np.float32(x) for x in q.mean_budget.values()] == [np.float32(x) for x in p.mean_budget.values()]
        assert np.array_equal(q.layer_miss, p.layer_miss)
        assert np.float32(q.defaults["mass"]) == np.float32(p.defaults["mass"])
        for a, b in itertools.chain(
            zip(q.weight, p.weight, strict=True),
            zip(q.ahead_weight, p.ahead_weight, strict=True),
            zip(q.recall, p.recall, strict=True),
        ):
            assert np.allclose(a, b, rtol=6e-5, atol=1e-44)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda p: p.mean_budget.update({300: 0.875 + 1e-12}),
            "masses between 0 and 1, each larger than the one before",
        ),
        (lambda p: p.mean_budget.update({300: 1 - 1e-12}), "masses between 0 and 1, each larger than the one before"),
        (lambda p: p.rope.update(base=1e-60), "key fasa.rope.base: expected a number above 0"),
        (
            lambda p: setattr(p, "mean_budget", {n: n / 9999 for n in range(1, 5000)}),
            "at most 4096 numbers, found 4999",
        ),
    ],
)
def test_what_cannot_be_loaded_is_not_saved(tiny, tmp_path, change, message):
    p = full_profile()
    change(p)
    for write in (lambda: p.save(tmp_path / "p.json"), lambda: embed.embed(tiny, p, tmp_path / "m.gguf")):
        with pytest.raises(FasaError, match=message):
            write()
    assert list(tmp_path.iterdir()) == []


def test_a_file_too_large_to_be_loaded_is_not_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(flat_module, "MAX_JSON", 100)
    with pytest.raises(FasaError, match=r"p.json: not a FASA profile: expected at most 100 bytes of JSON, found more"):
        full_profile().save(tmp_path / "p.json")
    assert list(tmp_path.iterdir()) == []
