"""What a run learns, by the recipe's task: how rows become a batch, what the loss of one is, and how
validation rows are judged. The loop asks for no more than that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from linchain_cli.data.batches import Batch, collate
from linchain_cli.data.dataset import PreparedData
from linchain_cli.data.store import EncodedRows
from linchain_cli.recipe import Recipe
from linchain_cli.training import loss
from linchain_cli.training.labels import LabelObjective
from linchain_cli.training.reading import Reading

Part = Sequence[int] | np.ndarray


class Objective(Protocol):
    """A task. `best_by` is what its best validation is told by, a key of what `judge` gives: the higher
    the better, but for the loss."""

    best_by: str

    def collate(self, rows: EncodedRows, part: Part, pad_id: int) -> Any:
        """A micro-batch on the CPU; no rows give one that learns nothing."""

    def beginnings(self, batch: Any, length: int) -> Any:
        """The first tokens of a batch's rows."""

    def add_gradients(self, model: nn.Module, batch: Any, scale: float, device: torch.device) -> Tensor:
        """Adds the gradient of `scale` · (summed loss) to every trained tensor; gives the scaled loss."""

    def summed_loss(self, model: nn.Module, batch: Any, device: torch.device) -> Tensor:
        """The loss summed over what a batch supervises, a float64 scalar on `device`."""

    def read(
        self,
        model: nn.Module,
        data: EncodedRows,
        parts: Sequence[Part],
        pad_id: int,
        device: torch.device,
    ) -> Reading:
        """What this process finds in its `parts` of validation rows, with a model that is folded."""

    def mean_loss(
        self, accelerator: Accelerator, found: Reading, data: EncodedRows, rows: np.ndarray
    ) -> float:
        """The mean loss of the `rows` that all processes have read, out of what each has `found`."""

    def judge(
        self, accelerator: Accelerator, found: Reading, data: EncodedRows, rows: np.ndarray
    ) -> dict[str, float]:
        """`mean_loss` as `loss`, and what else tells how good the model is."""


class CausalObjective:
    """Text, token by token: cross-entropy at the supervised ones."""

    best_by = "loss"
    collate = staticmethod(collate)

    def add_gradients(self, model: nn.Module, batch: Batch, scale: float, device: torch.device) -> Tensor:
        return loss.add_gradients(model, batch, scale, device)

    def summed_loss(self, model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
        return loss.summed_loss(model, batch, device)

    def beginnings(self, batch: Batch, length: int) -> Batch:
        return Batch(*(t[:, :length] for t in (batch.input_ids, batch.attention_mask, batch.labels)))

    def read(
        self,
        model: nn.Module,
        data: EncodedRows,
        parts: Sequence[Part],
        pad_id: int,
        device: torch.device,
    ) -> Reading:
        total = torch.zeros((), dtype=torch.float64, device=device)
        for part in parts:
            total += self.summed_loss(model, self.collate(data, part, pad_id), device)
        return Reading(total)

    def mean_loss(
        self, accelerator: Accelerator, found: Reading, data: EncodedRows, rows: np.ndarray
    ) -> float:
        total = accelerator.reduce(found.loss, reduction="sum")
        return (total / data.supervised_counts[rows].sum()).item()

    def judge(
        self, accelerator: Accelerator, found: Reading, data: EncodedRows, rows: np.ndarray
    ) -> dict[str, float]:
        return {"loss": self.mean_loss(accelerator, found, data, rows)}


def objective_of(recipe: Recipe, data: PreparedData) -> Objective:
    """The objective of a recipe's task."""
    if recipe.task == "causal":
        return CausalObjective()
    return LabelObjective(len(data.template.classes), recipe.training.best_by)
