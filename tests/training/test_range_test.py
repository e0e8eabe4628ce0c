"""The range test itself: what it trains on, what it looks at, and where it ends."""

from __future__ import annotations

import math

import numpy as np
import pytest

from linchain_cli.errors import LinchainError
from linchain_cli.training import range_test
from linchain_cli.training.range_test import rising_rates
from linchain_cli.training.signals import stop_requests

RATES = rising_rates(1e-4, 1.0, 12)


@pytest.fixture
def seen(monkeypatch):
    """The training rows of each step, and how many held-out rows were read each time."""
    trained, read = [], []
    step, validation = range_test.optimizer_step, range_test.validation

    def stepped(job, rows, rate, stop):
        trained.append((rate, rows.tolist()))
        return step(job, rows, rate, stop)

    def validated(job, rows):
        read.append(len(rows))
        return validation(job, rows)

    monkeypatch.setattr(range_test, "optimizer_step", stepped)
    monkeypatch.setattr(range_test, "validation", validated)
    return trained, read


def take(job, rates=RATES):
    shown: list[int] = []
    with stop_requests("") as stop:
        points = range_test.range_test(job, rates, stop, shown.append)
    return points, shown


def test_it_takes_a_step_at_each_rate_on_the_rows_of_a_run(job_of, seen):
    trained, read = seen
    points, shown = take(job_of())
    assert [rate for rate, _ in trained] == [point.rate for point in points] == RATES[: len(points)]
    assert shown == list(range(1, len(points) + 1)) and set(read) == {4}  # as many as a step has
    assert min(point.loss for point in points) < points[0].loss
    job = job_of()
    for step, (_, rows) in enumerate(trained):
        job.state.step = step
        assert job.next_rows().tolist() == rows


def test_conversations_stay_together(job_of, seen, monkeypatch):
    job = job_of()
    monkeypatch.setitem(job.data.train.__dict__, "starts", np.arange(0, 40, 2))
    take(job, RATES[:5])
    assert all(
        first + 1 == second
        for _, rows in seen[0]
        for first, second in zip(rows[::2], rows[1::2], strict=True)
    )


def test_a_long_one_looks_seldom_and_then_at_more_rows(job_of, seen, monkeypatch):
    """At as many rows as a short one in all, but at fewer points, each with less noise."""
    monkeypatch.setattr(range_test, "POINTS", 5)
    points, shown = take(job_of({"data.validation": 14}), rising_rates(1e-5, 1e-2, 12))
    assert set(seen[1]) == {3 * 4} and len(shown) == 12
    assert [point.rate for point in points] == rising_rates(1e-5, 1e-2, 12)[2::3]


def test_it_ends_where_the_loss_is_lost_or_no_number(job_of, monkeypatch):
    with monkeypatch.context() as patch:
        losses = iter([6.0, 5.0, 3.0, 5.9, 2.0, 6.0, 6.1, 1.0])  # the first before any step
        patch.setattr(range_test, "validation", lambda job, rows: {"loss": next(losses)})
        points, _ = take(job_of())
    assert [point.loss for point in points] == [5.0, 3.0, 5.9, 2.0, 6.0, 6.1]
    step, taken = range_test.optimizer_step, []

    def failing(job, rows, rate, stop):
        taken.append(rate)
        if len(taken) == 3:
            raise LinchainError("step 3: the loss is nan")
        return step(job, rows, rate, stop)

    monkeypatch.setattr(range_test, "optimizer_step", failing)
    points, _ = take(job_of())
    assert [point.rate for point in points] == RATES[:2] and all(math.isfinite(p.loss) for p in points)
