"""What a command says besides its result: notes and progress, all of it on stderr, where `--quiet` ends it.

A result goes to stdout, in words or with `--json` as one JSON value, and nothing else goes there.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

SECONDS_BETWEEN_LINES = 30.0

_quiet = False


def is_first_process() -> bool:
    """Whether this is the one of several processes that writes and speaks; it need not know the others."""
    return "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0"


def set_quiet(quiet: bool) -> None:
    """Whether notes and progress are left out from here on; warnings and errors never are."""
    global _quiet
    _quiet = quiet


def note(message: str) -> None:
    """A line that the user may want to know."""
    if not _quiet:
        print(message, file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """A line that the user should know."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def stderr_console(quiet: bool = False) -> Console:
    """Where progress is drawn; silent with `quiet` (every process but the first) or `--quiet`."""
    from rich.console import Console

    return Console(stderr=True, quiet=quiet or _quiet, soft_wrap=True, highlight=False)


def table_console() -> Console:
    """Where tables are printed, which are made for 80 columns: a narrower terminal breaks their lines, and
    no number is cut."""
    from rich.console import Console

    console = Console()
    console.width = max(console.width, 80)
    return console


def print_json(value: Any) -> None:
    """A result as indented JSON on stdout, in ASCII where that is all that stdout takes."""
    plain = (getattr(sys.stdout, "encoding", None) or "ascii").lower().replace("-", "") != "utf8"
    print(json.dumps(value, indent=2, ensure_ascii=plain, allow_nan=False))


class Progress:
    """How far something is: bars on a terminal, elsewhere a line every half minute.

    Args:
        unit: `bytes` are shown as such; anything else is counted.
        counted: what is counted although `unit` is bytes.
        quiet: show nothing (every process but the first).
        bars: False shows lines on a terminal, too: within something that may have bars of its own.
    """

    def __init__(self, unit: str = "", counted: Collection[str] = (), quiet: bool = False, bars: bool = True):
        self._console, self._unit, self._counted = stderr_console(quiet), unit, counted
        self._last = time.monotonic()
        self._bars: dict[str, Any] = {}
        drawn = bars and self._console.is_terminal and not self._console.quiet
        self._progress = self._drawn() if drawn else None

    def _drawn(self) -> Any:
        from rich import progress

        class Amount(progress.ProgressColumn):
            """Bytes or a count, as the task says."""

            def render(self, task: progress.Task) -> Any:
                return columns[bool(task.fields["in_bytes"])].render(task)

        columns = (progress.MofNCompleteColumn(), progress.DownloadColumn())
        text = progress.TextColumn("{task.description}", markup=False)
        shown = (text, progress.BarColumn(), Amount(), progress.TimeRemainingColumn())
        return progress.Progress(*shown, console=self._console, transient=True)

    def __enter__(self) -> Progress:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._progress:
            self._progress.stop()

    def show(self, what: str, done: int, total: int, part: str = "") -> None:
        """So much of `what` is done; `part` is the part of it that is under way."""
        if self._progress:
            if what not in self._bars:
                self._bars[what] = self._progress.add_task(what, total=total, in_bytes=self._in_bytes(what))
            self._progress.update(self._bars[what], description=part or what, completed=done, total=total)
        elif time.monotonic() - self._last >= SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            text = f"{what} ({part})" if part else what
            amounts = (f"{n / 1e6:,.0f} MB" if self._in_bytes(what) else f"{n:,}" for n in (done, total))
            self._console.print(f"{text}: {' of '.join(amounts)}", markup=False)

    def _in_bytes(self, what: str) -> bool:
        return self._unit == "bytes" and what not in self._counted
