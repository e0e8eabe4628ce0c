"""Rows of several lengths one behind the other, without padding.

Everything in a decoder but its attention takes token by token and needs no padding, so only the attention
(model/flat_attention.py) has to know where the rows are. And since a causal decoder's state at a token
depends on what stands before it alone, rows that begin alike have their common beginning computed once, in
training, too: prompts of one template share a quarter of their tokens and more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from linchain_cli.model import varlen
from linchain_cli.model.attention import FLAT_SDPA, GROUPED, Reach, attention_window, note_reaches, reaches
from linchain_cli.model.fast import (
    GRADIENT_SLACK,
    REFUSALS,
    alike,
    embeddings_apart,
    forget_failed_forward,
    gradient_of,
    probe_ids,
    record,
)
from linchain_cli.model.flat_attention import Beside, Pieces, Places, Varlen
from linchain_cli.model.head import backbone, hidden_states
from linchain_cli.model.varlen import Cut, Kernel

_T = TypeVar("_T")

# oneDNN makes a program for each shape that a product of matrices has: some 60 ms for all those of a 135 M
# model, of 800 that the products themselves take. So that shapes recur, tokens are counted in steps.
TOKEN_STEP = 16
LENGTH_STEP = 8


# From so many tokens on, rows go to the kernel that knows where each ends: it saves the padding, and copies
# of queries and outputs. Where it begins to pay is not measured, for want of a GPU.
LONG = 512
VARLEN = "varlen"
# Bytes at whose multiples tensors begin that go to a GPU as one: kernels read a mask so many at a time.
_ALIGNED = 16


@dataclass(frozen=True)
class FlatRows:
    """Right-padded rows without their padding, as a model's forward takes them.

    `input_ids` and `position_ids` (1, count) hold the tokens of the rows one behind the other, those that a
    row has in common with an earlier one left out, and then up to `TOKEN_STEP` that belong to no row.
    `token_of` (rows, longest or more), on the CPU, says which token stands where in the padded rows (any, in
    the padding), `layout` how their attention is computed.
    """

    input_ids: Tensor
    position_ids: Tensor
    token_of: Tensor
    layout: Beside | Varlen

    @classmethod
    def of(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        share: bool = True,
        kernel: Kernel | None = None,
        chunks: Collection[int | None] = (None,),
    ) -> FlatRows:
        """From right-padded rows (rows, longest) and their mask of ones and zeros, on the CPU.

        `share` has what several rows begin with computed once. Not with dropout, which is to differ from row
        to row. With a `kernel` rows stay one behind the other in attention, too, cut into `chunks`.
        """
        missing = -input_ids.shape[1] % LENGTH_STEP
        if not missing and attention_mask.all():
            missing = LENGTH_STEP  # there has to be some padding
        mask = nn.functional.pad(attention_mask.bool(), (0, missing))
        input_ids = nn.functional.pad(input_ids, (0, missing))
        count, slots = mask.shape
        every_row, every_slot = torch.arange(count)[:, None], torch.arange(slots)

        owners = _first_alike(input_ids, mask) if share else every_row.expand(-1, slots)
        own = mask & (owners == every_row)
        tokens = own.flatten().nonzero()[:, 0]
        others = -len(tokens) % TOKEN_STEP
        if kernel is not None:
            others = others or TOKEN_STEP  # there has to be some token of no row
        token_of = (own.flatten().cumsum(0) - 1)[owners * slots + every_slot] * mask
        if kernel is None:
            layout = _beside(token_of, mask, owners, tokens, others)
        else:
            layout = Varlen(kernel, {chunk: _pieces(token_of, mask, own, others, chunk) for chunk in chunks})
        # Those of no row stand at 0, since a model may have no position behind the longest row.
        ids, positions = (
            nn.functional.pad(each, (0, others))[None]
            for each in (input_ids.flatten()[tokens], tokens % slots)
        )
        return cls(ids, positions, token_of, layout)

    def to(self, device: torch.device) -> FlatRows:
        """With all that the model takes on `device`."""
        taken = in_one_copy(replace(self, token_of=self.token_of[:0]), device)
        return replace(taken, token_of=self.token_of)


def _beside(token_of: Tensor, mask: Tensor, owners: Tensor, tokens: Tensor, others: int) -> Beside:
    """Tables for rows beside each other; `owners` as `_first_alike` gives them, `tokens` the slots in which
    tokens stand first, and `others` more that belong to no row."""
    count, slots = mask.shape
    every_row = torch.arange(count)[:, None]
    nobody = int((~mask.flatten()).nonzero()[0])
    shared = token_of[mask & (owners != every_row)].unique()
    rows, places = tokens[shared] // slots, tokens[shared] % slots
    holds = (owners[:, places] == rows) & mask[:, places]
    holders = torch.where(holds, every_row * slots + places, nobody).T.contiguous()
    first = nn.functional.pad(tokens, (0, others), value=nobody)
    return Beside(Places(token_of.flatten(), first, shared, holders), slots)


def _pieces(token_of: Tensor, mask: Tensor, own: Tensor, others: int, chunk: int | None) -> Pieces:
    """The rows' own tokens as queries, cut at every `chunk` tokens, and with what stands before them there as
    keys. Pieces without a query are left out; the tokens of no row are the last one."""
    lengths, owned = mask.sum(1).tolist(), own.sum(1).tolist()
    queries, keys, taken = [], [], []
    for row, (length, count) in enumerate(zip(lengths, owned, strict=True)):
        begin = length - count  # what stands before it is an earlier row's
        size = chunk or length
        for start in range(begin // size * size, length if count else 0, size):
            end = min(length, start + size)
            queries.append(end - max(begin, start))
            keys.append(end - start)
            taken.append(token_of[row, start:end])
    count = sum(owned)
    tokens = torch.cat([*taken, torch.arange(others) + count])
    ends = (torch.tensor([0, *sizes, others]).cumsum(0).int() for sizes in (queries, keys))
    cut = Cut(*ends, max(*queries, others), max(*keys, others))
    as_they_are = len(tokens) == count + others
    return Pieces(cut, None if as_they_are else Places.of(tokens, nobody=len(tokens) - 1))


def _first_alike(ids: Tensor, mask: Tensor) -> Tensor:
    """(rows, slots): the first row that has the same tokens up to and with this slot; in the padding, any."""
    owners = torch.arange(len(ids))[:, None].repeat(1, ids.shape[1])
    for row in range(1, len(ids)):
        same = ((ids[:row] == ids[row]) & mask[:row] & mask[row]).to(torch.int8).cumprod(1)
        owners[row] = torch.where(same.any(0), same.argmax(0), row)
    return owners


def in_one_copy(value: _T, device: torch.device) -> _T:
    """A dataclass or mapping of tensors (or of such) with all its tensors on `device`. They go to a GPU in
    one transfer out of pinned memory, which the host need not wait for."""
    if device.type == "cpu":
        return value
    tensors = list(_tensors(value))
    in_bytes = [tensor.contiguous().flatten().view(torch.uint8) for tensor in tensors]
    sizes = [len(each) + -len(each) % _ALIGNED for each in in_bytes]
    packed = torch.cat(
        [nn.functional.pad(each, (0, size - len(each))) for each, size in zip(in_bytes, sizes, strict=True)]
    )
    if device.type == "cuda":
        packed = packed.pin_memory()
    parts = packed.to(device, non_blocking=True).split(sizes)
    return _rebuilt(
        value,
        iter(
            part[: len(each)].view(tensor.dtype).view(tensor.shape)
            for part, each, tensor in zip(parts, in_bytes, tensors, strict=True)
        ),
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    for part in _parts(value).values():
        yield from _tensors(part)


def _rebuilt(value: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(value, Tensor):
        return next(tensors)
    parts = {name: _rebuilt(part, tensors) for name, part in _parts(value).items()}
    return replace(value, **parts) if is_dataclass(value) else parts or value


def _parts(value: Any) -> Mapping[Any, Any]:
    if is_dataclass(value):
        return {each.name: getattr(value, each.name) for each in fields(value)}
    return value if isinstance(value, Mapping) else {}


_TRIAL = "reads flat rows"
_KERNEL = "kernel for flat rows"
_SHARES = "shares beginnings"


def attention_way(model: nn.Module, longest: int) -> str | None:
    """How the attention of a model's rows of up to `longest` tokens is computed; None where they are padded.

    - `GROUPED`, beside each other with masks: on CPUs, and wherever SDPA cannot compute a model's attention
      (Gemma 2's capped scores).
    - `VARLEN`, one behind the other: on GPUs in half precision whose kernel gave the same in
      `allow_flat_rows`, rows of `LONG` tokens and more, and those that are longer than a layer's window or
      chunk, for which SDPA would need a mask.
    - `FLAT_SDPA`, beside each other: the others on GPUs.

    Padded are rows of models that `allow_flat_rows` has not found to read flat ones, and rows beyond a window
    or a chunk of which it is not known to which layers it belongs.
    """
    known, own = record(model), model.config._attn_implementation
    if not known.get(_TRIAL, False) or own not in (GROUPED, FLAT_SDPA):
        return None
    layers = reaches(model)
    if layers is None and longest > attention_window(model):
        return None
    shortest = min((reach.size for reach in layers or ()), default=float("inf"))
    if own == FLAT_SDPA and known.get(_KERNEL) is not None and longest >= min(LONG, shortest + 1):
        return VARLEN
    return own


def rows_for(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, *, share: bool) -> FlatRows | None:
    """Right-padded rows (rows, longest), on the CPU, as the model reads them flat; None if it reads them
    padded. `share` as in `FlatRows.of`, if `share_beginnings` was not told otherwise.
    """
    way = attention_way(model, input_ids.shape[1])
    if way is None or input_ids.numel() >= _places_alike(model):
        return None
    kernel = record(model)[_KERNEL] if way == VARLEN else None
    return _rows(model, input_ids, attention_mask, share and record(model).get(_SHARES, True), kernel)


def _places_alike(model: nn.Module) -> float:
    """How many tokens may stand one behind the other. Llama 4 scales its queries by where a token stands
    among all that it is given, whatever its position is, in steps of so many."""
    config = model.config.get_text_config()
    return config.floor_scale if getattr(config, "attn_temperature_tuning", False) else float("inf")


def _rows(model: nn.Module, ids: Tensor, mask: Tensor, share: bool, kernel: Kernel | None) -> FlatRows:
    chunks = {reach.chunk for reach in reaches(model) or {Reach()}}
    return FlatRows.of(ids, mask, share=share, kernel=kernel, chunks=chunks)


def flat_hidden_states(model: nn.Module, rows: FlatRows) -> Tensor:
    """The backbone's last hidden states of rows without padding: their tokens', and those of the tokens
    behind them that belong to no row, (count, d). For rows on the model's device that `rows_for` gave."""
    layout = rows.layout
    if isinstance(layout, Beside):
        adds_masks = model.config._attn_implementation == GROUPED
        dtype = model.get_input_embeddings().weight.dtype if adds_masks else None
        layout = layout.masked(reaches(model) or (), dtype)
    output = backbone(model)(
        input_ids=rows.input_ids,
        position_ids=rows.position_ids,
        # Any four dimensions keep transformers from making a mask of its own, and from waiting for the
        # positions to see where rows end. Nobody reads it.
        attention_mask=rows.position_ids[:, :1, None, None],
        flat=layout,
        use_cache=False,
    )
    return output.last_hidden_state[0]


def allow_flat_rows(model: nn.Module, kernel: Kernel | None = None) -> bool:
    """Tries on two rows of different lengths whether the model gives the same without padding, and with their
    common beginning computed once, as with padding, and from then on has `attention_way` say so.

    Models that mix neighbouring tokens outside their attention do not, however little comes through at first:
    a row's hidden states may have no gradient at all for another row's tokens.

    Args:
        kernel: what attention goes to that is computed row by row, if it gives the same, too. Left out, it is
            torch's, on GPUs and in half precision.
    """
    forbid_flat_rows(model)
    own, embeddings = model.config._attn_implementation, model.get_input_embeddings().weight
    if own not in (GROUPED, FLAT_SDPA):
        return False
    note_reaches(model)
    longest = 13 if reaches(model) is not None else int(min(13, attention_window(model)))
    if longest < 3:
        return False
    ids = probe_ids(model, 2, longest).cpu()
    ids[1, : longest // 3] = ids[0, : longest // 3]
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, longest // 2 :] = False
    record(model)[_TRIAL] = _the_same_flat(model, ids, mask, None)
    if kernel is None and embeddings.device.type != "cpu" and embeddings.dtype.itemsize == 2:
        kernel = varlen.flash
    if record(model)[_TRIAL] and own == FLAT_SDPA and kernel is not None:
        heads: set[tuple[int, int, int]] = set()

        def noting_heads(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
            heads.add((query.shape[1], key.shape[1], query.shape[2]))
            return kernel(query, key, value, *options)

        same = _the_same_flat(model, ids, mask, noting_heads)
        # Windows are longer than the trial.
        if same and all(varlen.agrees(kernel, each, embeddings) for each in heads):
            record(model)[_KERNEL] = kernel
    return record(model)[_TRIAL]


def forbid_flat_rows(model: nn.Module) -> None:
    """Undoes `allow_flat_rows`."""
    record(model)[_TRIAL] = False
    record(model)[_KERNEL] = None


def share_beginnings(model: nn.Module, wanted: bool) -> None:
    """Whether what rows begin with is computed once, as it is unless told otherwise: for measurements."""
    record(model)[_SHARES] = wanted


def _the_same_flat(model: nn.Module, ids: Tensor, mask: Tensor, kernel: Kernel | None) -> bool:
    try:
        with torch.enable_grad(), embeddings_apart(model) as embedded:
            return _compare(model, ids, mask, kernel, embedded)
    except REFUSALS:
        forget_failed_forward(model)
        return False


def _compare(
    model: nn.Module, ids: Tensor, mask: Tensor, kernel: Kernel | None, embedded: list[Tensor]
) -> bool:
    embeddings = model.get_input_embeddings().weight
    rows = _rows(model, ids, mask, True, kernel).to(embeddings.device)
    mask = mask.to(embeddings.device)
    tokens = rows.token_of.to(embeddings.device)[:, : mask.shape[1]][mask]  # of the rows one after the other
    padded = hidden_states(model, ids.to(embeddings.device))[mask]
    gradients, found = gradient_of(padded, embedded[-1])[mask], []
    for own in tokens.split(mask.sum(1).tolist()):
        flat = flat_hidden_states(model, rows)
        found.append(gradient_of(flat[own], embedded[-1])[0])
        foreign = torch.ones_like(found[-1][:, 0], dtype=torch.bool).index_fill(0, own, False)
        if found[-1][foreign].any():
            return False
    expected = torch.zeros_like(found[0]).index_add(0, tokens, gradients)
    return alike(flat[tokens], padded, model.dtype) and alike(
        sum(found), expected, model.dtype, whole=True, slack=GRADIENT_SLACK
    )
