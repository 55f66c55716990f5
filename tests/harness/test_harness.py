"""The reference harness: its decoder against llama.cpp, its FASA against reference.py and the library, the methods on planted keys."""

import json

import numpy as np
import pytest

from fasa_gguf import FasaError, FasaParams
from fasa_gguf import reference as R
from fasa_gguf.calibrate.gguf import default_corpus
from fasa_gguf.cli import main as cli
from fasa_gguf.gguf.file import GGUFFile
from fasa_gguf.gguf.shape import model_shape
from fasa_gguf.profile.embed import rewrite
from fasa_gguf.profile.profile import Profile
from fasa_gguf.speed.random_model import synthetic_profile

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'fasa_gguf[harness]'")

from fasa_gguf.harness import compare as C  # noqa: E402
from fasa_gguf.harness.calibrate import Knowledge, rank_ca, rank_channels, read_text  # noqa: E402
from fasa_gguf.harness.decoder import Decoder, Shape, Tail  # noqa: E402
from fasa_gguf.harness.methods import METHODS, parse_spec, spec_text  # noqa: E402
from fasa_gguf.harness.report import loss_text  # noqa: E402
from fasa_gguf.harness.selection import mass_count, quantize_k_dom, quantize_query, top  # noqa: E402

SHAPE = Shape(n_layer=1, n_head=4, n_head_kv=2, head_dim=16, n_rot=16)
N_KV, N_QUERY, BUDGET = 300, 6, 60
TAIL = Tail.make(SHAPE, N_KV - N_QUERY, N_QUERY)


pytestmark = pytest.mark.usefixtures("one_torch_thread")


def random_qk(seed=0):
    """q [n_head, N_QUERY, 16] and f16-rounded k [n_head_kv, N_KV, 16], as a cache gives them back."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(4, N_QUERY, 16, generator=g), torch.randn(2, N_KV, 16, generator=g).half().float()


def ranked(seed=0, weights=True):
    """A profile of one layer with shuffled chunks and weights."""
    rng = np.random.default_rng(seed)
    weight = [rng.uniform(0.5, 1.5, (2, 3)).astype(np.float32)] if weights else None
    return Profile(
        [2],
        [8],
        [np.stack([rng.permutation(8) for _ in range(2)]).astype(np.uint16)],
        weight=weight,
        weight_k=3 if weights else 0,
    )


def knowledge(seed=0, **kw):
    rng = np.random.default_rng(seed + 100)
    return Knowledge(
        ranked(seed, **kw),
        [[rng.permutation(8).tolist() for _ in range(4)]],
        [[rng.permutation(16).tolist() for _ in range(2)]],
    )


def masks(spec, q, k, budget=BUDGET, know=None):
    kind, options = parse_spec(spec)
    method = kind(SHAPE, budget, know or knowledge(), **options)
    method.prepare(0, q, k[:, : TAIL.start])
    return method.select(0, q, k, TAIL)


# ---- selection ----


def test_top_takes_forced_then_best_with_ties_to_the_lower_cell():
    score = torch.tensor([[[0.1, 0.5, 0.5, 0.5, 0.2, 0.0]]])
    visible, forced = torch.tensor([[1, 1, 1, 1, 1, 0]]).bool(), torch.tensor([[1, 0, 0, 0, 0, 0]]).bool()
    for count, cells in ((3, [0, 1, 2]), (4, [0, 1, 2, 3]), (100, [0, 1, 2, 3, 4]), (0, [0])):
        assert top(score, visible, forced, count)[0, 0].nonzero()[:, 0].tolist() == cells


@pytest.mark.parametrize("kind", ["f16", "q8", "q4"])
def test_dominant_keys_are_quantised_bit_for_bit(kind):
    rng = np.random.default_rng(1)
    k = rng.standard_normal((200, 16)).astype(np.float32) * rng.uniform(0, 30, (200, 1)).astype(np.float32)
    k[0], k[1, :8], k[2, :2] = 0, 0, (-3, 3)  # a zero row, a zero group, a tie of magnitudes
    dims = np.append(np.arange(14), [-1, -1])
    mine = quantize_k_dom(torch.tensor(np.where(dims >= 0, k[:, np.maximum(dims, 0)], 0)), kind)
    assert np.array_equal(mine.numpy(), R.quantize_k_dom(k, dims, kind))


@pytest.mark.parametrize("kind", ["f16", "q8", "q4"])
def test_queries_are_quantised_bit_for_bit(kind):
    x = np.random.default_rng(2).standard_normal((50, 16)).astype(np.float32)
    x[0], x[1, :8] = 0, 0
    assert np.array_equal(quantize_query(torch.tensor(x), kind).numpy(), R.quantize_query(x, kind))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"k_dom": "q8"},
        {"k_dom": "f16", "k": 2},
        {"mass": 0.5},
        {"mass": 0.8, "floor": 50, "cap": 90},
        {"mass": 0.99, "cap": 70},
        {"weights": False, "sink": 0, "recent": 0},
    ],
)
def test_fasa_selects_the_sets_of_the_reference(options):
    position, counts = np.arange(N_KV), set()
    for seed in range(8):
        q, k = random_qk(seed)
        profile = ranked(seed)
        method = METHODS["fasa"](SHAPE, BUDGET, Knowledge(profile), **options)
        got = method.select(0, q, k, TAIL)
        floor, cap = method.bounds()
        for h in range(2):
            p = FasaParams(
                chunks=method.chunks(),
                budget=BUDGET,
                mass=method.mass,
                floor=floor,
                cap=cap,
                sink=method.sink,
                recent=method.recent,
                k_dom=method.k_dom,
            )
            for t in range(N_QUERY):
                visible = position <= N_KV - N_QUERY + t
                _, cells = R.decode_step(
                    q[2 * h : 2 * h + 2, t].numpy(),
                    k[h].numpy(),
                    k[h].numpy(),
                    position,
                    visible,
                    profile.ranking[0][h],
                    R.chunk_dims(16, 16, "norm"),
                    p,
                    SHAPE.scale,
                    weight=profile.weight[0][h] if method.weights else None,
                )
                counts.add(len(cells))
                for g in (0, 1):
                    assert got[2 * h + g, t].nonzero()[:, 0].tolist() == cells.tolist()
    assert len(counts) > 5 if options.get("mass") == 0.5 else min(counts) >= 50  # an adaptive count moves


def test_a_mass_is_counted_exactly():
    score = torch.tensor([[[0.5, 0.25, 0.125, 0.125]]])
    every, none = torch.ones(1, 4, dtype=torch.bool), torch.zeros(1, 4, dtype=torch.bool)
    for mass, count in ((0.5, 1), (0.51, 2), (0.75, 2), (0.8, 3), (1.0, 4)):
        assert mass_count(score, every, none, 1, mass, 1, 99).item() == count
    last = torch.tensor([[0, 0, 0, 1]]).bool()  # forced ones hold their mass first
    assert (
        mass_count(score, every, last, 1, 0.6, 1, 99).item() == 2
        and mass_count(score, every, last, 1, 0.1, 1, 99).item() == 1
    )


FIXED = [
    "window",
    "random",
    "quest",
    "quest:page=32:shared=1",
    "double-sparsity",
    "double-sparsity:labels=q4:shared=1",
    "sparq",
    "sparq:shared=0",
    "snapkv",
    "snapkv:keep_new=0:shared=1",
    "oracle",
    "oracle-shared",
    "fasa",
    "paper",
]


@pytest.mark.parametrize("spec", FIXED)
def test_budgets_are_met_exactly_and_only_visible_cells_are_attended(spec):
    q, k = random_qk()
    for budget in (37, 60, 128, 297):
        m = masks(spec, q, k, budget)
        seen = TAIL.visible.sum(-1)
        assert (
            m.shape == (4, N_QUERY, N_KV)
            and (m.sum(-1) == seen.clamp(max=budget)).all()
            and not (m & ~TAIL.visible).any()
        )
    forced = TAIL.forced(4, 32)
    assert (masks(spec, q, k, 60) & forced == forced).all() == (spec != "paper")


FINDERS = [s for s in FIXED if s not in ("window", "random")]


def test_a_planted_heavy_token_is_found_by_all_but_the_window():
    for seed in range(3):
        q, k = random_qk(seed)
        needle, way = 77, torch.randn(16, generator=torch.Generator().manual_seed(seed + 50)).sign()
        q, k = 0.3 * q + way, 0.3 * k
        k[:, needle] = 3 * way
        for spec in FINDERS:
            assert masks(spec, q, k)[:, :, needle].all(), spec
        assert not masks("window", q, k)[:, :, needle].any()


def test_a_heavy_token_after_the_prompt_is_lost_to_snapkv_only_without_keep_new():
    tail = Tail.make(SHAPE, 200, 100)
    q, k = torch.randn(4, 100, 16), 0.1 * torch.randn(2, 300, 16)
    for keep, found in ((True, True), (False, False)):
        m = METHODS["snapkv"](SHAPE, 150, recent=8, keep_new=keep)
        m.prepare(0, q[:, :64], k[:, :200])
        assert m.select(0, q, k, tail)[:, 99, 230].all() == found


def test_snapkv_takes_what_the_last_queries_saw_pooled_over_neighbours():
    q, k = torch.zeros(4, 64, 16), torch.zeros(2, TAIL.start, 16)
    q[..., 0], k[:, 100, 0] = 1.0, 100.0
    m = METHODS["snapkv"](SHAPE, 60, sink=0, recent=0, keep_new=False, kernel=5)
    m.prepare(0, q, k)
    assert torch.allclose(m.score[0, 98:103], torch.tensor(32 / 5), atol=1e-3) and m.score[0, 97] < 0.1
    assert m.select(0, q[:, :6], torch.zeros(2, N_KV, 16), TAIL)[:, :, 98:103].all()


def test_quest_bounds_a_page_from_above_and_keeps_the_filling_one():
    q, k = random_qk()
    m = masks("quest:page=8:sink=0:recent=0", q, k, 40)
    for t in range(N_QUERY):
        n = N_KV - N_QUERY + t + 1
        full = n // 8
        pages = k[:, : 8 * full].view(2, full, 8, 16)
        bound = torch.maximum(
            q[:, t, None] * pages.amax(2).repeat_interleave(2, 0), q[:, t, None] * pages.amin(2).repeat_interleave(2, 0)
        ).sum(-1)
        for h in range(4):
            cells = list(range(8 * full, n)) + [
                8 * p + i for p in bound[h].argsort(descending=True).tolist() for i in range(8)
            ]
            assert m[h, t].nonzero()[:, 0].tolist() == sorted(cells[:40])


def test_sparq_reads_the_largest_query_dimensions():
    q, k = torch.zeros(4, N_QUERY, 16), torch.zeros(2, N_KV, 16)
    q[..., 3], q[..., 5] = 1.0, 0.1
    k[:, 50, 3], k[:, 60, 5], k[:, 70, 9] = 1.0, 100.0, 100.0
    m = masks("sparq:r=1:sink=0:recent=0", q, k, 1)
    assert m[:, :, 50].all() and m.sum() == 4 * N_QUERY  # r=1 does not see what the oracle takes
    assert masks("oracle:sink=0:recent=0", q, k, 1)[:, :, 60].all()


def test_double_sparsity_scores_with_its_channels_only():
    q, k = random_qk()
    k[:, 50, 3], q[..., 3] = 50.0, 1.0
    for channels, found in (
        ([3] + [c for c in range(16) if c != 3], True),
        ([c for c in range(16) if c != 3] + [3], False),
    ):
        m = masks("double-sparsity:channels=4", q, k, 38, Knowledge(channels=[[channels] * 2]))
        assert m[:, :, 50].all() == found


def test_specs():
    kind, options = parse_spec("quest:page=8:shared=1")
    assert (kind.name, options) == ("quest", {"page": 8, "shared": True}) and spec_text(
        kind, options
    ) == "quest:page=8:shared=1"
    assert spec_text(METHODS["fasa"], {"k": 0, "mass": 0.96, "sink": 4}) == "fasa:mass=0.96"
    for spec, message in (
        ("magic", "--methods 'magic': expected one of dense, window"),
        ("quest:pages=8", "method quest: unknown option 'pages'; known are"),
        ("quest:page=x", "method quest: option page: expected a whole number, found 'x'"),
        ("fasa:weights=2", "option weights: expected 0 or 1, found '2'"),
    ):
        with pytest.raises(FasaError, match=message):
            parse_spec(spec)
    with pytest.raises(
        FasaError, match="method window: budget 36: expected at least 37, 4 sinks, 32 recent tokens and one more"
    ):
        METHODS["window"](SHAPE, 36)
    with pytest.raises(FasaError, match="method fasa-mass: its mass comes from tuning"):
        METHODS["fasa-mass"](SHAPE, 256, knowledge())
    with pytest.raises(FasaError, match="method fasa needs a FASA profile; run `fasa-gguf embed-profile"):
        METHODS["fasa"](SHAPE, 256).select(0, *random_qk(), TAIL)


def test_byte_models():
    wide = Shape(1, 4, 2, 64, 64)
    know = Knowledge(ca=[[list(range(32)), list(range(4, 32)) + [0, 1, 2, 3], list(range(32)), list(range(32))]])
    for spec, read in (
        ("window", 0),
        ("snapkv", 0),
        ("quest", 16),
        ("quest:page=8", 32),
        ("double-sparsity", 32),
        ("double-sparsity:channels=32:labels=q4", 24),
        ("fasa", 18),
        ("fasa:k_dom=f16:k=8", 32),
        ("fasa:k_dom=q8:k=3", 10),
        ("oracle", 128),
        ("paper", 2 * 2 * (12 + 8) / 2),
    ):
        kind, options = parse_spec(spec)
        m = kind(wide, 256, know, **options)
        assert m.score_bytes(1000) == 1000 * read, spec
    assert wide.row_bytes == 256


# ---- calibration ----


def test_contextual_agreement_is_the_reference():
    q, k = random_qk(2)  # no two chunks of a head have as many hits
    got = rank_ca(q, k, N_KV - N_QUERY, SHAPE, 40)
    for h in range(4):
        want = R.rank_ca(
            q[h : h + 1].numpy(),
            k[h // 2].numpy(),
            np.arange(N_KV - N_QUERY, N_KV),
            R.chunk_dims(16, 16, "norm"),
            SHAPE.scale,
            40,
        )
        assert got[h] == want.tolist()


def test_label_channels_are_the_largest_products():
    q, k = 0.1 * torch.ones(4, 20, 16), 0.1 * torch.ones(2, 20, 16)
    k[0, :, 7], q[2:, :, 2], k[1, :, 9] = 5.0, -2.0, 1.0
    order = rank_channels(q, k, SHAPE)
    assert order[0][0] == 7 and order[1][:2] == [2, 9]


# ---- the decoder ----


@pytest.fixture(scope="module")
def decoder(tiny):
    return Decoder(tiny, kv_type="f32")


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(5).integers(3, 259, 401).tolist()


def method_of(decoder, spec, budget, know=None):
    kind, options = parse_spec(spec)
    return kind(decoder.shape, budget, know, **options)


@pytest.mark.parametrize("rope_base, kv_type, most", [(None, "f32", 1e-3), (500000.0, "f16", 1e-2)])
def test_dense_logits_are_llama_cpps(library, tmp_path, tokens, rope_base, kv_type, most):
    """Weights in f32. With an f16 cache the difference is llama.cpp's: its queries are rounded to f16 where they meet the keys."""
    from tiny_gguf import write_tiny

    from fasa_gguf.session import Session

    path = tmp_path / "t.gguf"
    write_tiny(path, rope_base=rope_base)
    with Session(path, n_ctx=512, n_threads=1, flash_attn=kv_type == "f16", type_k=kv_type, type_v=kv_type) as s:
        want = s.decode(tokens[:400], 0, logits="all")[300:]
    d = Decoder(path, kv_type=kv_type)
    got, counters = d.decode(d.prefill(tokens[:300]), tokens[300:400], METHODS["dense"](d.shape, 0))
    assert want.std() > 1 and np.abs(got.numpy() - want).max() < most
    assert (
        counters["tokens_attended"] / counters["lists"] == 350.5
        and counters["bytes_fac"] == counters["bytes_dense"] == 3 * 2 * 35050 * 64
    )


def all_known(decoder, tokens):
    found = read_text(decoder, tokens[:300], 40, 16)
    return Knowledge(synthetic_profile([2] * 3, [8] * 3, seed=1), found["ca"], found["channels"])


def test_a_budget_of_the_whole_context_is_dense(decoder, tokens):
    prefix, know = decoder.prefill(tokens[:380]), all_known(decoder, tokens)
    dense, _ = decoder.decode(prefix, tokens[380:400], METHODS["dense"](decoder.shape, 0))
    for spec in FIXED:
        got, counters = decoder.decode(prefix, tokens[380:400], method_of(decoder, spec, 400, know))
        assert torch.equal(got, dense) and counters["tokens_attended"] == counters["tokens_visible"], spec


@pytest.mark.parametrize("spec", ["fasa", "quest:page=8", "snapkv", "sparq", "fasa:mass=0.7"])
def test_the_batched_tail_is_decoding_token_by_token(decoder, tokens, spec):
    """A later token changes nothing before it, and a token's keys come from its sparse hidden states."""
    prefix, know = decoder.prefill(tokens[:380]), all_known(decoder, tokens)
    whole, _ = decoder.decode(prefix, tokens[380:392], method_of(decoder, spec, 60, know))
    part, _ = decoder.decode(prefix, tokens[380:386], method_of(decoder, spec, 60, know))
    other, _ = decoder.decode(prefix, [7, *tokens[381:392]], method_of(decoder, spec, 60, know))
    assert torch.allclose(whole[:6], part, atol=1e-4) and (whole[-1] - other[-1]).abs().max() > 1e-3


def test_bytes_and_tokens_are_counted(decoder, tokens):
    prefix, know = decoder.prefill(tokens[:380]), all_known(decoder, tokens)
    _, c = decoder.decode(prefix, tokens[380:400], method_of(decoder, "fasa", 60, know))
    seen = sum(range(381, 401))
    assert (
        c["tokens_attended"] / c["lists"] == 60
        and c["bytes_fac"] == 3 * 2 * 20 * 60 * 64
        and c["bytes_tip"] == 3 * 2 * seen * 6
    )
    assert c["bytes_dense"] == 3 * 2 * seen * 64 and c["bytes_k_dom"] / c["bytes_kv"] == 6 / 64
    _, own = decoder.decode(prefix, tokens[380:400], method_of(decoder, "oracle", 60, know))
    assert (
        own["tokens_attended"] / own["lists"] == 60 and 60 < own["bytes_fac"] / (3 * 2 * 20 * 64) <= 120
    )  # two heads' rows, each once
    paper = method_of(decoder, "paper:dense_layers=1", 60, know)
    _, first = decoder.decode(prefix, tokens[380:400], paper)
    assert first["tokens_attended"] == 4 * (seen + 2 * 20 * 60)
    assert first["bytes_tip"] == pytest.approx(2 * 2 * seen * paper.index_bytes(), abs=40)  # layer 0 chose nothing


def test_the_decoder_refuses(tiny, tmp_path):
    from tiny_gguf import write_tiny

    write_tiny(tmp_path / "q.gguf", arch="qwen2")
    with pytest.raises(FasaError, match="architecture qwen2: the harness runs Llama-family models only"):
        Decoder(tmp_path / "q.gguf")
    if not torch.cuda.is_available():
        with pytest.raises(FasaError, match="--device cuda: torch finds no CUDA device here; use --device cpu"):
            Decoder(tiny, "cuda")


# ---- compare ----


@pytest.fixture(scope="module")
def text():
    return default_corpus()[1][:40000]


@pytest.fixture(scope="module")
def profiled(tiny, tmp_path_factory):
    profile = synthetic_profile(*model_shape(GGUFFile(tiny)), seed=2)
    return str(rewrite(tiny, profile, tmp_path_factory.mktemp("harness") / "tiny.gguf"))


def setup(model, text, **kw):
    kw = {
        "methods": ["window", "fasa"],
        "budgets": [60],
        "windows": 2,
        "window": 300,
        "score": 20,
        "threads": 1,
        "profile": C.find_profile(None, model),
        **kw,
    }
    return C.Setup(model, text, **kw)


def test_fasa_agrees_with_the_shipped_library(library, decoder, profiled, text, tmp_path):
    """f32 weights, f16 cache: what is left is the rounding of queries to f16 and sums in another order."""
    out = C.compare(
        setup(profiled, text, methods=["fasa", "fasa:mass=0.8:floor=40:cap=200", "fasa:k=5:k_dom=q8", "fasa:shared=0"]),
        tmp_path,
        library=True,
    )
    assert [r["spec"] for r in out["library"]] == [
        "dense",
        "fasa",
        "fasa:mass=0.8:floor=40:cap=200",
        "fasa:k=5:k_dom=q8",
        "fasa:shared=0",
    ]
    for ours, theirs in zip(out["rows"][1:], out["library"][1:]):
        assert theirs["kl"] > 0.02 and abs(ours["kl"] / theirs["kl"] - 1) < 0.02, ours["spec"]
        assert abs(ours["ppl_ratio"] - theirs["ppl_ratio"]) < 4e-3
        assert abs(ours["tokens_attended"] / theirs["tokens_attended"] - 1) < 2e-3
        index = C.Job(ours["spec"], 60).method(decoder, Knowledge(synthetic_profile([2] * 3, [8] * 3))).index_bytes()
        read = theirs["kv_bytes_per_token"] - 3 * 2 * index * (
            512 - 290.5
        )  # the library's view of the cache has 512 cells
        if ours["spec"] != "fasa:shared=0":  # the library reads a row for every head that chose it
            assert abs(3 * ours["bytes_per_token"] / read - 1) < 2e-3
    assert "## FASA here and in the shipped library" in (tmp_path / "results.md").read_text()


def test_results(library, profiled, text, tmp_path, monkeypatch):
    told = []
    methods = ["window", "oracle", "fasa", "fasa:mass=0.9", "double-sparsity", "paper", "snapkv:sink=2"]
    out = C.compare(
        setup(profiled, text, methods=methods, budgets=[50, 100]), tmp_path, report=lambda *x: told.append(x)
    )
    assert out == json.loads((tmp_path / "results.json").read_text()) and told[-1] == ("comparing", 28, 28)
    rows = {(r["spec"], r["budget"]): r for r in out["rows"]}
    assert len(rows) == 14 and rows["dense", 0]["kl"] == 0 and ("fasa:mass=0.9", 0) in rows
    assert all(r["tokens_attended"] == b for (_, b), r in rows.items() if b)
    assert (
        rows["window", 100]["bytes_per_token"] == 2 * 100 * 64 and rows["window", 50]["kl"] > rows["oracle", 50]["kl"]
    )
    assert rows["fasa", 50]["bytes_per_token"] == 2 * (50 * 64 + 6 * np.mean(np.arange(281, 301)))
    config = out["config"]
    assert (
        config["windows"] == 2
        and config["budgets"] == [50, 100]
        and config["shape"]["n_head_kv"] == 2
        and not config["tuned"]
    )
    markdown = (tmp_path / "results.md").read_text()
    assert f"| oracle | 50 | 50.0 | {rows['oracle', 50]['ppl']:.3f} | {loss_text(rows['oracle', 50])} |" in markdown
    assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in ("budget.png", "bytes.png"))
    # finished: nothing is decoded and no library is needed; one more budget runs only itself
    calls, decode = [], Decoder.decode
    monkeypatch.setattr(Decoder, "decode", lambda self, p, t, m: calls.append(m.name) or decode(self, p, t, m))
    monkeypatch.setattr(C, "Session", None)
    assert C.compare(setup(profiled, text, methods=methods, budgets=[50, 100]), tmp_path) == out and calls == []
    C.compare(setup(profiled, text, methods=methods, budgets=[50, 70]), tmp_path)
    assert calls == ["dense", "window", "oracle", "fasa", "double-sparsity", "paper", "snapkv"] * 2
    with pytest.raises(FasaError, match="was begun with other settings .score: 20 there, 19 here"):
        C.compare(setup(profiled, text, methods=methods, score=19), tmp_path)


def test_an_interrupted_comparison_goes_on_to_the_same_figures(library, profiled, text, tmp_path, monkeypatch):
    whole = C.compare(setup(profiled, text), tmp_path / "a")
    assert C.compare(setup(profiled, text), tmp_path / "b", plan_only=True) is None
    monkeypatch.setattr(C, "Session", None)  # the windows are there already
    calls, decode = [], Decoder.decode

    def stop(self, prefix, tokens, method):
        calls.append(method.name)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return decode(self, prefix, tokens, method)

    monkeypatch.setattr(Decoder, "decode", stop)
    with pytest.raises(KeyboardInterrupt):
        C.compare(setup(profiled, text), tmp_path / "b")
    assert C.compare(setup(profiled, text), tmp_path / "b")["rows"] == whole["rows"]
    assert calls == ["dense", "window", "fasa", "dense", "window", "dense", "window", "fasa"]


def test_tuning(library, profiled, text, tmp_path):
    s = setup(
        profiled,
        text,
        methods=["quest", "quest:page=64", "sparq", "window", "fasa", "fasa-mass"],
        budgets=[60, 120],
        tune=text[10000:],
        tune_windows=1,
    )
    out = C.compare(s, tmp_path)
    specs = {(r["method"], r["budget"]): r["spec"] for r in out["rows"]}
    trials = {(t["spec"], t["budget"]): t for t in out["trials"]}
    for name, n in (("quest", 6), ("fasa", 5)):
        for b in (60, 120):
            tried = [t for t in out["trials"] if t["spec"].split(":")[0] == name and t["budget"] == b]
            best = min((t for t in tried if t["score_share"] <= 0.1251), key=lambda t: t["kl"])
            assert len(tried) == n and trials[best["spec"], b]["kl"] <= min(
                t["kl"] for t in tried if t["score_share"] <= 0.125
            )
            assert best["spec"] in [r["spec"] for r in out["rows"] if r["budget"] == b]
    for b in (60, 120):  # a mean within the budget, and near it
        t = trials[specs["fasa-mass", b], b]
        assert 0.9 * b < t["tokens"] <= b and t["spec"].startswith("fasa-mass:mass=0.")
        assert all(
            other["tokens"] <= t["tokens"] or other["tokens"] > b
            for (spec, bb), other in trials.items()
            if spec.startswith("fasa-mass") and bb == b
        )
    assert specs["window", 60] == "window" and out["config"]["tuned"]
    assert ("quest:page=64", 60) in {(r["spec"], r["budget"]) for r in out["rows"]}  # fixed by the user: not tuned


def test_the_command(library, profiled, text, tmp_path, capsys):
    file = tmp_path / "t.txt"
    file.write_text(text)
    base = [
        "compare",
        profiled,
        "-f",
        str(file),
        "--windows",
        "1",
        "--window",
        "300",
        "--score",
        "10",
        "--budgets",
        "50",
        "-t",
        "1",
        "-o",
        str(tmp_path / "d"),
    ]
    assert cli.main([*base, "--methods", "window,quest:page=8", "--plan"]) == 0
    assert (
        capsys.readouterr().out == ""
        and (tmp_path / "d" / "samples.jsonl").exists()
        and not (tmp_path / "d" / "results.md").exists()
    )
    assert cli.main([*base, "--methods", "window,quest:page=8"]) == 0
    assert [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()] == [
        "method",
        "---",
        "dense",
        "window",
        "quest:page=8",
    ]
    assert cli.main([*base, "--methods", "window", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["texts"] == {"text": "t.txt"}
    for extra, message in (
        (["--methods", "magic"], "--methods 'magic': expected one of"),
        (["--methods", "window", "--budgets", "30"], "method window: budget 30: expected"),
        (["--methods", "fasa-mass"], "fasa-mass: its mass comes from tuning; give --tune TEXT"),
    ):
        assert cli.main([*base, *extra]) == 1 and message in capsys.readouterr().err


def test_a_missing_torch_is_one_sentence(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    assert cli.main(["compare", "m", "-f", "t", "-o", str(tmp_path)]) == 1
    assert "the comparison needs torch; run `pip install 'fasa_gguf[harness]'`" in capsys.readouterr().err
