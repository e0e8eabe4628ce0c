"""What a run will cost, before anything is spent: memory by part, and time.

Memory is counted, not guessed: the recipe's model, chains and largest micro-batch run on the meta device,
which computes shapes only, and what autograd would keep for the backward pass is added up. Time is measured
on a few of the model's blocks with random weights on the device that will train, and scaled to all blocks
and to every padded position of the run; with the threads that training would take, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from linchain_cli.chain import ChainConfig
from linchain_cli.data.store import EncodedRows
from linchain_cli.machine import SharedCpus
from linchain_cli.recipe import Recipe
from linchain_cli.training.forecast.memory import MemoryForecast, forecast_memory
from linchain_cli.training.forecast.model import forecast_model, recipe_epoch
from linchain_cli.training.forecast.time import TimeForecast, forecast_time
from linchain_cli.training.schedule import total_steps


@dataclass(frozen=True)
class Forecast:
    """What one process of a run will take. `time` is None where blocks cannot be timed; `notes` say why."""

    device: str
    total_steps: int
    memory: MemoryForecast
    time: TimeForecast | None
    notes: tuple[str, ...] = ()


def forecast(
    recipe: Recipe,
    config: ChainConfig,
    directory: Path,
    train: EncodedRows,
    validation: EncodedRows | None,
    device: torch.device,
    processes: int = 1,
) -> Forecast:
    """Predicts memory and time of a recipe on `device`, of one of `processes`.

    Args:
        config: the recipe's chains.
        directory: the base model's checkpoint directory, of which only the configuration is read.
        train, validation: the encoded rows.
        processes: that train; they share the base where the recipe spreads it. The time is that of one alone.
    """
    notes: list[str] = []
    cpus = SharedCpus(torch.get_num_threads())
    steps = total_steps(recipe.training, len(train))
    model = forecast_model(recipe, config, directory, device)
    memory = forecast_memory(recipe, model, train, device, notes, processes)
    torch.set_num_threads(cpus.look())
    try:
        time = forecast_time(recipe, model, train, validation, steps, device, notes)
    finally:
        torch.set_num_threads(cpus.limit)
    return Forecast(str(device), steps, memory, time, tuple(notes))
