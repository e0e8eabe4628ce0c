"""float32 products by oneDNN: the same numbers to rounding, inside the block and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from linchain_cli.chain import ChainConfig, chain_layers, folded, inject
from linchain_cli.model import products
from linchain_cli.model.products import MIN_ROWS, fast_products


@pytest.fixture
def calls(monkeypatch):
    """As on a processor of AMD's; the shapes that went to oneDNN."""
    monkeypatch.setattr(products, "cpu_info", lambda field: "AuthenticAMD")
    if not products.onednn_is_faster():
        pytest.skip("this torch has no oneDNN")
    found, operator = [], torch.ops.mkldnn._linear_pointwise

    def noted(x, *arguments):
        found.append(tuple(x.shape))
        return operator(x, *arguments)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", noted)
    return found


def make_model(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40, bias=bias), nn.Tanh(), nn.Linear(40, 16, bias=bias)).to(dtype)


@pytest.mark.parametrize("bias", [True, False])
def test_the_same_to_rounding(calls, bias):
    model, x = make_model(bias=bias), torch.randn(3, MIN_ROWS, 24)
    expected = model(x)
    with torch.inference_mode(), fast_products(model):
        found = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert calls == [(3, MIN_ROWS, 24), (3, MIN_ROWS, 40)]


def test_outside_everything_is_as_it_was(calls):
    model, x = make_model(), torch.randn(MIN_ROWS, 24)
    expected = model(x)
    with pytest.raises(ZeroDivisionError), fast_products(model):
        raise ZeroDivisionError
    assert torch.equal(model(x), expected) and not calls
    assert not any("forward" in vars(module) for module in model.modules())


def test_gradients_few_rows_and_other_types_take_torchs_way(calls):
    model = make_model()
    with fast_products(model):
        x = torch.randn(MIN_ROWS, 24, requires_grad=True)
        model(x).sum().backward()
        assert x.grad is not None
        with torch.no_grad():
            model(torch.randn(MIN_ROWS - 1, 24))
    with torch.no_grad(), fast_products(make_model(torch.bfloat16)) as _:
        make_model(torch.bfloat16)(torch.randn(MIN_ROWS, 24, dtype=torch.bfloat16))
    assert not calls


def test_chains_add_to_it(calls):
    model, x = make_model(), torch.randn(MIN_ROWS, 24)
    inject(model, ChainConfig(rank=4, depth=2, target_modules=["0", "2"]))
    for layer in chain_layers(model).values():
        nn.init.normal_(layer.B, std=0.1)
    expected = model(x)
    with torch.inference_mode(), folded(model), fast_products(model):
        found = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == 2


def test_chains_on_bfloat16_keep_their_own_way(calls, monkeypatch):
    """Theirs rounds base and chain together, see test_layer."""
    model = make_model(torch.bfloat16)
    inject(model, ChainConfig(rank=4, depth=2, target_modules=["0"]))
    with torch.inference_mode(), fast_products(model):
        layer = chain_layers(model)["0"]
        assert layer.is_fused(torch.randn(MIN_ROWS, 24, dtype=torch.bfloat16))


def test_other_makers_processors_keep_mkl(calls, monkeypatch):
    monkeypatch.setattr(products, "cpu_info", lambda field: "GenuineIntel")
    model = make_model()
    with torch.inference_mode(), fast_products(model):
        model(torch.randn(MIN_ROWS, 24))
    assert not calls
