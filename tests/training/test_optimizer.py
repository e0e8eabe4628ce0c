"""AdamW in 32 and 8 bit over the kinds of a chain's tensors, and its state through a checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from linchain_cli.errors import InputError
from linchain_cli.run import read_jsonl
from linchain_cli.training import optimizer as optimizers

NAMES = ["adamw", "adamw_8bit", "paged_adamw_8bit"]


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    """A and B large enough for 8 bits; links as large, to show that they are left in 32."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x.A": (64, 80), "x.links": (2, 64, 64), "x.B": (96, 64), "y.A": (4, 8), "y.B": (8, 4)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def build(name: str, values: dict[str, nn.Parameter], weight_decay: float = 0.01, **multipliers: float):
    return optimizers.build_optimizer(name, values, weight_decay, multipliers)


def step(optimizer, values: dict[str, nn.Parameter], seed: int, rate: float = 0.01) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in values.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizers.set_learning_rate(optimizer, rate)
    optimizer.step()


def test_multipliers_scale_each_kinds_rate():
    values = parameters()
    optimizer = build("adamw", values, links=3.0, B=0.5)
    optimizers.set_learning_rate(optimizer, 0.1)
    assert [(group["kind"], group["lr"]) for group in optimizer.param_groups] == [
        ("A", 0.1),
        ("links", pytest.approx(0.3)),
        ("B", 0.05),
    ]
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(p) for p in values.values()
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_multiplier_of_zero_keeps_a_part_as_it_was(name):
    values = parameters()
    before = {key: value.detach().clone() for key, value in values.items()}
    step(build(name, values, links=0.0), values, seed=1)
    changed = {key for key, value in values.items() if not torch.equal(value, before[key])}
    assert changed == set(values) - {"x.links"}


@pytest.mark.parametrize("name", NAMES[1:])
def test_the_links_state_is_never_in_8_bit(name):
    values = parameters()
    optimizer = build(name, values)
    step(optimizer, values, seed=1)
    types = {key: optimizer.state[value]["state1"].dtype for key, value in values.items()}
    assert types["x.A"] == types["x.B"] == torch.uint8
    assert types["x.links"] == types["y.A"] == types["y.B"] == torch.float32


@pytest.mark.parametrize("name", NAMES[1:])
def test_eight_bits_follow_32(name):
    """Steps have the size of the rate (0.01); 8 bits of state lose a few percent of it."""
    exact, rounded = parameters(), parameters()
    first, second = build("adamw", exact), build(name, rounded)
    for seed in range(4):
        step(first, exact, seed)
        step(second, rounded, seed)
    for key in exact:
        difference = (exact[key] - rounded[key]).abs().mean()
        assert difference < (0.002 if key in ("x.A", "x.B") else 1e-6)
    assert (exact["x.A"] - rounded["x.A"]).abs().mean() > 1e-6, "is its state in 8 bit at all?"


@pytest.mark.parametrize("name", NAMES)
def test_state_goes_through_a_checkpoint_bit_for_bit(name):
    from safetensors.torch import load

    from linchain_cli.storage import tensor_bytes

    whole, parts = parameters(), parameters()
    first = build(name, whole)
    for seed in range(5):
        step(first, whole, seed)

    second = build(name, parts)
    for seed in range(3):
        step(second, parts, seed)
    saved = tensor_bytes(optimizers.optimizer_state(second, parts))
    continued = {key: nn.Parameter(value.detach().clone()) for key, value in parts.items()}
    third = build(name, continued)
    optimizers.load_optimizer_state(third, continued, load(saved))
    assert tensor_bytes(optimizers.optimizer_state(third, continued)) == saved
    for seed in range(3, 5):
        step(third, continued, seed)
    assert all(torch.equal(continued[key], whole[key]) for key in whole)
    assert tensor_bytes(optimizers.optimizer_state(third, continued)) == tensor_bytes(
        optimizers.optimizer_state(first, whole)
    )


def test_state_of_other_parameters_or_another_optimizer_is_refused():
    values = parameters()
    optimizer = build("adamw", values)
    step(optimizer, values, 0)
    state = optimizers.optimizer_state(optimizer, values)
    fewer = {key: value for key, value in parameters().items() if key != "y.A"}
    with pytest.raises(InputError, match="names 'y.A', which this run does not train"):
        optimizers.load_optimizer_state(build("adamw", fewer), fewer, state)
    missing = {key: value for key, value in state.items() if not key.startswith("x.links/")}
    with pytest.raises(InputError, match="no optimizer state for 'x.links'"):
        optimizers.load_optimizer_state(build("adamw", values), values, missing)
    with pytest.raises(InputError, match="another optimizer's"):
        optimizers.load_optimizer_state(build("adamw_8bit", values), values, state)


@pytest.mark.parametrize("name", NAMES)
def test_training_and_exact_resume(run_tiny, monkeypatch, capfd, name):
    from linchain_cli.errors import LinchainError
    from linchain_cli.training import loop

    changes = {
        "training.optimizer": name,
        "adapter.rank": 64,
        "adapter.dropout": 0.1,
        "training.max_steps": 4,
    }
    whole = run_tiny({**changes, "name": "whole"})
    losses = [row["loss"] for row in read_jsonl(whole.run.metrics_path) if "loss" in row]
    assert losses[-1] < losses[0]
    assert ("the CPU has nothing to page to" in capfd.readouterr().err) == (name == "paged_adamw_8bit")

    original = loop.optimizer_step

    def dies(job, *args):
        if job.state.step == 3:
            raise LinchainError("pulled the plug")
        return original(job, *args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimizer_step", dies)
        with pytest.raises(LinchainError, match="pulled the plug"):
            run_tiny(changes)
    job = run_tiny(changes, resume=True)
    for path in ("adapter/chain.safetensors", "checkpoints/step-000004/optimizer.safetensors", "rows.jsonl"):
        assert (job.run.path / path).read_bytes() == (whole.run.path / path).read_bytes()
