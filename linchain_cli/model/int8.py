"""Linear layers whose weight is stored in 8 bit and restored for each product.

bitsandbytes' own product (LLM.int8) rounds its input to 8 bit as well, waits for the GPU in every layer to
learn which columns are outliers, and keeps that input for the backward pass past autograd, which
recomputation of activations could not free. Here nothing is rounded but the weight, and nothing kept but it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from linchain_cli.model.fast import replace_forward


class StoredProduct(torch.autograd.Function):
    """x·Wᵀ + b of x (..., d_in), a weight (d_out, d_in) in int8 with its rows' largest values (d_out,), and b
    (d_out,) or None; the gradient goes to x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, largest: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, largest)
        return F.linear(x, _restored(weight, largest, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        weight, largest = ctx.saved_tensors
        return grad @ _restored(weight, largest, grad.dtype), None, None, None


def _restored(weight: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    return int8_vectorwise_dequant(weight.detach(), largest).to(dtype)


def store_only(model: nn.Module, dtype: torch.dtype) -> None:
    """Has the model's 8-bit layers (bitsandbytes' Linear8bitLt) restore their weights in that type, which
    each of them then names as its `compute_dtype`."""
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt":
            if module.weight.CB is not None:
                module.init_8bit_state()
            module.compute_dtype = dtype
            if module.bias is not None:
                module.bias.data = module.bias.data.to(dtype)
            replace_forward(module, _forward)


def _forward(self: nn.Module, x: Tensor) -> Tensor:
    return StoredProduct.apply(x, self.weight, self.state.SCB, self.bias)
