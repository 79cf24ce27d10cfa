"""Intervals and tests: how far a figure measured on a sample can be trusted."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

Z95 = 1.959964  # standard normal quantile: 95 % of the mass lies within +-Z95
MIN_PARTS = 10  # documents; an interval from fewer would be a guess


def wilson_interval(successes: int, total: int) -> tuple[float, float]:
    """95 % interval of a share, 0-1. Source: Wilson 1927, as in Brown, Cai and DasGupta 2001, eq. 4."""
    if not 0 <= successes <= total or total == 0:
        raise ValueError(f"wilson_interval: {successes} of {total}")
    share, spread = successes / total, Z95**2 / total
    middle = (share + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return (0.0 if successes == 0 else middle - half, 1.0 if successes == total else middle + half)


def paired_difference(gained: int, lost: int, total: int) -> tuple[float, tuple[float, float], float]:
    """How a share changed between two runs over the same cases, of which `gained` and `lost` changed sides.

    Returns: the difference, its 95 % interval, and the two-sided exact p-value of McNemar's test.
    Source: Newcombe 1998 (interval, method 1: Wald); McNemar 1947, in the exact form, a sign test.
    """
    difference, changed = (gained - lost) / total, gained + lost
    half = Z95 * math.sqrt(max(changed - (gained - lost) ** 2 / total, 0)) / total
    tail = sum(math.comb(changed, k) for k in range(min(gained, lost) + 1)) / 2**changed
    # Where as many gained as lost, the middle term is in both tails.
    return difference, (max(difference - half, -1.0), min(difference + half, 1.0)), min(1.0, 2 * tail)


def student_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t; within 0.02 % from 9 degrees of freedom on.

    Source: Abramowitz and Stegun 1964, 26.7.5.
    """
    z = NormalDist().inv_cdf(0.975)
    terms = (
        z**3 + z,
        5 * z**5 + 16 * z**3 + 3 * z,
        3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z,
        79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z,
    )
    factors = (4, 96, 384, 92160)
    powers = range(1, 5)
    return z + sum(t / (f * freedom**power) for t, f, power in zip(terms, factors, powers, strict=True))


def ratio_spread(values: np.ndarray, weights: np.ndarray) -> float | None:
    """Half of the 95 % interval of sum(values) / sum(weights) over documents; None if there are too few of them.

    Source: Cochran 1977, "Sampling Techniques", chapter 6 (the variance of a ratio); here with Student's t.
    """
    ratio = values.sum() / weights.sum()
    return sum_spread((values - ratio * weights) / weights.sum())


def sum_spread(parts: np.ndarray) -> float | None:
    """Half of the 95 % interval of a sum of independent parts whose mean is 0."""
    count = len(parts)
    if count < MIN_PARTS:
        return None
    return student_quantile(count - 1) * math.sqrt(count / (count - 1) * float((parts**2).sum()))
