"""The validation loss on either half of the rows: a learning rate is chosen on one, and reported on the
other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from linchain_cli.chain import folded
from linchain_cli.data.batches import micro_batches
from linchain_cli.data.store import EncodedRows
from linchain_cli.records import read_record
from linchain_cli.run import RunDirectory
from linchain_cli.training.objective import Objective


@dataclass(frozen=True, kw_only=True)
class HalfLosses:
    """halves.json: mean loss per supervised token of the even and of the odd rows, by the adapter in
    adapter/."""

    FORMAT: ClassVar[str] = "linchain validation halves"
    VERSION: ClassVar[int] = 1

    losses: tuple[float, float]


@torch.no_grad()
def half_losses(
    model: nn.Module,
    rows: EncodedRows,
    size: int | None,
    pad_id: int,
    objective: Objective,
    tokens: int | None = None,
) -> HalfLosses:
    """Every other row goes into the same half, so that both have their share of every source. `rows` are at
    least two; `size` and `tokens` as `micro_batches` takes them."""
    device = next(model.parameters()).device
    found = []
    for first in (0, 1):
        half = np.arange(first, len(rows), 2)
        total = torch.zeros((), dtype=torch.float64, device=device)
        with folded(model):
            for part in micro_batches(half, rows.lengths, size, tokens=tokens):
                total += objective.summed_loss(model, objective.collate(rows, part, pad_id), device)
        found.append(total.item() / int(rows.supervised_counts[half].sum()))
    return HalfLosses(losses=(found[0], found[1]))


def halves_path(run: RunDirectory) -> Path:
    """Where a run of a comparison keeps them."""
    return run.path / "halves.json"


def read_halves(run: RunDirectory) -> HalfLosses | None:
    """None if there is nothing yet.

    Raises:
        InputError: what is there is damaged.
    """
    path = halves_path(run)
    return read_record(path, HalfLosses) if path.exists() else None
