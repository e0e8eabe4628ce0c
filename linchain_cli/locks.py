"""One lock for everything that one process at a time may do: train into a directory, convert or encode
something that several want.

The lock is a file beside what it protects, held by `flock`, so the kernel releases it however its process
ends. It outlives what it protects, which may be replaced meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import math
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from linchain_cli.errors import InUse

logger = logging.getLogger(__name__)

_SILENT = 5.0  # seconds of waiting before it is told
# Seconds for which whoever takes a lock bears that it is held: `in_use` holds it for a moment to look.
_GLANCE = 0.2
# What file systems without locks answer: Lustre without -o flock, NFS without its lock service, some FUSE.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextlib.contextmanager
def locked(path: Path, wait: float | None = 0.0, *, needed: bool = True) -> Iterator[None]:
    """Keeps every other linchain process out of what lies at `path`.

    Args:
        wait: seconds to wait for another process; None for as long as it takes.
        needed: whether two processes at once would do harm, which is told where files cannot be locked.

    Raises:
        InUse: another process holds it, and still does after `wait` seconds.
        OSError: the lock file cannot be written.
    """
    place = lock_path(path)
    while True:
        descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            held = _acquire(descriptor, path, wait, needed)
            if held and not is_at(descriptor, place):
                continue  # its holder has removed the file: who comes next would lock another one
            if held:
                with contextlib.suppress(OSError):  # for the message of another process only
                    os.truncate(descriptor, 0)
                    os.pwrite(descriptor, f"{os.getpid()} on {socket.gethostname()}".encode(), 0)
            yield
            return
        finally:
            os.close(descriptor)


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that lies at `path` now."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def _acquire(descriptor: int, path: Path, wait: float | None, needed: bool) -> bool:
    began = time.monotonic()
    give_up, tell_at = math.inf if wait is None else began + max(wait, _GLANCE), began + _SILENT
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= give_up:
                raise InUse(in_use_message(path)) from None
            if time.monotonic() >= tell_at:
                logger.info("Waiting for another linchain process%s, which is at %s.", _holder(path), path)
                tell_at = math.inf
            time.sleep(0.05)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            if needed:
                logger.warning(
                    "The file system of %s has no file locks (%s): see to it that no other process works on"
                    " %s at the same time.",
                    path.parent,
                    error.strerror,
                    path.name,
                )
            return False


def in_use(path: Path) -> bool:
    """Whether a process holds the lock of `path` now."""
    try:
        with open(lock_path(path)) as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def in_use_message(path: Path) -> str:
    """That another process is at work there, which one, and what to do."""
    return f"{path} is in use by another linchain process{_holder(path)}; wait for it or stop it"


def _holder(path: Path) -> str:
    """` (process on machine)`, as the lock's holder has written it there."""
    try:
        holder = lock_path(path).read_text(encoding="utf-8", errors="replace")[:200]
    except OSError:
        holder = ""
    return f" ({holder})" if holder else ""


def lock_path(path: Path) -> Path:
    """The lock file of `path`: beside the place that a link there leads to, so that all names share it."""
    real = Path(os.path.realpath(path))
    return real.with_name(f".{real.name}.lock")
