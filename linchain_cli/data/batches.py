"""Batches: which rows an optimizer step consumes, how they are cut into micro-batches, and their tensors.

The order of rows is a pure function of (seed, epoch), so a resumed run needs no random state. The rows of
one step are sorted by length before they are cut, which leaves the step's gradient as it is (the loss is
normalised by the step's supervised tokens) and the padding at a fraction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch

IGNORED = -100  # the label that torch's cross-entropy leaves out


class Rows(Protocol):
    """Encoded rows: `len(rows)`, and `rows[i]` as (input_ids int32, supervised bool), both (length,)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass
class Batch:
    """Right-padded tensors, int64, each (batch, length). `labels[:, t]` is the token at t, or -100."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        move = {"device": device, "non_blocking": True}
        return Batch(self.input_ids.to(**move), self.attention_mask.to(**move), self.labels.to(**move))


def steps_per_epoch(num_rows: int, global_batch: int) -> int:
    """Optimizer steps of one pass over all rows; the last one may be smaller."""
    return math.ceil(num_rows / global_batch)


@lru_cache(maxsize=1)
def _epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    # RandomState's streams are frozen: the same order in every NumPy version.
    stream = np.random.RandomState([seed & 0xFFFFFFFF, seed >> 32, epoch])
    order = stream.permutation(np.arange(num_rows, dtype=np.int32))
    order.flags.writeable = False
    return order


def step_rows(
    num_rows: int, seed: int, global_batch: int, step: int, starts: np.ndarray | None = None
) -> np.ndarray:
    """The rows of optimizer step `step` (0-based): (≤ global_batch,) int32; each row comes once per epoch.

    Args:
        starts: where each conversation's rows begin, ascending; they stay together and in order, so that what
            they have in common can be computed once. None: every row is one.
    """
    epoch, within = divmod(step, steps_per_epoch(num_rows, global_batch))
    first, last = within * global_batch, min((within + 1) * global_batch, num_rows)
    if starts is None:
        return _epoch_order(num_rows, seed, epoch)[first:last]
    order = _epoch_order(len(starts), seed, epoch)
    sizes = np.diff(starts, append=num_rows)[order]
    ends = np.cumsum(sizes)
    taken = slice(np.searchsorted(ends, first, side="right"), np.searchsorted(ends, last) + 1)
    begins, counts = starts[order[taken]], sizes[taken]
    rows = np.concatenate([np.arange(at, at + count) for at, count in zip(begins, counts, strict=True)])
    skipped = first - int(ends[taken.start] - counts[0])
    return rows[skipped : skipped + last - first].astype(np.int32)


def micro_batches(
    rows: np.ndarray,
    lengths: np.ndarray,
    size: int | None,
    rank: int = 0,
    world: int = 1,
    tokens: int | None = None,
    starts: np.ndarray | None = None,
) -> list[np.ndarray]:
    """One rank's share of a step's rows as micro-batches of like length, largest first.

    Rows are sorted by length, those of one conversation beside each other, and dealt out to the ranks in
    turn. Every rank gets the same number of micro-batches, because all take part in each; where rows do not
    go round, one can be empty.

    Args:
        size: rows in a micro-batch, at most.
        tokens: those that it has at most, padding included, if it has more than one row; in place of `size`.
        starts: as for `step_rows`.
    """
    ordered = _by_length(rows, lengths[rows].astype(np.int64), starts)
    share = ordered[rank::world]
    # Where ranks' rows differ in length, all cut as the longest of each turn asks for.
    turns = np.array(
        [lengths[ordered[at : at + world]].max() for at in range(0, len(ordered), world)], np.int64
    )
    if tokens is None:
        count = math.ceil(math.ceil(len(rows) / world) / size)
        parts = np.array_split(share, count)
        sizes = [int(part.sum()) for part in np.array_split(turns, count)]
    else:
        cuts, sizes = _cuts(turns, tokens)
        parts = np.split(share, cuts)
    if tokens is None and starts is None:
        return parts
    return [parts[index] for index in np.argsort(-np.array(sizes), kind="stable")]


def _by_length(rows: np.ndarray, lengths: np.ndarray, starts: np.ndarray | None) -> np.ndarray:
    """The rows, longest first; a conversation's stand beside each other, at the place of its longest."""
    if starts is None:
        return rows[np.argsort(-lengths, kind="stable")]
    conversations = np.searchsorted(starts, rows, side="right")
    longest = np.zeros(len(starts) + 1, dtype=np.int64)
    np.maximum.at(longest, conversations, lengths)
    return rows[np.lexsort((-lengths, conversations, -longest[conversations]))]


def _cuts(lengths: np.ndarray, tokens: int) -> tuple[list[int], list[int]]:
    """Where rows of these lengths are cut so that a part has at most `tokens`, padding included (or one row),
    and how many each part has."""
    cuts, sizes, begin, longest = [], [], 0, 0
    for place, length in enumerate(lengths.tolist()):
        longest = max(longest, length)
        if place > begin and longest * (place + 1 - begin) > tokens:
            cuts.append(place)
            begin, longest = place, length
            sizes.append(0)
        elif not sizes:
            sizes.append(0)
        sizes[-1] = longest * (place + 1 - begin)
    return cuts, sizes


def padded(items: Sequence[np.ndarray], pad_token_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and attention mask, (rows, longest) int64; no items give one row of one padding token."""
    shape = (max(1, len(items)), max(map(len, items), default=1))
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64) if items else np.ones(shape, dtype=np.int64)
    for i, ids in enumerate(items):
        input_ids[i, : len(ids)] = ids
        attention_mask[i, : len(ids)] = 1
    return input_ids, attention_mask


def collate(encoded: Rows, rows: Sequence[int] | np.ndarray, pad_token_id: int) -> Batch:
    """Pads the rows on the right to the longest of them. No rows give one row of padding without labels."""
    import torch

    items = [encoded[int(row)] for row in rows]
    input_ids, attention_mask = padded([ids for ids, _ in items], pad_token_id)
    labels = np.full_like(input_ids, IGNORED)
    for i, (ids, supervised) in enumerate(items):
        labels[i, : len(ids)] = np.where(supervised, ids, IGNORED)
    return Batch(*map(torch.from_numpy, (input_ids, attention_mask, labels)))
