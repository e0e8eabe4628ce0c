"""The learning rate as a function of the step."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from linchain_cli.recipe import TrainingConfig
from linchain_cli.training.schedule import (
    due,
    learning_rate,
    times_due,
    total_steps,
    unreachable,
    validations,
    warmup_steps,
)


def rates(total: int, warmup: int, scheduler: str, peak: float = 1.0, floor: float = 0.0) -> list[float]:
    fields = {"warmup_steps": warmup, "lr_scheduler": scheduler, "learning_rate": peak, "min_lr_ratio": floor}
    training = TrainingConfig(max_steps=total, **fields)
    return [learning_rate(training, step, total) for step in range(total)]


def test_warm_up_reaches_the_peak_at_its_last_step():
    assert rates(8, 4, "constant") == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]


def test_linear_ends_just_after_the_last_step():
    assert rates(6, 2, "linear") == [0.5, 1, 1, 0.75, 0.5, 0.25]


def test_cosine_is_half_way_down_in_the_middle():
    values = rates(10, 0, "cosine")
    assert values[0] == 1 and values[5] == pytest.approx(0.5)
    assert values == sorted(values, reverse=True)
    assert values[9] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.9)))


def test_a_floor_is_a_share_of_the_peak():
    assert rates(6, 2, "linear", peak=0.8, floor=0.5) == pytest.approx([0.4, 0.8, 0.8, 0.7, 0.6, 0.5])
    assert rates(4, 0, "cosine", floor=0.2)[2] == pytest.approx(0.6)
    assert rates(4, 2, "linear", floor=1.0) == [0.5, 1, 1, 1]
    with pytest.raises(ValidationError, match="a constant rate has no end"):
        rates(3, 1, "constant", floor=0.1)


@pytest.mark.parametrize(
    "scheduler, floor",
    [("linear", {}), ("cosine", {}), ("cosine_with_min_lr", {"min_lr_rate": 0.1})],
)
def test_the_same_as_transformers(scheduler, floor):
    """Its schedulers start the warm-up at 0; ours is theirs one step later during warm-up, and equal from
    then on.
    """
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = get_scheduler(
        scheduler, optimizer, num_warmup_steps=5, num_training_steps=20, scheduler_specific_kwargs=floor
    )
    expected = []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    ours = rates(20, 5, scheduler.partition("_")[0], peak=0.3, floor=floor.get("min_lr_rate", 0))
    assert ours[:4] == pytest.approx(expected[1:5])
    assert ours[5:] == pytest.approx(expected[5:])


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "constant"])
def test_never_negative_nor_above_the_peak_not_even_when_warm_up_is_longer_than_the_run(scheduler):
    for total in (1, 2, 5):
        for warmup in (0, 1, 4, 5, 9):
            assert all(0 < rate <= 0.3 for rate in rates(total, warmup, scheduler, peak=0.3))


@pytest.mark.parametrize(
    ("length", "rows", "steps"),
    [
        ({"max_steps": 7}, 1000, 7),
        ({"epochs": 3}, 180, 36),  # twelve steps an epoch, of which the last has four rows
        ({"epochs": 1.1}, 160, 11),
        ({"epochs": 1.11}, 160, 12),  # a begun step is a step
        ({"epochs": 0.1}, 480, 3),  # 0.1 * 30 is a little more than 3 in binary
        ({"epochs": 0.001}, 10, 1),
    ],
)
def test_total_steps(length, rows, steps):
    assert total_steps(TrainingConfig(**length), rows) == steps


@pytest.mark.parametrize(
    ("every", "steps"),
    [
        (4, [4, 8, 12, 16, 20]),
        ("epoch", [10, 20]),
        ("epoch/1", [10, 20]),
        ("epoch/4", [3, 5, 8, 10, 13, 15, 18, 20]),
        ("epoch/1000", list(range(1, 21))),
    ],
)
def test_what_comes_every_so_many_steps_or_times_an_epoch(every, steps):
    """Epochs of ten steps."""
    assert [step for step in range(1, 21) if due(step, every, 10)] == steps
    assert [times_due(step, every, 10) for step in range(21)] == [
        sum(one <= step for one in steps) for step in range(21)
    ]


def test_validations_are_those_due_and_the_last_step():
    for every, total, times in (
        (5, 10, 2),
        (5, 11, 3),
        ("epoch", 30, 3),
        ("epoch", 31, 4),
        ("epoch/2", 20, 4),
    ):
        assert validations(TrainingConfig(eval_every=every, max_steps=total), total, 160) == times


@pytest.mark.parametrize(
    ("wanted", "total", "steps"),
    [(0, 50, 0), (100, 50, 100), (0.05, 34, 2), (0.05, 1, 1), (0.1, 30, 3), (0.5, 3, 2), ("0.05", 100, 5)],
)
def test_warm_up_is_a_number_of_steps_or_a_share_of_them(wanted, total, steps):
    assert warmup_steps(TrainingConfig(warmup_steps=wanted), total) == steps


def test_the_default_warm_up_reaches_the_peak_whatever_the_length():
    for total in range(1, 200):
        training = TrainingConfig(max_steps=total)
        assert max(rates(total, warmup_steps(training, total), "linear")) == 1
        assert not list(unreachable(training, 1000, True))


def test_explicit_numbers_that_cannot_be_reached():
    training = TrainingConfig(epochs=3, warmup_steps=100, global_batch_size=16, learning_rate=3e-4)
    (told,) = unreachable(training, 80, True)
    assert "the run has 15 steps, and warm-up takes 100" in told
    assert "ends at 4.5e-05 and never reaches 0.0003" in told
    (told,) = unreachable(TrainingConfig(global_batch_size=64), 40, True)
    assert told.startswith("training.global_batch_size: 64 rows are wanted for each step, and there are 40")
    patient = {"max_steps": 100, "eval_every": 25}
    (told,) = unreachable(TrainingConfig(early_stopping=3, **patient), 1000, True)
    assert "cannot come before the last of the run's 4 " in told
    assert not list(unreachable(TrainingConfig(early_stopping=2, **patient), 1000, True))
