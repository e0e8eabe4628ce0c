"""8-bit layers restore their weights for each product: no more is rounded or kept than that."""

from __future__ import annotations

import bitsandbytes
import pytest
import torch
from torch import nn

from linchain_cli.model.loading import load_model


@pytest.fixture
def models(tiny_llama_dir, monkeypatch: pytest.MonkeyPatch):
    """The model in 8 bit, and the same with ordinary layers that hold the rounded weights; the product of
    bitsandbytes raises."""

    def refuse(*_args, **_options):
        raise AssertionError("bitsandbytes' own product was called")

    rounded, plain = (
        load_model(tiny_llama_dir, dtype="float32", device="cpu", quantization=kind)
        for kind in ("int8", "none")
    )
    for path, module in rounded.named_modules():
        if type(module).__name__ == "Linear8bitLt":
            weight = module.weight.data.float() * (module.state.SCB / 127)[:, None]
            assert module.weight.dtype == torch.int8 and not torch.equal(
                weight, plain.get_submodule(path).weight
            )
            plain.get_submodule(path).weight.data = weight
    monkeypatch.setattr(bitsandbytes, "matmul", refuse)
    return rounded, plain


def test_values_and_gradients_are_those_of_the_rounded_weights(models):
    ids = torch.arange(3, 43).view(2, 20)
    found = []
    for model in models:
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=embedded).logits
        found.append((logits.detach(), torch.autograd.grad(logits.square().mean(), embedded)[0]))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * expected.abs().max())


def test_nothing_is_kept_but_the_weight(models):
    rounded, _ = models
    layer = next(m for m in rounded.modules() if type(m).__name__ == "Linear8bitLt")
    assert isinstance(layer, nn.Linear)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
        layer(torch.randn(5, layer.in_features, requires_grad=True))
    assert sorted(tensor.shape for tensor in kept) == sorted([layer.weight.shape, layer.state.SCB.shape])
