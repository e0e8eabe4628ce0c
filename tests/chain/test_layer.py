"""The chain layer against the written-out formula: outputs, gradients, initial values."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from linchain_cli.chain import ChainLinear, collapse, delta_weight, find_siblings, folded
from linchain_cli.chain.fused import matrix
from linchain_cli.chain.init import initial_links, initialise

BASES = {
    "linear": lambda: nn.Linear(12, 10),
    "linear without bias": lambda: nn.Linear(12, 10, bias=False),
    "conv1d": lambda: Conv1D(10, 12),
}


def make_layer(
    base: str = "linear", depth: int = 3, dropout: float = 0.0, dtype: torch.dtype = torch.float32
) -> ChainLinear:
    torch.manual_seed(0)
    layer = ChainLinear(
        BASES[base]().to(dtype).requires_grad_(False), rank=4, depth=depth, alpha=8, dropout=dropout
    )
    initialise(layer, "layer", "orthogonal", seed=0)
    nn.init.normal_(layer.B)
    return layer


def formula(layer: ChainLinear, x: torch.Tensor) -> torch.Tensor:
    """W0 x + b + (α/r) B Wn … W1 A x, one product after another."""
    h = x @ layer.A.T
    for link in layer.links:
        h = h @ link.T
    return layer.base(x) + layer.scaling * (h @ layer.B.T)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("depth", [0, 1, 3, 8])
def test_output_and_gradients_are_the_formulas_in_float64(base, depth):
    layer = make_layer(base, depth).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    results = []
    for compute in (lambda x: layer(x), lambda x: formula(layer, x)):
        own = x.clone().requires_grad_()
        layer.zero_grad()
        y = compute(own)
        (y.sin().sum()).backward()
        results.append([y, own.grad, *(parameter.grad.clone() for parameter in (layer.A, layer.B))])
        if depth:
            results[-1].append(layer.links.grad.clone())
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)


def test_plain_and_fused_way_agree():
    layer = make_layer()
    x = torch.randn(4, 12)
    fused = layer(x)
    # A hook must run, so the fused way is not taken.
    handle = layer.base.register_forward_hook(lambda *_: None)
    plain = layer(x)
    handle.remove()
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)


def test_a_hooked_base_still_sees_its_calls():
    layer, calls = make_layer(), []
    layer.base.register_forward_hook(lambda *_: calls.append(1))
    layer(torch.randn(2, 12))
    assert calls == [1]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_zero_b_leaves_the_base_bit_for_bit(bias, dtype, dropout):
    """In sizes for which libraries have programs of their own. A bias in bfloat16 is rounded by itself."""
    torch.manual_seed(0)
    base = nn.Linear(576, 320, bias=bias).to(dtype).requires_grad_(False)
    layer = ChainLinear(base, rank=4, depth=3, alpha=8, dropout=dropout)
    initialise(layer, "layer", "orthogonal", seed=0)
    x = torch.randn(2, 33, 576).to(dtype)
    if bias and dtype == torch.bfloat16:
        torch.testing.assert_close(layer(x), base(x), rtol=2**-7, atol=2**-7)
    else:
        assert torch.equal(layer(x), base(x))


def test_zero_b_leaves_a_conv1d_bit_for_bit():
    layer = make_layer("conv1d")
    nn.init.zeros_(layer.B)
    x = torch.randn(2, 7, 12)
    assert torch.equal(layer(x), layer.base(x))


def test_bfloat16_base_trains_float32_chains():
    layer = make_layer()
    layer.base.to(torch.bfloat16)
    x = torch.randn(6, 12, dtype=torch.bfloat16, requires_grad=True)
    layer(x).float().square().sum().backward()
    assert layer(x).dtype == torch.bfloat16
    assert {parameter.grad.dtype for parameter in (layer.A, layer.links, layer.B)} == {torch.float32}
    assert x.grad.dtype == torch.bfloat16


def test_dropout_acts_on_the_chain_alone_and_only_in_training():
    layer = make_layer(dropout=0.5)
    x = torch.randn(64, 12)
    layer.train()
    torch.manual_seed(1)
    first = layer(x)
    torch.manual_seed(1)
    assert torch.equal(first, layer(x))
    assert not torch.equal(first, layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), formula(layer, x), rtol=1e-5, atol=1e-5)
    layer.train()
    nn.init.zeros_(layer.B)
    assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("base", BASES)
def test_it_looks_like_the_module_that_it_replaces(base):
    """Some models multiply by a projection's weight themselves: with it they compute what the layer does."""
    layer = make_layer(base).double()
    assert (layer.in_features, layer.out_features) == (12, 10)
    assert layer.bias is layer.base.bias and layer.weight.shape == layer.base.weight.shape
    x = torch.randn(3, 12, dtype=torch.float64)
    found = []
    for by_weight in (False, True):
        layer.zero_grad()
        if by_weight:
            y = x @ (layer.weight if base == "conv1d" else layer.weight.T)
            y = y if layer.bias is None else y + layer.bias
        else:
            y = layer(x)
        y.sin().sum().backward()
        found.append([y, *(each.grad.clone() for each in (layer.A, layer.links, layer.B))])
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference)
    assert layer.to(torch.bfloat16).weight.dtype == torch.bfloat16
    layer.enabled = False
    assert layer.weight is layer.base.weight


def test_disabled_layer_is_the_base():
    layer = make_layer()
    layer.enabled = False
    x = torch.randn(3, 12)
    assert torch.equal(layer(x), layer.base(x))


def test_delta_weight_is_what_the_layer_adds():
    layer = make_layer().double()
    x = torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x) - layer.base(x), x @ layer.delta_weight(torch.float64).T)


def test_collapse_applies_the_first_link_first():
    links = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(collapse(links)[1], links[1, 2] @ links[1, 1] @ links[1, 0])


def test_depth_zero_delta_is_loras():
    A, B = torch.randn(4, 6), torch.randn(5, 4)
    torch.testing.assert_close(delta_weight(A, torch.empty(0, 4, 4), B, 2.0), 2.0 * B @ A)


def test_links_start_as_their_scheme_says():
    generator = torch.Generator().manual_seed(0)
    orthogonal = initial_links("orthogonal", 3, 16, generator)
    torch.testing.assert_close(
        collapse(orthogonal) @ collapse(orthogonal).T, torch.eye(16), rtol=1e-4, atol=1e-5
    )
    assert torch.equal(initial_links("identity", 2, 4, generator), torch.eye(4).expand(2, 4, 4))
    kaiming = initial_links("kaiming", 40, 16, generator)
    bound = 1 / math.sqrt(16)
    assert kaiming.abs().max() <= bound
    assert kaiming.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_a_is_the_same_at_every_depth_and_b_is_zero():
    first, second = make_layer(depth=0), make_layer(depth=3)
    initialise(first, "path", "orthogonal", seed=5)
    initialise(second, "path", "kaiming", seed=5)
    assert torch.equal(first.A, second.A)
    assert not second.B.any()
    assert first.A.abs().max() <= 1 / math.sqrt(12)
    initialise(second, "other path", "kaiming", seed=5)
    assert not torch.equal(first.A, second.A)


def test_identity_links_take_loras_first_step_of_b():
    x, steps = torch.randn(9, 12), []
    for depth in (0, 3):
        layer = make_layer(depth=depth)
        initialise(layer, "path", "identity", seed=0)
        layer(x).square().sum().backward()
        steps.append(layer.B.grad)
    torch.testing.assert_close(*steps, rtol=1e-6, atol=1e-6)


def test_a_module_without_a_matrix_is_refused():
    with pytest.raises(TypeError, match="nn.Linear or Conv1D"):
        ChainLinear(nn.LayerNorm(4), 2, 1, 4)


def in_4_bit(base: nn.Linear) -> nn.Linear:
    from bitsandbytes.nn import Linear4bit, Params4bit

    d_out, d_in = base.weight.shape
    rounded = Linear4bit(d_in, d_out, bias=base.bias is not None, compute_dtype=base.weight.dtype)
    rounded.weight = Params4bit(base.weight.float(), requires_grad=False, quant_type="nf4")
    rounded.bias = base.bias
    rounded.support_avx512bf16_for_cpu = False
    return rounded.to("cpu")  # which is when it rounds


def in_8_bit(base: nn.Linear) -> nn.Linear:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    from linchain_cli.model.int8 import store_only

    d_out, d_in = base.weight.shape
    rounded = Linear8bitLt(d_in, d_out, bias=base.bias is not None, has_fp16_weights=False)
    rounded.weight = Int8Params(base.weight.float(), requires_grad=False, has_fp16_weights=False)
    rounded.bias = base.bias
    rounded.to("cpu")  # which is when it rounds
    store_only(rounded, base.weight.dtype)
    return rounded


ROUNDED = {4: in_4_bit, 8: in_8_bit}


@pytest.mark.parametrize("way", ["fused", "dropout", "siblings"])
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_a_term_below_the_last_digit_of_the_bases_output_is_not_lost_in_bfloat16(way, bits, bias):
    """The first steps' terms are that small. Added to a rounded output they would vanish, all of them."""
    torch.manual_seed(0)
    d_in, d_out = 64, 256
    base = nn.Linear(d_in, d_out, bias=bias).to(torch.bfloat16).requires_grad_(False)
    base = ROUNDED[bits](base) if bits in ROUNDED else base
    layer = ChainLinear(base, 4, 2, 8.0, dropout=1e-9 if way == "dropout" else 0.0)
    initialise(layer, "layer", "orthogonal", seed=0)
    nn.init.normal_(layer.B)
    x = torch.randn(512, d_in).to(torch.bfloat16)
    output = base(x).double()
    term = x.double() @ layer.delta_weight(torch.float64).T
    # A tenth of half a last digit: bfloat16 keeps eight binary digits.
    scale = 0.1 * 2.0**-9 * output.abs().mean() / term.abs().mean()
    with torch.no_grad():
        layer.B *= scale
    term *= scale
    if way == "siblings":
        model = nn.ModuleDict({"one": layer, "other": copy.deepcopy(layer)})
        find_siblings(model, lambda: [member(x) for member in model.values()])
        with folded(model):
            found = [member(x) for member in model.values()][1]
    else:
        found = layer(x)
    weight = matrix(layer.base_weight, layer.base_scale, torch.bfloat16).double()
    exact = x.double() @ weight.T + (base.bias.double() if bias else 0)
    arrived = ((found.double() - exact) * term).sum() / term.square().sum()
    assert 0.8 < arrived < 1.2
    added_later = output.to(torch.bfloat16) + term.to(torch.bfloat16)
    assert ((added_later.double() - output) * term).sum() / term.square().sum() < 0.5


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_rounded_base_has_the_gradients_of_its_rounded_weights(dropout, bits):
    plain, rounded = make_layer(dropout=dropout), make_layer(dropout=dropout)
    rounded.base = ROUNDED[bits](rounded.base)
    weight = matrix(rounded.base_weight, rounded.base_scale, torch.float32)
    assert weight.shape == plain.base.weight.shape and not torch.equal(weight, plain.base.weight)
    plain.base.weight.copy_(weight)
    found = []
    for layer in (plain, rounded):
        x = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
        torch.manual_seed(2)
        layer(x).square().sum().backward()
        found.append([x.grad, layer.A.grad, layer.links.grad, layer.B.grad])
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference)
