"""The profile: JSON and GGUF keys both ways, and every rejection."""

import json
import os

import numpy as np
import pytest
from profiles import full_profile
from tiny_gguf import N_HEAD_KV, WIDTH, gguf_bytes

from fasa_gguf import FasaError
from fasa_gguf.gguf.file import ARR, BOOL, F32, STR, U8, U16, U32, GGUFFile, pack_kv
from fasa_gguf.params import FasaParams
from fasa_gguf.profile import embed
from fasa_gguf.profile import flat as flat_module
from fasa_gguf.profile.inspect import format_profile
from fasa_gguf.profile.keys import KEYS
from fasa_gguf.profile.profile import Profile
from fasa_gguf.report.pictures import save_heatmap
from fasa_gguf.speed.random_model import synthetic_profile

REMAKE = "; make the profile anew with `fasa-gguf embed-profile MODEL`"


def flat():
    return json.loads(full_profile().to_json())


def test_every_key_of_the_table_and_no_other_is_written():
    assert {"fasa." + k for k in full_profile().to_flat()} == {name for name, _, _ in KEYS}
    assert {name for name, _, _ in KEYS if name.startswith("fasa.default.")} == {
        f"fasa.default.{f}" for f in FasaParams.__dataclass_fields__
    }


def test_json_both_ways(tmp_path):
    p = full_profile()
    p.save(tmp_path / "p.json")
    q = Profile.load(tmp_path / "p.json")
    assert q.to_flat() == p.to_flat() and os.listdir(tmp_path) == ["p.json"]
    assert [r.dtype for r in q.ranking] == [np.uint16] * 3 and q.ranking[2].shape == (N_HEAD_KV, WIDTH // 2)
    assert np.array_equal(q.ranking[2], p.ranking[2]) and q.weight[1].dtype == np.float32 and q.weight[1][0, 0] == 1.5
    assert q.layer_miss.tolist() == [0.25, 2, 1] and q.mean_budget == {100: 0.5, 256: 0.875}
    assert q.params() == FasaParams(
        chunks=3,
        budget=256,
        mass=0.5,
        floor=8,
        cap=99,
        sink=2,
        recent=9,
        min_context=7,
        min_context_gpu=8,
        max_tokens=4,
        k_dom="q8",
        per_head=1,
        row_cache=64,
        ahead="on",
        prefill="on",
        prefill_min_context=9,
        prefill_min_context_gpu=11,
        prefill_tile=64,
        prefill_mass=0.75,
        prefill_budget=300,
        prefill_floor=10,
        prefill_cap=500,
        prefill_band=20,
    )
    assert q.ahead.dtype == np.uint8 and q.ahead.tolist() == [0, 1, 1] and q.ahead_weight[2][1, 1] == 2.25
    assert all(np.array_equal(a[:, ::-1], b) for a, b in zip(q.ahead_ranking, q.ranking, strict=True))
    assert p.to_json().count("\n") == len(p.to_flat()) + 2  # one key a line


def test_a_header_is_read_once(tiny, tmp_path, monkeypatch):
    model, parsed = GGUFFile(embed.embed(tiny, full_profile(), tmp_path / "m.gguf")), []
    parse = GGUFFile._parse
    monkeypatch.setattr(GGUFFile, "_parse", lambda self, r: parsed.append(self.path) or parse(self, r))
    assert embed.check_embeddable(model) is model
    assert Profile.load(model).to_flat() == full_profile().to_flat()
    embed.rewrite(model, None, tmp_path / "plain.gguf")
    assert parsed == [] and (tmp_path / "plain.gguf").read_bytes() == tiny.read_bytes()
    embed.remove(model)  # in place: the header is that of another file now
    assert parsed == [] and not model.is_current()
    with pytest.raises(FasaError, match="there is no FASA profile in this model, so there is nothing to remove"):
        embed.remove(model)
    assert parsed == [model.path]


def test_the_preset_paper_is_fasa_as_published():
    p = full_profile()
    assert p.preset("default") == (p.params(), p)
    with pytest.raises(
        FasaError,
        match="preset paper: expected a profile ranked by ca, found synthetic; make one with `fasa-gguf "
        "calibrate MODEL --method ca",
    ):
        p.preset("paper")
    with pytest.raises(FasaError, match="preset 'x': expected one of default, paper"):
        p.preset("x")
    p.ranking_method = "ca"
    params, plain = p.preset("paper")
    assert params == FasaParams(
        chunks=max(WIDTH // 8, 1), sink=0, recent=0, k_dom="f16", per_head=1, ahead="off", prefill="off"
    )
    assert plain.weight is None and plain.weight_k == 0 and plain.ahead_ranking is plain.ahead_weight is None
    assert plain.ranking is p.ranking and p.weight_k == 2


def test_gguf_both_ways_with_an_independent_reader(tiny, tmp_path):
    from gguf import GGUFReader, GGUFValueType

    out = embed.embed(tiny, full_profile(), tmp_path / "m.gguf")
    assert Profile.load(out).to_flat() == full_profile().to_flat()
    fields = GGUFReader(out).fields
    kinds = {
        "u32": [GGUFValueType.UINT32],
        "i32": [GGUFValueType.UINT32],  # unless it is negative
        "f32": [GGUFValueType.FLOAT32],
        "str": [GGUFValueType.STRING],
        "[u32]": [GGUFValueType.ARRAY, GGUFValueType.UINT32],
        "[f32]": [GGUFValueType.ARRAY, GGUFValueType.FLOAT32],
        "[u8]": [GGUFValueType.ARRAY, GGUFValueType.UINT8],
        "[u8] or [u16]": [GGUFValueType.ARRAY, GGUFValueType.UINT8],
    }
    for key, value in full_profile().to_flat().items():
        field = fields["fasa." + key]
        assert field.types == kinds[{n: k for n, k, _ in KEYS}["fasa." + key]]
        assert field.contents() == (value if isinstance(value, (str, list)) else pytest.approx(value))


def test_a_dense_layer_and_more_than_256_chunks():
    p = synthetic_profile([0, 1, 2], [0, 300, 4], seed=3)
    entries = {key: (kind, item) for key, kind, _, item in p.to_gguf_kv()}
    assert entries["fasa.ranking"] == (ARR, U16)
    assert {key: item for key, _, _, item in synthetic_profile([1], [256]).to_gguf_kv()}["fasa.ranking"] == U8
    q = Profile.from_json(p.to_json(), "p")
    assert [r.shape for r in q.ranking] == [(0, 0), (1, 300), (2, 4)] and np.array_equal(q.ranking[1], p.ranking[1])


def test_a_real_model_s_profile_is_small():
    p = synthetic_profile([3] * 30, [32] * 30, seed=0)
    p.weight_k, p.weight = 12, [np.random.default_rng(0).random((3, 12), np.float32)] * 30
    p.recall_k, p.recall = 16, [np.random.default_rng(0).random((3, 16), np.float32)] * 30
    assert len(p.to_json()) < 50_000


def put(key, value):
    return lambda f: f.update({key: value})


def put_at(key, i, value):
    return lambda f: f[key].__setitem__(i, value)


BAD = [
    (put("version", 2), "key fasa.version: expected at most 1, found 2; install a newer fasa_gguf"),
    (lambda f: f.update(version=7, surprise=1, ranking="new"), "key fasa.version: expected at most 1, found 7"),
    (put("version", 0), "key fasa.version: expected 1, found 0"),
    (lambda f: f.pop("version"), "key fasa.version: expected u32, found nothing"),
    (lambda f: f.pop("ranking"), "key fasa.ranking: expected .u8. or .u16., found nothing"),
    (lambda f: f.pop("weight"), "key fasa.weight: expected .f32., found nothing"),
    (lambda f: f.pop("weight_k"), "key fasa.weight_k: expected 1 to 8, found 0"),
    (put("n_layer", "x"), "key fasa.n_layer: expected u32, found 'x'"),
    (put("n_layer", True), "key fasa.n_layer: expected u32, found True"),
    (put("n_layer", 3.0), "key fasa.n_layer: expected u32, found 3.0"),
    (put("n_layer", 10**6), "key fasa.n_layer: expected 1 to 4096, found 1000000"),
    (put("n_layer", 10**400), "key fasa.n_layer: expected u32, found a number of more than 64 bits"),
    (put("n_layer", None), "key fasa.n_layer: expected u32, found nothing"),
    (put("n_chunk", [8, 8]), "key fasa.n_chunk: expected 3 numbers, one a layer, found 2 numbers"),
    (put("n_chunk", 8), "key fasa.n_chunk: expected an array, .u32., found 8"),
    (put("n_chunk", [0, 0, 0]), "key fasa.n_chunk: expected chunks in at least one layer, found none in any"),
    (put("n_chunk", [8, 8, 5000]), "key fasa.n_chunk: expected numbers from 0 to 4096, found 5000 in layer 2"),
    (put("n_chunk", [8, {}, 8]), "key fasa.n_chunk: expected an array, .u32., found an object of 0 at index 1"),
    (
        put("n_head_kv", [0, 2, 2]),
        "key fasa.n_head_kv: expected KV heads in every layer that has chunks, found 0 in layer 0",
    ),
    (put("n_head_kv", [2, 10**5, 2]), "key fasa.n_head_kv: expected numbers from 0 to 4096, found 100000 in layer 1"),
    (lambda f: f["ranking"].pop(), "key fasa.ranking: expected 48 numbers for this shape, found 47 numbers"),
    (lambda f: f["ranking"].append(0), "key fasa.ranking: expected 48 numbers for this shape, found 49 numbers"),
    (
        lambda f: f["ranking"].__setitem__(8, f["ranking"][9]),
        "key fasa.ranking: expected each chunk from 0 to 7 once in layer 0, KV head 1, found chunk . twice",
    ),
    (
        put_at("ranking", 47, 200),
        "key fasa.ranking: expected each chunk from 0 to 7 once in layer 2, KV head 1, found chunk 200",
    ),
    (put_at("ranking", 9, -1), "key fasa.ranking: expected an array, .u8. or .u16., found -1 at index 9"),
    (
        put_at("ranking", 9, 10**400),
        "key fasa.ranking: expected an array, .u8. or .u16., found a number of more than 64 bits at index 9",
    ),
    (put_at("ranking", 0, 0.5), "key fasa.ranking: expected an array, .u8. or .u16., found 0.5 at index 0"),
    (put_at("ranking", 3, "\x1b[31m"), r"found '\\x1b\[31m' at index 3"),
    (
        put("ranking_method", "guess"),
        "key fasa.ranking_method: expected recall or energy or ca or synthetic, found 'guess'",
    ),
    (put("ranking_method", 3), "key fasa.ranking_method: expected text of fewer than 4096 characters, found 3"),
    (put("weight_k", 99), "key fasa.weight_k: expected 1 to 8, found 99"),
    (put("weight_k", 3), "key fasa.weight: expected 18 numbers for this shape, found 12 numbers"),
    (put_at("weight", 0, float("nan")), "key fasa.weight: expected an array, .f32., found nan at index 0"),
    (put_at("weight", 5, 1e39), r"key fasa.weight: expected an array, .f32., found 1e\+39 at index 5"),
    (put_at("recall", 4, 1.5), "key fasa.recall: expected shares from 0 to 1, found 0.75 to 1.5 in layer 2"),
    (put_at("recall", 0, -0.25), "key fasa.recall: expected shares from 0 to 1, found -0.25 to 0.75 in layer 0"),
    (put("ahead.layers", [1, 1]), "key fasa.ahead.layers: expected 3 numbers, 0 or 1, one a layer, found 2 numbers"),
    (
        put_at("ahead.layers", 1, 2),
        "key fasa.ahead.layers: expected 3 numbers, 0 or 1, one a layer, found 2 in layer 1",
    ),
    (put_at("ahead.layers", 2, -1), "key fasa.ahead.layers: expected an array, .u8., found -1 at index 2"),
    (put("ahead.layers", 1), "key fasa.ahead.layers: expected an array, .u8., found 1"),
    (
        lambda f: f["ahead.ranking"].pop(),
        "key fasa.ahead.ranking: expected 48 numbers for this shape, found 47 numbers",
    ),
    (
        put_at("ahead.ranking", 47, 200),
        "key fasa.ahead.ranking: expected each chunk from 0 to 7 once in layer 2, KV head 1, found chunk 200",
    ),
    (
        lambda f: f["ahead.weight"].append(1.0),
        "key fasa.ahead.weight: expected 12 numbers for this shape, found 13 numbers",
    ),
    (
        put_at("ahead.weight", 5, float("inf")),
        "key fasa.ahead.weight: expected an array, .f32., found inf at index 5",
    ),
    (
        lambda f: f.pop("ahead.weight"),
        "key fasa.ahead.weight: expected it where both fasa.ahead.ranking and fasa.weight are, and only there, found "
        "nothing",
    ),
    (lambda f: f.pop("ahead.ranking"), "key fasa.ahead.weight: expected it where both .*, and only there, found it"),
    (
        lambda f: [f.pop("weight"), f.pop("weight_k")],
        "key fasa.ahead.weight: expected it where both .*, and only there, found it",
    ),
    (
        put("default.ahead", "maybe"),
        "keys fasa.default..: setting ahead: expected one of auto, off, on, found 'maybe'",
    ),
    (put("layer_miss", [1, 1]), "key fasa.layer_miss: expected 3 factors above 0 and below 100, found a list of 2"),
    (
        put("layer_miss", [1.0, 0.0, 1]),
        "key fasa.layer_miss: expected 3 factors above 0 and below 100, found a list of 3",
    ),
    (
        put_at("mean_budget", 1, 100),
        "key fasa.mean_budget: expected numbers of tokens, each larger than the one before, found .100, 100.",
    ),
    (
        put_at("mean_budget", 0, 0),
        "key fasa.mean_budget: expected numbers of tokens, each larger than the one before, found .0, 256.",
    ),
    (
        put("mean_budget", []),
        "key fasa.mean_budget: expected numbers of tokens, each larger than the one before, found a list of 0",
    ),
    (lambda f: f.pop("mean_budget"), "key fasa.mean_budget: expected .u32., found nothing"),
    (
        put("mean_budget_mass", [0.5]),
        "key fasa.mean_budget_mass: expected 2 numbers, one for each of mean_budget, found 1 numbers",
    ),
    (
        put_at("mean_budget_mass", 1, 1.0),
        "key fasa.mean_budget_mass: expected masses between 0 and 1, each larger than the one before, found .0.5, 1.0.",
    ),
    (
        put_at("mean_budget_mass", 0, 0.9),
        "key fasa.mean_budget_mass: expected masses between 0 and 1, each larger than the one before, "
        "found .0.9, 0.875.",
    ),
    (put("rope.layout", "odd"), "key fasa.rope.layout: expected norm or neox, found 'odd'"),
    (put("rope.base", 0.0), "key fasa.rope.base: expected a number above 0, found 0.0"),
    (put("rope.base", float("inf")), "key fasa.rope.base: expected f32, found inf"),
    (put("rope.dims", -1), "key fasa.rope.dims: expected u32, found -1"),
    (
        put("default.budget", 0),
        "keys fasa.default..: setting budget: expected a whole number from 1 to 2147483647, found 0",
    ),
    (
        put("default.budget", 2**31),
        "keys fasa.default..: setting budget: expected a whole number from 1 to 2147483647, found 2147483648",
    ),
    (put("default.mass", 1.5), "keys fasa.default..: setting mass: expected a number from 0 to 1, found 1.5"),
    (put("default.cap", 1), "keys fasa.default..: settings floor and cap: expected 1 <= floor <= cap, found 8 and 1"),
    (put("default.k_dom", "q5"), "keys fasa.default..: setting k_dom: expected one of f16, q8, q4, found 'q5'"),
    (put("default.per_head", 2), "keys fasa.default..: setting per_head: expected a whole number from 0 to 1, found 2"),
    (
        lambda f: f.update({"default.mass": 0.5, "default.mean_budget": 9}),
        "keys fasa.default..: settings mass and mean_budget: expected one of them, found 0.5 and 9",
    ),
    (
        lambda f: f.update({"default.mass": 0, "default.mean_budget": 257}),
        "key fasa.default.mean_budget: expected a number that the table fasa.mean_budget reaches, found "
        "257, and the table has 100 to 256 tokens",
    ),
    (
        lambda f: [
            f.pop("mean_budget"),
            f.pop("mean_budget_mass"),
            f.update({"default.mass": 0, "default.mean_budget": 9}),
        ],
        "key fasa.default.mean_budget: expected .*, found 9, and the table has none",
    ),
    (
        put("calibration.corpus", "x" * 5000),
        "key fasa.calibration.corpus: expected text of fewer than 4096 characters, found 'xxx",
    ),
    (put("surprise", 1), "key fasa.surprise: expected one of the keys of format version 1, found an unknown one"),
    (put("a\nb", 1), r"key fasa.a\?b: expected one of the keys"),
]


@pytest.mark.parametrize(
    "i", range(len(BAD)), ids=lambda i: BAD[i][1].split(":")[0].removeprefix("key fasa.") + f"-{i}"
)
def test_bad_values(i):
    change, message = BAD[i]
    f = flat()
    change(f)
    with pytest.raises(FasaError, match="^p.json: .*" + message) as e:
        Profile.from_flat(f, "p.json")
    assert str(e.value).endswith(REMAKE[2:]) and "\n" not in str(e.value) and len(str(e.value)) < 400


def test_what_cannot_be_read_is_not_written(tiny, tmp_path):
    p = full_profile()
    p.weight[0][0, 0] = np.nan
    with pytest.raises(FasaError, match=r"p.json: key fasa.weight: expected an array, .f32., found nan at index 0"):
        p.save(tmp_path / "p.json")
    with pytest.raises(FasaError, match=r"key fasa.weight"):
        embed.embed(tiny, p, tmp_path / "m.gguf")
    assert os.listdir(tmp_path) == []
    with pytest.raises(
        FasaError, match=r"none/p.json: cannot be written: No such file or directory; give another path with -o"
    ):
        full_profile().save(tmp_path / "none" / "p.json")


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", r"not a FASA profile: neither GGUF nor JSON \(Expecting value"),
        (b"{", "not a FASA profile: neither GGUF nor JSON"),
        (b"[1]", "not a FASA profile: expected a JSON object, found list"),
        (b"{}", "key fasa.version: expected u32, found nothing"),
        (b"[" * 100_000, "not a FASA profile: expected JSON, found"),
        (b"[]", "not a FASA profile: expected a JSON object, found list"),
        (b'{"version": 1, "version": 1}', "key fasa.version: expected it once, found it twice"),
        (b'{"version": ' + b"9" * 5000 + b"}", "p.json: "),
        (b"\xff\xfe\xfd\xfc\xfb", "not a FASA profile: expected JSON or GGUF, found other bytes"),
        (b"GGUF", "not a GGUF file: it has 4 bytes"),
    ],
)
def test_bad_files(tmp_path, data, message):
    (tmp_path / "p.json").write_bytes(data)
    with pytest.raises(FasaError, match=message):
        Profile.load(tmp_path / "p.json")


def test_files_that_cannot_be_read(tiny, tmp_path, monkeypatch):
    with pytest.raises(FasaError, match="none: cannot be read: No such file or directory"):
        Profile.load(tmp_path / "none")
    with pytest.raises(FasaError, match="expected a regular file, JSON or GGUF"):
        Profile.load(tmp_path)
    with pytest.raises(
        FasaError, match=r"there is no FASA profile in this model; run `fasa-gguf embed-profile .*tiny.gguf`"
    ):
        Profile.load(tiny)
    full_profile().save(tmp_path / "p.json")
    monkeypatch.setattr(flat_module, "MAX_JSON", 100)
    with pytest.raises(FasaError, match="expected at most 100 bytes of JSON, found more"):
        Profile.load(tmp_path / "p.json")


@pytest.mark.parametrize(
    "entries, message",
    [
        ([pack_kv("fasa.version", STR, "1")], "key fasa.version: expected u32, found str"),
        (
            [pack_kv("fasa.version", U32, 2), pack_kv("fasa.ranking", STR, "new"), pack_kv("fasa.odd", U32, 1)],
            "key fasa.version: expected at most 1, found 2",
        ),
        ([pack_kv("fasa.ranking", ARR, [1.0], F32)], "key fasa.ranking: expected .u8. or .u16., found array of f32"),
        ([pack_kv("fasa.ranking", U8, 3)], "key fasa.ranking: expected .u8. or .u16., found u8"),
        ([pack_kv("fasa.n_head_kv", ARR, [1], BOOL)], "key fasa.n_head_kv: expected .u32., found array of bool"),
        ([pack_kv("fasa.n_layer", F32, 3.0)], "key fasa.n_layer: expected u32, found f32"),
        (
            [pack_kv("fasa.odd", U32, 1)],
            "key fasa.odd: expected one of the keys of format version 1, found an unknown one",
        ),
        ([pack_kv("fasa.n_layer", U32, 3)], "key fasa.version: expected u32, found nothing"),
    ],
)
def test_bad_embedded_keys(tmp_path, entries, message):
    (tmp_path / "m.gguf").write_bytes(gguf_bytes(entries))
    with pytest.raises(FasaError, match="m.gguf: " + message):
        Profile.load(tmp_path / "m.gguf")


def test_embedded_arrays_have_a_cap(tmp_path, monkeypatch):
    monkeypatch.setattr(flat_module, "MAX_NUMBERS", 100)
    (tmp_path / "m.gguf").write_bytes(gguf_bytes([pack_kv("fasa.ranking", ARR, [0] * 101, U8)]))
    with pytest.raises(FasaError, match=r"key fasa.ranking: expected at most 100 elements, found 101"):
        Profile.from_gguf(GGUFFile(tmp_path / "m.gguf"))


def test_the_shape_must_fit():
    p = synthetic_profile([2, 2, 2], [8, 0, 8])
    p.check([2, 5, 2], [8, 3, 8], "m")  # layer 1 has no ranking: whatever the model has there
    p.check([2, 5, 2], [-1, 3, 8], "m")  # -1: not known from the metadata
    with pytest.raises(
        FasaError,
        match=r"^m: the profile is for another model: it has 3 layers, 2 KV heads, 0 to 8 chunks, the "
        r"model 2 layers, 2 KV heads, 8 chunks",
    ):
        p.check([2, 2], [8, 8], "m")
    with pytest.raises(
        FasaError, match="it has 3 layers, 2 KV heads, 0 to 8 chunks, the model 3 layers, 4 KV heads, 16 chunks"
    ):
        p.check([4, 4, 4], [16] * 3, "m")
    with pytest.raises(FasaError, match="it has 2 KV heads and 8 chunks in layer 0, the model 2 and 0"):
        p.check([2, 2, 2], [0, 8, 8], "m")


def test_format_profile_names_chunks_and_attention_kept():
    p = full_profile()
    p.ranking[0][0] = [7, 3, 1, 0, 2, 4, 5, 6]
    p.n_chunk[1], p.ranking[1] = 0, np.zeros((0, 0), np.uint16)
    lines = format_profile(p, chunks=3).splitlines()
    assert lines[0] == (
        "method synthetic, 3 layers, 2 KV heads, 0 to 8 chunks per head, rope norm base 10000.0, "
        "5000 in layers with a window"
    )
    assert (
        "mean budgets: 100 at mass 0.5, 256 at mass 0.875" in lines
        and "layers may miss 0.25 to 2 times 1 - mass" in lines
    )
    row = {line.split()[0]: line.split()[1:] for line in lines[-3:]}
    assert row["0"] == ["75.0%", "7", "3", "1", "(window", "of", "64)"] and row["1"] == ["dense"]


def test_inspect_shows_the_chunks_that_decoding_uses():
    """The share kept belongs to that number of chunks too, though the profile has figures for more."""
    p = full_profile()
    p.recall_k, p.recall = 4, [np.array([[0.5, 0.625, 0.75, 1.0]] * 2, np.float32)] * 3
    p.window = None
    for chunks, kept in ((3, "75.0%"), (2, "62.5%"), (0, "100.0%")):  # 0: 3/8 of the head's 8, in whole groups: 4
        p.defaults["chunks"] = chunks
        lines = format_profile(p).splitlines()
        assert lines[-4].split("best ")[1].split()[0] == str(chunks or 4)
        assert [len(line.split()) for line in lines[-3:]] == [2 + (chunks or 4)] * 3
        assert [line.split()[1] for line in lines[-3:]] == [kept] * 3


def test_heat_map_shows_the_mean_place(tmp_path, monkeypatch):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.axes

    seen = []
    draw = matplotlib.axes.Axes.imshow
    monkeypatch.setattr(matplotlib.axes.Axes, "imshow", lambda self, a, **kw: seen.append(a) or draw(self, a, **kw))
    p = Profile([2, 0], [3, 0], [np.array([[2, 0, 1], [0, 2, 1]], np.uint16), np.zeros((0, 0), np.uint16)])
    save_heatmap(p, tmp_path / "h.png")
    assert (tmp_path / "h.png").read_bytes()[:4] == b"\x89PNG"
    assert seen[0][0].tolist() == [0.75, 0.0, 0.75] and np.isnan(seen[0][1]).all()
    n_layer, n_chunk = 18, 256
    wide = Profile([1] * n_layer, [n_chunk] * n_layer, [np.arange(n_chunk, dtype=np.uint16)[None]] * n_layer)
    wide.window = [512 * (il % 6 < 5) for il in range(n_layer)]
    texts = []
    monkeypatch.setattr(matplotlib.axes.Axes, "set_yticks", lambda self, at, labels: texts.extend(labels))
    save_heatmap(wide, tmp_path / "wide.png")
    width, height = (int.from_bytes((tmp_path / "wide.png").read_bytes()[at : at + 4], "big") for at in (16, 20))
    assert width <= 1800 and width <= 4 * height
    assert texts[:7] == ["0 w", "1 w", "2 w", "3 w", "4 w", "5", "6 w"]
    with pytest.raises(FasaError, match=r"h.png: cannot be written: No such file or directory"):
        save_heatmap(p, tmp_path / "none" / "h.png")
