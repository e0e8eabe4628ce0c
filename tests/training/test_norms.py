"""Norms that keep their input alone: the same values bit for bit, the same gradients, less memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from linchain_cli.chain import ChainConfig, inject
from linchain_cli.model.fast import is_replaced
from linchain_cli.model.head import hidden_states
from linchain_cli.training import norms
from linchain_cli.training.forecast.memory import saved_bytes
from linchain_cli.training.norms import LeanRMSNorm, make_norms_lean

IDS = torch.arange(3, 43).view(2, 20)
WITHOUT = {
    "phi",
    "stablelm",
    "starcoder2",
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "gptj",
    "opt",
    "falcon",
    "bloom",
    "mpt",
}
# Layer norms, which torch keeps lean by itself.
WITHOUT |= {"codegen", "nemotron", "cohere", "cohere2", "olmo"}


def made_lean(model: nn.Module) -> int:
    """How many norms of the model it changes."""
    make_norms_lean(model)
    return sum(map(is_replaced, model.modules()))


def test_values_are_the_same_and_gradients_agree(architecture, small_model, hidden_and_gradient):
    model = small_model(architecture)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            nn.init.uniform_(module.weight, -0.5, 1.5)
    hidden, gradient = hidden_and_gradient(model, lambda: hidden_states(model, IDS))
    count = made_lean(model)
    expected = sum(type(module).__name__.endswith("RMSNorm") for module in model.modules())
    assert count == expected and (count == 0) == (architecture in WITHOUT)
    ours, our_gradient = hidden_and_gradient(model, lambda: hidden_states(model, IDS))
    assert torch.equal(ours, hidden)
    torch.testing.assert_close(our_gradient, gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max())


def test_bfloat16_gradients_are_closer_to_float32s_than_the_modules_own(small_model):
    norm = small_model("llama").model.norm
    torch.manual_seed(0)
    norm.weight.data = torch.rand(32)
    x, grad = torch.randn(2, 64, 32), torch.randn(64, 32)

    def gradient(dtype: torch.dtype) -> torch.Tensor:
        own = x[0].to(dtype).requires_grad_()
        return torch.autograd.grad(norm.to(dtype)(own), own, grad.to(dtype))[0].float()

    exact, theirs = gradient(torch.float32), gradient(torch.bfloat16)
    assert made_lean(nn.Sequential(norm)) == 1
    ours = gradient(torch.bfloat16)
    assert (ours - exact).abs().mean() <= (theirs - exact).abs().mean()


def test_less_is_kept_for_the_backward_pass(small_model):
    model = small_model("llama").bfloat16().to("meta")
    model.set_attn_implementation("eager")
    inject(model, ChainConfig(rank=2, depth=0, target_modules=["q_proj"]))
    before = saved_bytes(model, 2, 16)
    assert made_lean(model) == 5
    assert saved_bytes(model, 2, 16) < 0.9 * before


def test_the_formula_passes_gradcheck_in_float32():
    torch.manual_seed(0)
    x = torch.randn(4, 6, requires_grad=True)
    weight = torch.rand(6)

    def formula(x):
        return weight * x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()

    def ours(x):
        return LeanRMSNorm.apply(x, formula, weight, lambda w: w, 1e-5)

    grad = torch.randn(4, 6)
    torch.testing.assert_close(
        torch.autograd.grad(ours(x), x, grad)[0], torch.autograd.grad(formula(x), x, grad)[0]
    )


@pytest.mark.parametrize("change", ["another formula", "trained", "without a weight"])
def test_what_is_something_else_is_left_alone(change):
    class OddRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.rand(6), change == "trained"), 1e-6
            if change == "without a weight":
                self.weight = None

        def forward(self, x):
            power = 3 if change == "another formula" else 2
            return self.weight * x / (x.abs().pow(power).mean(-1, keepdim=True) + self.eps).pow(1 / power)

    assert made_lean(nn.Sequential(OddRMSNorm())) == 0


def test_a_copy_computes_with_its_own_weight(small_model):
    norm = small_model("llama").model.norm
    model = nn.Sequential(norm)
    make_norms_lean(model)
    other = copy.deepcopy(model)
    nn.init.zeros_(other[0].weight)
    x = torch.randn(2, 32, requires_grad=True)
    assert not other(x).any() and model(x).any()


def test_doing_it_twice_is_doing_it_once(small_model):
    model = small_model("llama")
    assert made_lean(model) == made_lean(model) == 5


def test_it_is_undone(small_model):
    model = small_model("llama")
    make_norms_lean(model)()
    assert not any(map(is_replaced, model.modules()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_kernel_computes_what_each_family_does(architecture, small_model, monkeypatch, dtype):
    """torch's kernel, which is for GPUs, beside each norm of its own, on the CPU: no further from the norm in
    float32 than the module is by itself."""
    monkeypatch.setattr(norms, "FUSED_ON", ("cpu",))
    model = small_model(architecture)
    found = {type(module): module for module in model.modules() if type(module).__name__.endswith("RMSNorm")}
    for norm in found.values():
        nn.init.uniform_(norm.weight, -0.5, 1.5)
        own, values = copy.deepcopy(norm), []
        assert made_lean(nn.Sequential(norm)) == 1
        x, grad = torch.randn(2, 64, norm.weight.shape[0], generator=torch.Generator().manual_seed(0))
        for module, kind in ((own, torch.float32), (own, dtype), (norm, dtype)):
            there = x.to(kind).requires_grad_()
            y = module.to(kind)(there)
            values.append([each.double() for each in (y, torch.autograd.grad(y, there, grad.to(kind))[0])])
            assert y.dtype == kind
        for exact, theirs, ours in zip(*values, strict=True):
            assert (ours - exact).norm() <= 1.05 * (theirs - exact).norm() + 1e-6 * exact.norm()
