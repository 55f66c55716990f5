"""The three tables: what is generated from them is what is committed, and the library is what they say."""

import dataclasses
import importlib.util
import re

import numpy as np
import pytest
from paths import ROOT

import fasa_gguf
from fasa_gguf import FasaError, FasaParams
from fasa_gguf.counters import COUNTED_BY, COUNTERS
from fasa_gguf.params import INT_MAX, MODES, QUALITIES, SETTINGS, default_chunks, parse_mode
from fasa_gguf.reasons import Reason, not_used
from fasa_gguf.speed.random_model import synthetic_profile

# values that the rules across settings need beside the tested one
BESIDE = {
    "prefill_floor": {"prefill_cap": INT_MAX},
    "prefill_cap": {"prefill_floor": 1},
    "floor": {"cap": INT_MAX},
    "cap": {"floor": 1},
}


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "native" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def session(library, tiny):
    from fasa_gguf.session import Session

    with Session(tiny, n_ctx=256, n_threads=1) as s:
        s.fasa.set_profile(synthetic_profile([2] * 3, [8] * 3))
        yield s


def c_params(library, **values):
    ffi, lib = library.library.api()
    p = ffi.new("fasa_params *", lib.fasa_params_default())
    p.enabled = 1
    for name, value in values.items():
        setattr(p, name, value)
    return p


def set_params(library, session, **values):
    _, lib = library.library.api()
    library.library.check(lib.fasa_set_params(session.fasa._ctx, c_params(library, **values)))


# ---- generated files ----


def test_generated_files_are_what_the_tables_say(generate):
    for path, text in generate.texts().items():
        assert path.read_text() == text, f"{path.relative_to(ROOT)} is out of date; run `make tables`"


def test_a_new_row_reaches_the_header_and_the_library(generate, monkeypatch):
    row = dataclasses.replace(SETTINGS[0], name="stride", default=3, unit="cells", help="a test", low=1, high=9)
    monkeypatch.setattr(generate, "SETTINGS", (*SETTINGS, row))
    texts = generate.texts()
    assert "    // cells, from 1 to 9: a test\n    uint32_t stride;\n} fasa_params;" in texts[generate.HEADER]
    assert '    X(stride, uint32_t, 3, 1, 9, "")\n' in texts[generate.TABLES]


def test_documented_blocks_are_replaced(generate):
    text = "before\n<!-- begin counters -->\nold\n<!-- end counters -->\nafter\n"
    block = generate.docs_blocks()["counters"]
    new = generate.fill(text, "counters", block, "<!-- begin {name} -->", "<!-- end {name} -->")
    assert new == f"before\n<!-- begin counters -->\n{block}<!-- end counters -->\nafter\n"
    assert "| `lists` | lists | lists selected: " in block
    assert "- `MIN_CONTEXT`: the context is shorter than min_context; use" in generate.docs_blocks()["reasons"]
    settings = generate.docs_blocks()["settings"]
    assert "- **`k_dom`** = q4 (f16, q8 or q4): how" in settings
    assert "- **`sink`** = 4 (tokens, from 0 to 65536): " in settings
    assert all(f"- **`{row.name}`** = " in settings for row in SETTINGS)


# ---- settings ----


def test_defaults_are_the_same_in_c(library):
    _, lib = library.library.api()
    p = lib.fasa_params_default()
    for row in SETTINGS:
        value = row.choices.index(row.default) if row.choices else row.default
        value = float(np.float32(value)) if row.kind is float else value  # C's float
        assert getattr(p, row.name) == value, row.name
    assert p.enabled == 0


def test_the_struct_has_the_rows_and_their_types(library):
    ffi, _ = library.library.api()
    fields = {name: field.type.cname for name, field in ffi.typeof("fasa_params").fields}
    assert fields.pop("size") == "uint64_t" and fields.pop("enabled") == "int32_t"
    assert fields == {row.name: row.c_type for row in SETTINGS}


@pytest.mark.parametrize("row", SETTINGS, ids=lambda row: row.name)
def test_a_range_holds_in_python_and_in_c(library, session, row):
    kind = "number" if row.kind is float else "whole number"
    values = [v for v in (row.low - 1, row.high + 1) if row.low < 0 or v >= 0]
    if row.kind is float:
        values.append(float("nan"))
    if row.c_type == "int32_t":
        values = [v for v in values if v <= INT_MAX]
    for value in values:
        text = f"setting {row.name}: expected a {kind} from {row.low} to {row.high}, found "
        with pytest.raises(FasaError, match=re.escape(text)):
            set_params(library, session, **{row.name: value})
    for value in (-2, row.high + 1, "x", None, True, float("nan")):
        with pytest.raises(FasaError, match=f"setting {row.name}: expected"):
            row.check(value)
    for value in (row.low, row.high):
        beside = BESIDE.get(row.name, {})
        if row.name != "mean_budget" or value == 0:  # which also needs the profile's table
            set_params(library, session, **{row.name: value, **beside})
        FasaParams(**{row.name: row.choices[value] if row.choices else value, **beside}).check()


def test_rules_across_settings_are_the_same_in_c(library, session):
    for values, text in (
        ({"mass": 0.5, "floor": 9, "cap": 3}, "settings floor and cap: expected 1 <= floor <= cap, found 9 and 3"),
        (
            {"prefill_floor": 99, "prefill_cap": 98},
            "settings prefill_floor and prefill_cap: expected prefill_floor <= prefill_cap, found 99 and 98",
        ),
        ({"mass": 0.5, "floor": 0}, "settings floor and cap: expected 1 <= floor <= cap, found 0 and 1024"),
        ({"mass": 0.5, "mean_budget": 9}, "settings mass and mean_budget: expected one of them, found 0.5 and 9"),
    ):
        with pytest.raises(FasaError, match=text):
            set_params(library, session, **values)
        with pytest.raises(FasaError, match=text):
            FasaParams(**values).check()


def test_names_follow_from_the_row():
    row = next(row for row in SETTINGS if row.name == "min_context_gpu")
    assert (row.flag, row.variable, row.key, row.gguf_type) == (
        "--fasa-min-context-gpu",
        "FASA_MIN_CONTEXT_GPU",
        "fasa.default.min_context_gpu",
        "i32",
    )
    assert {row.name: row.gguf_type for row in SETTINGS if row.gguf_type != "u32"} == {
        "mass": "f32",
        "min_context_gpu": "i32",
        "k_dom": "str",
        "row_cache": "i32",
        "ahead": "str",
        "prefill": "str",
        "prefill_mass": "f32",
    }
    assert FasaParams.from_env(environ={row.variable: "77"}).min_context_gpu == 77


# ---- quality ----


def test_a_quality_stands_for_settings_and_single_ones_win():
    base = FasaParams(budget=99, chunks=8, mean_budget=64, k_dom="q8")
    for name, chosen in QUALITIES.items():
        found = FasaParams.from_mapping({"quality": name}, "here", base)
        assert found == base.replace(**chosen, mean_budget=0)
        assert 1 <= found.floor <= found.cap == found.longest
    careful = QUALITIES["careful"]
    assert FasaParams.from_mapping({"cap": "300", "quality": "careful"}, "here") == FasaParams(
        mass=careful["mass"], floor=careful["floor"], cap=300
    )
    for name, value in (("budget", 77), ("mean_budget", 128)):  # they replace the mass
        found = FasaParams.from_mapping({"quality": "fast", name: value}, "here")
        assert (found.mass, getattr(found, name)) == (0.0, value)
    masses = [q["mass"] for q in QUALITIES.values()]
    caps = [q["cap"] for q in QUALITIES.values()]
    assert masses == sorted(masses) and caps == sorted(caps)


def test_a_quality_that_does_not_exist_is_named():
    for value in ("best", "", 1):
        with pytest.raises(
            FasaError, match=f"here: quality: expected one of fast, balanced, careful, found {re.escape(repr(value))}"
        ):
            FasaParams.from_mapping({"quality": value}, "here")


def test_a_quality_from_the_environment_is_under_what_comes_later():
    environ = {"FASA_QUALITY": "careful", "FASA_FLOOR": "70"}
    found = FasaParams.from_env(FasaParams(cap=11), environ)
    assert (found.mass, found.floor, found.cap) == (0.985, 70, 8192)
    assert FasaParams.from_env(environ={"FASA_QUALITY": ""}) == FasaParams()
    assert FasaParams.from_mapping({"quality": "fast"}, "flags", found) == FasaParams(**QUALITIES["fast"])


def test_default_chunks_are_the_librarys(library):
    _, lib = library.library.api()
    for head_dim in range(32, 257):
        assert default_chunks(head_dim // 2) == lib.fasa_default_chunks(head_dim // 2), head_dim
    assert [default_chunks(n) for n in (4, 8, 16, 32, 48, 64, 128)] == [4, 4, 4, 12, 16, 24, 48]


def test_modes_have_short_names():
    assert [parse_mode(x) for x in (*MODES, "c", "m")] == [*MODES, "device", "host"]
    with pytest.raises(FasaError, match=r"here: expected one of auto, device, host \(or c, m\), found 'x'"):
        parse_mode("x", "here")


def test_a_mode_that_the_library_does_not_know_is_refused(library):
    _, lib = library.library.api()
    with pytest.raises(FasaError, match="fasa_set_mode: expected 0 or 1, found 2"):
        library.library.check(lib.fasa_set_mode(2))
    assert lib.fasa_set_mode(lib.FASA_MODE_DEVICE) == 0


# ---- counters ----


def test_counters_of_c_and_python_are_the_same(library, session):
    ffi, _ = library.library.api()
    names = [row.name for row in COUNTERS]
    assert [name for name, _ in ffi.typeof("fasa_counters").fields] == ["size", *names]
    assert list(session.fasa.counters()) == names
    assert {row.counted_by for row in COUNTERS} == set(COUNTED_BY)


def test_a_reset_leaves_the_memory_and_nothing_else(session):
    session.fasa.set_params(FasaParams(chunks=4, budget=64, min_context=0))
    session.clear()
    session.decode(range(1, 101), 0)
    session.decode([5], 100)
    before = session.fasa.counters()
    assert before["steps_sparse"] == 1 and before["lists"] == 3 * 2 and before["tokens_attended"] == 64 * 6
    session.fasa.reset_counters()
    after = session.fasa.counters()
    for row in COUNTERS:
        assert after[row.name] == (before[row.name] if row.counted_by == "memory" else 0), row.name
    assert after["bytes_kv"] > 0 and after["bytes_k_dom"] > 0


# ---- reasons ----


def test_texts_of_the_library_are_the_tables(library):
    ffi, lib = library.library.api()
    for reason in Reason:
        assert ffi.string(lib.fasa_reason_text(reason)).decode() == reason.text
        assert getattr(lib, f"FASA_REASON_{reason.name}") == reason
    assert lib.fasa_reason_text(len(Reason)) == lib.fasa_reason_text(-1) == ffi.NULL
    assert len({reason.text for reason in Reason}) == len(Reason)


def test_reasons_of_a_context(library, session):
    ffi, lib = library.library.api()
    session.fasa.set_params(None)
    assert session.fasa.layer_reason_codes() == [Reason.OFF] * 3
    session.fasa.set_params(FasaParams(chunks=4, budget=64, min_context=200))
    assert session.fasa.layer_reason_codes() == [Reason.NOT_BUILT] * 3
    session.clear()
    session.decode(range(1, 101), 0)
    session.decode([5], 100)
    assert session.fasa.step_reason_code() == Reason.NONE  # 256 cells are seen
    session.fasa.set_params(FasaParams(chunks=4, budget=64, min_context=300))
    session.decode([6], 101)
    assert session.fasa.step_reason_code() == Reason.MIN_CONTEXT
    assert session.fasa.step_reason() == "the context is shorter than min_context"
    assert session.fasa.layer_reason_codes() == [Reason.NONE] * 3 and session.fasa.layer_reasons() == [None] * 3
    ctx = session.fasa._ctx
    assert lib.fasa_layer_reason(ctx, 0) == ffi.NULL and lib.fasa_layer_reason_code(ctx, 3) == Reason.NO_SUCH_LAYER
    assert ffi.string(lib.fasa_layer_reason(ctx, 3)) == b"no such layer"
    assert ffi.string(lib.fasa_step_reason(ctx)).decode() == Reason.MIN_CONTEXT.text


def test_a_reason_comes_with_its_remedy():
    assert not_used(Reason.MIN_CONTEXT_GPU) == (
        "FASA was asked for and no step used it: the context is shorter than min_context_gpu; "
        "use --fasa-min-context-gpu 0 or a longer context"
    )
    assert not_used(Reason.NO_LAYER) == "FASA was asked for and no step used it: no layer can run sparse"
    assert not_used(Reason.NONE, "one token") == "FASA was asked for and no step used it: one token"


# ---- memory ----


def test_the_pool_is_one_estimate(library):
    from fasa_gguf.memory import plan

    _, lib = library.library.api()
    assert lib.fasa_pool_bytes(14336, 512) == 4 * 14336 * 512 + (16 << 20)
    if not hasattr(plan, "pool_bytes"):
        pytest.skip("memory.plan has no pool_bytes")
    for n_act, n_tokens in ((1, 1), (576, 8), (14336, 512), (2**20, 2**16)):
        assert plan.pool_bytes(n_act, n_tokens) == lib.fasa_pool_bytes(n_act, n_tokens)


# ---- versions ----


def upstream():
    return re.search(r"^version = (.*)$", (ROOT / "patches" / "UPSTREAM").read_text(), re.M)[1]


def test_the_version_has_one_place(library):
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert fasa_gguf.__version__ == library.library.version() == version


def test_the_pin_has_one_place(library):
    assert library.library.upstream_version() == upstream()
    assert upstream() not in (ROOT / "pyproject.toml").read_text()
    for path in (ROOT / "Makefile", *(ROOT / "fasa_gguf").rglob("*.py")):
        assert upstream() not in path.read_text(), f"{path.relative_to(ROOT)} repeats the version of patches/UPSTREAM"
