"""An arm of a training benchmark: a process of its own, which trains when it is its turn."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

# An interpreter of its own for each process. With `forkserver` they start at once, all imports done.
FRESH = multiprocessing.get_context("spawn")


class ArmFailed(SystemExit):
    """An arm ended before its time, with what it printed last. Where nobody minds, the benchmark ends too."""


class Arm:
    """A worker process and what it measured.

    Args:
        environment: variables of the worker, set before it imports anything that is not imported yet.
        context: how its process starts.
    """

    def __init__(
        self,
        name: str,
        settings: dict,
        scratch: Path,
        environment: dict[str, str] | None = None,
        context: BaseContext = FRESH,
    ):
        settings = settings | {"scratch": str(scratch / name)}
        environment = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"} | (environment or {})
        if settings["device"] == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        self.name, self.rounds = name, []
        self._log = scratch / f"{name}.log"
        self._log.touch()  # a process may be ended before it comes to that
        self._connection, theirs = context.Pipe()
        self.process = context.Process(
            target=in_process, args=(run_arm, (name, settings), environment, str(self._log), theirs)
        )
        self.process.start()
        theirs.close()
        self._lines = os.fdopen(os.dup(self._connection.fileno()), "r")

    def receive(self) -> dict:
        """The worker's next JSON line; other lines are library talk.

        Raises:
            ArmFailed: it has ended.
        """
        while line := self._lines.readline():
            if line.startswith("{"):
                return json.loads(line)
        self.process.join()
        raise ArmFailed(f"the {self.name} arm ended early:\n{self._log.read_text(errors='replace')[-3000:]}")

    def round(self) -> None:
        """Runs a round and keeps what it measured."""
        os.write(self._connection.fileno(), b"go\n")
        self.rounds.append(self.receive())

    def result(self) -> dict:
        """Speeds, memory and losses over the rounds."""
        # The first round warms up (allocator, compilation); it counts for the losses alone.
        timed = self.rounds[1:]
        speeds = [entry["tokens"] / entry["seconds"] for entry in timed]
        losses = [loss for entry in self.rounds for loss in entry["losses"]][:10]
        return {
            "tokens_per_second": statistics.median(speeds),
            "lowest": min(speeds),
            "highest": max(speeds),
            "peak_memory_mb": max(entry["peak_mb"] for entry in timed),
            "first_losses": [None if math.isnan(loss) else loss for loss in losses],
        }

    def close(self) -> None:
        """Lets the process end."""
        self._lines.close()
        self._connection.close()
        self.process.join()


def in_process(
    work: Callable[..., Any],
    arguments: tuple,
    environment: dict[str, str],
    log: str,
    connection: Connection | None = None,
) -> None:
    """What a process started by `multiprocessing` runs: `work(*arguments)`, what it prints in the file `log`,
    or on the other end of `connection`, from where its standard input comes, with errors in `log` alone."""
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if connection is not None:
        os.dup2(connection.fileno(), 0)
        os.dup2(connection.fileno(), 1)
        connection.close()
        sys.stdin = open(0, closefd=False)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    work(*arguments)


def run_arm(name: str, settings: dict) -> None:
    """Serves the arm of this name to the end of its standard input."""
    from scripts.bench.arms import ARMS

    ARMS[name](settings)
