"""SIGINT, SIGTERM and SIGHUP: a request to stop after the optimizer step; a second one ends the process at
once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

from linchain_cli.console import is_first_process
from linchain_cli.errors import LinchainError, Stopped
from linchain_cli.stopping import caught


class StopRequest:
    """`signum` is the signal that asked for the stop, 0 while none has.

    `deferred` says that somebody looks at it from step to step. Until then, a signal stops what is going on
    (loading, encoding, evaluating) on the spot, and `message` says what that leaves.
    """

    def __init__(self, message: str = "stopped"):
        self.message = message
        self.signum = 0
        self.deferred = False


@contextlib.contextmanager
def stop_requests(message: str) -> Iterator[StopRequest]:
    """Catches the signals for the length of the block. Those that come along when a terminal is closed (a
    SIGHUP of the kernel's, another of the shell's, a SIGTERM at the end of the session) are one request.

    Raises:
        Stopped: a signal came while `deferred` was not set, with `message`.
        SystemExit: the same, on other processes than the first.
    """
    request = StopRequest(message)

    def handle(signum: int, _frame: FrameType | None) -> None:
        if request.signum and signal.SIGHUP not in (request.signum, signum):
            _exit_at_once(128 + signum)
        again, request.signum = request.signum, signum
        if again:
            return
        if not request.deferred:
            if is_first_process():
                raise Stopped(request.message, signum)
            raise SystemExit(128 + signum)

    with caught(handle):
        try:
            yield request
        except LinchainError as error:
            error.stop_signal = request.signum
            raise


def _exit_at_once(code: int) -> None:
    if sys.stderr.isatty():
        os.write(2, b"\x1b[?25h\n")  # the cursor, which a progress bar hides
    os._exit(code)
