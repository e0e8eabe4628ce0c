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


@dataclass
class TrainingState:
    """Counters of a run. Row order and dropout are functions of the step, so no random state belongs here.

    `rows`, `tokens` and `supervised_tokens` are what was consumed so far, unpadded, over all processes;
    `seconds` is time spent in steps. `best_step` and `best_loss` are those of the lowest validation loss;
    `stale` counts the validations since. `micro_batch_size` is the one in use, which `auto` found.
    """

    step: int = 0
    rows: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_loss: float | None = None
    stale: int = 0
    micro_batch_size: int | None = None


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
            raise InputError(f"the checkpoint does not hold '{name}' of shape {tuple(parameter.shape)}")
        parameter.copy_(values[name])
