"""The rows an evaluation has finished so far, on disk, so that it continues where it stopped.

Every process appends to files of its own beside the results, one per task, named by the task's fingerprint
(its rows, model, protocol, template, dtype): evaluations that run at once never meet, and one that was cut
off continues with whatever tasks are asked for next. All of a task's files are read at the start, whatever
number of processes wrote them, and removed once the result is written; so are those beside them that nobody
has gone on with for a month.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from linchain_cli.evaluation.results import Prediction
from linchain_cli.run import jsonl_bytes, read_jsonl
from linchain_cli.storage import append, make_directory

GIVEN_UP_AFTER = 30 * 24 * 3600.0  # seconds since the last row


class FinishedRows:
    """Finished rows, below `directory`, of tasks by name and fingerprint."""

    def __init__(self, directory: Path, fingerprints: Mapping[str, str]):
        self._directory, self._fingerprints = directory, fingerprints
        self._token = secrets.token_hex(4)
        self.done: dict[tuple[str, int], Prediction] = {}
        for task, fingerprint in fingerprints.items():
            for part in self._parts(fingerprint):
                self.done.update({(task, row["index"]): {**row, "task": task} for row in read_jsonl(part)})

    def _parts(self, fingerprint: str) -> Iterator[Path]:
        return self._directory.glob(f".{fingerprint[:16]}.part-*.jsonl")

    def append(self, rows: Sequence[Prediction]) -> None:
        """Adds the rows of one task's batch in one write."""
        make_directory(self._directory)
        fingerprint = self._fingerprints[rows[0]["task"]]
        append(self._directory / f".{fingerprint[:16]}.part-{self._token}.jsonl", jsonl_bytes(rows))

    def remove(self) -> None:
        """Removes the files of all processes, and those of other evaluations that were given up long ago;
        called by one of the processes when the result is written."""
        own = {part for fingerprint in self._fingerprints.values() for part in self._parts(fingerprint)}
        for part in self._directory.glob(".*.part-*.jsonl"):
            with contextlib.suppress(FileNotFoundError):  # another process may do so, too
                if part in own or time.time() - part.stat().st_mtime > GIVEN_UP_AFTER:
                    part.unlink()
