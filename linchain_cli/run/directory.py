"""The run directory: where everything of one training run lives, and the lock that keeps it to one process.

recipe.yaml  run.json  metrics.jsonl  rows.jsonl  loss.png  checkpoints/  adapter/  eval/  merged/
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from linchain_cli import directories, locks, storage
from linchain_cli.errors import InputError, LinchainError, some
from linchain_cli.locks import in_use, in_use_message
from linchain_cli.records import read_record, record_bytes, update_record
from linchain_cli.run.status import RunStatus, now

# What lies in a run's directory, and what commands add for one of its checkpoints.
_PARTS = re.compile(
    r"(recipe\.yaml|(run|import|halves|linchain_prompt)\.json|(metrics|rows)\.jsonl|loss\.png|report\.html"
    r"|adapter|checkpoints|trackers|(eval|merged|peft|gguf|inspect)(-step-\d+)?(\.json|\.png)?)"
)


class RunDirectory:
    """Paths and state of one run. Creating the object touches nothing on disk."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.recipe_path = self.path / "recipe.yaml"
        self.status_path = self.path / "run.json"
        self.metrics_path = self.path / "metrics.jsonl"
        self.rows_path = self.path / "rows.jsonl"
        self.loss_plot_path = self.path / "loss.png"
        self.checkpoints_dir = self.path / "checkpoints"
        self.adapter_dir = self.path / "adapter"
        self.eval_dir = self.path / "eval"
        self._watched: int | None = None

    def exists(self) -> bool:
        """Whether this is a run's directory (and not just any directory of that name)."""
        return self.status_path.is_file()

    def read_status(self) -> RunStatus:
        """run.json.

        Raises:
            InputError: there is none, or it is damaged or of a later version.
        """
        if not self.exists():
            raise InputError(f"{self.path} is not a run directory: it has no run.json")
        return read_record(self.status_path, RunStatus)

    def update_status(self, **changes: Any) -> None:
        """Writes `changes`, which are fields of RunStatus, over those of run.json, as one step."""
        update_record(self.status_path, RunStatus, changes)

    def end_as_failed(self, reason: str) -> None:
        """Marks a run that nobody is at any more as failed, if it still says that it is running."""
        with contextlib.suppress(InputError, OSError):
            if not self.exists():
                return
            with self.lock():
                if self.read_status().status == "running":
                    self.update_status(status="failed", reason=reason)

    def check_free(self, *, replace: bool = False) -> None:
        """Raises InputError when a run may not be written here: one exists (and is not to be replaced, or has
        files of the user's in it), or a directory that is no run, which is never touched."""
        if not self.path.exists():
            return
        if self.exists():
            if not replace:
                raise InputError(self._exists_message())
            refuse_foreign(self.path, _PARTS)
        elif ComparisonDirectory(self.path).exists():
            raise InputError(
                f"{self.path} holds a comparison, not a run: give the run another name (name=NEW)"
            )
        elif not self.path.is_dir() or not directories.is_empty(self.path):
            raise InputError(
                f"{self.path} exists and is not a run directory; it is left alone."
                " Choose another name or output_dir in the recipe."
            )

    def create(self, recipe_yaml: str, *, replace: bool = False) -> None:
        """Makes the directory with recipe.yaml and run.json in it, as one step; with `replace`, in an
        existing run's place.

        Call it with the lock held: what a killed process left beside the directory is removed.

        Raises:
            InputError: as `check_free`.
        """
        storage.remove_staging(self.path.parent, self.path.name)
        self.check_free(replace=replace)  # also of what has just been put back
        status = RunStatus(name=self.path.name, status="running", created_at=now())
        with directories.staged_directory(self.path, overwrite=True) as staging:
            storage.write_durable(staging / self.recipe_path.name, recipe_yaml.encode())
            storage.write_durable(staging / self.status_path.name, record_bytes(status))

    def _exists_message(self) -> str:
        status = self.read_status()
        if status.finished:
            return f"{self.path} holds a finished run. Use --fresh to replace it, or another name (name=NEW)."
        if status.status == "running" and in_use(self.path):
            return in_use_message(self.path)
        return (
            f"{self.path} holds a run that {status.ended}. Use --resume to continue it or --fresh to start"
            " over."
        )

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Within it `check_there` knows the directory, also from one that comes into its place."""
        self._watched = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield
        finally:
            os.close(self._watched)
            self._watched = None

    def check_there(self) -> None:
        """Raises LinchainError where the directory that is `watched` was removed or moved since. What is
        written to its path would be lost, or go into another run."""
        if self._watched is None or self._is_there(self._watched):
            return
        with contextlib.suppress(OSError):
            # Linux says where an open directory lies by now.
            now = Path(os.readlink(f"/proc/self/fd/{self._watched}"))
            if locks.is_at(self._watched, now):
                raise LinchainError(
                    f"{self.path} was moved to {now} while the run was going on, which ends here. Its"
                    " checkpoints are there: move it back, and continue it with --resume"
                )
        raise LinchainError(
            f"{self.path} was removed while the run was going on, and its checkpoints with it: the run ends"
            " here"
        )

    def _is_there(self, descriptor: int) -> bool:
        try:
            status = os.stat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:  # a share that does not answer: who writes there will learn why
            return True
        with contextlib.suppress(OSError):  # of one that another machine has removed from a share
            if os.path.samestat(os.fstat(descriptor), status):
                return True
            # Some shares give a directory another number now and then. What it holds stays the same.
            held = os.open(self.status_path.name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=descriptor)
            with open(held, "rb") as handle:
                return handle.read() == self.status_path.read_bytes()
        return False

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps every other process out of this run; the kernel releases it however this one ends.

        The lock file lies beside the directory, so that it outlives a replaced one.

        Raises:
            InUse: another process holds it.
        """
        with locked(self.path):
            yield


# Of locks, and of file systems: nobody misses them.
_NOBODYS = re.compile(r"\..+\.lock|\.DS_Store|\.nfs.+")


def refuse_foreign(path: Path, parts: re.Pattern[str]) -> None:
    """Raises InputError where a directory that is to be replaced holds anything but `parts`, which linchain
    knows by their names for its own."""
    names = sorted(entry.name for entry in directories.entries(path))
    others = [name for name in names if not (parts.fullmatch(name) or _NOBODYS.fullmatch(name))]
    if others:
        raise InputError(
            f"{path} is left as it is: it also holds {some(others)}, which linchain did not write. Move that"
            " away before the rest is replaced."
        )


class ComparisonDirectory:
    """Paths of one comparison; its arms are run directories below arms/. Creating the object touches nothing
    on disk.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.definition_path = self.path / "comparison.json"
        self.results_path = self.path / "results.json"
        self.table_path = self.path / "results.csv"
        self.runs_table_path = self.path / "runs.csv"
        self.plot_path = self.path / "loss.png"
        self.arms_dir = self.path / "arms"
        self.base_dir = self.path / "base"

    def exists(self) -> bool:
        """Whether this is a comparison's directory."""
        return self.definition_path.is_file()


@contextlib.contextmanager
def locked(path: Path, wait: float = 0.0) -> Iterator[None]:
    """`locks.locked` for a directory of runs, which is made first where it is missing.

    Raises:
        InUse: another process holds it, and still does after `wait` seconds.
        InputError: nothing can be written there.
    """
    place = locks.lock_path(path).parent
    with contextlib.ExitStack() as held:
        try:
            storage.make_directory(place)
            held.enter_context(locks.locked(path, wait))
        except OSError as error:
            raise InputError(
                f"{place} cannot be written to ({error.strerror or error}); choose another output_dir"
            ) from error
        yield


def is_run(path: Path | str) -> bool:
    """Whether `path` is a run directory."""
    return RunDirectory(path).exists()
