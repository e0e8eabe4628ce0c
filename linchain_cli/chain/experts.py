"""Chains on routed experts, whose matrices transformers holds as 3-D parameters, one matrix per expert.

Every expert has a chain of its own: A (experts, r, d_in), links (experts, n, r, r) and B (experts, d_out, r).
So expert e computes with W_e + (α/r)·B_e·Wn,e…W1,e·A_e, as it would if it were a linear layer of its own, and
is merged, collapsed and inspected like one. (Links that all experts share would spare little: of a chain on
a matrix of 768 x 2048 with r = 16 and n = 3 the links are 1.7 %.)

`ChainExperts` computes what transformers' experts interface defines: tokens sorted by expert, one product per
expert and matrix. Only the experts that a batch routes tokens to are computed.

Letters behind a name are a tensor's dimensions: T tokens, N rows of tokens sorted by expert, E experts, r
rank, D d_in, O d_out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from linchain_cli.chain.fused import Factors
from linchain_cli.chain.layer import Chain

# Experts outside transformers' interface: they take the tokens of one expert below those of the last, equally
# many for each, and their matrices are (d_in, d_out).
_SORTED_BEFORE = ("Llama4TextExperts",)
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_transposed(experts: nn.Module) -> bool:
    """Whether the matrices of an experts' module are stored as (d_in, d_out)."""
    return _is_sorted_before(experts) or bool(getattr(experts, "is_transposed", False))


def _is_sorted_before(experts: nn.Module) -> bool:
    return type(experts).__name__ in _SORTED_BEFORE


def expert_matrices(module: nn.Module | None) -> dict[str, tuple[int, int, int]]:
    """(d_in, d_out, experts) of each parameter of a module that can carry chains, by its name.

    They are those of routed experts whose computation is known: transformers' experts interface says which
    parameters it multiplies by, and how they lie. All other modules have none.
    """
    if module is None or not (_is_sorted_before(module) or hasattr(module, "is_transposed")):
        return {}
    names = ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj")
    found = {}
    for name in names:
        parameter = module._parameters.get(name)
        if parameter is None or parameter.dim() != 3 or parameter.dtype not in _FLOATS:
            return {}
        count, d_out, d_in = parameter.shape
        found[name] = (d_out, d_in, count) if is_transposed(module) else (d_in, d_out, count)
    return found


@dataclass(frozen=True)
class Groups:
    """Where each expert's rows end among rows that are sorted by expert: `offsets` (experts,) in int32 on the
    rows' device, and the same as numbers where products are made one by one."""

    offsets: Tensor
    ends: tuple[int, ...] | None = None

    def spans(self) -> list[tuple[int, int, int]]:
        """(expert, first row, end) of each expert that has rows."""
        starts = (0, *self.ends[:-1])
        return [(e, a, b) for e, (a, b) in enumerate(zip(starts, self.ends, strict=True)) if b > a]


class ExpertChain(Chain):
    """The chains on one matrix of routed experts; see `Chain` for the shapes. `ChainExperts` holds it, under
    the parameter's name."""

    compute_dtype: torch.dtype  # of the parameter, in which the products run

    def forward(self, x_ND: Tensor, groups: Groups) -> Tensor:
        """The adapter's term, (N, O)."""
        x_ND = F.dropout(x_ND, self.dropout) if self.drops else x_ND
        if groups.ends is None:
            # The kernel reads rows of whole 16 bytes.
            spare = -self.rank % (16 // x_ND.element_size())
            a_ErD = F.pad(self.folded_a.to(x_ND.dtype), (0, 0, 0, spare))
            b_EOr = F.pad(self.B.to(x_ND.dtype), (0, spare))
            a_ErD, b_EOr = (OfExpertsWithRows.apply(each, groups.offsets) for each in (a_ErD, b_EOr))
            h_Nr = F.grouped_mm(x_ND, a_ErD.mT, offs=groups.offsets)
            return F.grouped_mm(h_Nr, b_EOr.mT, offs=groups.offsets)
        factors = self.group.part(self) or Factors.of_one(self.folded_a, self.B, x_ND.dtype)
        h_Nr = MultiplyExperts.apply(x_ND, factors.ready_a_RD, factors.as_rD[0], groups)
        return MultiplyExperts.apply(h_Nr, factors.ready_bs_Or[0], self.B, groups)


class ChainExperts(nn.Module):
    """Stands in for a module of routed experts and adds chains to its matrices; `base` is the module.

    The chains are its children under the names of the parameters that they adapt.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.train(base.training)

    def adapt(self, name: str, rank: int, depth: int, alpha: float, dropout: float = 0.0) -> ExpertChain:
        """Puts chains on the parameter of that name, with values still to be set."""
        d_in, d_out, experts = expert_matrices(self.base)[name]
        device = self.base._parameters[name].device
        chain = ExpertChain(d_in, d_out, rank, depth, alpha, dropout, device, experts)
        chain.compute_dtype = self.base._parameters[name].dtype
        self.add_module(name, chain)
        return chain

    @property
    def chains(self) -> dict[str, ExpertChain]:
        """The chains by the names of their parameters."""
        return {name: module for name, module in self.named_children() if isinstance(module, ExpertChain)}

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the base's, which computes alone while all chains are switched off."""
        if not any(chain.enabled for chain in self.chains.values()):
            return self.base(*args, **kwargs)
        return (self._sorted_before if _is_sorted_before(self.base) else self._routed)(*args, **kwargs)

    def _routed(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (T, D), each token's k experts and their weights (T, k) → (T, D)."""
        tokens, chosen = top_k_index.shape
        experts_N, order_N = top_k_index.reshape(-1).sort(stable=True)
        x_ND = hidden_states[order_N // chosen]
        places_E = torch.arange(self.base.num_experts, device=experts_N.device)
        offsets_E = torch.searchsorted(experts_N, places_E, right=True).to(torch.int32)
        y_ND = self._experts(x_ND, experts_N, offsets_E)
        if getattr(self.base, "has_post_expert_norm", False):
            y_ND = self.base.post_expert_norm(y_ND)
        y_ND = y_ND * top_k_weights.reshape(-1)[order_N].unsqueeze(-1)
        back_N = torch.empty_like(order_N)
        back_N[order_N] = torch.arange(len(order_N), device=order_N.device)
        return y_ND[back_N].view(tokens, chosen, -1).sum(1).to(hidden_states.dtype)

    def _sorted_before(self, hidden_states: Tensor) -> Tensor:
        """hidden_states (E · n, D) → the same shape."""
        x_ND = hidden_states.reshape(-1, hidden_states.shape[-1])
        count = self.base.num_experts
        each = len(x_ND) // count
        places_E = torch.arange(count, device=x_ND.device)
        offsets_E = ((places_E + 1) * each).to(torch.int32)
        return self._experts(x_ND, places_E.repeat_interleave(each), offsets_E)

    def _experts(self, x_ND: Tensor, experts_N: Tensor, offsets_E: Tensor) -> Tensor:
        """Each row through its expert, `experts_N` in rising order; `offsets_E` as `Groups` has them."""
        if multiplies_groups(x_ND):
            return self._multiply_all(x_ND, experts_N, Groups(offsets_E))
        return self._one_by_one(x_ND, experts_N, offsets_E)

    @torch.compiler.disable  # or every batch, with rows for other experts, would be a program of its own
    def _one_by_one(self, x_ND: Tensor, experts_N: Tensor, offsets_E: Tensor) -> Tensor:
        return self._multiply_all(x_ND, experts_N, Groups(offsets_E, _ends(offsets_E, len(x_ND))))

    def _multiply_all(self, x_ND: Tensor, experts_N: Tensor, groups: Groups) -> Tensor:
        """`_experts`, with the groups found."""
        base = self.base
        if getattr(base, "has_gate", True):
            y = self._multiply("gate_up_proj", x_ND, experts_N, groups)
            if hasattr(base, "_apply_gate"):
                y = base._apply_gate(y)
            else:
                gate, up = y.chunk(2, dim=-1)
                y = up * base.act_fn(gate)
        else:
            y = base.act_fn(self._multiply("up_proj", x_ND, experts_N, groups))
        return self._multiply("down_proj", y, experts_N, groups)

    def _multiply(self, name: str, x_ND: Tensor, experts_N: Tensor, groups: Groups) -> Tensor:
        """The rows by one of the matrices, its chain and its bias: (N, O)."""
        w_EOD = getattr(self.base, name)
        w_EOD = w_EOD.mT if is_transposed(self.base) else w_EOD
        x_ND = x_ND.to(w_EOD.dtype)
        chain = self.chains.get(name)
        term_NO = chain(x_ND, groups) if chain is not None and chain.enabled else None
        if groups.ends is None:
            y_NO = F.grouped_mm(x_ND, w_EOD.mT, offs=groups.offsets)
            y_NO = y_NO if term_NO is None else y_NO + term_NO
        else:
            term_NO = x_ND.new_zeros(len(x_ND), w_EOD.shape[1]) if term_NO is None else term_NO
            y_NO = AddExperts.apply(term_NO, x_ND, w_EOD, groups)
        if getattr(self.base, "has_bias", False):
            y_NO = y_NO + getattr(self.base, f"{name}_bias")[experts_N]
        return y_NO


def _ends(offsets: Tensor, rows: int) -> tuple[int, ...]:
    """The offsets as numbers; on the meta device, where nothing is known of them, equal parts of the rows."""
    if offsets.device.type != "meta":
        return tuple(offsets.tolist())
    return tuple(rows * (expert + 1) // len(offsets) for expert in range(len(offsets)))


def multiplies_groups(x: Tensor) -> bool:
    """Whether torch has a kernel for products of all groups at once, which spares the device the wait for
    their sizes."""
    return (
        x.device.type == "cuda"
        and x.dtype == torch.bfloat16
        and hasattr(F, "grouped_mm")
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )


class OfExpertsWithRows(torch.autograd.Function):
    """Matrices (E, ...) as they are; the gradient of those of experts without rows is zero. torch's grouped
    product leaves it as whatever was in memory on Blackwell, as others have found
    (github.com/pytorch/pytorch/issues/172439)."""

    @staticmethod
    def forward(ctx: Any, matrices: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(offsets)
        return matrices.view_as(matrices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (offsets,) = ctx.saved_tensors
        empty_E = offsets == F.pad(offsets[:-1], (1, 0))
        return grad.masked_fill(empty_E[:, None, None], 0), None


class MultiplyExperts(torch.autograd.Function):
    """y_e = x_e·M_eᵀ, expert by expert, (N, O). M (E, O, D) comes twice: `ready` for the products, in x's
    type, and `trained`, which receives the gradient."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, ready_EOD: Tensor, trained_EOD: Tensor, groups: Groups) -> Tensor:
        y_NO = x_ND.new_empty(len(x_ND), ready_EOD.shape[1])
        for expert, first, end in groups.spans():
            torch.mm(x_ND[first:end], ready_EOD[expert].T, out=y_NO[first:end])
        ctx.groups, ctx.type = groups, trained_EOD.dtype
        ctx.save_for_backward(x_ND, ready_EOD)
        return y_NO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, ready_EOD = ctx.saved_tensors
        needs_x, _, needs_trained, _ = ctx.needs_input_grad
        grad_x_ND = torch.empty_like(x_ND) if needs_x else None
        grad_EOD = torch.zeros_like(ready_EOD, dtype=ctx.type) if needs_trained else None
        for expert, first, end in ctx.groups.spans():
            if needs_x:
                torch.mm(grad_NO[first:end], ready_EOD[expert], out=grad_x_ND[first:end])
            if needs_trained:
                grad_EOD[expert] = grad_NO[first:end].T @ x_ND[first:end]
        return grad_x_ND, None, grad_EOD, None


class AddExperts(torch.autograd.Function):
    """term_e + x_e·W_eᵀ in the term's place, expert by expert; W takes no gradient. So the chain's term takes
    part in the product's one rounding; see chain/fused.py."""

    @staticmethod
    def forward(ctx: Any, term_NO: Tensor, x_ND: Tensor, w_EOD: Tensor, groups: Groups) -> Tensor:
        ctx.mark_dirty(term_NO)
        for expert, first, end in groups.spans():
            term_NO[first:end].addmm_(x_ND[first:end], w_EOD[expert].T)
        ctx.groups = groups
        ctx.save_for_backward(w_EOD)
        return term_NO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        (w_EOD,) = ctx.saved_tensors
        grad_ND = None
        if ctx.needs_input_grad[1]:
            grad_ND = grad_NO.new_empty(len(grad_NO), w_EOD.shape[2])
            for expert, first, end in ctx.groups.spans():
                torch.mm(grad_NO[first:end], w_EOD[expert], out=grad_ND[first:end])
        return grad_NO, grad_ND, None, None
