"""RMS norms that keep nothing but their input for the backward pass.

transformers writes an RMS norm as half a dozen operations in float32, each of which keeps its own operands:
about six times the input. A frozen norm needs its input alone: with n = x / rms(x), s = 1 / rms(x) and the
gain g, the gradient of y = g·n is s·(g·dy − n·mean(g·dy·n)) (Zhang and Sennrich, arXiv 1910.07467, by the
chain rule).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from linchain_cli.model.fast import GRADIENT_SLACK, REFUSALS, alike, replace_forward

# What a norm multiplies by: its weight, or (Gemma) one more than that.
GAINS: dict[str, Callable[[Tensor], Tensor]] = {
    "weight": lambda w: w.float(),
    "1 + weight": lambda w: 1 + w.float(),
}
_EPSILONS = ("variance_epsilon", "eps")


class LeanRMSNorm(torch.autograd.Function):
    """y = norm(x), computed by the module's own forward; x (..., d) is all that is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, forward: Callable, weight: Tensor, gain: Callable, epsilon: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.gain, ctx.epsilon = gain, epsilon
        return forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wide = x.to(torch.float32, copy=True)
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = scale.square_().div_(x.shape[-1]).add_(ctx.epsilon).rsqrt_()
        normed = wide.mul_(scale)
        grad = grad.to(torch.float32, copy=True).mul_(ctx.gain(weight))
        along = (grad * normed).mean(-1, keepdim=True)
        grad = grad.addcmul_(normed, along, value=-1).mul_(scale)
        return grad.to(x.dtype), None, None, None, None


def make_norms_lean(model: nn.Module) -> list[Callable[[], None]]:
    """Makes the frozen RMS norms of `model` keep only their input; returns, for each, what undoes it.

    Their outputs stay the same bit for bit. A module is taken for an RMS norm by its class's name, and
    changed only if its gradient proves to be the one above. Compiled code is left alone: the compiler knows
    what to keep.
    """
    proven: dict[tuple, Callable | None] = {}
    undo = []
    for module in model.modules():
        if not type(module).__name__.endswith("RMSNorm"):
            continue
        epsilon = next((getattr(module, name) for name in _EPSILONS if hasattr(module, name)), None)
        weight = getattr(module, "weight", None)
        if epsilon is None or weight is None or weight.requires_grad:
            continue
        key = (type(module), epsilon)
        if key not in proven:
            proven[key] = _gain(module, epsilon)
        if proven[key] is not None:
            undo.append(replace_forward(module, _lean(proven[key], epsilon)))
    return undo


def _lean(gain: Callable, epsilon: float) -> Callable:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        own = type(self).forward.__get__(self)
        if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.requires_grad):
            return own(x)
        return LeanRMSNorm.apply(x, own, self.weight, gain, epsilon)

    return forward


def _gain(module: nn.Module, epsilon: float) -> Callable | None:
    """What the module multiplies by, if its gradient on random values is what this file computes."""
    generator = torch.Generator().manual_seed(0)
    # With a weight of its own, since the module's may be on any device or spread over several.
    probe = copy.copy(module)
    probe._parameters = {"weight": nn.Parameter(torch.rand(module.weight.shape, generator=generator), False)}
    own = type(module).forward.__get__(probe)
    x, grad = torch.randn(2, 3, *probe.weight.shape, generator=generator)
    try:
        x.requires_grad_()
        expected = torch.autograd.grad(own(x), x, grad)[0]
        for gain in GAINS.values():
            y = LeanRMSNorm.apply(x, own, probe.weight, gain, epsilon)
            ours = torch.autograd.grad(y, x, grad)[0]
            if alike(ours, expected, torch.float32, whole=True, slack=GRADIENT_SLACK):
                return gain
    except REFUSALS:
        pass
    return None
