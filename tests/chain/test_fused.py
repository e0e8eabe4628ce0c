"""Base and adapter in one node, alone and for layers that read the same input."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from linchain_cli.chain import ChainConfig, detach, find_siblings, folded, inject, set_enabled
from linchain_cli.chain.fused import FusedChains


@pytest.mark.parametrize("outputs", [(7,), (7, 4, 3)])
def test_the_node_passes_gradcheck(outputs):
    torch.manual_seed(0)

    def random(*shape: int, trained: bool = True) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=trained)

    weights = [random(d_out, 6, trained=False) for d_out in outputs]
    biases = [random(d_out, trained=False) for d_out in outputs]
    x, k = random(3, 5, 6), len(outputs)
    trained = *(random(2, 6) for _ in outputs), *(random(d_out, 2) for d_out in outputs)

    def node(x: Tensor, dropped: Tensor | None, *trained: Tensor) -> tuple[Tensor, ...]:
        ready_a, ready_bs = torch.cat(trained[:k]).detach(), [b.detach() for b in trained[k:]]
        return FusedChains.apply(x, dropped, ready_a, (None,) * k, *weights, *biases, *ready_bs, *trained)

    assert torch.autograd.gradcheck(lambda x, *trained: node(x, None, *trained), (x, *trained))
    assert torch.autograd.gradcheck(node, (x, random(3, 5, 6), *trained))


class Attention(nn.Module):
    """Three layers that read one input and one that reads another."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 5), nn.Linear(5, 6)
        self.order = ("q", "k", "v")

    def forward(self, x: Tensor) -> Tensor:
        found = {name: getattr(self, name)(x) for name in self.order}
        value = found["q"] @ found["k"].transpose(-1, -2) @ found["v"] if "q" in found else found["v"]
        return self.o(torch.tanh(value))


def make_model(depth: int = 3, **options) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(Attention(), nn.Tanh(), Attention()).double()
    for layer in inject(model, ChainConfig(rank=2, depth=depth, alpha=4, **options), seed=0).values():
        layer.double()
        nn.init.normal_(layer.B)
    return model


GROUPS = [["0.q", "0.k", "0.v"], ["2.q", "2.k", "2.v"]]
BATCHES = torch.randn(3, 4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def grouped(model: nn.Module) -> nn.Module:
    assert find_siblings(model, lambda: model(BATCHES[0])) == GROUPS
    return model


def detached(model: nn.Module) -> nn.Module:
    detach(model)
    return model


def step(model: nn.Module, run=lambda model, batch: model(batch)) -> dict[str, Tensor]:
    with folded(model):
        for batch in BATCHES:
            torch.manual_seed(2)
            run(model, batch.clone().requires_grad_()).square().sum().backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def same(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    """A sibling that had no part in the loss has a gradient of zero, where one alone has none."""
    assert ours.keys() >= reference.keys() and len(reference) > 0
    for name, gradient in ours.items():
        expected = reference.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_siblings_have_the_gradients_of_layers_alone(depth, monkeypatch):
    counts = []
    forward = FusedChains.forward

    def counting(ctx, x, dropped, ready_a, scales, *operands):
        counts.append(len(scales))
        return forward(ctx, x, dropped, ready_a, scales, *operands)

    reference = step(make_model(depth))
    model = grouped(make_model(depth))
    monkeypatch.setattr(FusedChains, "forward", staticmethod(counting))
    same(step(model), reference)
    assert counts == [3, 1, 3, 1] * 3


def test_in_another_order_recomputed_and_called_twice():
    model = grouped(make_model())
    model[0].order = ("v", "q", "k")
    same(step(model), step(make_model()))

    def recompute(model, batch):
        return checkpoint(model, batch, use_reentrant=False)

    same(step(grouped(make_model()), recompute), step(make_model()))

    def twice(model, batch):
        return model[0](batch) + model[0](batch)

    same(step(grouped(make_model()), twice), step(make_model(), twice))


def test_dropout_a_disabled_layer_and_a_hook_take_them_apart():
    same(step(grouped(make_model(dropout=0.5)).train()), step(make_model(dropout=0.5).train()))
    models = grouped(make_model()), make_model()
    for model in models:
        model[0].k.enabled = False
        model[2].v.base.register_forward_hook(lambda *_: None)
    same(*map(step, models))
    base = detached(make_model())
    set_enabled(models[0], False)
    models[0][2].v.base._forward_hooks.clear()
    with folded(models[0]):
        assert torch.allclose(models[0](BATCHES[0]), base(BATCHES[0]))


def test_a_sibling_that_is_not_called_leaves_nothing_behind():
    model, other = grouped(make_model()), make_model()
    for each in (model, other):
        each[0].order = ("v",)
    same(step(model), step(other))
    group = model[0].q.group
    assert group.factors is None and group._input is None and not group._outputs


def test_with_and_without_gradients_on_the_same_input():
    model, x = grouped(make_model()), BATCHES[0].clone().requires_grad_()
    with folded(model):
        with torch.no_grad():
            model[0].q(x)
        assert model[0].k(x).requires_grad
    with torch.no_grad():
        torch.testing.assert_close(model[0](x), make_model()[0](x), rtol=1e-12, atol=1e-12)


def test_copies_have_siblings_of_their_own():
    model = grouped(make_model())
    other = copy.deepcopy(model)
    assert other[0].q.group is other[0].v.group is not model[0].q.group
    same(step(other), step(model))


def test_a_layer_with_several_inputs_has_no_siblings():
    model = make_model()

    def forward():
        model(BATCHES[0])
        model[0].k(BATCHES[1])

    assert find_siblings(model, forward) == GROUPS[1:]


@pytest.mark.parametrize("together", [False, True])
def test_a_model_may_change_outputs_in_place(together):
    """As Gemma 3n does."""
    results = []
    for in_place in (False, True):
        model = grouped(make_model()) if together else make_model()
        handles = [
            layer.register_forward_hook(lambda _m, _i, y, in_place=in_place: y.mul_(2) if in_place else 2 * y)
            for layer in (model[0].q, model[0].k, model[2].v)
        ]
        with folded(model):
            model(BATCHES[0]).sin().sum().backward()
        results.append([layer.B.grad for layer in model.modules() if hasattr(layer, "links")])
        assert len(handles) == 3
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference)


def test_an_input_that_was_changed_in_place_is_read_again():
    model = grouped(make_model())[0]
    x = BATCHES[0].clone()
    with torch.no_grad(), folded(model):
        model.q(x)
        x.mul_(2)
        changed = model.k(x)
        torch.testing.assert_close(changed, model.k(x.clone()))
