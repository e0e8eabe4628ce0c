"""What decides a run's result, apart from its state: a checkpoint is continued only where all of it is the
same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from linchain_cli.errors import InputError
from linchain_cli.recipe import Recipe, within

# A recipe's keys that may differ between a checkpoint and the run that continues it: names, lengths,
# intervals. Which model and data it is shows in their hashes, wherever they lie.
FREE_KEYS = (
    *("name", "output_dir", "model.path", "model.revision", "model.dtype"),
    *("data.train", "data.split", "data.revision", "data.columns", "data.labels", "data.on_long_row"),
    "data.validation",
    *("training.epochs", "training.max_steps", "training.early_stopping"),
    *("training.log_every", "training.eval_every", "training.save_every"),
    *(
        "training.keep_checkpoints",
        "training.trackers",
        "training.parallel",
        "training.offload_base",
        "evaluation",
    ),
)

# What may be changed on the way to make a run fit or go faster, because it changes no more than the order of
# sums: what is said of it. Recomputing activations gives the same bits.
MICRO_BATCH = "training.micro_batch_size"
_EXECUTION = {
    MICRO_BATCH: "sums are formed in another order, so the end may differ in its last bits",
    "training.gradient_checkpointing": "the result stays the same",
    "training.offload_activations": "the result stays the same",
    "training.compile": "compiled blocks round otherwise, so the end may differ in its last bits",
}

_MEANING = {
    "data": "the rows' files, or how they become tokens, are others",
    "validation": "the validation rows are others, so the best adapter could not be told",
    "base": "the base model's weights are others",
    "dtype": "the base would compute in another number format",
    "device": "sums are formed in another order there, so the end would not be bit for bit the same",
    "threads": "sums would be formed in another order, so the end would not be bit for bit the same",
    "world_size": "rows would be shared out otherwise",
    "sharded": "products would be formed on other devices",
}


def fingerprints(recipe: Recipe, held_out: int | None, **others: Any) -> dict[str, Any]:
    """What a checkpoint stores beside its state: the recipe's values and the `others`, those of _MEANING.

    Args:
        held_out: validation rows that were taken from the training rows; None if they have a file, of whose
            rows the hash is among the others.
    """
    assert others.keys() == _MEANING.keys()
    values = {key: value for key, value in recipe.flat().items() if not within(key, FREE_KEYS)}
    values[MICRO_BATCH] = recipe.training.rows_at_once(others["device"]) or "auto"
    if held_out is not None:
        values["data.validation"] = held_out
    return {"recipe": values, **others}


def compare(
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    checkpoint: Path,
    places: Mapping[str, str],
    config: Sequence[str] = (),
) -> list[str]:
    """Compares the fingerprints of a checkpoint with those of the run that wants to continue it.

    Args:
        places: where what the current fingerprints are of was found.
        config: what the base's config.json says otherwise than it did.

    Returns:
        What is to be said of the differences that leave the result as it is but for its last bits.

    Raises:
        InputError: something that decides the result differs; every difference is listed with its meaning.
    """
    lines, notes, restore = [], [], []
    # A key that the version of the checkpoint did not know had what is its default now.
    known = Recipe(name="r", model={"path": "m"}, data={"train": "d"}).flat()
    for key in sorted(saved["recipe"].keys() | current["recipe"].keys()):
        before, after = saved["recipe"].get(key, known.get(key)), current["recipe"].get(key)
        if before == after:
            continue
        if key in _EXECUTION:
            notes.append(f"{key} is {_written(after)} now (was {_written(before)}): {_EXECUTION[key]}")
            continue
        lines.append(f"  {key}: {before!r} in the checkpoint, {after!r} now")
        restore.append(f"{key}={_written(before)}")
    for key, meaning in _MEANING.items():
        if saved.get(key) != current.get(key):
            before, after = (str(value)[:16] for value in (saved.get(key), current.get(key)))
            place = f" ({places[key]})" if key in places else ""
            lines.append(f"  {key}: {before} in the checkpoint, {after} now{place}: {meaning}")
            if key == "world_size":
                restore.append(f"--nproc {saved[key]}")
            if key == "threads" and saved.get(key):
                restore.append(f"OMP_NUM_THREADS={saved[key]} in the environment")
    lines += [f"  {places.get('base', 'base')}/config.json: {change}" for change in config]
    if lines:
        how = f" ({' '.join(restore)})" if restore else ""
        raise InputError(
            "this run cannot be resumed as it is:\n"
            + "\n".join(lines)
            + f"\nRestore what differs{how}, or start over with --fresh. A run of another name can begin with"
            f" these values, its optimizer and schedule anew: name=NEW adapter.init_from={checkpoint}"
        )
    return notes


def _written(value: Any) -> str:
    """A recipe's value as it stands on the command line."""
    return value if isinstance(value, str) else json.dumps(value)
