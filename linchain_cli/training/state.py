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

    `tokens` and `supervised_tokens` are unpadded counts so far, over all processes; `seconds` is time spent in steps.
    `best_step` and `best_loss` are those of the lowest validation loss; `stale` counts validations since it.
    """

    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_loss: float | None = None
    stale: int = 0


def state_bytes(state: TrainingState, fingerprints: Mapping[str, Any]) -> bytes:
    """state.json of a checkpoint."""
    return storage.json_bytes({"state": asdict(state), "fingerprints": fingerprints})


def read_state(data: bytes) -> tuple[TrainingState, dict[str, Any]]:
    """What `state_bytes` wrote. Raises InputError when another version of linchain wrote other fields."""
    content = json.loads(data)
    try:
        return TrainingState(**content["state"]), content["fingerprints"]
    except (KeyError, TypeError) as error:
        raise InputError(f"the checkpoint's {STATE_FILE} is of another linchain version ({error})") from error


# A recipe's keys that may differ between a checkpoint and the run that continues it.
FREE_KEYS = (
    "name", "output_dir", "model.path", "model.revision", "data.train", "data.split", "data.revision", "data.columns",
    "data.validation", "training.epochs", "training.max_steps", "training.log_every", "training.eval_every",
    "training.save_every", "training.keep_checkpoints", "training.keep", "training.early_stopping", "training.trackers",
    "evaluation",
)  # fmt: skip
_MEANING = {
    "data": "the rows, their tokens or their order would be others",
    "base": "the base model's weights are others",
    "threads": "sums would be formed in another order, so the end would not be bit for bit the same",
    "world_size": "rows would be shared out otherwise",
}


def flat_recipe(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A recipe's values by dotted key, without `FREE_KEYS` (data and base are covered by fingerprints of their own)."""
    values = {}
    for key, value in recipe.items():
        dotted = prefix + key
        if dotted in FREE_KEYS:
            continue
        if isinstance(value, dict):
            values.update(flat_recipe(value, dotted + "."))
        else:
            values[dotted] = value
    return values


def refuse_differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Compares the fingerprints of a checkpoint with those of the run that wants to continue it.

    Raises:
        InputError: something that decides the result differs; every difference is listed with its meaning.
    """
    lines = []
    for key in sorted(saved["recipe"].keys() | current["recipe"].keys()):
        before, after = saved["recipe"].get(key), current["recipe"].get(key)
        if before != after:
            lines.append(f"  recipe {key}: {before!r} in the checkpoint, {after!r} now")
    for key, meaning in _MEANING.items():
        if saved.get(key) != current.get(key):
            before, after = (str(value)[:16] for value in (saved.get(key), current.get(key)))
            lines.append(f"  {key}: {before} in the checkpoint, {after} now: {meaning}")
    if lines:
        raise InputError(
            "this run cannot be resumed as it is:\n" + "\n".join(lines) + "\nRestore what differs, or start over with --fresh."
        )


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
