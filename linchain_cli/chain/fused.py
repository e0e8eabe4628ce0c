"""Base and adapter in one autograd node, for one layer or for several that read the same input.

Beside W0·x the adapters of SmolLM2 are a few per cent of the arithmetic, but they are thin products (rank
16), for which a processor waits for memory and not for its multipliers. So an input that several layers read
(q, k and v) is read once for all their A', outputs and gradients are added in place, and nothing is kept for
the backward pass but the input and A'·x.

The adapter's term comes first and W0·x is added to it, not the other way round. In bfloat16 that decides
whether a young adapter has an effect at all: W0·x is rounded to 8 bits, and a term below half of its last
digit that is added afterwards vanishes. Added within the product, whose sums are float32, it takes part in
the one rounding of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class FusedChains(torch.autograd.Function):
    """y_i = x·W_iᵀ + b_i + (x·A'_iᵀ)·B_iᵀ for k layers on one input x.

    Shapes: x (..., d_in), folded_a (Σr, d_in), which is the A'_i one below the other, then k weights (d_out,
    d_in), k biases (d_out) or None, and k times B (d_out, r). Weights and biases get no gradient; a weight in
    4 bit comes with its scales in `scales`, k of them or None. folded_a and B are float32 (or float64) and so
    are their gradients; each product runs in x's type. Returns a tuple of k outputs.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, folded_a: Tensor, scales: Sequence[Any], *operands: Tensor | None
    ) -> tuple[Tensor, ...]:
        count = len(scales)
        weights, biases, Bs = operands[:count], operands[count : 2 * count], operands[2 * count :]
        a, bs = folded_a.to(x.dtype), [B.to(x.dtype) for B in Bs]
        rows = x.reshape(-1, x.shape[-1])
        h = rows @ a.T
        outputs = [
            _add_product(part @ b.T, rows, matrix(weight, scale, x.dtype), bias)
            for weight, scale, bias, part, b in zip(weights, scales, biases, _parts(h, bs), bs, strict=True)
        ]
        ctx.scales = scales
        ctx.save_for_backward(rows, a, h, *weights, *bs)
        ctx.types = folded_a.dtype, Bs[0].dtype
        ctx.input_shape = x.shape
        # Not as views, which nobody might change in place: a model does what it likes with a layer's output.
        shape = x.shape[:-1]
        return tuple(torch.ops.aten._unsafe_view(y, (*shape, y.shape[-1])) for y in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, a, h, *operands = ctx.saved_tensors
        count = len(grads)
        weights, bs = operands[:count], operands[count:]
        type_a, type_b = ctx.types
        grads = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        grad_hs = [grad @ b for grad, b in zip(grads, bs, strict=True)]
        grad_h = grad_hs[0] if count == 1 else torch.cat(grad_hs, dim=1)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_h @ a
            for grad, weight, scale in zip(grads, weights, ctx.scales, strict=True):
                grad_x.addmm_(grad, matrix(weight, scale, grad.dtype))
            grad_x = grad_x.view(ctx.input_shape)
        grad_a = (grad_h.T @ rows).to(type_a) if ctx.needs_input_grad[1] else None
        # (hᵀ·g)ᵀ: the long side of the result runs along memory, which takes half the time of gᵀ·h.
        grad_bs = [
            (part.T @ grad).T.to(type_b) if needed else None
            for part, grad, needed in zip(_parts(h, bs), grads, ctx.needs_input_grad[-count:], strict=True)
        ]
        return grad_x, grad_a, None, *[None] * (2 * count), *grad_bs


class AddBase(torch.autograd.Function):
    """term + x·Wᵀ + b in `term`'s place, for adapters that compute their term by other operations.

    Shapes: term (n, d_out), x (n, d_in), weight (d_out, d_in), bias (d_out) or None, the last two without
    gradient; `scale` as one of `FusedChains`' scales.
    """

    @staticmethod
    def forward(ctx: Any, term: Tensor, x: Tensor, weight: Tensor, scale: Any, bias: Tensor | None) -> Tensor:
        ctx.mark_dirty(term)
        ctx.save_for_backward(weight)
        ctx.scale = scale
        return _add_product(term, x, matrix(weight, scale, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        grad_x = grad @ matrix(weight, ctx.scale, grad.dtype) if ctx.needs_input_grad[1] else None
        return grad, grad_x, None, None, None


def matrix(weight: Tensor, scale: Any, dtype: torch.dtype) -> Tensor:
    """W0 (d_out, d_in) of a weight in 4 bit with its scales, bitsandbytes' QuantState; without them, the
    weight itself."""
    if scale is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.detach().view(-1, 1), scale).to(dtype)


def _add_product(term: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # As the bias comes first in torch's own layers, a term of zero then leaves their output bit for bit. In
    # half precision small terms would be lost in it, and it has to come last.
    first = bias is not None and term.dtype in (torch.float32, torch.float64)
    if first:
        term.add_(bias)
    term.addmm_(x, weight.T)
    return term if bias is None or first else term.add_(bias)


def _parts(h: Tensor, bs: Sequence[Tensor]) -> Sequence[Tensor]:
    """A'_i·x of each layer out of all of them side by side."""
    return (h,) if len(bs) == 1 else h.split([b.shape[1] for b in bs], dim=1)


def fused_chains(x: Tensor, folded_a: Tensor, layers: Sequence[Any]) -> tuple[Tensor, ...]:
    """The outputs of chain layers that read x (..., d_in); `folded_a` (Σr, d_in) is their A' one below the
    other."""
    return FusedChains.apply(
        x,
        folded_a,
        tuple(layer.base_scale for layer in layers),
        *(layer.base_weight for layer in layers),
        *(layer.base.bias for layer in layers),
        *(layer.B for layer in layers),
    )


def _version(x: Tensor) -> int | None:
    """How often x was changed in place, where torch counts it."""
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version


class Group:
    """Chain layers that read the same input, or one alone: whichever is called first computes for all.

    It does so while they are folded, for the length of an optimizer step. Each of the others then takes its
    output, provided that its input is that very tensor, unchanged.
    """

    def __init__(self, layers: Sequence[Any]):
        self.layers = tuple(layers)
        self.install(None)

    def install(self, folded_a: Tensor | None) -> None:
        """Folds the layers, with their A' one below the other as `folded_a` (Σr, d_in), or with None unfolds
        them. Outputs that nobody took are dropped."""
        self.folded_a = folded_a
        self._parts = () if folded_a is None else folded_a.split([layer.rank for layer in self.layers])
        self._forget()

    def part(self, layer: Any) -> Tensor | None:
        """A' (r, d_in) of one of the layers while they are folded, else None."""
        return self._parts[self.layers.index(layer)] if self._parts else None

    def _forget(self) -> None:
        self._input: Tensor | None = None
        self._outputs: list[Tensor | None] = []
        self._state: tuple[bool, int | None] | None = None  # gradients on or off, the input's version

    def output(self, layer: Any, x: Tensor) -> Tensor:
        """A layer's output for x (..., d_in), of the layers together where all of them can be."""
        state = torch.is_grad_enabled(), _version(x)
        place = self.layers.index(layer)
        if self._input is not x or self._state != state or self._outputs[place] is None:
            if self.folded_a is None or not all(member.is_fused(x) for member in self.layers):
                return fused_chains(x, layer.folded_a, [layer])[0]
            self._input, self._state = x, state
            self._outputs = list(fused_chains(x, self.folded_a, self.layers))
        output, self._outputs[place] = self._outputs[place], None
        if all(other is None for other in self._outputs):
            self._forget()
        return output
