"""The policies: selection against reference.py, planted keys, budgets, specs and bytes."""

import numpy as np
import pytest

from fasa_gguf import FasaError, FasaParams
from fasa_gguf import reference as R

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'fasa_gguf[harness]'")

from policies import BUDGET, FIXED, N_KV, N_QUERY, SHAPE, TAIL, knowledge, masks, random_qk, ranked  # noqa: E402

from fasa_gguf.harness.calibrate import Knowledge  # noqa: E402
from fasa_gguf.harness.decoder import Shape, Tail  # noqa: E402
from fasa_gguf.harness.policies import POLICIES, parse_spec, spec_text  # noqa: E402
from fasa_gguf.harness.selection import group_score, mass_count, quantize_k_dom, quantize_query, top  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")


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


@pytest.mark.parametrize("spread", [1.0, 15.0, 40.0])
def test_scores_far_behind_the_best_rank_as_in_the_reference(spread):
    """Between 50 and 100 nats behind the best a softmax in f32 would be 0, and ranked by cell."""
    rng = np.random.default_rng(5)
    est = (rng.standard_normal((4, 3, 700)) * spread).astype(np.float32)
    visible = np.arange(700) <= np.arange(600, 603)[:, None]
    got = group_score(torch.from_numpy(est), torch.from_numpy(visible), 2).numpy()
    want = np.array([[R.group_score(est[2 * h : 2 * h + 2, t], visible[t]) for t in range(3)] for h in range(2)])
    assert (spread < 15) == (got[..., :600] > 1e-30).all()
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=0)
    chosen = top(torch.from_numpy(got), torch.from_numpy(visible), torch.zeros(3, 700, dtype=torch.bool), 300)
    for h, t in np.ndindex(2, 3):
        best = np.lexsort((np.arange(700), -np.where(visible[t], want[h, t], -1)))[:300]
        assert set(best) == set(np.flatnonzero(chosen[h, t].numpy()))


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
        policy = POLICIES["fasa"](SHAPE, BUDGET, Knowledge(profile), **options)
        got = policy.select(0, q, k, TAIL)
        floor, cap = policy.bounds()
        for h in range(2):
            p = FasaParams(
                chunks=policy.chunks(),
                budget=BUDGET,
                mass=policy.mass,
                floor=floor,
                cap=cap,
                sink=policy.sink,
                recent=policy.recent,
                k_dom=policy.k_dom,
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
                    weight=profile.weight[0][h] if policy.weights else None,
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
        m = POLICIES["snapkv"](SHAPE, 150, recent=8, keep_new=keep)
        m.prepare(0, q[:, :64], k[:, :200])
        assert m.select(0, q, k, tail)[:, 99, 230].all() == found


def test_snapkv_takes_what_the_last_queries_saw_pooled_over_neighbours():
    q, k = torch.zeros(4, 64, 16), torch.zeros(2, TAIL.start, 16)
    q[..., 0], k[:, 100, 0] = 1.0, 100.0
    m = POLICIES["snapkv"](SHAPE, 60, sink=0, recent=0, keep_new=False, kernel=5)
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


def test_unique_scores_a_page_by_the_mean_and_deviation_of_its_keys():
    q, k = random_qk()
    m = masks("unique:page=8:offset=0.5:sink=0:recent=0", q, k, 40)
    for t in range(N_QUERY):
        n = N_KV - N_QUERY + t + 1
        full = n // 8
        for h in range(4):
            x, keys = q[h, t].double().numpy(), k[h // 2, : 8 * full].double().numpy().reshape(full, 8, 16)
            score = keys.mean(1) @ x + 0.5 * np.sqrt(keys.var(1)) @ np.abs(x)  # [full]
            best = np.argsort(-score, kind="stable").tolist()
            cells = [*range(8 * full, n), *(8 * p + i for p in best for i in range(8))]
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
    assert spec_text(POLICIES["fasa"], {"k": 0, "mass": 0.96, "sink": 4}) == "fasa:mass=0.96"
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
        POLICIES["window"](SHAPE, 36)
    with pytest.raises(FasaError, match="method fasa-mass: its mass comes from tuning"):
        POLICIES["fasa-mass"](SHAPE, 256, knowledge())
    with pytest.raises(FasaError, match="method fasa needs a FASA profile; run `fasa-gguf embed-profile"):
        POLICIES["fasa"](SHAPE, 256).select(0, *random_qk(), TAIL)


def test_byte_models():
    wide = Shape(1, 4, 2, 64, 64)
    know = Knowledge(ca=[[list(range(32)), [*range(4, 32), 0, 1, 2, 3], list(range(32)), list(range(32))]])
    for spec, read in (
        ("window", 0),
        ("snapkv", 0),
        ("quest", 16),
        ("quest:page=8", 32),
        ("unique", 16),
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
