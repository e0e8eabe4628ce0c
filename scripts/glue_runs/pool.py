"""Worker processes that share runs through a directory: who creates a run's file takes it, and what came of
it is a line of results.jsonl."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from linchain_cli.errors import InUse
from linchain_cli.locks import in_use, locked

GRACE = 45.0  # seconds that runs have to end in after the last one may start
_LAST_LINES = 12
_WAIT = 0.1
_BETWEEN_LINES = 15.0
_ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}


class Named(Protocol):
    @property
    def name(self) -> str: ...


_R = TypeVar("_R", bound=Named)


class Results:
    """DIR/results.jsonl, which several processes append to, and the files by which they take runs."""

    def __init__(self, directory: Path):
        self.path, self._claims = directory / "results.jsonl", directory / "claims"
        self.done: dict[str, dict[str, Any]] = {}
        self._read = 0
        self.refresh()

    def refresh(self) -> None:
        """Reads what has come since. A line that is not whole (its writer was killed) is no result."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                self.done[row["name"]] = row

    def add(self, row: Mapping[str, Any]) -> None:
        """Appends a line, behind whatever a killed process may have left of one."""
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        with self.path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if end := file.seek(0, os.SEEK_END):
                file.seek(end - 1)
                line = line if file.read(1) == b"\n" else b"\n" + line
            file.write(line)

    def forget_claims(self) -> None:
        """Runs that earlier calls took and did not finish may be taken again."""
        shutil.rmtree(self._claims, ignore_errors=True)
        self._claims.mkdir(parents=True)

    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Whether this process has the run, for the length of the block. Nobody else gets it afterwards, so
        that a run that kills one process does not kill the next."""
        path = self._claims / name
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(locked(path))
                free = not path.exists()
                path.touch()
            except InUse:
                free = False
            yield free

    def any_under_way(self) -> bool:
        """Whether a process is at work on a run."""
        names = [path.name for path in self._claims.iterdir() if not path.name.startswith(".")]
        return any(in_use(self._claims / name) for name in names if name not in self.done)


def work(
    results: Results,
    possible: Callable[[Mapping[str, Any]], Sequence[_R]],
    do: Callable[[_R], Mapping[str, Any]],
    until: float | None = None,
) -> None:
    """Does one run after another, until none is left and none under way, which may make others possible, or
    `until` (as time.time() counts) is past."""
    while until is None or time.time() < until:
        others = results.any_under_way()  # before what they have done is read
        results.refresh()
        if not _do_next(results, possible(results.done), do):
            if not others:
                return
            time.sleep(_WAIT)


def _do_next(results: Results, runs: Sequence[_R], do: Callable[[_R], Mapping[str, Any]]) -> bool:
    for run in runs:
        with results.claim(run.name) as free:
            if free:
                results.add(do(run))
                return True
    return False


def work_in_processes(
    command: Sequence[str], directory: Path, results: Results, count: int, until: float | None
) -> list[str]:
    """Runs `command` in `count` processes of one thread, until all have ended or GRACE after `until`.

    Returns:
        What to tell of those that did not end well, each with the last lines of its log in `directory`.
    """
    logs = [directory / f"worker-{number}.log" for number in range(1, count + 1)]
    workers: list[subprocess.Popen] = []
    try:
        for log in logs:
            with log.open("wb") as file:
                workers.append(
                    subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        env=os.environ | _ONE_THREAD,
                    )
                )
        _wait(workers, results, until)
    finally:
        late = [worker.poll() is None for worker in workers]
        _end(workers)
    told = []
    for log, worker, was_late in zip(logs, workers, late, strict=True):
        if was_late:
            told.append(f"{log.stem} was ended in the middle of a run: time was up")
        elif worker.returncode:
            lines = log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
            told.append("\n    ".join([f"{log.stem} ended with {worker.returncode} ({log}):", *lines]))
    return told


def _wait(workers: Sequence[subprocess.Popen], results: Results, until: float | None) -> None:
    began = told = time.time()
    while any(worker.poll() is None for worker in workers):
        now = time.time()
        if until is not None and now > until + GRACE:
            return
        if now - told > _BETWEEN_LINES:
            told = now
            results.refresh()
            alive = sum(worker.poll() is None for worker in workers)
            line = f"{now - began:.0f} s: {len(results.done)} runs are done, {alive} processes at work"
            print(line, file=sys.stderr, flush=True)
        time.sleep(_WAIT)


def _end(workers: Sequence[subprocess.Popen]) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.kill()  # what it has done is in results.jsonl
    for worker in workers:
        worker.wait()
