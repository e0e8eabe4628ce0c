"""Errors, intervals and tests, against numbers worked out in another way."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import numpy as np
import pytest

from linchain_cli.comparison.statistics import t_quantile
from linchain_cli.evaluation.statistics import (
    Paired,
    crossed,
    holm,
    macro_average,
    mcnemar,
    normal_interval,
    pair,
    standard_error,
    wilson_interval,
)


def test_standard_error_is_that_of_the_mean():
    rows = [1] * 7 + [0] * 4
    assert standard_error(7, 11) == pytest.approx(statistics.stdev(rows) / math.sqrt(11))
    assert standard_error(1, 1) is None


def test_wilson_interval_is_where_the_score_test_turns():
    """The bounds are the proportions p with |p̂ − p| = 1.96·√(p(1−p)/n)."""
    for correct, n in [(0, 10), (3, 10), (250, 400), (400, 400)]:
        for bound in wilson_interval(correct, n):
            score = abs(correct / n - bound) - 1.959964 * math.sqrt(bound * (1 - bound) / n)
            assert score == pytest.approx(0, abs=1e-6)
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # a textbook's example


def test_wilson_interval_holds_the_proportion_itself():
    for n in range(1, 300):
        for correct in {0, 1, n // 2, n - 1, n}:
            low, high = wilson_interval(correct, n)
            assert 0 <= low <= correct / n <= high <= 1


def test_macro_average_weighs_tasks_alike():
    mean, error = macro_average([0.5, 0.9], [0.03, 0.04])
    assert mean == pytest.approx(0.7) and error == pytest.approx(0.025)
    assert macro_average([0.5, 0.9], [0.03, None]) == (pytest.approx(0.7), None)
    assert normal_interval(0.7, 0.025, 0, 1) == pytest.approx((0.651, 0.749), abs=1e-4)
    assert normal_interval(0.7, None, 0, 1) is None
    assert normal_interval(0.99, 0.025, 0, 1)[1] == 1 and normal_interval(-0.99, 0.025, -1, 1)[0] == -1


def test_mcnemar_is_the_exact_binomial_test():
    for gained, lost in itertools.product(range(5), repeat=2):
        n = gained + lost
        outcomes = [sum(coins) for coins in itertools.product([0, 1], repeat=n)]
        as_uneven = sum(abs(heads - n / 2) >= abs(gained - n / 2) for heads in outcomes)
        assert mcnemar(gained, lost) == pytest.approx(as_uneven / len(outcomes))
    assert mcnemar(3000, 2800) == pytest.approx(
        0.00897, abs=1e-5
    )  # far beyond what a float can hold on the way


def test_pairs_are_counted_by_row():
    paired = pair([True, True, False, False, True], [True, False, False, True, False])
    assert (paired.n, paired.gained, paired.lost) == (5, 2, 1)
    assert paired.difference == pytest.approx(0.2)
    with pytest.raises(ValueError):
        pair([True], [])


def test_paired_interval_is_not_empty_where_models_agree():
    low, high = Paired(400, 0, 0).interval
    assert low < 0 < high and high < 0.01
    low, high = Paired(400, 40, 10).interval
    assert low > 0
    assert (low + high) / 2 == pytest.approx(30 / 402)


def test_paired_intervals_cover_the_truth():
    """Over many draws, 95 % of the intervals hold the true difference, give or take."""
    rng = random.Random(0)
    gain, loss, covered = 0.15, 0.07, 0
    for _ in range(1000):
        draws = [rng.random() for _ in range(120)]
        paired = Paired(120, sum(d < gain for d in draws), sum(gain <= d < gain + loss for d in draws))
        covered += paired.interval[0] <= gain - loss <= paired.interval[1]
    assert 930 <= covered <= 975


def test_holms_p_values():
    """The textbook's steps: the smallest times all, the next times one less, never falling."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.8, 0.9]) == [1.0, 1.0] and holm([0.3]) == [0.3] and holm([]) == []


def test_holm_rejects_a_true_null_in_one_family_of_twenty():
    rng = random.Random(1)
    families = [[rng.random() for _ in range(8)] for _ in range(4000)]
    wrong = [sum(min(adjust(family)) < 0.05 for family in families) / 4000 for adjust in (list, holm)]
    assert wrong[0] > 0.3 and wrong[1] == pytest.approx(0.05, abs=0.01)


def test_of_one_seed_the_error_is_that_of_the_rows():
    found = crossed([np.array([[1.0, 0, 0, 1, 1, 0, 1, 1]])])
    assert (found.mean, found.df) == (5 / 8, 7)
    assert found.error == pytest.approx(standard_error(5, 8))


def test_where_seeds_alone_differ_the_error_is_that_of_their_means():
    found = crossed([np.repeat([[0.2], [0.3], [0.7]], 50, axis=1)])
    assert found.mean == pytest.approx(0.4)
    assert (found.error, found.df) == (pytest.approx(math.sqrt(0.07 / 3)), pytest.approx(2))


def test_seeds_that_agree_on_every_row_are_no_more_rows():
    one = np.array([[1.0, 0, 0, 1, 1, 0, 1, 1]])
    assert crossed([np.repeat(one, 3, axis=0)]).error == pytest.approx(crossed([one]).error)


def test_an_average_counts_every_task_alike():
    tasks = [np.array([[1.0, 1, 0, 1]] * 2), np.array([[0.0, 1, 0, 0, 0, 0, 0, 0]] * 2)]
    found = crossed(tasks)
    assert found.mean == (3 / 4 + 1 / 8) / 2
    assert found.error == pytest.approx(math.hypot(standard_error(3, 4), standard_error(1, 8)) / 2)
    assert crossed([tasks[0], np.zeros((2, 1))]).error is None


@pytest.mark.parametrize(("of_seeds", "of_rows", "rest"), [(0.1, 0.1, 1.0), (0.3, 1.0, 1.0), (0.0, 1.0, 0.2)])
def test_intervals_for_other_seeds_and_rows_hold_the_truth(of_seeds, of_rows, rest):
    rng, inside, count = np.random.default_rng(1), 0, 400
    for _ in range(count):
        effects = rng.normal(size=(3, 1)) * of_seeds + rng.normal(size=(1, 60)) * of_rows
        found = crossed([effects + rng.normal(size=(3, 60)) * rest])
        inside += abs(found.mean) <= t_quantile(max(1.0, found.df)) * found.error
    assert 0.93 <= inside / count  # exact where one effect is large, else somewhat wide
