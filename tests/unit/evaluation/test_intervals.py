"""Intervals and tests against other arithmetic, published examples and what they promise."""

import math

import numpy as np
import pytest

from utils.evaluation.intervals import paired_difference, ratio_spread, student_quantile, wilson_interval


def solve_wilson(successes, total, above):
    """The share p above (or below) the observed one with |observed - p| = z sqrt(p (1 - p) / n), by bisection."""
    observed, z = successes / total, 1.959963984540054
    low, high = (observed, 1.0) if above else (0.0, observed)
    for _ in range(200):
        middle = (low + high) / 2
        inside = abs(observed - middle) < z * math.sqrt(middle * (1 - middle) / total)
        if inside == above:
            low = middle
        else:
            high = middle
    return (low + high) / 2


@pytest.mark.parametrize(("successes", "total"), [(0, 7), (7, 7), (1, 29), (81, 263), (8, 10), (190, 200), (1, 1)])
def test_wilson_interval(successes, total):
    expected = [solve_wilson(successes, total, above) for above in (False, True)]
    assert wilson_interval(successes, total) == pytest.approx(expected, abs=1e-6)


def test_wilson_interval_of_published_examples():
    """Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3."""
    for (successes, total), interval in {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605)}.items():
        assert wilson_interval(successes, total) == pytest.approx(interval, abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)


@pytest.mark.parametrize(("successes", "total"), [(1, 0), (3, 2), (-1, 2)])
def test_no_interval_of_no_share(successes, total):
    with pytest.raises(ValueError, match="wilson"):
        wilson_interval(successes, total)


def test_the_difference_of_paired_shares():
    """Agresti 2002, "Categorical Data Analysis", table 10.1, by hand: 150 and 86 of 1,600 changed their mind."""
    difference, interval, p_value = paired_difference(86, 150, 1600)
    assert difference == pytest.approx(-0.04) and p_value < 1e-4
    assert interval == pytest.approx((-0.0587, -0.0213), abs=1e-4)
    assert paired_difference(0, 0, 3) == (0, (0, 0), 1)
    assert paired_difference(3, 0, 3)[1:] == ((1.0, 1.0), 0.25)


def test_intervals_hold_what_they_promise():
    """Of 2,000 samples of documents of all sizes, about 95 % have an interval around the true ratio."""
    rng = np.random.default_rng(2)
    inside = 0
    for _ in range(2000):
        weights = rng.lognormal(3, 0.7, 40)
        values = weights * rng.normal(2, 0.5, 40)
        ratio, half = values.sum() / weights.sum(), ratio_spread(values, weights)
        inside += abs(ratio - 2) < half
    assert 0.92 < inside / 2000 < 0.97


def test_quantiles_of_student():
    table = {9: 2.262157, 10: 2.228139, 19: 2.093024, 30: 2.042272, 100: 1.983972, 10**6: 1.959966}
    for freedom, quantile in table.items():
        assert student_quantile(freedom) == pytest.approx(quantile, rel=2e-4)
