"""What several processes need of each other: to start and fail together, and one sum per optimizer step.

Every process holds the adapters whole and steps its own optimizer on the same summed gradient, so they stay
equal without being sent around.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
)
from torch import Tensor

from linchain_cli.errors import LinchainError

Result = TypeVar("Result")

# How long processes wait for each other. The first one may encode a large data set or write to a slow disk
# meanwhile; a process that has died is noticed by its connection or its launcher, not by this.
PATIENCE = timedelta(hours=6)
# Marks an error that has ended all processes already.
_AGREED = "_linchain_agreed"
# What gloo says when a process at the other end is gone.
_LOST = ("connection closed", "connection reset", "broken pipe", "socket closed")


def connect(trackers: Sequence[str] = (), logging_dir: Path | None = None) -> Accelerator:
    """Joins the processes that the environment describes (see launch.py), or stands alone. CUDA, else CPU.

    Raises:
        LinchainError: the processes do not find each other.
    """
    try:
        return Accelerator(
            # Without it Accelerate overlooks that there are several CPU processes: each would train alone.
            cpu=not torch.cuda.is_available(),
            log_with=list(trackers) or None,
            project_config=ProjectConfiguration(logging_dir=str(logging_dir) if logging_dir else None),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
    except torch.distributed.DistError as error:
        raise LinchainError(f"the processes could not connect: {error}") from error


def disconnect() -> None:
    """Leaves the other processes in good order."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def is_first_process() -> bool:
    """Whether this process is the one that writes and speaks; it need not be connected to the others."""
    return os.environ.get("RANK", "0") == "0"


def together(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """Runs `work` on every process. If it raises on any of them, it ends all of them, and only one speaks.

    The first process that failed raises its error; the others exit quietly with the same code. `work` may
    itself do things together.
    """
    if accelerator.num_processes == 1:
        return work()
    result, error = None, None
    try:
        result = work()
    except Exception as raised:
        if getattr(raised, _AGREED, False):
            raise
        error = raised
    codes = gather_object([_exit_code(error)])
    failed = [rank for rank, code in enumerate(codes) if code]
    if failed and failed[0] == accelerator.process_index:
        setattr(error, _AGREED, True)
        raise error
    if failed:
        raise SystemExit(codes[failed[0]])
    return result


def _exit_code(error: Exception | None) -> int:
    return 0 if error is None else getattr(error, "exit_code", 1)


def on_main(accelerator: Accelerator, work: Callable[[], Result]) -> Result | None:
    """`together`, with work for the first process alone, while the others wait; they get None."""
    return together(accelerator, lambda: work() if accelerator.is_main_process else None)


def raise_on_all(accelerator: Accelerator, error: LinchainError) -> None:
    """Ends all processes with an error that each of them found: the first raises it, the others just exit."""
    if accelerator.is_main_process:
        raise error
    raise SystemExit(error.exit_code)


def from_main(accelerator: Accelerator, value: Any) -> Any:
    """The first process's value, on every process."""
    return broadcast_object_list([value])[0] if accelerator.num_processes > 1 else value


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return any(words in str(error).lower() for words in _LOST)


def sum_over_processes(accelerator: Accelerator, sums: Tensor) -> None:
    """Replaces a tensor by its sum over all processes, in place and in one all-reduce."""
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(sums)
