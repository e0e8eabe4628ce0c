"""The few exception types that end a command, and how a message names words and reasons.

LinchainError        exit code 1: the work failed, the message says why
├── InputError       exit code 2: the input is wrong; the message names the place and the remedy
│   └── InUse        another process is at work in the directory
└── Stopped          exit code 130, 143 or 129: a signal ended the run after its state was saved
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class LinchainError(Exception):
    """The work failed. The message is shown as it is, without a traceback.

    `stop_signal` is the signal that had asked for a stop before, if any: whoever has more to do stops, too.
    """

    exit_code = 1
    stop_signal = 0


class InputError(LinchainError):
    """The user's input is wrong: a recipe, a path, an option, a model or a data set out of reach."""

    exit_code = 2


class InUse(InputError):
    """Another process is at work in the directory."""


class Stopped(LinchainError):
    """A signal ended the run after its state was saved; `signum` is 2 (SIGINT), 15 (SIGTERM) or 1
    (SIGHUP)."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.exit_code = 128 + signum


def nearest(name: str, names: Iterable[str], alike: float = 0.6) -> str | None:
    """The name out of `names` that is most like `name`, or None when none is as near as `alike` (up to 1)."""
    by_lower = {candidate.lower(): candidate for candidate in names}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=alike)
    return by_lower[close[0]] if close else None


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A sentence to put behind a message: ` Did you mean 'rank'?`, or nothing. What alone begins with `name`
    comes before what is like it."""
    names = list(names)
    begun = [one for one in names if len(name) > 2 and one.startswith(name)]
    found = begun[0] if len(begun) == 1 else nearest(name, names)
    return f" Did you mean '{found}'?" if found else ""


def some(names: Sequence[str], most: int = 3) -> str:
    """The first of `names`, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def first_line(error: BaseException) -> str:
    """The first line of an exception's message: beneath it libraries put advice for programmers."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
