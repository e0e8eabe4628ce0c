"""Experiment trackers, started through Accelerate by their names. metrics.jsonl is written with or without
them.
"""

from __future__ import annotations

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


def start_trackers(job: Job) -> None:
    """Starts the recipe's trackers with the recipe as their configuration. Nothing of the environment is
    passed on.
    """
    if not job.recipe.training.trackers:
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
    job.accelerator.init_trackers("linchain", config=config, init_kwargs=options)
