"""How predictions agree with labels: values against formulas, intervals against draws of whole rows."""

from __future__ import annotations

import math

import numpy as np
import pytest

from linchain_cli.data import agreement as agreements
from linchain_cli.data.agreement import agreement, difference, with_interval

# 3 true positives, 2 true negatives, 1 false positive, 2 false negatives.
TARGETS = np.array([1, 1, 1, 1, 1, 0, 0, 0])
TOLD = np.array([1, 1, 1, 0, 0, 1, 0, 0])


def test_values_are_those_of_the_formulas():
    assert agreement("accuracy", TARGETS, TOLD, 2) == 5 / 8
    assert agreement("f1", TARGETS, TOLD, 2) == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    expected = (3 * 2 - 1 * 2) / math.sqrt((3 + 1) * (3 + 2) * (2 + 1) * (2 + 2))
    assert agreement("matthews", TARGETS, TOLD, 2) == pytest.approx(expected)
    numbers = np.array([1.0, 2.0, 3.0, 10.0])
    assert agreement("pearson", numbers, 2 * numbers + 1) == pytest.approx(1)
    assert agreement("spearman", numbers, numbers**3) == pytest.approx(1)
    assert agreement("spearman", numbers, -numbers) == pytest.approx(-1)


def test_f1_of_more_than_two_classes_is_their_mean():
    targets, told = np.array([0, 1, 2, 2]), np.array([0, 1, 1, 2])
    assert agreement("f1", targets, told, 3) == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)


def test_f1_leaves_out_classes_that_do_not_occur(monkeypatch):
    """Also in each draw: with few rows of many classes the interval would lie below the value."""
    from sklearn.metrics import f1_score

    targets, told = np.array([0, 0, 3, 3, 4]), np.array([0, 3, 3, 3, 1])
    expected = f1_score(targets, told, average="macro")
    assert agreement("f1", targets, told, 9) == pytest.approx(expected) == pytest.approx((2 / 3 + 0.8) / 4)
    monkeypatch.setattr(agreements, "RESAMPLES", 50)
    targets = np.repeat(np.arange(40), 2)
    assert with_interval("f1", targets, targets, 40).interval == (1, 1)


def test_what_is_undefined_counts_as_zero():
    constant = np.zeros(4)
    assert agreement("pearson", np.arange(4.0), constant) == 0
    assert agreement("matthews", TARGETS, np.ones(8), 2) == 0
    assert agreement("f1", np.zeros(8), np.zeros(8), 2) == 0


@pytest.mark.parametrize("metric", ["accuracy", "f1", "matthews"])
def test_drawing_counts_of_cells_is_drawing_rows(metric, monkeypatch):
    """The interval of classes is drawn from how often each pair occurs; it is that of the rows themselves."""
    monkeypatch.setattr(agreements, "RESAMPLES", 600)
    random = np.random.RandomState(1)
    targets = random.randint(0, 2, 200)
    told = np.where(random.rand(200) < 0.8, targets, 1 - targets)
    found = with_interval(metric, targets, told, 2)
    draws = [random.randint(0, 200, 200) for _ in range(600)]
    of_rows = [agreement(metric, targets[draw], told[draw], 2) for draw in draws]
    assert found.interval == pytest.approx(np.percentile(of_rows, (2.5, 97.5)), abs=0.03)
    assert found.stderr == pytest.approx(np.std(of_rows), rel=0.15)
    assert found.interval[0] < found.value < found.interval[1]


def test_two_models_are_compared_on_the_same_draws(monkeypatch):
    """Of two that tell nearly the same the difference is known far better than either value."""
    monkeypatch.setattr(agreements, "RESAMPLES", 200)
    random = np.random.RandomState(2)
    targets = random.randint(0, 2, 300)
    first = np.where(random.rand(300) < 0.7, targets, 1 - targets)
    second = first.copy()
    second[:5] = 1 - second[:5]
    found = difference("matthews", targets, first, second, 2)
    alone = with_interval("matthews", targets, first, 2)
    own = agreement("matthews", targets, first, 2) - agreement("matthews", targets, second, 2)
    assert found.value == pytest.approx(own)
    assert found.interval[1] - found.interval[0] < 0.4 * (alone.interval[1] - alone.interval[0])
    same = difference("spearman", targets + 0.5, first * 1.0, first * 1.0)
    assert same.value == 0 and same.interval == (0, 0)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("metric", ["accuracy", "f1", "matthews"])
def test_counted_draws_follow_scikit_learn(metric, classes):
    random = np.random.RandomState(3)
    for _ in range(20):
        targets, told = random.randint(0, classes, (2, 15))
        cells, counts = np.unique(np.stack([targets, told]), axis=1, return_counts=True)
        (found,) = agreements._of_counts(metric, *cells, counts[None].astype(float), classes)
        assert found == pytest.approx(agreement(metric, targets, told, classes), abs=1e-12)


@pytest.mark.parametrize("metric", ["pearson", "spearman"])
def test_correlations_of_draws_follow_scipy(metric, monkeypatch):
    monkeypatch.setattr(agreements, "_AT_ONCE", 70)  # draws in several pieces
    random = np.random.RandomState(4)
    targets = random.randint(0, 6, (5, 12)) / 2  # with ties
    told = targets + random.randn(5, 12)
    found = agreements._correlations(metric, targets, told)
    assert found == pytest.approx([agreement(metric, *pair) for pair in zip(targets, told, strict=True)])
    one = with_interval(metric, targets[0], told[0])
    assert one.interval[0] < one.value < one.interval[1] <= 1


def test_intervals_are_the_same_every_time():
    assert with_interval("f1", TARGETS, TOLD, 2) == with_interval("f1", TARGETS, TOLD, 2)
