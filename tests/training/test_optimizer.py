"""AdamW over flat buffers: the values of AdamW over each tensor, and its state through a checkpoint."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load
from torch import nn

from linchain_cli.errors import InputError
from linchain_cli.run import read_jsonl
from linchain_cli.storage import tensor_bytes
from linchain_cli.training.optimizer import EXTRAS, FlatAdamW


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x.A": (16, 80), "x.links": (2, 16, 16), "x.B": (96, 16), "y.A": (4, 7), "y.B": (5, 4)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def set_gradients(values: dict[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in values.values():
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = gradient if parameter.grad is None else parameter.grad.copy_(gradient)


def step(optimizer: FlatAdamW, values: dict[str, nn.Parameter], seed: int, rate: float = 0.01) -> None:
    set_gradients(values, seed)
    optimizer.set_learning_rate(rate)
    optimizer.step()
    optimizer.zero_grad()


def test_it_is_torchs_adamw_on_each_tensor_clipped_together():
    ours, theirs = parameters(), parameters()
    flat = FlatAdamW(ours, 0.01, {"links": 3.0, "B": 0.5})
    factors = {name: {"A": 1.0, "links": 3.0, "B": 0.5}[name.rpartition(".")[2]] for name in theirs}
    reference = torch.optim.AdamW(
        [{"params": [theirs[name]], "lr": 0.01 * factor} for name, factor in factors.items()],
        weight_decay=0.01,
    )
    for seed in range(4):
        set_gradients(ours, seed)
        set_gradients(theirs, seed)
        norm = flat.clip_gradients(0.7)
        expected = nn.utils.clip_grad_norm_(theirs.values(), 0.7)
        assert norm.item() == pytest.approx(expected.item(), rel=1e-6) and norm > 0.7
        flat.set_learning_rate(0.01)
        flat.step()
        reference.step()
        flat.zero_grad()
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-6, atol=1e-6)
        moments = {key: reference.state[theirs[name]][key] for key in ("exp_avg", "exp_avg_sq")}
        torch.testing.assert_close(flat.moments(name), moments, rtol=1e-5, atol=1e-7)


def test_parameters_gradients_and_state_are_views_of_whole_tensors():
    values = parameters()
    before = {name: parameter.detach().clone() for name, parameter in values.items()}
    optimizer = FlatAdamW(values)
    assert all(torch.equal(values[name], before[name]) for name in values)
    wholes = [group["params"][0] for group in optimizer.param_groups]
    assert [whole.numel() for whole in wholes] == [16 * 80 + 28, 512, 96 * 16 + 20]
    assert len({whole.untyped_storage().data_ptr() for whole in wholes}) == 1
    values["y.B"].sum().backward()
    values["y.B"].sum().backward()
    assert optimizer.sums.sum() == 2 * 20 and wholes[2].grad.sum() == 2 * 20
    numbers = torch.arange(float(EXTRAS))
    optimizer.extras.copy_(numbers)
    assert torch.equal(optimizer.sums[-EXTRAS:], numbers) and wholes[2].grad.sum() == 2 * 20
    optimizer.set_learning_rate(0.1)
    optimizer.step()
    assert torch.equal(values["x.A"], before["x.A"]) and not torch.equal(values["y.B"], before["y.B"])
    assert optimizer.moments("y.B")["exp_avg"].shape == (5, 4) and optimizer.moments("y.B")["exp_avg"].all()
    optimizer.zero_grad()
    assert not values["y.B"].grad.any()


def test_the_norm_keeps_its_digits():
    """One sum of 28 million squares in float32 is off by a thousandth on a CPU."""
    values = {"x.A": nn.Parameter(torch.zeros(2**22))}
    optimizer = FlatAdamW(values)
    values["x.A"].grad.copy_(torch.rand(2**22, generator=torch.Generator().manual_seed(0)) ** 8)
    exact = values["x.A"].grad.double().norm().item()
    gradient = values["x.A"].grad.clone()
    assert optimizer.clip_gradients(None).item() == pytest.approx(exact, rel=1e-6)
    assert torch.equal(values["x.A"].grad, gradient)
    optimizer.clip_gradients(2.0)
    assert values["x.A"].grad.double().norm().item() == pytest.approx(2.0, rel=1e-5)


def test_what_is_not_finite_is_seen_in_the_norm():
    values = parameters()
    optimizer = FlatAdamW(values)
    values["y.A"].grad[0, 0] = math.nan
    assert optimizer.clip_gradients(1.0).isnan()


def test_a_multiplier_of_zero_keeps_a_part_as_it_was():
    values = parameters()
    before = {key: value.detach().clone() for key, value in values.items()}
    step(FlatAdamW(values, 0.01, {"links": 0.0}), values, seed=1)
    changed = {key for key, value in values.items() if not torch.equal(value, before[key])}
    assert changed == set(values) - {"x.links"}


def test_biases_and_norms_of_a_head_do_not_decay():
    shapes = {"x.A": (2, 3), "norm.weight": (3,), "score.weight": (2, 3), "score.bias": (2,)}
    values = {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    optimizer = FlatAdamW(values, 0.1)
    optimizer.set_learning_rate(0.5)
    optimizer.step()  # all gradients are zero: what moves is decay
    kept = {name for name, value in values.items() if torch.equal(value, torch.ones(shapes[name]))}
    assert kept == {"norm.weight", "score.bias"}
    torch.testing.assert_close(values["score.weight"], torch.full((2, 3), 1 - 0.5 * 0.1))


def test_state_goes_through_a_checkpoint_bit_for_bit():
    whole, parts = parameters(), parameters()
    first = FlatAdamW(whole)
    for seed in range(5):
        step(first, whole, seed)

    second = FlatAdamW(parts)
    for seed in range(3):
        step(second, parts, seed)
    saved = tensor_bytes(second.named_state())
    continued = {key: nn.Parameter(value.detach().clone()) for key, value in parts.items()}
    third = FlatAdamW(continued)
    third.load_named_state(load(tensor_bytes(first.named_state())))  # another state, which is replaced
    third.load_named_state(load(saved))
    assert tensor_bytes(third.named_state()) == saved
    for seed in range(3, 5):
        step(third, continued, seed)
    assert all(torch.equal(continued[key], whole[key]) for key in whole)
    assert tensor_bytes(third.named_state()) == tensor_bytes(first.named_state())


def test_checkpoints_hold_the_state_of_each_tensor_as_torchs_adamw_has_it():
    values, theirs = parameters(), parameters()
    optimizer, reference = FlatAdamW(values), torch.optim.AdamW(theirs.values(), lr=0.01, weight_decay=0.0)
    step(optimizer, values, 1)
    set_gradients(theirs, 1)
    reference.step()
    expected = {f"{n}/{key}": v for n, p in theirs.items() for key, v in reference.state[p].items()}
    torch.testing.assert_close(optimizer.named_state(), expected)


def test_state_of_other_parameters_or_another_optimizer_is_refused():
    values = parameters()
    optimizer = FlatAdamW(values)
    step(optimizer, values, 0)
    state = optimizer.named_state()
    fewer = {key: value for key, value in parameters().items() if key != "y.A"}
    with pytest.raises(InputError, match="names 'y.A', which this run does not train"):
        FlatAdamW(fewer).load_named_state(state)
    missing = {key: value for key, value in state.items() if not key.startswith("x.links/")}
    with pytest.raises(InputError, match="no optimizer state for 'x.links'"):
        FlatAdamW(parameters()).load_named_state(missing)
    other = {key.replace("exp_avg_sq", "state2"): value for key, value in state.items()}
    with pytest.raises(InputError, match="another optimizer's"):
        FlatAdamW(parameters()).load_named_state(other)


def test_training_and_exact_resume(run_tiny, dies_after):
    changes = {"adapter.dropout": 0.1, "training.max_steps": 4}
    whole = run_tiny({**changes, "name": "whole"})
    losses = [row["loss"] for row in read_jsonl(whole.run.metrics_path) if "loss" in row]
    assert losses[-1] < losses[0]

    with dies_after(3):
        run_tiny(changes)
    job = run_tiny(changes, resume=True)
    for path in ("adapter/chain.safetensors", "checkpoints/step-000004/optimizer.safetensors", "rows.jsonl"):
        assert (job.run.path / path).read_bytes() == (whole.run.path / path).read_bytes()
