"""What evaluations of all kinds begin and end with, the same on every process: tasks that were measured
before are not measured again, and the first process writes what is new."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from linchain_cli.errors import InputError, LinchainError
from linchain_cli.evaluation.results import Results
from linchain_cli.evaluation.store import ResultStore, results_directory
from linchain_cli.result_files import Evaluation

T = TypeVar("T")


class Measuring:
    """Tasks, by name and fingerprint, that are to be measured in one setting.

    Args:
        out: where their results go, a directory or a .json file.

    Raises:
        InputError: nothing can be written at `out`.
        LinchainError: the processes would measure different things. Of either the first process alone tells;
            the others end.
    """

    def __init__(self, setting: Evaluation, fingerprints: Mapping[str, str], out: Path | None):
        self.rank, self.world = processes()
        self._fingerprints, self._out = fingerprints, out
        self._store: ResultStore | None = None
        if any(other != fingerprints for other in gather([fingerprints], self.world)):
            self._refuse(
                LinchainError("the processes do not hold the same adapter, rows and settings to evaluate")
            )
        # The first one decides what all do next: another's disk may not hold it, or not yet.
        found = [self._look(setting) if self.rank == 0 else None]
        if self.world > 1:
            torch.distributed.broadcast_object_list(found)
        if isinstance(found[0], LinchainError):
            self._refuse(found[0])
        self._earlier: Results | None = found[0]

    def _look(self, setting: Evaluation) -> Results | LinchainError | None:
        if self._out is None:
            return None
        try:
            self._store = ResultStore(self._out, setting)
            return self._store.measured(self._fingerprints)
        except LinchainError as error:
            return error

    def _refuse(self, error: LinchainError) -> None:
        if self.rank == 0:
            raise error
        raise SystemExit(error.exit_code)

    def knows(self, *names: str) -> bool:
        """Whether these tasks were measured before."""
        return self._earlier is not None and self._earlier.summary.tasks.keys() >= set(names)

    @property
    def directory(self) -> Path | None:
        """Where finished rows may lie meanwhile; None where there is no place."""
        try:
            return self._out and results_directory(self._out)
        except InputError:  # of another machine than the first process's
            return None

    def results(self, new: Results | None = None) -> Results:
        """All the tasks' results: what was measured before, and what is new, which is written."""
        earlier = self._earlier
        if new is None:
            found, path = earlier, earlier.path
        else:
            found = new.with_tasks_of(earlier) if earlier else new
            path = self._store.add(new).path if self._store else earlier.path if earlier else None
        known = tuple(earlier.summary.tasks) if earlier else ()
        return replace(found.of_tasks(self._fingerprints), path=path, known=known)


def processes() -> tuple[int, int]:
    """This process's number and how many there are."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def gather(own: list[T], world: int) -> list[T]:
    """What all processes have, such as rows, on each of them."""
    if world == 1:
        return own
    parts: list[Any] = [None] * world
    torch.distributed.all_gather_object(parts, own)
    return [one for part in parts for one in part]
