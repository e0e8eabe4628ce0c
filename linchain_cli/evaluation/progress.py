"""The rows an evaluation has finished so far, on disk, so that it continues where it stopped.

Every process appends to a file of its own beside the result: a header that fingerprints the evaluation
(model, protocol, template, dtype, rows), then finished rows. All of them are read at the start, whatever
number of processes wrote them, and removed once the result is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from linchain_cli.evaluation.results import Prediction


class Progress:
    """Finished rows of the evaluation whose result goes to `path`."""

    def __init__(self, path: Path, fingerprint: str, rank: int = 0):
        self._path, self._fingerprint = path, fingerprint
        self._own = path.with_name(f".{path.stem}.part-{rank}.jsonl")
        self.done: dict[tuple[str, int], Prediction] = {}
        for part in self._parts():
            self.done.update(_read(part, fingerprint))
        self._handle: Any = None

    def _parts(self) -> Iterator[Path]:
        escaped = "".join(
            f"[{character}]" if character in "*?[" else character for character in self._path.stem
        )
        return self._path.parent.glob(f".{escaped}.part-*.jsonl")

    def append(self, rows: Sequence[Prediction]) -> None:
        """Adds the rows of one batch in one write."""
        if self._handle is None:
            self._handle = self._open()
        self._handle.write(
            "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode()
        )
        self._handle.flush()

    def _open(self) -> Any:
        """The process's own file; rows of another evaluation in it, or a torn last line, are dropped."""
        self._own.parent.mkdir(parents=True, exist_ok=True)
        kept = _read(self._own, self._fingerprint)
        handle = open(self._own, "wb")  # noqa: SIM115 (kept open from batch to batch)
        lines = [{"fingerprint": self._fingerprint}, *kept.values()]
        handle.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
        handle.flush()
        return handle

    def close(self) -> None:
        """Keeps the files."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    def remove(self) -> None:
        """Removes the files of all processes; called by one of them when the result is written."""
        self.close()
        for part in list(self._parts()):
            part.unlink(missing_ok=True)


def _read(path: Path, fingerprint: str) -> dict[tuple[str, int], Prediction]:
    """The complete rows of one file, or nothing if it is of another evaluation."""
    if not path.is_file():
        return {}
    lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    try:
        header, *rows = [json.loads(line) for line in lines] or [None]
        if header != {"fingerprint": fingerprint}:
            return {}
        return {(row["task"], row["index"]): row for row in rows}
    except (ValueError, KeyError, TypeError):
        return {}
