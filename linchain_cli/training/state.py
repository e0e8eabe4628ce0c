"""What a run knows about itself between two steps, and how it becomes the files of a checkpoint and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linchain_cli import storage
from linchain_cli.errors import InputError

OPTIMIZER_FILE = "optimizer.safetensors"
BEST_FILE = "best.safetensors"
STATE_FILE = "state.json"
FIRST_LOSS_SCALE = 2.0**16
STEPS_TO_DOUBLE = 2000


@dataclass
class TrainingState:
    """Counters of a run. Row order and dropout are functions of the step, so no random state belongs here.

    `rows`, `tokens` and `supervised_tokens` are what was consumed so far, unpadded, over all processes;
    `seconds` is time spent in steps. `best_step`, `best_loss` and `best_metric` are those of the best
    validation (`best_metric` None where the loss tells it); `stale` counts the validations since.
    Micro-batches have up to `micro_batch_size` rows, or with `auto` up to `micro_batch_tokens` tokens,
    padding included.

    `loss_scale` is what the loss is multiplied by before its gradients are taken, so that small ones do not
    vanish in float16; 1 in other types. A step whose gradients overflow is computed again at half of it; it
    doubles after `STEPS_TO_DOUBLE` steps without that, of which `steps_at_scale` are over (Micikevicius et
    al., arXiv 1710.03740). By powers of two no digit is lost.
    """

    step: int = 0
    rows: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_loss: float | None = None
    best_metric: float | None = None
    stale: int = 0
    micro_batch_size: int | None = None
    micro_batch_tokens: int | None = None
    loss_scale: float = 1.0
    steps_at_scale: int = 0

    def is_better(self, loss: float, metric: float | None) -> bool:
        """Whether a validation is better than the best one: by the metric, if there is one, then by the
        loss."""
        if self.best_loss is None:
            return True
        if metric is None or self.best_metric is None or metric == self.best_metric:
            return loss < self.best_loss
        return metric > self.best_metric

    def halve_loss_scale(self) -> bool:
        """Whether there is a smaller scale, which is the one from now on."""
        if self.loss_scale <= 1.0:
            return False
        self.loss_scale, self.steps_at_scale = self.loss_scale / 2, 0
        return True

    def count_scaled_step(self) -> None:
        """Notes a float16 step without overflow."""
        self.steps_at_scale += 1
        if self.steps_at_scale == STEPS_TO_DOUBLE:
            self.loss_scale, self.steps_at_scale = 2 * self.loss_scale, 0


def first_state(dtype: torch.dtype) -> TrainingState:
    """The state before the first step on a base of that type."""
    return TrainingState(loss_scale=FIRST_LOSS_SCALE if dtype == torch.float16 else 1.0)


def state_bytes(state: TrainingState, about: Mapping[str, Any]) -> bytes:
    """state.json of a checkpoint: the counters, and what else it should tell."""
    return storage.json_bytes({"state": asdict(state), **about})


def read_state(data: bytes) -> tuple[TrainingState, dict[str, Any]]:
    """What `state_bytes` wrote. Raises InputError when another version of linchain wrote other fields."""
    content = json.loads(data)
    try:
        return TrainingState(**content.pop("state")), content
    except (KeyError, TypeError) as error:
        raise InputError(f"the checkpoint's {STATE_FILE} is of another linchain version ({error})") from error


def snapshot(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Copies of all trained tensors on the CPU."""
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters.items()}


@torch.no_grad()
def restore(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Puts a snapshot back. Raises InputError when it is of other parameters."""
    for name, parameter in parameters.items():
        if name not in values or values[name].shape != parameter.shape:
            raise InputError(
                f"the checkpoint does not hold '{name}' of shape {tuple(parameter.shape)}, which is trained"
                " here: another version of linchain began this run. Go on with that version, or begin a run"
                " of another name."
            )
        parameter.copy_(values[name])
