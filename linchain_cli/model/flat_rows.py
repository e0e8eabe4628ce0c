"""Rows of several lengths one behind the other, without padding.

Everything in a decoder but its attention takes token by token and needs no padding, so only the attention
puts the rows beside each other. And since a causal decoder's state at a token depends on what stands before
it alone, rows that begin alike have their common beginning computed once, in training, too: prompts of one
template share a quarter of their tokens and more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from linchain_cli.model.attention import FLAT_SDPA, GROUPED, attention_window, grouped_attention
from linchain_cli.model.fast import GRADIENT_SLACK, REFUSALS, alike, probe_ids, record
from linchain_cli.model.head import backbone, hidden_states

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
    (n, rows), filled up with one of the padding. `attention_mask` (1, 1, slots, slots) is the causal mask to
    add to each row's scores.
    """

    input_ids: Tensor
    position_ids: Tensor
    padded_rows: Tensor
    flat_rows: Tensor
    shared_tokens: Tensor
    token_holders: Tensor
    attention_mask: Tensor

    @classmethod
    def of(
        cls, input_ids: Tensor, attention_mask: Tensor, dtype: torch.dtype | None, *, share: bool = True
    ) -> FlatRows:
        """From right-padded rows (rows, longest) and their mask of ones and zeros.

        `dtype` is that of the causal mask (`mask_type`). `share` has what several rows begin with computed
        once. Not with dropout, which is to differ from row to row.
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
            _causal_mask(slots, dtype),
        )

    def to(self, device: torch.device) -> FlatRows:
        return FlatRows(**in_one_copy(vars(self), device))


def _causal_mask(slots: int, dtype: torch.dtype | None) -> Tensor:
    """(1, 1, slots, slots), to be added to the scores. Four dimensions keep transformers from making a mask
    of its own; without a type nobody reads it."""
    if dtype is None:
        return torch.zeros(1, 1, 1, 1, dtype=torch.long)
    return torch.full((slots, slots), torch.finfo(dtype).min, dtype=dtype).triu(1)[None, None]


def in_one_copy(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The tensors on `device`. Those of whole numbers go to a GPU in one transfer out of pinned memory, which
    the host need not wait for."""
    if device.type == "cpu":
        return dict(tensors)
    whole = {name: tensor for name, tensor in tensors.items() if tensor.dtype == torch.int64}
    moved = {name: tensors[name].to(device, non_blocking=True) for name in tensors.keys() - whole.keys()}
    packed = torch.cat([tensor.flatten() for tensor in whole.values()])
    if device.type == "cuda":
        packed = packed.pin_memory()
    parts = packed.to(device, non_blocking=True).split([tensor.numel() for tensor in whole.values()])
    return moved | {name: part.view(whole[name].shape) for name, part in zip(whole, parts, strict=True)}


def _first_alike(ids: Tensor, mask: Tensor) -> Tensor:
    """(rows, slots): the first row that has the same tokens up to and with this slot; in the padding, any."""
    owners = torch.arange(len(ids))[:, None].repeat(1, ids.shape[1])
    for row in range(1, len(ids)):
        same = ((ids[:row] == ids[row]) & mask[:row] & mask[row]).to(torch.int8).cumprod(1)
        owners[row] = torch.where(same.any(0), same.argmax(0), row)
    return owners


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


def reading_flat_rows(attention: Callable, *, masked: bool = True) -> Callable:
    """An attention function for transformers' AttentionInterface that reads flat rows, too: it puts them
    beside each other for `attention`, which need not know of them. Unless it is `masked`, `attention` is
    causal by itself where it is given no mask, and reads none."""

    def either(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        padded_rows: Tensor | None = None,
        flat_rows: Tensor | None = None,
        shared_tokens: Tensor | None = None,
        token_holders: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if padded_rows is None:
            return attention(module, query, key, value, attention_mask, **options)
        places = padded_rows, flat_rows, shared_tokens, token_holders
        query, key, value = (_padded(states, *places) for states in (query, key, value))
        mask = attention_mask if masked else None
        output, _ = attention(module, query, key, value, mask, **options)
        return _Unpad.apply(output.flatten(0, 1), flat_rows)[None], None

    return either


AttentionInterface.register(GROUPED, reading_flat_rows(grouped_attention))
AttentionInterface.register(FLAT_SDPA, reading_flat_rows(sdpa_attention_forward, masked=False))
_TRIAL = "reads flat rows"
_SHARES = "shares beginnings"


def flat_hidden_states(model: nn.Module, rows: FlatRows) -> Tensor:
    """The backbone's last hidden states of rows without padding: their tokens', and those of the tokens
    behind them that belong to no row, (count, d). For models that `reads_flat` allows."""
    return backbone(model)(**vars(rows), use_cache=False).last_hidden_state[0]


def reads_flat(model: nn.Module, longest: int) -> bool:
    """Whether the model reads rows of up to `longest` tokens without padding."""
    return (
        record(model).get(_TRIAL, False)
        and model.config._attn_implementation in (GROUPED, FLAT_SDPA)
        and longest <= attention_window(model)
    )


def allow_flat_rows(model: nn.Module) -> bool:
    """Tries on two rows of different lengths whether the model gives the same without padding, and with their
    common beginning computed once, as with padding, and from then on has `reads_flat` say so.

    Models that mix neighbouring tokens outside their attention do not, however little comes through at first:
    a row's hidden states may have no gradient at all for another row's tokens.
    """
    forbid_flat_rows(model)
    longest = int(min(13, attention_window(model)))
    if model.config._attn_implementation not in (GROUPED, FLAT_SDPA) or longest < 3:
        return False
    ids = probe_ids(model, 2, longest).cpu()
    ids[1, : longest // 3] = ids[0, : longest // 3]
    mask = torch.ones_like(ids)
    mask[0, longest // 2 :] = 0
    try:
        with torch.enable_grad(), _embeddings_apart(model) as embedded:
            record(model)[_TRIAL] = _the_same_flat(model, ids, mask.bool(), embedded)
    except REFUSALS:
        pass
    return record(model)[_TRIAL]


def mask_type(model: nn.Module) -> torch.dtype | None:
    """The type of the causal mask that the model's flat rows bring along; None where none is needed."""
    masked = model.config._attn_implementation != FLAT_SDPA
    return model.get_input_embeddings().weight.dtype if masked else None


def forbid_flat_rows(model: nn.Module) -> None:
    """Undoes `allow_flat_rows`."""
    record(model)[_TRIAL] = False


def share_beginnings(model: nn.Module, wanted: bool) -> None:
    """Whether what rows begin with is computed once, as it is unless told otherwise: for measurements."""
    record(model)[_SHARES] = wanted


def shares_beginnings(model: nn.Module) -> bool:
    """What `share_beginnings` was told last."""
    return record(model).get(_SHARES, True)


def _the_same_flat(model: nn.Module, ids: Tensor, mask: Tensor, embedded: list[Tensor]) -> bool:
    embeddings = model.get_input_embeddings().weight
    rows = FlatRows.of(ids, mask.long(), mask_type(model)).to(embeddings.device)
    mask = mask.to(embeddings.device)
    tokens = rows.padded_rows[:, : mask.shape[1]][mask]  # of the rows one after the other, with padding
    padded = hidden_states(model, ids.to(embeddings.device))[mask]
    gradients, found = _gradient(padded, embedded[-1])[mask], []
    for own in tokens.split(mask.sum(1).tolist()):
        flat = flat_hidden_states(model, rows)
        found.append(_gradient(flat[own], embedded[-1])[0])
        foreign = torch.ones_like(found[-1][:, 0], dtype=torch.bool).index_fill(0, own, False)
        if found[-1][foreign].any():
            return False
    expected = torch.zeros_like(found[0]).index_add(0, tokens, gradients)
    return alike(flat[tokens], padded, model.dtype) and alike(
        sum(found), expected, model.dtype, whole=True, slack=GRADIENT_SLACK
    )


def _gradient(hidden: Tensor, embedded: Tensor) -> Tensor:
    """Of a sum of these hidden states, each through its sine; no trained tensor receives any."""
    return torch.autograd.grad(hidden.float().sin().sum(), embedded)[0]


@contextlib.contextmanager
def _embeddings_apart(model: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, the list receives what the embeddings give in each forward, as leaves that take a gradient."""
    embedded: list[Tensor] = []

    def apart(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()  # which the model may change in place

    hook = model.get_input_embeddings().register_forward_hook(apart)
    try:
        yield embedded
    finally:
        hook.remove()
