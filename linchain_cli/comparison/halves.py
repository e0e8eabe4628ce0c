"""The validation loss on either half of the rows: a learning rate is chosen on one, and reported on the
other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from linchain_cli import storage
from linchain_cli.chain import folded
from linchain_cli.data.batches import collate, micro_batches
from linchain_cli.data.store import EncodedRows
from linchain_cli.errors import InputError
from linchain_cli.run import RunDirectory
from linchain_cli.training.loss import summed_loss

Halves = tuple[float, float]


@torch.no_grad()
def half_losses(model: nn.Module, rows: EncodedRows, micro_batch_size: int, pad_id: int) -> Halves:
    """Mean loss per supervised token of the even and of the odd rows, so that both have their share of every
    source. `rows` are at least two."""
    device = next(model.parameters()).device
    found = []
    for first in (0, 1):
        half = np.arange(first, len(rows), 2)
        total = torch.zeros((), dtype=torch.float64, device=device)
        with folded(model):
            for part in micro_batches(half, rows.lengths, micro_batch_size):
                total += summed_loss(model, collate(rows, part, pad_id), device)
        found.append(total.item() / int(rows.supervised_counts[half].sum()))
    return found[0], found[1]


def _path(run: RunDirectory) -> Path:
    return run.path / "halves.json"


def write_halves(run: RunDirectory, losses: Halves) -> None:
    """Keeps the losses in the run's directory."""
    storage.write_json(_path(run), {"validation_losses": list(losses)})


def read_halves(run: RunDirectory) -> Halves | None:
    """What `write_halves` wrote; None if there is nothing yet.

    Raises:
        InputError: it is damaged.
    """
    path = _path(run)
    try:
        one, other = map(float, json.loads(path.read_bytes())["validation_losses"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}): remove it, it is measured again") from error
    return one, other
