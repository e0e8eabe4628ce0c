"""Intervals against published quantiles, and against many simulated comparisons."""

from __future__ import annotations

import math
import random

import pytest

from linchain_cli.comparison.statistics import (
    Estimate,
    estimate,
    interval,
    p_value,
    smallest_telling,
    t_quantile,
)
from linchain_cli.evaluation.statistics import holm

# Two-sided 95 % quantiles of Student's t, from printed tables.
TABLE = {
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    9: 2.262,
    10: 2.228,
    29: 2.045,
    30: 2.042,
    120: 1.980,
}


@pytest.mark.parametrize(("df", "value"), TABLE.items())
def test_quantiles_are_the_printed_ones(df, value):
    assert t_quantile(df) == pytest.approx(value, abs=5e-4)


def test_quantiles_of_other_levels():
    assert t_quantile(2, 0.99) == pytest.approx(9.925, abs=5e-4)
    assert t_quantile(1, 0.5) == pytest.approx(1.0, abs=1e-9)
    assert t_quantile(5) < t_quantile(4.5) < t_quantile(4)
    assert t_quantile(1e7) == pytest.approx(1.95996, abs=1e-5)


def test_a_mean_with_its_spread_and_interval():
    found = estimate([0.1, 0.2, 0.6])
    assert found == Estimate(pytest.approx(0.3), pytest.approx(math.sqrt(0.07)), 3)
    low, high = interval(found)
    assert high - found.mean == pytest.approx(4.303 * math.sqrt(0.07 / 3), rel=1e-3)
    assert found.mean - low == pytest.approx(high - found.mean)


def test_one_value_has_no_spread_and_no_interval():
    found = estimate([0.3])
    assert found == Estimate(0.3, None, 1)
    assert interval(found) is None
    assert estimate([]) is None


def test_the_interval_covers_the_truth_as_often_as_it_says():
    draw = random.Random(0)
    covered = 0
    for _ in range(4000):
        low, high = interval(estimate([draw.gauss(1.0, 2.0) for _ in range(3)]))
        covered += low <= 1.0 <= high
    assert covered / 4000 == pytest.approx(0.95, abs=0.011)  # three standard errors


def test_p_values_and_intervals_say_the_same():
    draw = random.Random(1)
    for _ in range(200):
        found = estimate([draw.gauss(1.0, 1.0) for _ in range(4)])
        low, high = interval(found)
        assert (p_value(found) > 0.05) == (low <= 0 <= high)
    assert p_value(Estimate(4.302652729911275 / math.sqrt(3), 1.0, 3)) == pytest.approx(0.05)
    assert p_value(Estimate(1.0, None, 1)) is None
    assert (p_value(Estimate(0.0, 0.0, 3)), p_value(Estimate(0.1, 0.0, 3))) == (1.0, 0.0)


def test_the_smallest_telling_difference_is_where_the_word_begins():
    smallest = smallest_telling(0.2, 3, 7)
    for factor, told in ((1.0001, True), (0.9999, False)):
        p = p_value(Estimate(smallest * factor, 0.2, 3))
        assert (holm([p, *[0.9] * 6])[0] <= 0.05) is told
