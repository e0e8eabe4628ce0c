"""Learning labels: cross-entropy over classes, or the squared error of a number, a row at a time.

Letters behind a name are a tensor's dimensions: R rows, C classes, or 1 where the head gives a number.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from linchain_cli.data.agreement import agreement
from linchain_cli.data.labelled_batches import LabelledBatch, collate_labelled
from linchain_cli.data.store import EncodedRows
from linchain_cli.model.classifier import predictions, row_logits
from linchain_cli.recipe.schema import METRICS
from linchain_cli.training.reading import Reading


class LabelObjective:
    """A row's class, or with no `classes` its number; see objective.Objective."""

    collate = staticmethod(collate_labelled)

    def __init__(self, classes: int, best_by: str):
        self.classes = classes
        self.best_by = best_by

    def beginnings(self, batch: LabelledBatch, length: int) -> LabelledBatch:
        return batch.beginnings(length)

    def add_gradients(
        self, model: nn.Module, batch: LabelledBatch, scale: float, device: torch.device
    ) -> Tensor:
        """Of `scale` = 1 / (rows of the whole optimizer step) the step's loss is the mean over its rows."""
        batch = batch.to(device)
        loss = scale * self.losses(row_logits(model, batch), batch).sum()
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def summed_loss(self, model: nn.Module, batch: LabelledBatch, device: torch.device) -> Tensor:
        batch = batch.to(device)
        return self.losses(row_logits(model, batch), batch).double().sum()

    def losses(self, logits_RC: Tensor, batch: LabelledBatch) -> Tensor:
        """Each row's loss, (R,), zero for rows that count nothing."""
        if self.classes:
            each_R = F.cross_entropy(logits_RC, batch.targets.long(), reduction="none")
        else:
            each_R = (logits_RC[:, 0] - batch.targets).square()
        return each_R * batch.counts

    @torch.no_grad()
    def read(
        self,
        model: nn.Module,
        data: EncodedRows,
        parts: Sequence[np.ndarray],
        pad_id: int,
        device: torch.device,
    ) -> Reading:
        told: list[Tensor] = []
        total = torch.zeros((), dtype=torch.float64, device=device)
        for part in parts:
            batch = self.collate(data, part, pad_id).to(device)
            logits_RC = row_logits(model, batch)
            total += self.losses(logits_RC, batch).double().sum()
            told.append(predictions(logits_RC)[: len(part)])
        values = torch.cat(told).cpu().numpy()  # all at once, or a GPU would be waited for each time
        return Reading(total, [(np.concatenate([np.asarray(part) for part in parts]), values)])

    def mean_loss(
        self, accelerator: Accelerator, found: Reading, data: EncodedRows, rows: np.ndarray
    ) -> float:
        return accelerator.reduce(found.loss, reduction="sum").item() / len(rows)

    def judge(
        self,
        accelerator: Accelerator,
        found: Reading,
        data: EncodedRows,
        rows: np.ndarray,
    ) -> dict[str, float]:
        loss = self.mean_loss(accelerator, found, data, rows)
        predicted = np.zeros(len(data))
        for part, values in gather_object(found.told):
            predicted[part] = values
        names = METRICS["classification" if self.classes else "regression"]
        targets, predicted = data.targets[rows], predicted[rows]
        return {"loss": loss} | {name: agreement(name, targets, predicted, self.classes) for name in names}
