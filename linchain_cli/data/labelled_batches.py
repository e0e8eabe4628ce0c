"""Batches of rows with a label, whose padding the model has to be told: an encoder sees every token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from linchain_cli.data.batches import padded

if TYPE_CHECKING:
    import torch

    from linchain_cli.data.store import EncodedRows


@dataclass
class LabelledBatch:
    """Right-padded tensors.

    input_ids, attention_mask: (batch, length) int64
    token_type_ids: (batch, length) int64, which of its texts a token is of; None where the model is not told
    targets: (batch,) float32, the number of the row's class, or the number itself
    counts: (batch,) float32, one for a row and zero for what fills an empty batch
    is_padded: whether any row is shorter than the longest; a GPU would have to be waited for to learn it
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    token_type_ids: torch.Tensor | None
    targets: torch.Tensor
    counts: torch.Tensor
    is_padded: bool

    def to(self, device: torch.device) -> LabelledBatch:
        from linchain_cli.model.flat_rows import in_one_copy

        return in_one_copy(self, device)

    def beginnings(self, length: int) -> LabelledBatch:
        """The first `length` tokens of every row."""
        cut = [
            tensor if tensor is None else tensor[:, :length]
            for tensor in (self.input_ids, self.attention_mask, self.token_type_ids)
        ]
        return LabelledBatch(*cut, self.targets, self.counts, self.is_padded)


def collate_labelled(
    encoded: EncodedRows, rows: Sequence[int] | np.ndarray, pad_token_id: int
) -> LabelledBatch:
    """Pads the rows on the right to the longest of them. No rows give one row of padding that counts zero."""
    import torch

    input_ids, attention_mask = padded([encoded[int(row)][0] for row in rows], pad_token_id)
    segments = np.zeros_like(input_ids)
    targets, counts = np.zeros((2, len(input_ids)), dtype=np.float32)
    for i, row in enumerate(rows):
        if (kinds := encoded.segments(int(row))) is not None:
            segments[i, : len(kinds)] = kinds
    targets[: len(rows)] = encoded.targets[np.asarray(rows, dtype=np.int64)]
    counts[: len(rows)] = 1
    told = torch.from_numpy(segments) if encoded.store.has_segments else None
    return LabelledBatch(
        *map(torch.from_numpy, (input_ids, attention_mask)),
        told,
        *map(torch.from_numpy, (targets, counts)),
        is_padded=not attention_mask.all(),
    )
