"""SIGINT and SIGTERM: a request to stop after the optimizer step; a second one ends the process at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

from linchain_cli.console import is_first_process
from linchain_cli.errors import LinchainError, Stopped


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
    """Catches the two signals for the length of the block.

    Raises:
        Stopped: a signal came while `deferred` was not set, with `message`.
        SystemExit: the same, on other processes than the first.
    """
    request = StopRequest(message)

    def handle(signum, _frame):
        if request.signum:
            _exit_at_once(128 + signum)
        request.signum = signum
        if not request.deferred:
            if is_first_process():
                raise Stopped(request.message, signum)
            raise SystemExit(128 + signum)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    except LinchainError as error:
        error.stop_signal = request.signum
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit_at_once(code: int) -> None:
    if sys.stderr.isatty():
        os.write(2, b"\x1b[?25h\n")  # the cursor, which a progress bar hides
    os._exit(code)
