"""The run directory: where everything of one training run lives, its status, and the lock that keeps it to one process.

    recipe.yaml  run.json  metrics.jsonl  rows.jsonl  loss.png  checkpoints/  adapter/  eval/  merged/
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from linchain_cli import storage
from linchain_cli.errors import InputError, did_you_mean

Status = Literal["running", "stopped", "failed", "finished"]


def now() -> str:
    """The present moment in UTC, ISO 8601 to the millisecond."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


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
        """Raises InputError when a run may not be written here: one exists (and is not to be replaced), or a directory
        that is no run, which is never touched."""
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
        """Makes the directory with recipe.yaml and run.json in it; with `replace`, an existing run is removed first.

        Raises:
            InputError: as `check_free`.
        """
        self.check_free(replace=replace)
        if self.path.exists():
            aside = self.path.with_name(f"{storage.STAGING_PREFIX}old-{self.path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            self.path.rename(aside)
            shutil.rmtree(aside)
        self.path.mkdir(parents=True)
        storage.write_atomic(self.recipe_path, recipe_yaml)
        storage.write_json(self.status_path, {"name": self.path.name, "status": "running", "created_at": now()})

    def _exists_message(self) -> str:
        status = self.read_status()["status"]
        if status == "finished":
            return f"{self.path} holds a finished run. Use --fresh to replace it, or another name (name=NEW)."
        return f"{self.path} holds a run that is {status}. Use --resume to continue it or --fresh to start over."

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps every other process out of this run; the kernel releases it however this one ends.

        The lock file lies beside the directory, so that it outlives a replaced one.

        Raises:
            InputError: another process holds it.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.parent / f".{self.path.name}.lock", "a") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{self.path} is in use by another linchain process; wait for it or stop it") from None
            yield


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
        raise InputError(f"no finished run below {root}/: name a run directory, or train one with 'linchain train RECIPE'")
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
        parent = run.path.parent
        names = [entry.name for entry in parent.iterdir() if is_run(entry)] if parent.is_dir() else []
        raise InputError(f"{path} is not a run directory: it has no run.json." + did_you_mean(run.path.name, names))
    status = run.read_status()["status"]
    if finished and status != "finished":
        raise InputError(f"{path} is {status}, not finished: continue it with 'linchain train RECIPE --resume'")
    return run


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The complete rows of a JSON-lines file; a last line that a killed process left torn is dropped."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            rows.append(json.loads(line))
    return rows


def jsonl_bytes(rows: list[dict[str, Any]]) -> bytes:
    """Rows as `append_jsonl` writes them."""
    return b"".join(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n" for row in rows)


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Adds one row at the end of a JSON-lines file, in a single write."""
    with open(path, "ab") as handle:
        handle.write(jsonl_bytes([row]))


def cut_jsonl(path: Path, last_step: int) -> None:
    """Drops the rows of steps after `last_step`, and a torn last line."""
    if path.is_file():
        storage.write_atomic(path, jsonl_bytes([row for row in read_jsonl(path) if row["step"] <= last_step]))
