"""Which attention a model computes with, and one written for CPUs.

On a CPU transformers' eager attention repeats keys and values for the query heads that share them, and goes
through the scores in float32; torch's SDPA takes still longer in its backward pass. `grouped_attention` takes
the query heads of one key head as more rows of one product (grouped-query attention, arXiv 2305.13245), and
leaves the softmax in the scores' type, whose kernel computes in float32 anyway. Forward and backward take
about half of eager's time, and a third of its memory is kept in between.

It also reads rows of several lengths one behind the other, without padding: everything else in a decoder
takes token by token and needs none, so only the attention puts the rows beside each other. And since a causal
decoder's state at a token depends on what stands before it alone, rows that begin alike have their common
beginning computed once, in training, too: prompts of one template share a quarter of their tokens and more.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

GROUPED = "grouped"


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    padded_rows: Tensor | None = None,
    flat_rows: Tensor | None = None,
    shared_tokens: Tensor | None = None,
    token_holders: Tensor | None = None,
    row_mask: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """softmax(scaling · q·kᵀ + mask)·v, in the form that transformers' AttentionInterface asks for.

    Args:
        query: (batch, heads, queries, d). key, value: (batch, key heads, keys, d and d_v).
        attention_mask: what is added to the scores, broadcast to (batch, heads, queries, keys), or None.
        softcap: c of c·tanh(scores / c), before the mask (Gemma 2).
        padded_rows, flat_rows, shared_tokens, token_holders, row_mask: of `FlatRows`; then batch is 1, and
            its tokens are those of several rows.

    Returns:
        (batch, queries, heads, d_v), contiguous, and None for the weights.
    """
    if padded_rows is not None:
        places = padded_rows, flat_rows, shared_tokens, token_holders
        query, key, value = (_padded(states, *places) for states in (query, key, value))
        output, _ = grouped_attention(
            module, query, key, value, row_mask, scaling, dropout, softcap, **others
        )
        return _Unpad.apply(output.flatten(0, 1), flat_rows)[None], None
    if any(others.get(name) is not None for name in ("s_aux", "sinks", "position_bias")):
        raise NotImplementedError("attention sinks and position biases")
    batch, heads, queries, width = query.shape
    groups, keys = key.shape[1], key.shape[2]
    shared = heads // groups
    scaling = width**-0.5 if scaling is None else scaling
    scores = torch.matmul(
        (query * scaling).reshape(batch, groups, shared * queries, width), key.transpose(2, 3)
    )
    scores = scores.view(batch, heads, queries, keys)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1)
    weights = nn.functional.dropout(weights, dropout, training=module.training)
    output = torch.matmul(weights.view(batch, groups, shared * queries, keys), value)
    return output.view(batch, heads, queries, -1).transpose(1, 2).contiguous(), None


def _padded(states: Tensor, padded_rows: Tensor, *places: Tensor) -> Tensor:
    """(1, heads, tokens, d) → (rows, heads, longest, d)."""
    rows = _Pad.apply(states[0].transpose(0, 1), padded_rows.flatten(), *places)
    return rows.view(*padded_rows.shape, *rows.shape[1:]).transpose(1, 2)


class _Pad(torch.autograd.Function):
    """(tokens, ...) → (slots, ...). What stands in the padding is any token's; its gradient is zero, because
    nobody reads what it leads to, and so is not asked for. A token that stands in several rows gets the sum
    of its slots' gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        padded_rows: Tensor,
        flat_rows: Tensor,
        shared_tokens: Tensor,
        token_holders: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(flat_rows, shared_tokens, token_holders)
        return tokens.index_select(0, padded_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat_rows, shared_tokens, token_holders = ctx.saved_tensors
        held = grad.index_select(0, token_holders.flatten()).view(*token_holders.shape, *grad.shape[1:])
        summed = grad.index_select(0, flat_rows).index_copy_(0, shared_tokens, held.sum(1))
        return summed, None, None, None, None


class _Unpad(torch.autograd.Function):
    """(slots, ...) → (tokens, ...)."""

    @staticmethod
    def forward(ctx: Any, slots: Tensor, flat_rows: Tensor) -> Tensor:
        ctx.save_for_backward(flat_rows)
        ctx.shape = slots.shape
        return slots.index_select(0, flat_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.new_zeros(ctx.shape).index_copy_(0, ctx.saved_tensors[0], grad), None


# oneDNN makes a program for each shape that a product of matrices has: some 60 ms for all those of a 135 M
# model, of 800 that the products themselves take. So that shapes recur, tokens are counted in steps.
TOKEN_STEP = 16
LENGTH_STEP = 8


@dataclass(frozen=True)
class FlatRows:
    """Right-padded rows without their padding, as a model's forward takes them.

    `input_ids` and `position_ids` (1, count) hold the tokens of the rows one behind the other, those that a
    row has in common with an earlier one left out, and then up to `TOKEN_STEP` − 1 that belong to no row.
    `padded_rows` (rows, slots) says which token stands in each slot of the padded rows (any, in the padding),
    `flat_rows` (count,) in which slot each token stands first (those of no row in one of the padding, of
    which nothing is read). `shared_tokens` (n,) stand in several rows, namely in the slots `token_holders`
    (n, rows), filled up with one of the padding. `row_mask` (slots, slots) is the causal mask to add.
    """

    input_ids: Tensor
    position_ids: Tensor
    padded_rows: Tensor
    flat_rows: Tensor
    shared_tokens: Tensor
    token_holders: Tensor
    row_mask: Tensor

    @classmethod
    def of(
        cls, input_ids: Tensor, attention_mask: Tensor, dtype: torch.dtype, *, share: bool = True
    ) -> FlatRows:
        """From right-padded rows (rows, longest) and their mask of ones and zeros.

        `share` has what several rows begin with computed once. Not with dropout, which is to differ from row
        to row.
        """
        missing = -input_ids.shape[1] % LENGTH_STEP
        if not missing and attention_mask.all():
            missing = LENGTH_STEP  # there has to be some padding
        input_ids, mask = (nn.functional.pad(each, (0, missing)) for each in (input_ids, attention_mask))
        count, slots = mask.shape
        every_row, every_slot = torch.arange(count)[:, None], torch.arange(slots)
        nobody = int((mask.flatten() == 0).nonzero()[0])

        owners = _first_alike(input_ids, mask.bool()) if share else every_row.expand(-1, slots)
        own = (mask.bool() & (owners == every_row)).flatten()
        tokens = own.nonzero()[:, 0]
        others = -len(tokens) % TOKEN_STEP
        flat_rows = nn.functional.pad(tokens, (0, others), value=nobody)
        padded_rows = (own.cumsum(0) - 1)[owners * slots + every_slot] * mask

        shared_tokens = padded_rows[mask.bool() & (owners != every_row)].unique()
        rows, places = tokens[shared_tokens] // slots, tokens[shared_tokens] % slots
        holds = (owners[:, places] == rows) & mask[:, places].bool()
        token_holders = torch.where(holds, every_row * slots + places, nobody).T.contiguous()

        return cls(
            input_ids.flatten()[flat_rows][None],
            # Those of no row stand at 0, since a model may have no position behind the longest row.
            nn.functional.pad(tokens % slots, (0, others))[None],
            padded_rows,
            flat_rows,
            shared_tokens,
            token_holders,
            torch.full((slots, slots), torch.finfo(dtype).min, dtype=dtype).triu(1),
        )

    def to(self, device: torch.device) -> FlatRows:
        return FlatRows(**{name: tensor.to(device, non_blocking=True) for name, tensor in vars(self).items()})


def _first_alike(ids: Tensor, mask: Tensor) -> Tensor:
    """(rows, slots): the first row that has the same tokens up to and with this slot; in the padding, any."""
    owners = torch.arange(len(ids))[:, None].repeat(1, ids.shape[1])
    for row in range(1, len(ids)):
        same = ((ids[:row] == ids[row]) & mask[:row] & mask[row]).to(torch.int8).cumprod(1)
        owners[row] = torch.where(same.any(0), same.argmax(0), row)
    return owners


_reading_flat = contextvars.ContextVar("reading_flat", default=False)


def _mask(*arguments: Any, **options: Any) -> Tensor | None:
    """Eager attention's masks, and none for flat rows, which bring their own."""
    return None if _reading_flat.get() else eager_mask(*arguments, **options)


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, _mask)


@contextlib.contextmanager
def reading_flat() -> Iterator[None]:
    """Inside, a model with grouped attention makes no mask for its tokens."""
    token = _reading_flat.set(True)
    try:
        yield
    finally:
        _reading_flat.reset(token)


def attention_window(model: nn.Module) -> float:
    """Tokens up to which the model's attention is plain: behind it a sliding window or a chunk ends."""
    config = model.config.get_text_config()
    limits = (
        getattr(config, name, None)
        for name in ("sliding_window", "attention_chunk_size", "attention_window_size")
    )
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=float("inf"))


def alike(ours: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether two ways through a model of that type differ by rounding alone, however small the values are.

    float64 is held to float32's digits, because softmax and norms are in float32 whatever the model's type.
    """
    tolerance = 1e-4 if dtype in (torch.float32, torch.float64) else 5e-2
    return torch.allclose(ours, expected, rtol=0.0, atol=tolerance * float(expected.abs().max()))


def may_group(model: PreTrainedModel) -> bool:
    """Whether nothing is known that speaks against grouped attention; `use_grouped_attention` finds out."""
    return model._can_set_attn_implementation() and not any(
        hasattr(module, "sinks") for module in model.modules()
    )


@torch.no_grad()
def use_grouped_attention(model: PreTrainedModel) -> bool:
    """Gives a model that computes with eager attention the grouped one, if it then gives the same answers.

    Returns:
        Whether it did. Architectures that bring an attention of their own, or something that is not in the
        formula, keep eager attention.
    """
    if not may_group(model):
        return False
    ids = torch.arange(1, 25, device=model.get_input_embeddings().weight.device)[None]
    ids %= model.get_input_embeddings().weight.shape[0]

    def logits() -> Tensor:
        return model(input_ids=ids, use_cache=False).logits.float()

    expected = logits()
    try:
        model.set_attn_implementation(GROUPED)
        same = alike(logits(), expected, model.dtype)
    except (ValueError, TypeError, KeyError, NotImplementedError, RuntimeError):
        same = False
    if not same:
        model.set_attn_implementation("eager")
    return same
