"""The chain layer: a frozen linear map plus (α/r)·B·Wn…W1·A.

Two ways lead to the same output. The plain one is the formula, written with torch's own operations;
it serves anything unusual. The fused one (chain/fused.py) computes base and adapter in one autograd node, and
is what training runs when nothing stands in its way.

Letters behind a name are a tensor's dimensions: T tokens, n links, r rank, D d_in, O d_out. Of experts, E of
them stand before the last ones: A_ErD, links_Enrr, B_EOr.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from linchain_cli.chain.fused import Group


def collapse(links: Tensor) -> Tensor:
    """The product Wn…W1 of chained links.

    Args:
        links: (..., n, r, r), where links[..., 0, :, :] is W1, the one applied first. n ≥ 1.

    Returns:
        (..., r, r): n − 1 batched products, whatever stands in the leading dimensions.
    """
    product = links[..., 0, :, :]
    for i in range(1, links.shape[-3]):
        product = links[..., i, :, :] @ product
    return product


def fold_into_a(A_rD: Tensor, links_nrr: Tensor, scaling: float) -> Tensor:
    """A' (..., r, d_in) = (α/r)·Wn…W1·A, so that the adapter is B·A'; A alone where n = 0. `scaling` is α/r;
    what stands in front of a tensor's dimensions is experts or layers."""
    return scaling * A_rD if links_nrr.shape[-3] == 0 else (scaling * collapse(links_nrr)) @ A_rD


def delta_weight(
    A_rD: Tensor, links_nrr: Tensor, B_Or: Tensor, scaling: float, dtype: torch.dtype = torch.float32
) -> Tensor:
    """ΔW = (α/r)·B·Wn…W1·A, the one place that writes it out.

    Args:
        A_rD, links_nrr, B_Or: for the matrices of several experts with a leading dimension.
        scaling: α/r.
        dtype: the precision of the arithmetic and of the result.

    Returns:
        (..., d_out, d_in), also for a Conv1D, whose stored weight is the transpose.
    """
    return B_Or.to(dtype) @ fold_into_a(A_rD.to(dtype), links_nrr.to(dtype), scaling)


# bitsandbytes' layers compute W0·x, too, from weights that they have packed.
_QUANTISED = ("Linear4bit", "Linear8bitLt")
# Up to so many tokens bitsandbytes multiplies by a 4-bit weight as it is packed, on any GPU. Where an answer
# is read token by token, restoring the weight would move nine times as many bytes.
_FEW_TOKENS = 4


def linear_shape(module: nn.Module | None) -> tuple[int, int] | None:
    """(d_in, d_out) of a module that can carry a chain, None of any other.

    It can if W0·x + b is all that it computes. Some subclasses of nn.Linear compute more, such as routers
    that return which experts they chose.
    """
    if type(module) is Conv1D:
        return module.nx, module.nf
    if isinstance(module, nn.Linear) and (is_quantised(module) or _is_plain(type(module))):
        return module.in_features, module.out_features
    return None


def is_quantised(module: nn.Module) -> bool:
    """Whether bitsandbytes holds the layer's weight in 4 or 8 bit."""
    return type(module).__name__ in _QUANTISED


@functools.cache
def _is_plain(kind: type[nn.Linear]) -> bool:
    """Whether a class of linear layers gives W·x + b and nothing else, tried out on small numbers."""
    if kind.forward is nn.Linear.forward:
        return True
    probe = nn.utils.skip_init(nn.Linear, 2, 3)
    probe.weight.data = torch.arange(6.0).view(3, 2)
    probe.bias.data = torch.arange(3.0)
    probe.__class__ = kind
    x = torch.arange(8.0).view(4, 2)
    try:
        return torch.equal(probe.forward(x), F.linear(x, probe.weight, probe.bias))
    except Exception:  # whatever a class needs that a plain layer does not have
        return False


class Chain(nn.Module):
    """The trained part of an adapted matrix: A, the links and B, float32 whatever the base's type.

    Shapes: `A` (r, d_in), `links` (n, r, r) with links[0] = W1, and `B` (d_out, r); with `experts` all three
    begin with a dimension that counts them, and every expert has a chain of its own.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        rank: int,
        depth: int,
        alpha: float,
        dropout: float,
        device: torch.device,
        experts: int | None = None,
    ):
        super().__init__()
        each = () if experts is None else (experts,)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*each, *shape, dtype=torch.float32, device=device))

        self.A = parameter(rank, d_in)
        self.links = parameter(depth, rank, rank)
        self.B = parameter(d_out, rank)
        self.scaling = alpha / rank
        self.dropout = dropout
        self.enabled = True
        # The layers that read the same input, this one among them, once `find_siblings` has found them.
        self.group = Group([self])

    @property
    def depth(self) -> int:
        return self.links.shape[-3]

    @property
    def rank(self) -> int:
        return self.A.shape[-2]

    @property
    def folded_a(self) -> Tensor:
        """A' (..., r, d_in), as `folded` installed it for one optimizer step, or folded now."""
        part = self.group.part(self)
        return fold_into_a(self.A, self.links, self.scaling) if part is None else part.as_rD[0]

    @property
    def drops(self) -> bool:
        """Whether it would apply dropout now."""
        return self.enabled and self.training and self.dropout > 0

    def delta_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """ΔW (..., d_out, d_in); see the function of the same name."""
        return delta_weight(self.A.detach(), self.links.detach(), self.B.detach(), self.scaling, dtype)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, depth={self.depth}, scaling={self.scaling:g}, dropout={self.dropout:g}"


class ChainLinear(Chain):
    """h = W0·x + (α/r)·B·Wn…W1·A·x with W0 frozen (LinChain, arXiv 2411.00039; n = 0 is LoRA, n = 1 MoSLoRA).

    The products run in the input's type. To the model around it the layer looks like the one it replaces:
    some read a projection's `weight` and multiply by themselves (Mamba's).

    Args:
        base: an nn.Linear (also bitsandbytes' subclasses of it) or a transformers Conv1D.
        rank: r. depth: n. alpha: α.
        dropout: probability with which an entry of the adapter's input is zeroed while training.
    """

    def __init__(self, base: nn.Module, rank: int, depth: int, alpha: float, dropout: float = 0.0):
        shape = linear_shape(base)
        if shape is None:
            raise TypeError(f"a chain needs an nn.Linear or Conv1D, not {type(base).__name__}")
        super().__init__(*shape, rank, depth, alpha, dropout, base.weight.device)
        self.base = base

    @property
    def in_features(self) -> int:
        return self.A.shape[1]

    @property
    def out_features(self) -> int:
        return self.B.shape[0]

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    @property
    def weight(self) -> Tensor:
        """W0 + ΔW in the base's type and form, with gradients for the chain; W0 while it is switched off. The
        packed numbers of a quantised W0 stay as they are."""
        weight = self.base.weight
        if not self.enabled or is_quantised(self.base):
            return weight
        delta_OD = self.B @ self.folded_a
        return (weight + (delta_OD.T if isinstance(self.base, Conv1D) else delta_OD)).to(weight.dtype)

    @property
    def base_weight(self) -> Tensor:
        """W0 (d_out, d_in); in 4 bit, whatever shape its numbers are packed in."""
        return self.base.weight.T if isinstance(self.base, Conv1D) else self.base.weight

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """The type that the base's products run in; None where nobody says so of a W0 in 8 bit."""
        dtype = getattr(self.base, "compute_dtype", self.base.weight.dtype)
        return dtype if dtype is not None and dtype.is_floating_point else None

    @property
    def base_scale(self) -> Any:
        """The scales of a W0 in 4 bit (bitsandbytes' QuantState) or 8 bit ((d_out,) float32), else None."""
        if type(self.base).__name__ == "Linear8bitLt":  # which moves them with its first product
            return self.base.weight.SCB if self.base.state.SCB is None else self.base.state.SCB
        # FSDP2 gives the layer tensors of its own for weights, which do not bring their scales along.
        return getattr(self.base.weight, "quant_state", None) or getattr(self.base, "quant_state", None)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) → (..., d_out)."""
        if not self.enabled:
            return self.base(x)
        if self.is_fused(x):
            return self.group.output(self, x)
        dropped = F.dropout(x, self.dropout) if self.drops else x
        if self._adds_to_base(x):
            return self.group.alone(self, x, dropped)
        h = F.linear(dropped, self.folded_a.to(x.dtype))
        return self.base(x) + F.linear(h, self.B.to(x.dtype))

    def is_fused(self, x: Tensor) -> bool:
        """Whether the layer adds its chain, without dropout, to a matrix that `_adds_to_base` takes."""
        return self.enabled and not self.drops and self._adds_to_base(x)

    def _adds_to_base(self, x: Tensor) -> bool:
        """Whether the base is a matrix of x's type whose forward nobody replaced, or one in 4 or 8 bit that
        computes in it, which needs no gradient and which nobody hooks into."""
        base = self.base
        if is_quantised(base):
            usual = self.base_scale is not None and not self._is_read_packed(x)
        else:
            usual = type(base) in (nn.Linear, Conv1D) and "forward" not in vars(base)
        return (
            usual
            and self.compute_dtype == x.dtype
            and not base.weight.requires_grad
            and not base._forward_hooks
            and not base._forward_pre_hooks
        )

    def _is_read_packed(self, x: Tensor) -> bool:
        """Whether bitsandbytes is left to compute W0·x by itself: of a few tokens, from which nothing is
        learned, so that it may be rounded before the chain's term is added."""
        return (
            getattr(self.base.weight, "quant_state", None) is not None
            and x.device.type != "cpu"
            and x.numel() <= _FEW_TOKENS * self.in_features
            and not torch.is_grad_enabled()
        )


def chain_layers(model: nn.Module) -> dict[str, Chain]:
    """A model's chains by the path of what each one adapts, in model order: a linear module, or a matrix of
    experts, which is a parameter."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Chain)}
