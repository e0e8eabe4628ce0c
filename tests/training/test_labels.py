"""Which positions the loss reads: those before each label, each once, and how often it counts."""

from __future__ import annotations

import torch

from linchain_cli.data.batches import IGNORED, Batch
from linchain_cli.model.flat_rows import FlatRows
from linchain_cli.training.loss import Labels

MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
IDS = torch.tensor([[7, 8, 9, 4, 0], [7, 8, 9, 5, 6], [7, 8, 9, 4, 0]])
# One less in the last row.
LABELS = torch.tensor([[-100, -100, 9, 4, -100], [-100, -100, 9, 5, 6], [-100, -100, -100, 4, -100]])


def listed(labels: Labels) -> list[tuple[int, int, int]]:
    return list(zip(*(each.tolist() for each in vars(labels).values()), strict=True))


def test_with_padding_each_label_stands_behind_its_own_token():
    found = listed(Labels.of(Batch(IDS, MASK, LABELS)))
    assert found == [(1, 9, 1), (2, 4, 1), (6, 9, 1), (7, 5, 1), (8, 6, 1), (12, 4, 1)]


def test_rows_that_begin_alike_share_tokens():
    batch = Batch(IDS, MASK, LABELS)
    flat = FlatRows.of(IDS, MASK)
    assert flat.input_ids[0, :6].tolist() == [7, 8, 9, 4, 5, 6]
    # Behind the 8 stands a 9 in two rows, behind the 9 a 4 in two rows and a 5 in one.
    assert listed(Labels.of(batch, flat)) == [(1, 9, 2), (2, 4, 2), (2, 5, 1), (4, 6, 1)]
    apart = FlatRows.of(IDS, MASK, share=False)
    found = listed(Labels.of(batch, apart))
    assert [label for _, label, _ in found] == [9, 4, 9, 5, 6, 4] and {count for *_, count in found} == {1}


def test_what_fills_up_counts_nothing():
    plain, filled = (Labels.of(Batch(IDS, MASK, LABELS), step=step) for step in (1, 4))
    assert listed(filled)[:6] == listed(plain) and listed(filled)[6:] == [(12, 4, 0)] * 2
    assert Labels.of(Batch(IDS, MASK, LABELS), step=3).counts.sum() == 6


def test_a_first_token_and_a_batch_without_labels():
    labels = torch.full_like(IDS, IGNORED)
    labels[:, 0] = 7  # nothing stands before it
    assert listed(Labels.of(Batch(IDS, MASK, labels), step=16)) == []
