"""Experiment trackers, started through Accelerate by their names. metrics.jsonl is written with or without
them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from linchain_cli.errors import InputError
from linchain_cli.recipe import Recipe
from linchain_cli.training.job import Job


def check_trackers(recipe: Recipe) -> None:
    """Raises InputError when a tracker's package is missing; Accelerate would leave it out without a word."""
    if not recipe.training.trackers:
        return
    from accelerate.tracking import get_available_trackers

    available = {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}
    missing = [name for name in recipe.training.trackers if name not in available]
    if missing:
        raise InputError(
            f"training.trackers: {', '.join(missing)} cannot be used: its Python package is not installed"
            f" (pip install {missing[0].replace('_', '-')})."
        )


@contextlib.contextmanager
def tracking(job: Job) -> Iterator[None]:
    """In the block the recipe's trackers get what is recorded. They begin with the recipe as their
    configuration, and nothing of the environment but the name of wandb's project ($WANDB_PROJECT); they end
    with the block, or the next run of this process (a comparison's next arm) would be the same one to them.
    """
    if not job.recipe.training.trackers:
        yield
        return
    options = {
        "wandb": {"name": job.recipe.name, "dir": str(job.run.path)},
        # What a killed run had logged after the checkpoint is logged again.
        "tensorboard": {"purge_step": job.state.step + 1} if job.state.step else {},
    }
    # Trackers take numbers and text only.
    config = {
        key: value if isinstance(value, (str, int, float, bool)) else str(value)
        for key, value in job.recipe.flat().items()
    }
    project = os.environ.get("WANDB_PROJECT") if "wandb" in job.recipe.training.trackers else None
    job.accelerator.init_trackers(project or "linchain", config=config, init_kwargs=options)
    try:
        yield
    finally:
        # Accelerate's own `end_training` would leave the other processes as well.
        for tracker in job.accelerator.trackers:
            tracker.finish()
