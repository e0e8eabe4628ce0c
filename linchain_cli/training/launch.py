"""Several processes on this machine, started by `linchain train` itself.

Each child is the same command with the environment variables that torch.distributed reads. The parent passes
signals on and waits: children finish their optimizer step and save, and the parent exits as they did. Under
torchrun or `accelerate launch` those variables are there already and nothing is started here.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from linchain_cli.errors import InputError
from linchain_cli.machine import cpu_limit
from linchain_cli.stopping import caught

COMMAND = [sys.executable, "-m", "linchain_cli"]
POLL_SECONDS = 0.1
# After one process has failed, the others may wait for it in a collective. They get this long to end.
GRACE_SECONDS = 15.0
PARENT = "LINCHAIN_LAUNCHER_PID"
_PR_SET_PDEATHSIG = 1
_LAUNCHERS = "torchrun, `linchain train --nproc` and scripts/slurm_train.sh"
_OF_MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_LEFT_BEHIND = ("LOCAL_RANK", "WORLD_SIZE")


def launched() -> bool:
    """Whether a launcher (torchrun, accelerate launch, this module) started this process among others.

    Raises:
        InputError: what it has set is no number or not all there; or MPI or srun started several processes,
            which then do not know how to find each other.
    """
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        for variable in _OF_MPI:
            if (size := os.environ.get(variable, "1")) != "1":
                raise InputError(
                    f"{variable}={size}: MPI or srun started several processes, which linchain does not join."
                    f" {_LAUNCHERS} start them; for one process alone unset {variable}"
                )
        return False
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        if not os.environ.get(variable, "0").isdecimal():
            raise InputError(f"{variable}={os.environ[variable]!r}, which a launcher sets, is no number")
    missing = [variable for variable in ("MASTER_ADDR", "MASTER_PORT") if variable not in os.environ]
    if missing and os.environ["WORLD_SIZE"] == "1":
        return False
    if missing:
        raise InputError(
            f"RANK and WORLD_SIZE={os.environ['WORLD_SIZE']} say that a launcher started several processes,"
            f" but {' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not set. {_LAUNCHERS} set"
            " them all; for one process alone unset RANK and WORLD_SIZE"
        )
    return True


def world_size() -> int:
    """How many processes a launcher started, this one among them; 1 without one."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


@contextlib.contextmanager
def standing_alone() -> Iterator[None]:
    """Hides what clusters set without a launcher, and Accelerate takes for one."""
    found = {name: os.environ.pop(name) for name in _LEFT_BEHIND if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(found)


def wanted_processes(nproc: int | None) -> int:
    """How many processes `linchain train` runs on: `nproc`, else one per visible GPU, else one.

    Raises:
        InputError: `nproc` are more than there are GPUs.
    """
    import torch

    # torch counts the cards also where their driver is too old for it, and then computes on the CPU.
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if nproc is not None and gpus and nproc > gpus:
        raise InputError(
            f"--nproc {nproc}: each process needs a GPU, and {gpus} {'are' if gpus > 1 else 'is'} visible."
            " Set CUDA_VISIBLE_DEVICES= (to nothing) to train on the CPU."
        )
    return nproc or max(1, gpus)


def run_processes(
    arguments: Sequence[str], nproc: int, on_failure: Callable[[str], None] = lambda reason: None
) -> int:
    """Runs `linchain ARGUMENTS` as `nproc` processes and returns the exit code they agree on.

    The first process that fails decides the code; 130, 143 or 129 when a signal stopped them.

    Args:
        on_failure: is told which process failed first, and how, once all have ended.
    """
    environment = os.environ | {
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        PARENT: str(os.getpid()),
    }
    if "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = str(max(1, cpu_limit() // nproc))
    command = [*COMMAND, *arguments]
    children = [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            # A terminal's Ctrl-C would reach every child by itself and once more through the parent.
            start_new_session=True,
        )
        for rank in range(nproc)
    ]

    def pass_on(signum: int, _frame: FrameType | None) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(signum)

    try:
        with caught(pass_on):
            first = _wait(children)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()
    if first is None:
        return 0
    rank, code = first
    if code == -signal.SIGKILL:
        print(
            f"error: process {rank} was killed from outside (when memory runs out, the kernel does so)",
            file=sys.stderr,
        )
    on_failure(f"process {rank} {_ended(code)}")
    return 128 - code if code < 0 else code


def _ended(code: int) -> str:
    """How a process ended, from its exit code as subprocess has it."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def end_with_launcher() -> None:
    """Asks the kernel for SIGTERM when the `run_processes` that started this process dies in any way."""
    parent = os.environ.get(PARENT)
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it died before the kernel was asked
        os.kill(os.getpid(), signal.SIGTERM)


def _wait(children: list[subprocess.Popen]) -> tuple[int, int] | None:
    """The rank and the exit code of the process that failed first; None if none did."""
    failed, deadline = None, None
    while None in (codes := [child.poll() for child in children]):
        if deadline is None and any(codes):
            failed, deadline = _first_failure(codes), time.monotonic() + GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS)
    return failed or _first_failure(codes)


def _first_failure(codes: list[int | None]) -> tuple[int, int] | None:
    return next(((rank, code) for rank, code in enumerate(codes) if code), None)


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
