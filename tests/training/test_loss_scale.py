"""float16 bases: the loss is scaled, and a step whose gradients overflow is taken again at half the scale."""

from __future__ import annotations

import json
import math

import pytest
import torch

from linchain_cli.chain import chain_layers
from linchain_cli.errors import LinchainError
from linchain_cli.run import read_jsonl
from linchain_cli.training import loop, loss, state
from linchain_cli.training import step as one_step
from linchain_cli.training.state import TrainingState

HALF = {"model.dtype": "float16"}
TOO_MUCH = 2.0**40


def values(job, key: str) -> list[float]:
    return [row[key] for row in read_jsonl(job.run.metrics_path) if key in row]


def test_the_scale_halves_and_doubles():
    ours = TrainingState(loss_scale=4.0)
    for _ in range(state.STEPS_TO_DOUBLE):
        ours.count_scaled_step()
    assert (ours.loss_scale, ours.steps_at_scale) == (8.0, 0)
    ours.count_scaled_step()
    assert ours.halve_loss_scale() and (ours.loss_scale, ours.steps_at_scale) == (4.0, 0)
    assert ours.halve_loss_scale() and ours.halve_loss_scale() and ours.loss_scale == 1.0
    assert not ours.halve_loss_scale() and ours.loss_scale == 1.0


def test_a_float16_base_trains_as_in_float32(run_tiny, recipe_of):
    from linchain_cli.training.runner import run_training

    changes = {"training.max_steps": 4, "training.warmup_steps": 0}
    whole = run_tiny({**changes, "name": "float32"})
    half = run_training(recipe_of({**changes, **HALF, "name": "float16"}))
    assert half.model.dtype == torch.float16 and half.run.read_status().base.dtype == "float16"
    assert {parameter.dtype for parameter in half.parameters.values()} == {torch.float32}
    assert values(half, "loss") == pytest.approx(values(whole, "loss"), rel=2e-3)
    assert values(half, "grad_norm") == pytest.approx(values(whole, "grad_norm"), rel=2e-2)
    assert half.state.loss_scale == state.FIRST_LOSS_SCALE and half.state.steps_at_scale == 4
    assert whole.state.loss_scale == 1.0 and whole.state.steps_at_scale == 0


def test_gradients_that_overflow_are_taken_again_and_a_resume_is_bitwise(recipe_of, dies_after, monkeypatch):
    from linchain_cli.training.runner import run_training

    changes = {**HALF, "adapter.dropout": 0.1, "training.save_every": 1, "training.keep_checkpoints": 9}
    settled = run_training(recipe_of({**changes, "name": "settled"}))
    monkeypatch.setattr(state, "FIRST_LOSS_SCALE", TOO_MUCH)
    monkeypatch.setattr(state, "STEPS_TO_DOUBLE", 2)
    tries = []
    original = one_step._sum_gradients

    def counted(job, *rest):
        tries.append(job.state.step)
        return original(job, *rest)

    monkeypatch.setattr(one_step, "_sum_gradients", counted)
    whole = run_training(recipe_of({**changes, "name": "whole"}))
    assert tries.count(0) > 5 and len(tries) > whole.total_steps, "is there no overflow?"
    assert 1.0 <= whole.state.loss_scale < TOO_MUCH
    assert [row["step"] for row in read_jsonl(whole.run.rows_path)] == [1, 2, 3, 4, 5, 6], "no row is lost"
    assert all(map(math.isfinite, values(whole, "loss")))
    assert values(whole, "loss") == pytest.approx(values(settled, "loss"), rel=1e-2)

    with dies_after(3):
        run_training(recipe_of(changes))
    job = run_training(recipe_of(changes), resume=True)
    for path in ("adapter/chain.safetensors", "checkpoints/step-000006/optimizer.safetensors", "rows.jsonl"):
        assert (job.run.path / path).read_bytes() == (whole.run.path / path).read_bytes()
    files = [each.run.path / "checkpoints/step-000006/state.json" for each in (job, whole)]
    kept = [json.loads(file.read_bytes())["state"] for file in files]
    assert kept[0]["loss_scale"] == kept[1]["loss_scale"] == whole.state.loss_scale
    assert kept[0]["steps_at_scale"] == kept[1]["steps_at_scale"]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_no_scale_helps_against_ends_the_run(recipe_of, monkeypatch, where):
    """A loss that overflowed in the forward pass, and gradients that are not numbers at any scale."""
    from linchain_cli.training.runner import run_training

    original, scales = loss.add_gradients, []

    def spoilt(model, batch, scale, device):
        scales.append(scale)
        result = original(model, batch, scale, device)
        if where == "loss":
            return result * math.inf
        next(iter(chain_layers(model).values())).B.grad += math.nan
        return result

    monkeypatch.setattr("linchain_cli.training.runner.run_heaviest", lambda job: None)
    monkeypatch.setattr(loss, "add_gradients", spoilt)
    with pytest.raises(LinchainError, match=r"step 1: the loss is .* nothing was updated"):
        run_training(recipe_of(HALF))
    assert max(scales) / min(scales) == (1.0 if where == "loss" else state.FIRST_LOSS_SCALE)


def test_sums_are_not_rounded_while_it_trains(run_tiny, monkeypatch):
    products, seen = torch.backends.cuda.matmul, []
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    original = loop.optimizer_step

    def noted(*arguments):
        seen.append([getattr(products, name) for name in names])
        return original(*arguments)

    monkeypatch.setattr(loop, "optimizer_step", noted)
    before = [getattr(products, name) for name in names]
    run_tiny({"training.max_steps": 1})
    assert seen == [[False, False]] and [getattr(products, name) for name in names] == before
