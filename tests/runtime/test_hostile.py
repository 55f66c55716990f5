"""What must not end the process: profiles made by hand, NULL pointers, absurd numbers. Each is one FasaError."""

import re
from dataclasses import replace

import numpy as np
import pytest
from paths import ROOT
from profiles import full_profile

from fasa_gguf import FasaError, FasaParams
from fasa_gguf.session import Session


@pytest.fixture(scope="module")
def session(library, tiny):
    with Session(tiny, n_ctx=256, n_batch=256, n_threads=1) as s:
        s.fasa.set_profile(full_profile())
        yield s


# ---- profiles made by hand ----

P = full_profile()
TWICE = [np.array([[0, 0, *range(2, 8)], range(8)])] * 3
WRONG = {
    "weights of one layer": ({"weight": P.weight[:1]}, "weight: expected an array for each layer, found 1 arrays"),
    "empty weights": (
        {"weight": [P.weight[0], np.zeros((0, 0), np.float32), P.weight[2]]},
        r"weight of layer 1: expected shape \[2, 2\], found \[0, 0\]",
    ),
    "no weights": ({"weight": None}, "weight: expected arrays, since weight_k is 2; found none"),
    "weight_k above the arrays": ({"weight_k": 3}, r"weight of layer 0: expected shape \[2, 3\], found \[2, 2\]"),
    "weight_k 2^31": ({"weight_k": 2**31}, r"weight of layer 0: expected shape \[2, 2147483648\]"),
    "weight_k 2^64": ({"weight_k": 2**64}, "weight_k: expected whole numbers from 0 to 4294967295, found"),
    "weight_k -1": ({"weight_k": -1}, "weight_k: expected whole numbers from 0 to 4294967295, found"),
    "weights beyond the chunks": (
        {f"{name}weight": [np.ones((2, 9), np.float32)] * 3 for name in ("", "ahead_")} | {"weight_k": 9},
        "layer 0: the profile has weights of 9 chunks, the layer 8 chunks",
    ),
    "weight NaN": (
        {"weight": [w * np.nan for w in P.weight]},
        "weight: expected finite numbers, found -?nan at index 0",
    ),
    "weight beyond f32": (
        {"weight": [w.astype(float) * 1e200 for w in P.weight]},
        "weight: expected finite numbers, found inf",
    ),
    "weight text": ({"weight": [["a", "b"]] * 3}, "weight of layer 0: expected numbers, found others: could not"),
    "chunk ids that wrap around": (
        {"ranking": [r.astype(np.int64) + 65536 for r in P.ranking]},
        "ranking of layer 0: expected whole numbers from 0 to 65535, found",
    ),
    "negative chunk ids": (
        {"ranking": [-r.astype(np.int64) - 1 for r in P.ranking]},
        "ranking of layer 0: expected whole numbers from 0 to 65535, found",
    ),
    "chunk ids as floats": (
        {"ranking": [r + 0.5 for r in P.ranking]},
        "ranking of layer 0: expected whole numbers from 0 to 65535, found",
    ),
    "chunk ids twice": ({"ranking": TWICE}, "layer 0, KV head 0, rank 1: chunk 0 is ranked twice"),
    "ranking of one layer": ({"ranking": P.ranking[:1]}, "ranking: expected an array for each layer, found 1 arrays"),
    "ranking of one head": (
        {"ranking": [r[:1] for r in P.ranking]},
        r"ranking of layer 0: expected shape \[2, 8\], found \[1, 8\]",
    ),
    "n_head_kv short": (
        {"n_head_kv": P.n_head_kv[:2]},
        r"one number each for every layer, found shapes \[2\] and \[3\]",
    ),
    "n_chunk short": ({"n_chunk": P.n_chunk[:2]}, r"one number each for every layer, found shapes \[3\] and \[2\]"),
    "n_chunk 2^32 + 8": ({"n_chunk": [2**32 + 8] * 3}, "n_chunk: expected whole numbers from 0 to 4294967295, found"),
    "n_chunk 10^30": ({"n_chunk": [10**30] * 3}, "n_chunk: expected whole numbers from 0 to 4294967295, found"),
    "ahead short": ({"ahead": P.ahead[:2]}, "ahead: expected 3 numbers for this shape, found 2"),
    "ahead 256": ({"ahead": [0, 1, 256]}, "ahead: expected whole numbers from 0 to 255, found 256"),
    "ahead ranking of one head": (
        {"ahead_ranking": [r[:1] for r in P.ranking]},
        r"ahead_ranking of layer 0: expected shape \[2, 8\], found \[1, 8\]",
    ),
    "ahead chunk ids twice": ({"ahead_ranking": TWICE}, "layer 0, KV head 0, rank 1: chunk 0 is ranked twice"),
    "ahead weights of one layer": (
        {"ahead_weight": P.ahead_weight[:1]},
        "ahead_weight: expected an array for each layer, found 1 arrays",
    ),
    "ahead weight NaN": (
        {"ahead_weight": [w * np.nan for w in P.weight]},
        "ahead_weight: expected finite numbers, found -?nan at index 0",
    ),
    "ahead ranking without weights": (
        {"ahead_weight": None},
        "ahead_weight: expected arrays where ahead_ranking and weight are, and only there; found none",
    ),
    "ahead weights without a ranking": (
        {"ahead_ranking": None},
        "ahead_weight: expected arrays where ahead_ranking and weight are, and only there; found some",
    ),
    "layer_miss short": ({"layer_miss": P.layer_miss[:2]}, "layer_miss: expected 3 numbers for this shape, found 2"),
    "layer_miss long": ({"layer_miss": np.ones(4)}, "layer_miss: expected 3 numbers for this shape, found 4"),
    "layer_miss NaN": ({"layer_miss": np.ones(3) * np.nan}, "layer 0: layer_miss is -?nan, and must be above 0"),
    "mean_budget 2^32": ({"mean_budget": {2**32 + 100: 0.5}}, "mean_budget: expected whole numbers from 0 to"),
    "mean_budget NaN": ({"mean_budget": {100: np.nan}}, "entry 0 of the table of mean budgets"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_profile_made_by_hand_is_refused(session, name):
    changes, message = WRONG[name]
    with pytest.raises(FasaError, match=message):
        session.fasa.set_profile(replace(full_profile(), **changes))
    session.fasa.set_params(FasaParams(min_context=0, mean_budget=100))  # what was there stays
    session.fasa.set_params(None)


def test_values_of_other_types_are_taken(session):
    p = full_profile()
    wide = replace(
        p,
        n_head_kv=np.array(p.n_head_kv),
        ranking=[r.astype(np.int64).tolist() for r in p.ranking],
        weight=[w.astype(np.float64) for w in p.weight],
        weight_k=np.int64(2),
    )
    session.fasa.set_profile(wide)


def test_c_is_told_every_length(library, session):
    ffi, lib = library.library.api()
    from fasa_gguf.runtime.attach import Attached

    def refused(message, **fields):
        a = Attached(full_profile())
        for name, value in fields.items():
            setattr(a.struct, name, value)
        assert lib.fasa_set_profile(session.fasa._ctx, a.struct) == -1
        assert re.search(message, library.library.last_error()), library.library.last_error()

    for name, n in (("ranking", 48), ("weight", 12), ("layer_miss", 3)):
        for wrong in (1, n - 1, n + 1, 2**32 + n, 2**64 - 1):
            refused(f"{name}: expected {n} numbers for this shape, found {wrong}", **{f"n_{name}": wrong})
        refused(f"{name}: expected {n} numbers, found NULL", **{name: ffi.NULL})
    for wrong in (1, 2, 4, 2**32 - 1):
        refused(f"ahead: expected 3 numbers for this shape, found {wrong}", n_ahead=wrong)
    for name in ("n_head_kv", "n_chunk", "ahead"):
        refused(f"{name}: expected 3 numbers, found NULL", **{name: ffi.NULL})
    for name in ("mean_budget", "mean_budget_mass"):
        refused(f"{name}: expected 2 numbers, found NULL", **{name: ffi.NULL})
    refused("layer 0: the profile has weights of 2147483648 chunks", weight_k=2**31)
    refused("weight: expected 0 numbers for this shape, found 12", weight_k=0)
    refused("for a model of 4294967295 layers, this one has 3", n_layer=2**32 - 1)
    refused("expected a struct of .* bytes, found 8", size=8)


# ---- the C interface ----

NEEDS_NOTHING = {"fasa_version", "fasa_upstream_version", "fasa_error", "fasa_params_default"}
ARE_NUMBERS = {"fasa_default_chunks", "fasa_set_mode", "fasa_pool_bytes", "fasa_reason_text"}
TELL_A_REASON = {
    "fasa_layer_reason",
    "fasa_layer_reason_code",
    "fasa_layer_ahead_code",
    "fasa_step_reason",
    "fasa_step_reason_code",
    "fasa_prefill_reason_code",
}
MAY_BE_NULL = {("fasa_set_observer", 1), ("fasa_set_observer", 2)}


def functions():
    text = "".join(path.read_text() for path in sorted((ROOT / "native").glob("fasa*.h")))
    return re.findall(r"^FASA_API .*?\b(fasa_\w+)\(", text, re.M)


def test_the_lists_above_know_every_function():
    assert set(functions()) > NEEDS_NOTHING | ARE_NUMBERS | TELL_A_REASON and len(functions()) > 20


@pytest.mark.parametrize("name", [f for f in functions() if f not in NEEDS_NOTHING | ARE_NUMBERS])
def test_null_is_an_error(library, session, name):
    ffi, lib = library.library.api()
    f, keep = getattr(lib, name), []

    def value(kind):
        if kind.kind != "pointer":
            return ffi.NULL if kind.kind == "function" else 1
        if kind.cname == "char *":
            keep.append(ffi.new("char[]", b"CPU"))
        elif kind.item.cname == "fasa_profile":
            from fasa_gguf.runtime.attach import Attached

            keep.append(Attached(full_profile()))
            return keep[-1].struct
        elif "llama_context" in kind.cname:
            return session.fasa._ctx
        elif kind.item.kind == "struct":
            keep.append(library.library.struct(kind.item.cname))
        elif kind.item.kind == "void":
            return ffi.NULL
        else:
            keep.append(ffi.new(kind.item.cname + "[16]"))
        return keep[-1]

    kinds = ffi.typeof(f).args
    for at, kind in enumerate(kinds):
        if kind.kind != "pointer" or (name, at) in MAY_BE_NULL:
            continue
        got = f(*[ffi.NULL if i == at else value(k) for i, k in enumerate(kinds)])
        if name in TELL_A_REASON:
            code = got if name.endswith("_code") else ffi.string(got).decode()
            assert code in (lib.FASA_REASON_UNKNOWN_CONTEXT, "this context has no KV cache that FASA knows")
        else:
            assert got == -1 and re.search("expected a (pointer|struct), found NULL", library.library.last_error())


def test_absurd_numbers_are_refused(library, session):
    ffi, lib = library.library.api()
    rate = ffi.new("double *")
    for n in (-1, 0, 513, 10**6):
        with pytest.raises(FasaError, match=f"copy rate: n_threads: expected a number from 1 to 512, found {n}"):
            library.library.check(lib.fasa_copy_rate(b"CPU", n, 1 << 20, rate))
    with pytest.raises(FasaError, match="copy rate: expected 4 to"):
        library.library.check(lib.fasa_copy_rate(b"CPU", 1, 2**63, rate))
    with pytest.raises(FasaError, match="cells cannot be filled"):
        session.fasa.fill_random(2**32 - 1)
    p = ffi.new("fasa_params *", lib.fasa_params_default())
    p.enabled, p.chunks = 1, 2**31
    with pytest.raises(FasaError, match="chunks: expected a whole number from 0 to 2147483647, found 2147483648"):
        library.library.check(lib.fasa_set_params(session.fasa._ctx, p))
    with pytest.raises(
        FasaError, match="setting chunks: expected a whole number from 0 to 2147483647, found 2147483648"
    ):
        session.fasa.set_params(FasaParams(chunks=2**31))
    assert lib.fasa_default_chunks(2**31) == 3 * 2**28 and lib.fasa_default_chunks(2**32 - 1) == 1610612732


def test_ops_refuse_what_they_cannot_read(library):
    z = np.zeros
    case = {
        "q": z((1, 1, 2, 64)),
        "k": z((1, 8, 1, 64)),
        "v": z((1, 8, 1, 64)),
        "mask": z((1, 1, 8)),
        "dims": np.arange(8)[None],
        "weight": z((1, 8)),
        "forced": z((1, 1, 1)),
        "budget": 4,
        "scale": 1.0,
    }
    library.ops.op_run(**case)
    for message, changes in (
        ("n_threads: expected a number from 1 to 512, found 1000000", {"n_threads": 10**6}),
        ("dimension 64, outside of -1 to 63", {"dims": np.array([[64, *range(7)]])}),
        ("dimension -2, outside of -1 to 63", {"dims": np.array([[-2, *range(7)]])}),
        ("rows of 64 and 64 values cannot be stored as i32 and f16", {"type_k": "i32"}),
        ("rows of 64 and 64 values cannot be stored as f16 and q4_K", {"type_v": "q4_K"}),
        ("n_hadamard 24 must be a power of 2 that divides the head dimension 64", {"n_hadamard": 24}),
        ("n_hadamard -2 must be", {"n_hadamard": -2}),
        ("expected a mass from 0 to 1 and 1 <= floor <= cap, found nan", {"mass": np.nan}),
        ("expected a mass from 0 to 1 and 1 <= floor <= cap, found 0.5, 9 and 8", {"mass": 0.5, "floor": 9, "cap": 8}),
        ("mask: expected a pointer, found NULL", {"mask": None}),
        ("mode: expected a number from 0 to 1, found 7", {"mode": 7}),
    ):
        with pytest.raises(FasaError, match=message):
            library.ops.op_run(**{**case, **changes})


def test_the_ranking_refuses_what_it_cannot_rank(library):
    dims, pos = np.array([[0, 1], [2, 3]]), [2]
    good = {"q": np.ones((1, 1, 4)), "k": np.ones((3, 4)), "n_threads": 1}
    for message, changes in (
        ("q, q_est, k, scale or soft_cap is not finite", {"q": np.full((1, 1, 4), np.nan)}),
        ("q, q_est, k, scale or soft_cap is not finite", {"k": np.full((3, 4), np.inf)}),
        ("q, q_est, k, scale or soft_cap is not finite", {"q_est": np.full((1, 1, 4), np.inf)}),
        (r"expected q_est of shape \[1, 1, 4\], found \[4\]", {"q_est": np.ones(4)}),
    ):
        case = {**good, **changes}
        with pytest.raises(FasaError, match=message):
            library.ops.rank_recall(
                case.pop("q"), case.pop("k"), pos, dims, n_rank=1, budget=1, sink=0, recent=0, scale=1.0, **case
            )


@pytest.mark.parametrize(
    "value",
    [float("inf"), -float("inf"), float("nan"), 10**400, "inf", "nan", "9" * 5000, 2**31, -2, 1.5, None, [], b"x"],
)
@pytest.mark.parametrize("name", ["budget", "row_cache", "mass", "k_dom"])
def test_settings_by_name_refuse_what_is_no_number(name, value):
    with pytest.raises(FasaError, match=rf"setting {name}: expected "):
        FasaParams.from_mapping({name: value}, "profile defaults")
