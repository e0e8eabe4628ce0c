"""Folding for one optimizer step: the same gradients as without it, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from linchain_cli.chain import ChainConfig, folded, inject


def make_model(depth: int, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    layers = inject(model, ChainConfig(rank=2, depth=depth, alpha=4, dropout=dropout), seed=0)
    for layer in layers.values():
        layer.double()
        nn.init.normal_(layer.B)
    return model


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_gradients_over_several_micro_batches_equal_the_unfolded_ones(depth):
    batches = torch.randn(3, 5, 6, dtype=torch.float64)
    plain, fast = make_model(depth), make_model(depth)
    for batch in batches:
        plain(batch).square().sum().backward()
    with folded(fast):
        for batch in batches:
            fast(batch).square().sum().backward()
    reference = gradients(plain)
    assert reference.keys() == gradients(fast).keys()
    for name, gradient in gradients(fast).items():
        torch.testing.assert_close(gradient, reference[name], rtol=1e-10, atol=1e-12)


def test_gradients_survive_checkpoint_recomputation():
    from torch.utils.checkpoint import checkpoint

    batch = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    plain, fast = make_model(3), make_model(3)
    plain(batch).square().sum().backward()
    with folded(fast):
        checkpoint(fast, batch, use_reentrant=False).square().sum().backward()
    for name, gradient in gradients(fast).items():
        torch.testing.assert_close(gradient, gradients(plain)[name], rtol=1e-10, atol=1e-12)


def test_values_are_those_at_the_blocks_start_and_nothing_stays():
    model, batch = make_model(2), torch.randn(4, 6, dtype=torch.float64)
    before = model(batch)
    with folded(model), torch.no_grad():
        model[0].links.zero_()
        assert torch.equal(model(batch), before)
    assert not torch.equal(model(batch), before)
    assert model[0].group.factors is None


def test_without_gradients_nothing_is_carried():
    model = make_model(3)
    with torch.no_grad(), folded(model):
        model(torch.randn(4, 6, dtype=torch.float64))
    assert not gradients(model)


def test_an_error_inside_leaves_the_model_unfolded():
    model = make_model(3)
    with pytest.raises(ZeroDivisionError), folded(model):
        raise ZeroDivisionError
    assert model[0].group.factors is None


def test_nesting_is_refused():
    model = make_model(1)
    with folded(model), pytest.raises(RuntimeError, match="does not nest"):
        with folded(model):
            pass
