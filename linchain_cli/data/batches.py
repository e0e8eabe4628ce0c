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


def step_rows(num_rows: int, seed: int, global_batch: int, step: int) -> np.ndarray:
    """The rows of optimizer step `step` (0-based): (≤ global_batch,) int32; each row comes once per epoch."""
    epoch, within = divmod(step, steps_per_epoch(num_rows, global_batch))
    return _epoch_order(num_rows, seed, epoch)[within * global_batch : (within + 1) * global_batch]


def micro_batches(
    rows: np.ndarray,
    lengths: np.ndarray,
    size: int | None,
    rank: int = 0,
    world: int = 1,
    tokens: int | None = None,
) -> list[np.ndarray]:
    """One rank's share of a step's rows as micro-batches of like length, largest first.

    Rows are sorted by length and dealt out to the ranks in turn. Every rank gets the same number of
    micro-batches, because all take part in each; where rows do not go round, one can be empty.

    Args:
        size: rows in a micro-batch, at most.
        tokens: those that it has at most, padding included, if it has more than one row; in place of `size`.
    """
    ordered = rows[np.argsort(-lengths[rows].astype(np.int64), kind="stable")]
    share = ordered[rank::world]
    if tokens is None:
        count = math.ceil(math.ceil(len(rows) / world) / size)
        return np.array_split(share, count)
    # No rank has longer rows, or more of them, than the first, by whose share all are cut.
    longest = lengths[ordered[::world]].astype(np.int64)
    starts, found = [], 0
    while found < len(longest):
        starts.append(found)
        found += max(1, tokens // int(longest[found]))
    counts = np.diff([*starts, len(longest)])
    largest = np.argsort(-counts * longest[starts], kind="stable")
    parts = np.split(share, starts[1:])
    return [parts[index] for index in largest]


def collate(encoded: Rows, rows: Sequence[int] | np.ndarray, pad_token_id: int) -> Batch:
    """Pads the rows on the right to the longest of them. No rows give one row of padding without labels."""
    import torch

    items = [encoded[int(row)] for row in rows]
    shape = (max(1, len(items)), max((len(ids) for ids, _ in items), default=1))
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64) if items else np.ones(shape, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    for i, (ids, supervised) in enumerate(items):
        input_ids[i, : len(ids)] = ids
        attention_mask[i, : len(ids)] = 1
        labels[i, : len(ids)] = np.where(supervised, ids, IGNORED)
    return Batch(*map(torch.from_numpy, (input_ids, attention_mask, labels)))
