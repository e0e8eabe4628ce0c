"""The run directory: where everything of one training run lives, its status, and the lock that keeps it to
one process.

recipe.yaml  run.json  metrics.jsonl  rows.jsonl  loss.png  checkpoints/  adapter/  eval/  merged/
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from linchain_cli import storage
from linchain_cli.errors import InputError, InUse, did_you_mean

Status = Literal["running", "stopped", "failed", "finished"]


def now() -> str:
    """The present moment in UTC, ISO 8601 to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


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
        self.merged_dir = self.path / "merged"

    def exists(self) -> bool:
        """Whether this is a run's directory (and not just any directory of that name)."""
        return self.status_path.is_file()

    def read_status(self) -> dict[str, Any]:
        """run.json.

        Raises:
            InputError: there is none, or it is damaged.
        """
        try:
            status = json.loads(self.status_path.read_bytes())
        except FileNotFoundError:
            raise InputError(f"{self.path} is not a run directory: it has no run.json") from None
        except (OSError, ValueError) as error:
            raise InputError(f"{self.status_path} cannot be read: {error}") from error
        if not isinstance(status, dict) or "status" not in status:
            raise InputError(f"{self.status_path} is damaged: it names no status")
        return status

    def update_status(self, **fields: Any) -> None:
        """Writes `fields` over those of run.json, as one step."""
        status = self.read_status() if self.exists() else {}
        storage.write_json(self.status_path, {**status, **fields})

    def check_free(self, *, replace: bool = False) -> None:
        """Raises InputError when a run may not be written here: one exists (and is not to be replaced), or a
        directory that is no run, which is never touched."""
        if not self.path.exists():
            return
        if self.exists():
            if not replace:
                raise InputError(self._exists_message())
        elif not self.path.is_dir() or any(self.path.iterdir()):
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
        self.check_free(replace=replace)
        storage.remove_staging(self.path.parent, self.path.name)
        status = {"name": self.path.name, "status": "running", "created_at": now()}
        with storage.staged_directory(self.path, overwrite=True) as staging:
            storage.write_durable(staging / self.recipe_path.name, recipe_yaml.encode())
            storage.write_durable(staging / self.status_path.name, storage.json_bytes(status))

    def _exists_message(self) -> str:
        status = self.read_status()["status"]
        if status == "finished":
            return f"{self.path} holds a finished run. Use --fresh to replace it, or another name (name=NEW)."
        if status == "running" and in_use(self.path):
            return _in_use_message(self.path)
        ended = {"running": "was killed", "stopped": "was stopped"}.get(status, status)
        return f"{self.path} holds a run that {ended}. Use --resume to continue it or --fresh to start over."

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps every other process out of this run; the kernel releases it however this one ends.

        The lock file lies beside the directory, so that it outlives a replaced one.

        Raises:
            InUse: another process holds it.
        """
        with locked(self.path):
            yield


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

    def exists(self) -> bool:
        """Whether this is a comparison's directory."""
        return self.definition_path.is_file()


@contextlib.contextmanager
def locked(path: Path, wait: float = 0.0) -> Iterator[None]:
    """Keeps every other linchain process out of the directory `path`, by a lock file beside it.

    Raises:
        InUse: another process holds it, and still does after `wait` seconds.
        InputError: nothing can be written there.
    """
    try:
        storage.make_directory(path.parent)
        lock = open(_lock_path(path), "a")
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise InputError(
            f"{path.parent} cannot be written to ({error.strerror}); choose another output_dir"
        ) from error
    with lock as handle:
        give_up = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= give_up:
                    raise InUse(_in_use_message(path)) from None
                time.sleep(0.05)
        yield


def in_use(path: Path) -> bool:
    """Whether a process holds the lock of `path` now."""
    try:
        with open(_lock_path(path)) as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _lock_path(path: Path) -> Path:
    return path.parent / f".{path.name}.lock"


def _in_use_message(path: Path) -> str:
    return f"{path} is in use by another linchain process; wait for it or stop it"


def is_run(path: Path | str) -> bool:
    """Whether `path` is a run directory."""
    return RunDirectory(path).exists()


def newest_finished_run(root: Path | str = "runs") -> RunDirectory:
    """The run below `root` that finished last; arms of a comparison do not count.

    Raises:
        InputError: there is none.
    """
    root = Path(root)
    candidates = []
    for path in root.iterdir() if root.is_dir() else ():
        run = RunDirectory(path)
        with contextlib.suppress(InputError):
            status = run.read_status()
            if status["status"] == "finished" and not status.get("comparison"):
                candidates.append((status.get("finished_at", ""), path.name, run))
    if not candidates:
        raise InputError(
            f"no finished run below {root}/: name a run directory, or train one with 'linchain train RECIPE'"
        )
    return max(candidates)[2]


def find_run(path: Path | str | None, *, finished: bool = True) -> RunDirectory:
    """The run at `path`, or the newest finished one when `path` is None.

    Raises:
        InputError: there is none there, or (with `finished`) it has not finished.
    """
    if path is None:
        return newest_finished_run()
    run = RunDirectory(path)
    if not run.exists():
        if (comparison := ComparisonDirectory(path)).exists():
            raise InputError(
                f"{path} is a comparison: name one of its runs, which lie in {comparison.arms_dir}/"
            )
        parent = run.path.parent
        names = [entry.name for entry in parent.iterdir() if is_run(entry)] if parent.is_dir() else []
        raise InputError(
            f"{path} is not a run directory: it has no run.json." + did_you_mean(run.path.name, names)
        )
    status = run.read_status()["status"]
    if finished and status != "finished":
        raise InputError(
            f"{path} is {status}, not finished: continue it with 'linchain train RECIPE --resume'"
        )
    return run


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, up to the first line that a killed process or a lost disk block left
    damaged.
    """
    if not path.is_file():
        return []
    rows = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            row = None
        if not isinstance(row, dict):
            break
        rows.append(row)
    return rows


def jsonl_bytes(rows: list[dict[str, Any]]) -> bytes:
    """Rows as `append_jsonl` writes them."""
    return b"".join(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n" for row in rows)


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Adds one row at the end of a JSON-lines file."""
    storage.append(path, jsonl_bytes([row]))


def cut_jsonl(path: Path, last_step: int) -> None:
    """Drops the rows of steps after `last_step`, and what is damaged."""
    if path.is_file():
        storage.write_atomic(
            path, jsonl_bytes([row for row in read_jsonl(path) if row.get("step", 0) <= last_step])
        )
