"""What several processes need of each other: to start and fail together, and one sum per optimizer step.

Every process holds the adapters whole and steps its own optimizer on the same summed gradient, so they stay
equal without being sent around. Gradients go from GPU to GPU over NCCL, all else as objects over gloo.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
)
from torch import Tensor

from linchain_cli.console import is_first_process
from linchain_cli.errors import InputError, LinchainError, Stopped
from linchain_cli.machine import is_out_of_memory
from linchain_cli.training import peers
from linchain_cli.training.launch import launched, standing_alone

Result = TypeVar("Result")

BACKENDS = "cpu:gloo,cuda:nccl"
# How long processes wait for one that does not answer. Before training and after it the first one may encode
# a large data set, or another one may have more to evaluate; from step to step nothing takes long but a
# checkpoint on a slow disk. A process that has died is noticed by its connection or its launcher.
PATIENCE = timedelta(hours=6)
STEP_PATIENCE = timedelta(minutes=15)
# Marks an error that has ended all processes already.
_AGREED = "_linchain_agreed"
# What gloo says when a process at the other end is gone, and when it does not answer.
_LOST = ("connection closed", "connection reset", "broken pipe", "socket closed")
_SILENT = ("timed out", "collective operation timeout")
# What `accelerate launch` sets for configurations under which it would take the model apart itself.
_TAKES_APART = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}


def connect(trackers: Sequence[str] = (), logging_dir: Path | None = None) -> Accelerator:
    """Joins the processes that the environment describes (see launch.py), or stands alone. CUDA, else CPU.

    Raises:
        InputError: the launcher is to take the model apart, which linchain does itself; or its environment is
            not all there.
        LinchainError: the processes do not find each other.
        SystemExit: on other processes than the first, when that one tells the error.
    """
    _refuse_taking_apart()
    try:
        join_group()
        with contextlib.nullcontext() if launched() else standing_alone():
            accelerator = Accelerator(
                # Without it Accelerate overlooks that there are several CPU processes: each trained alone.
                cpu=not torch.cuda.is_available(),
                log_with=list(trackers) or None,
                project_config=ProjectConfiguration(logging_dir=str(logging_dir) if logging_dir else None),
                kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
            )
        peers.introduce(accelerator.process_index, gather_object if accelerator.num_processes > 1 else list)
        return accelerator
    except torch.distributed.DistError as error:
        raise LinchainError(f"the processes could not connect: {error}") from error


def join_group() -> None:
    """On GPUs joins the process group that the environment describes, which Accelerate then finds. It would
    connect by NCCL alone, over which a GPU waits for every word that is exchanged, and at most ten minutes.
    """
    if torch.cuda.is_available() and launched() and not torch.distributed.is_initialized():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.distributed.init_process_group(BACKENDS, timeout=PATIENCE)


def _refuse_taking_apart() -> None:
    """Raises InputError on the first process, and ends the others, where `accelerate launch` has been told to
    spread or wrap the model: the base is never wrapped here."""
    wanted = [name for variable, name in _TAKES_APART.items() if os.environ.get(variable) == "true"]
    if not wanted:
        return
    if not is_first_process():
        raise SystemExit(InputError.exit_code)
    raise InputError(
        f"accelerate launch is configured for {' and '.join(wanted)}, which linchain does not train under: it"
        " spreads a large base over the GPUs itself. Use a configuration without it (accelerate launch"
        " --multi_gpu, torchrun or linchain train --nproc) and set training.parallel to shard"
    )


@contextlib.contextmanager
def answering_soon() -> Iterator[None]:
    """In the block, a process that does not answer for `STEP_PATIENCE` ends those that wait for it."""
    from torch.distributed import distributed_c10d

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        yield
        return
    distributed_c10d._set_pg_timeout(STEP_PATIENCE)
    try:
        yield
    finally:
        if torch.distributed.is_initialized():
            distributed_c10d._set_pg_timeout(PATIENCE)


def disconnect() -> None:
    """Leaves the other processes in good order."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def together(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """Runs `work` on every process. If it raises on any of them, it ends all of them, and only one speaks.

    The first process that failed raises its error; the others exit quietly with the same code. `work` may
    itself do things together.
    """
    if accelerator.num_processes == 1:
        return work()
    result, error = None, None
    try:
        with told_when_lost():
            result = work()
    except Stopped:  # by a signal, on the spot: the others may be long at it, or have been stopped as well
        raise
    except Exception as raised:
        if getattr(raised, _AGREED, False):
            raise
        error = raised
    try:
        with told_when_lost():
            codes = gather_object([_exit_code(error)])
    except Exception:
        if error is not None:  # and another has ended meanwhile
            raise error from None
        raise
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


def from_main(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """What `work` gives on the first process, on every process; a small value, which is sent."""
    value = on_main(accelerator, work)
    if accelerator.num_processes == 1:
        return value
    with told_when_lost():
        return broadcast_object_list([value])[0]


def lost_connection(error: RuntimeError) -> str | None:
    """What a collective's error means if another process is gone or does not answer, or NCCL fails itself;
    None of any other error, and where NCCL has found no memory."""
    if is_out_of_memory(error):
        return None
    text = str(error).strip()
    silent, lost = (any(words in text.lower() for words in known) for known in (_SILENT, _LOST))
    if not (silent or lost or isinstance(error, torch.distributed.DistError)):
        return None
    names = ", ".join(peers.gone())
    if silent and not names:
        minutes = STEP_PATIENCE.total_seconds() / 60
        return f"another process of this run has not answered for {minutes:g} minutes"
    if not (silent or lost or names):  # NCCL's own trouble, as two processes on one GPU are
        *_, reason = (text or type(error).__name__).splitlines()
        return f"the processes cannot exchange what they have computed: {reason}"
    ended = "another process of this run ended while this one waited for it"
    return f"{ended}: {names}" if names else ended


@contextlib.contextmanager
def told_when_lost() -> Iterator[None]:
    """Makes a collective's error, where another process is gone, a LinchainError that says so."""
    try:
        yield
    except RuntimeError as error:
        if launched() and (told := lost_connection(error)):
            raise LinchainError(told) from error
        raise


def sum_over_processes(accelerator: Accelerator, sums: Tensor) -> None:
    """Replaces a tensor by its sum over all processes, in place and in one all-reduce."""
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(sums)
