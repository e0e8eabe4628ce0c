"""A loaded model as lm-evaluation-harness asks it; importing this module imports the harness."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from torch import Tensor

BATCH_SIZE = {"cpu": 8, "cuda": 32}


class SharedModel(HFLM):
    """The harness's own class for models of transformers, which it asks in one process alone if the model is
    loaded already. Here `world` processes that hold the same model each get the rows of their `rank`, and the
    first of them all results."""

    def __init__(self, model: Any, tokenizer: Any, rank: int = 0, world: int = 1):
        by_device = BATCH_SIZE.get(model.get_input_embeddings().weight.device.type, BATCH_SIZE["cuda"])
        # It gives the tokenizer a padding token, by which it would be another one to everybody else.
        super().__init__(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=by_device)
        self._rank, self._world_size = rank, world

    def all_gather(self, tensor: Tensor) -> Tensor:
        """A number of each process, (world,)."""
        found: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(found, tensor.item())
        return torch.tensor(found)

    def barrier(self) -> None:
        """Waits for all processes, for which the harness's own needs an Accelerator."""
        self.all_gather(torch.zeros(()))


@contextlib.contextmanager
def without_git() -> Iterator[None]:
    """Keeps the harness from asking git for the commit of the current directory, whatever that is of: git
    complains on stderr where there is none."""
    asked = evaluator.get_git_commit_hash
    evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = asked
