"""The processes of a run by name, so that one which has died can be named by those that wait for it."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# How long a process may take to end after its connections have.
_DYING = 2.0


@dataclass(frozen=True)
class Peer:
    """A process of the run, on the machine named `host`."""

    rank: int
    host: str
    pid: int

    def is_gone(self) -> bool:
        """Whether it has ended, as far as can be seen from here: not from another machine."""
        if self.host != socket.gethostname() or self.pid == os.getpid():
            return False
        try:
            os.kill(self.pid, 0)
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return state in "ZX"  # its launcher has not asked for its exit code yet


_known: list[Peer] = []


def introduce(rank: int, gather: Callable[[list[Peer]], list[Peer]]) -> None:
    """Tells this process to the others, and them to it; `gather` brings all processes' lists together."""
    _known[:] = gather([Peer(rank, socket.gethostname(), os.getpid())])


def gone() -> list[str]:
    """The names of those that have ended; waits a moment for one that is just ending."""
    deadline = time.monotonic() + _DYING
    while True:
        names = [f"process {peer.rank} (pid {peer.pid} on {peer.host})" for peer in _known if peer.is_gone()]
        if names or time.monotonic() > deadline:
            return names
        time.sleep(0.05)
