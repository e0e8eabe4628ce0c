"""The learning rate as a function of the step."""

from __future__ import annotations

import math

import pytest
import torch

from linchain_cli.training.schedule import learning_rate


def rates(total: int, warmup: int, scheduler: str, peak: float = 1.0) -> list[float]:
    return [learning_rate(step, total, peak, warmup, scheduler) for step in range(total)]


def test_warm_up_reaches_the_peak_at_its_last_step():
    assert rates(8, 4, "constant") == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]


def test_linear_ends_just_after_the_last_step():
    assert rates(6, 2, "linear") == [0.5, 1, 1, 0.75, 0.5, 0.25]


def test_cosine_is_half_way_down_in_the_middle():
    values = rates(10, 0, "cosine")
    assert values[0] == 1 and values[5] == pytest.approx(0.5)
    assert values == sorted(values, reverse=True)
    assert values[9] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.9)))


@pytest.mark.parametrize("scheduler", ["linear", "cosine"])
def test_the_same_as_transformers(scheduler):
    """Its schedulers start the warm-up at 0; ours is theirs one step later during warm-up, and equal from
    then on.
    """
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = get_scheduler(scheduler, optimizer, num_warmup_steps=5, num_training_steps=20)
    expected = []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    ours = rates(20, 5, scheduler, peak=0.3)
    assert ours[:4] == pytest.approx(expected[1:5])
    assert ours[5:] == pytest.approx(expected[5:])


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "constant"])
def test_never_negative_nor_above_the_peak_not_even_when_warm_up_is_longer_than_the_run(scheduler):
    for total in (1, 2, 5):
        for warmup in (0, 1, 4, 5, 9):
            assert all(0 < rate <= 0.3 for rate in rates(total, warmup, scheduler, peak=0.3))
