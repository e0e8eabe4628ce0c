"""The signals that ask a command to stop: Ctrl-C, SIGTERM, and the end of the terminal that it was started
from."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextlib.contextmanager
def caught(handle: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Has `handle` called for these signals in the block. A SIGHUP that is ignored stays so, as nohup wants
    it. On another thread than the main one, where signals are not handled, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
    before = {number: signal.signal(number, handle) for number in {*SIGNALS} - ignored}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
