"""SIGINT and SIGTERM as a request to stop after the optimizer step; a second one ends the process at once."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator


class StopRequest:
    """`signum` is the signal that asked for the stop, 0 while none has."""

    signum = 0


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Catches the two signals for the length of the block."""
    request = StopRequest()

    def handle(signum, _frame):
        if request.signum:
            os._exit(128 + signum)
        request.signum = signum

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
