"""The exponentials of native/cuda/tile-exp.cuh in numpy, bit by bit: how far off they are, and the scores made of them.

t is a logit to base 2 with an offset of its row, in octaves above the lower end of a window of 32.
"""

import numpy as np
import pytest

POOL = 30.0  # t of a logit that is as large as its row's sum


def steps(t):
    """fasa_tile_steps: whole 1/64 octaves, uint16; 0 where there is no more."""
    with np.errstate(over="ignore", invalid="ignore"):
        x = np.asarray(t, np.float32).astype(np.float16).astype(np.float32) * np.float32(2.0**-18)
        return np.maximum(x, np.float32(0)).astype(np.float16).view(np.uint16)


def exp_f16(n):
    """fasa_tile_exp: 2^(t - 15) as float64."""
    return (n << 4).astype(np.uint16).view(np.float16).astype(np.float64)


def exp_bf16(n):
    """What fasa_tile_sum adds up on sm_80 and later, 2^(t - 15) too: bf16, times 2^112."""
    return ((n.astype(np.uint32) << 1) << 16).view(np.float32).astype(np.float64) * 2.0**112


T = np.linspace(0, 30.98, 200_000)


@pytest.mark.parametrize("of", [exp_f16, exp_bf16])
def test_an_exponential(of):
    got, true = of(steps(T)), 2.0 ** (T - 15)
    normal = T >= 1.01  # below it numbers have no exponent: the error is half a step of the lowest octave
    ratio = got[normal] / true[normal]
    assert ratio.min() >= 1 - 0.0082 and ratio.max() <= 1.0615 + 0.0087  # half a step is 1/128 of 1 to 2
    assert abs(ratio.mean() - 1.0407) < 2e-4  # that of (1 + f)/2^f
    assert (np.abs(got - true)[~normal] <= 2.0**-14).all()
    assert (np.diff(got) >= 0).all()


def test_both_ways_have_the_same_numbers():
    n = np.arange(64, 1984, dtype=np.uint16)
    assert (exp_f16(n) == exp_bf16(n)).all()
    assert (exp_f16(n + np.uint16(0))[64:] == 2 * exp_f16(n)[:-64]).all()  # an octave more is twice as much


def test_nothing_is_left_below_the_window():
    assert (steps([-np.inf, -1e30, -70000, -32.0, -1e-3, 0.0, 0.007]) == 0).all()
    assert (steps([0.0079, 1 / 64, 1.0, 31.98]) == [1, 1, 64, 2047]).all()


def test_what_is_above_the_window_shows():
    """A bit of TILE_BEYOND, 0xf800, and for NaN too."""
    assert (steps([31.9, 31.99]) & 0xF800 == 0).all()
    assert (steps([32.0, 33.0, 1000.0, 30000.0, 1e6, np.inf, np.nan]) & 0xF800 != 0).all()


def softmax(y, base):
    """A row's scores as the kernels make them from logits to base 2; base: the offset in `sums`, whole octaves."""
    log = np.log2(exp_bf16(steps(y + base)).sum()) + 15 - base
    up = np.ceil(log)
    factor = np.float64(np.float16(2 ** (up - log)))
    n = steps(y + (POOL - up))
    assert (n <= 64 * POOL).all()
    return exp_f16(n) * factor * 2.0 ** (15 - POOL)


@pytest.mark.parametrize("hot", [0.1, 3.0, 10.0])
@pytest.mark.parametrize("n", [1, 2, 100, 20_000])
def test_the_scores_of_a_row(n, hot):
    rng = np.random.default_rng(n)
    for _ in range(20):
        y = (rng.standard_normal(n) * hot).astype(np.float32)
        true = 2.0 ** (y - y.max()).astype(np.float64)
        true /= true.sum()
        got = softmax(y, np.ceil(24 - y.max()))
        assert abs(got.sum() - 1) < 1e-3  # the sum is one of the same numbers
        ratio = got[true > 2.0**-18] / true[true > 2.0**-18]
        assert ratio.min() > 0.93 and ratio.max() < 1.073  # 1.0615, and two roundings to a step
        if n == 20_000 and hot == 3.0:  # no cell is much of a row
            assert ratio.min() > 0.95 and ratio.max() < 1.031


def test_a_mass_is_estimated_right():
    """Over many rows errors cancel: the best cells hold as much as they should."""
    rng = np.random.default_rng(1)
    y = (rng.standard_normal((256, 4000)) * 4 + rng.standard_normal(4000) * 3).astype(np.float32)
    true = 2.0 ** (y - y.max(1, keepdims=True)).astype(np.float64)
    true = (true / true.sum(1, keepdims=True)).sum(0)
    got = sum(softmax(row, np.ceil(24 - row.max())) for row in y)
    for share in (0.5, 0.9, 0.98):
        best = np.argsort(-got)
        k = np.searchsorted(np.cumsum(got[best]), share * got.sum()) + 1
        assert abs(true[best[:k]].sum() / true.sum() - share) < 2e-3
    large = true > true.max() / 100
    assert np.abs(got[large] / true[large] - 1).max() < 0.03
