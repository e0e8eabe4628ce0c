"""Base and adapter in one autograd node, for one layer or for several that read the same input.

Beside W0·x the adapters of SmolLM2 are a few per cent of the arithmetic, but they are thin products (rank
16), for which a processor waits for memory and not for its multipliers. So an input that several layers read
(q, k and v) is read once for all their A', outputs and gradients are added in place, and nothing is kept for
the backward pass but the input and A'·x.

The adapter's term comes first and W0·x is added to it, not the other way round. In bfloat16 that decides
whether a young adapter has an effect at all: W0·x is rounded to 8 bits, and a term below half of its last
digit that is added afterwards vanishes. Added within the product, whose sums are float32, it takes part in
the one rounding of the whole.

Letters behind a name are a tensor's dimensions: T tokens, D d_in, O d_out, r rank, R the ranks of several
layers together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Factors(NamedTuple):
    """What k layers that read the same input add to their bases: B_i·A'_i.

    `as_rD` are the k A'_i that receive the gradients, in float32 (or float64). `ready_a_RD`, all of them one
    below the other, and the k `ready_bs_Or` are A' and B in the type that the products run in, detached.
    A layer of experts stands alone, and each tensor has a first dimension that counts them.
    """

    as_rD: Sequence[Tensor]
    ready_a_RD: Tensor
    ready_bs_Or: Sequence[Tensor]

    @classmethod
    def of_one(cls, a_rD: Tensor, b_Or: Tensor, dtype: torch.dtype) -> Factors:
        return cls([a_rD], a_rD.detach().to(dtype), [b_Or.detach().to(dtype)])


class FusedChains(torch.autograd.Function):
    """y_i = x·W_iᵀ + b_i + (x·A'_iᵀ)·B_iᵀ for k layers on one input x (..., D).

    The adapters read `dropped` instead, if it is not None: x after dropout. `ready_a_RD` is that of
    `Factors`. `operands` are k weights W (O, D), k biases b (O,) or None and k ready B, none of which gets a
    gradient, and k trained A' (r, D) and B (O, r), which do. A weight in 4 or 8 bit comes with its scales in
    `scales`, k of them or None. The gradients of A' and B have their types, and are summed in them; all else
    is of x's type. Returns a tuple of k outputs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        ready_a_RD: Tensor,
        scales: Sequence[Any],
        *operands: Tensor | None,
    ) -> tuple[Tensor, ...]:
        k = len(scales)
        weights, biases, bs_Or, trained_as, trained_bs = (operands[i * k : (i + 1) * k] for i in range(5))
        # Sizes are read off the parameters: torch 2.11's compiler cannot keep those of x that turn out fixed.
        d_in = ready_a_RD.shape[1]
        x_TD = x.reshape(-1, d_in)
        read_TD = x_TD if dropped is None else dropped.reshape(-1, d_in)
        h_TR = read_TD @ ready_a_RD.T
        outputs = [
            _add_product(h_Tr @ b_Or.T, x_TD, matrix(weight, scale, x.dtype), bias)
            for weight, scale, bias, h_Tr, b_Or in zip(
                weights, scales, biases, _parts(h_TR, bs_Or), bs_Or, strict=True
            )
        ]
        ctx.scales = scales
        ctx.save_for_backward(read_TD, ready_a_RD, h_TR, *weights, *bs_Or)
        ctx.types = trained_as[0].dtype, trained_bs[0].dtype
        ctx.leading, ctx.is_dropped = x.shape[:-1], dropped is not None
        # Not as views, which nobody might change in place: a model does what it likes with a layer's output.
        return tuple(
            torch.ops.aten._unsafe_view(y_TO, (*ctx.leading, b_Or.shape[0]))
            for y_TO, b_Or in zip(outputs, bs_Or, strict=True)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        read_TD, a_RD, h_TR, *operands = ctx.saved_tensors
        k = len(grads)
        weights, bs_Or = operands[:k], operands[k:]
        type_a, type_b = ctx.types
        needs_x, needs_as, needs_bs = (
            ctx.needs_input_grad[0],
            ctx.needs_input_grad[-2 * k : -k],
            ctx.needs_input_grad[-k:],
        )
        grads = [grad.reshape(-1, b_Or.shape[0]) for grad, b_Or in zip(grads, bs_Or, strict=True)]
        grad_hs = [grad_TO @ b_Or for grad_TO, b_Or in zip(grads, bs_Or, strict=True)]
        grad_h_TR = grad_hs[0] if k == 1 else torch.cat(grad_hs, dim=1)
        grad_x = grad_dropped = None
        if needs_x:
            grad_read_TD = grad_h_TR @ a_RD
            if ctx.is_dropped:
                grad_dropped = grad_read_TD.view(*ctx.leading, a_RD.shape[1])
            else:
                grad_x = grad_read_TD
            for grad_TO, weight, scale in zip(grads, weights, ctx.scales, strict=True):
                w_OD = matrix(weight, scale, grad_TO.dtype)
                grad_x = grad_TO @ w_OD if grad_x is None else grad_x.addmm_(grad_TO, w_OD)
            grad_x = grad_x.view(*ctx.leading, a_RD.shape[1])
        ranks = [b_Or.shape[1] for b_Or in bs_Or]
        grad_as = [None] * k
        if any(needs_as):
            grad_as = _product(grad_h_TR.T, read_TD, type_a).split(ranks)
        # (hᵀ·g)ᵀ: the long side of the result runs along memory, which takes half the time of gᵀ·h.
        grad_bs = [
            _product(h_Tr.T, grad_TO, type_b).T if needed else None
            for h_Tr, grad_TO, needed in zip(_parts(h_TR, bs_Or), grads, needs_bs, strict=True)
        ]
        return grad_x, grad_dropped, None, None, *[None] * (3 * k), *grad_as, *grad_bs


def matrix(weight: Tensor, scale: Any, dtype: torch.dtype) -> Tensor:
    """W0 (d_out, d_in) of a weight in 4 bit with its scales, bitsandbytes' QuantState, or in 8 bit with the
    largest value of each row, (d_out,); without them, the weight itself."""
    if scale is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

    if isinstance(scale, Tensor):
        return int8_vectorwise_dequant(weight.detach(), scale).to(dtype)
    return dequantize_4bit(weight.detach().view(-1, 1), scale).to(dtype)


def _add_product(term: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # As the bias comes first in torch's own layers, a term of zero then leaves their output bit for bit. In
    # half precision small terms would be lost in it, and it has to come last.
    first = bias is not None and term.dtype in (torch.float32, torch.float64)
    if first:
        term.add_(bias)
    term.addmm_(x, weight.T)
    return term if bias is None or first else term.add_(bias)


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right in another type than theirs: a GPU gives the sums themselves instead of rounding them."""
    if left.dtype == dtype or left.device.type == "cpu":
        return (left @ right).to(dtype)
    return torch.mm(left, right, out_dtype=dtype)


def _parts(h_TR: Tensor, bs_Or: Sequence[Tensor]) -> Sequence[Tensor]:
    """A'_i·x of each layer out of all of them side by side."""
    return (h_TR,) if len(bs_Or) == 1 else h_TR.split([b_Or.shape[1] for b_Or in bs_Or], dim=1)


def fused_chains(
    x: Tensor, factors: Factors, layers: Sequence[Any], dropped: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The outputs of chain layers that read x (..., d_in), by way of `factors`; their adapters read `dropped`
    of the same shape, if it is given."""
    return FusedChains.apply(
        x,
        dropped,
        factors.ready_a_RD,
        tuple(layer.base_scale for layer in layers),
        *(layer.base_weight for layer in layers),
        *(layer.base.bias for layer in layers),
        *factors.ready_bs_Or,
        *factors.as_rD,
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

    def install(self, factors: Factors | None) -> None:
        """Folds the layers, or with None unfolds them. Outputs that nobody took are dropped."""
        self.factors = factors
        self._forget()

    def part(self, layer: Any) -> Factors | None:
        """The factors of one of the layers while they are folded, else None."""
        if self.factors is None or len(self.layers) == 1:
            return self.factors
        place = self.layers.index(layer)
        one, rows = slice(place, place + 1), slice(place * layer.rank, (place + 1) * layer.rank)
        as_rD, ready_a_RD, ready_bs_Or = self.factors
        return Factors(as_rD[one], ready_a_RD[rows], ready_bs_Or[one])

    def _forget(self) -> None:
        self._input: Tensor | None = None
        self._outputs: list[Tensor | None] = []
        self._state: tuple[bool, int | None] | None = None  # gradients on or off, the input's version

    def output(self, layer: Any, x: Tensor) -> Tensor:
        """A layer's output for x (..., d_in), of the layers together where all of them can be."""
        state = torch.is_grad_enabled(), _version(x)
        place = self.layers.index(layer)
        if self._input is not x or self._state != state or self._outputs[place] is None:
            if self.factors is None or not all(member.is_fused(x) for member in self.layers):
                return self.alone(layer, x)
            # Recomputation ends by an exception in the last product of a block. An input kept by then would
            # keep all that the block has computed.
            outputs = list(fused_chains(x, self.factors, self.layers))
            self._input, self._state, self._outputs = x, state, outputs
        output, self._outputs[place] = self._outputs[place], None
        if all(other is None for other in self._outputs):
            self._forget()
        return output

    def alone(self, layer: Any, x: Tensor, dropped: Tensor | None = None) -> Tensor:
        """A layer's output for x, computed by itself; its adapter reads `dropped`, if that is given."""
        factors = self.part(layer) or Factors.of_one(layer.folded_a, layer.B, x.dtype)
        return fused_chains(x, factors, [layer], dropped)[0]
