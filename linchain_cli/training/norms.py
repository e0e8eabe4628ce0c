"""RMS norms that keep nothing but their input for the backward pass, on a GPU by one kernel each way.

transformers writes an RMS norm as half a dozen operations in float32, each of which keeps its own operands:
about six times the input. A frozen norm needs its input alone: with n = x / rms(x), s = 1 / rms(x) and the
gain g, the gradient of y = g·n is s·(g·dy − n·mean(g·dy·n)) (Zhang and Sennrich, arXiv 1910.07467, by the
chain rule). torch's own kernel for all of it is faster on a GPU, and rounds once where some models round
twice; on a CPU it is slower than the operations one by one.

Letters behind a name are a tensor's dimensions: T what stands before the last one, tokens, and d the width.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from linchain_cli.model.fast import GRADIENT_SLACK, REFUSALS, alike, replace_forward

# What a norm multiplies by: its weight, or (Gemma) one more than that.
GAINS: dict[str, Callable[[Tensor], Tensor]] = {
    "weight": lambda w: w.float(),
    "1 + weight": lambda w: 1 + w.float(),
}
_EPSILONS = ("variance_epsilon", "eps")
# Types of devices on which torch's kernel computes a norm.
FUSED_ON = ("cuda",)


class LeanRMSNorm(torch.autograd.Function):
    """y = norm(x), computed by the module's own forward; x (..., d) is all that is kept."""

    @staticmethod
    def forward(
        ctx: Any, x_Td: Tensor, forward: Callable, weight_d: Tensor, gain: Callable, epsilon: float
    ) -> Tensor:
        ctx.save_for_backward(x_Td, weight_d)
        ctx.gain, ctx.epsilon = gain, epsilon
        return forward(x_Td)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_Td: Tensor) -> tuple[Tensor | None, ...]:
        x_Td, weight_d = ctx.saved_tensors
        wide_Td = x_Td.to(torch.float32, copy=True)
        scale_T1 = torch.linalg.vector_norm(wide_Td, dim=-1, keepdim=True)
        scale_T1 = scale_T1.square_().div_(x_Td.shape[-1]).add_(ctx.epsilon).rsqrt_()
        normed_Td = wide_Td.mul_(scale_T1)
        grad_Td = grad_Td.to(torch.float32, copy=True).mul_(ctx.gain(weight_d))
        along_T1 = (grad_Td * normed_Td).mean(-1, keepdim=True)
        grad_Td = grad_Td.addcmul_(normed_Td, along_T1, value=-1).mul_(scale_T1)
        return grad_Td.to(x_Td.dtype), None, None, None, None


def make_norms_lean(model: nn.Module) -> Callable[[], None]:
    """Makes the frozen RMS norms of `model` keep only their input; returns what undoes it.

    On a CPU their outputs stay the same bit for bit, on a GPU to a rounding. A module is taken for an RMS
    norm by its class's name, and changed only if its values and its gradient prove to be those above.
    Compiled code is left alone: the compiler knows what to keep.
    """
    proven: dict[tuple, Callable | None] = {}
    undo = contextlib.ExitStack()
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
            undo.callback(replace_forward(module, _lean(proven[key], epsilon)))
    return undo.close


def _lean(gain: Callable, epsilon: float) -> Callable:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return type(self).forward(self, x)
        own = type(self).forward.__get__(self)
        if x.device.type in FUSED_ON and x.dtype == self.weight.dtype:
            return fused_norm(x, self.weight, gain, epsilon)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return own(x)
        return LeanRMSNorm.apply(x, own, self.weight, gain, epsilon)

    return forward


def fused_norm(x: Tensor, weight: Tensor, gain: Callable, epsilon: float) -> Tensor:
    """norm(x) of x (..., d) by torch's kernel. It takes a gain of x's type alone: one that is the weight
    itself, or else all is float32."""
    if gain is GAINS["weight"]:
        return F.rms_norm(x, weight.shape, weight, epsilon)
    return F.rms_norm(x.float(), weight.shape, gain(weight), epsilon).to(x.dtype)


def _gain(module: nn.Module, epsilon: float) -> Callable | None:
    """What the module multiplies by, if its values and gradients on random numbers are this file's."""
    generator = torch.Generator().manual_seed(0)
    # With a weight of its own, since the module's may be on any device or spread over several.
    probe = copy.copy(module)
    probe._parameters = {"weight": nn.Parameter(torch.rand(module.weight.shape, generator=generator), False)}
    own = type(module).forward.__get__(probe)
    x, grad = torch.randn(2, 3, *probe.weight.shape, generator=generator)
    try:
        x.requires_grad_()
        value = own(x)
        expected = torch.autograd.grad(value, x, grad)[0]
        for gain in GAINS.values():
            lean = LeanRMSNorm.apply(x, own, probe.weight, gain, epsilon)
            fused = fused_norm(x, probe.weight, gain, epsilon)
            ours = [torch.autograd.grad(y, x, grad)[0] for y in (lean, fused)]
            if alike(fused, value, torch.float32) and all(
                alike(each, expected, torch.float32, whole=True, slack=GRADIENT_SLACK) for each in ours
            ):
                return gain
    except REFUSALS:
        pass
    return None
