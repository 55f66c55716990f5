"""Paired differences of scores, sample by sample, with their 95% intervals.

An interval is Student's t over samples. When all samples differ by the same amount, mostly by nothing, that has no
width. Then it is the exact bound on the share of samples that may differ (Clopper-Pearson). p is the exact sign test
over the samples that were lost and gained (McNemar's, where a sample is found or not).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def t_quantile(df: int) -> float:
    """The 97.5% quantile of Student's t."""
    x = np.linspace(0, 13, 130001)  # 12.706 with one degree of freedom
    density = (
        math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2))
        / math.sqrt(df * math.pi)
        * (1 + x**2 / df) ** (-(df + 1) / 2)
    )
    mass = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)]) * (x[1] - x[0])
    return float(np.interp(0.475, mass, x))


def paired(diff: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
    """(mean, low, high) of paired differences in [-1, 1], 95%: by t or Clopper-Pearson."""
    d = np.asarray(diff, float)
    mean, n = float(d.mean()), len(d)
    if np.ptp(d) == 0:
        share = 1 - 0.025 ** (1 / n)  # at most this share may be otherwise
        return mean, mean - share * (1 + mean), mean + share * (1 - mean)
    half = t_quantile(n - 1) * float(d.std(ddof=1)) / math.sqrt(n)
    return mean, max(-1.0, mean - half), min(1.0, mean + half)


def sign_test(lost: int, gained: int) -> float:
    """Two-sided exact p of so uneven a split, when either side is as likely."""
    n = lost + gained
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(lost, gained) + 1)) / 2**n)
