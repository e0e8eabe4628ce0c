"""The tool's own cache: where it lies, how long things stay there, and the hashes of large files, which need
not be read twice.

    encoded/    rows as tokens (data/cache.py)
    gguf/       .gguf files as checkpoint directories (model/gguf.py)
    downloads/  data files from addresses (data/files.py)
    hashes/     what files hash to

All of it can be made or fetched again. An entry is a directory, which a process that uses it keeps by a
shared lock on one of its files; whoever adds an entry removes those that nobody has used for long.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from linchain_cli.directories import remove_directory
from linchain_cli.errors import InputError, InUse
from linchain_cli.locks import is_at, lock_path, locked
from linchain_cli.storage import (
    expand,
    sha256_bytes,
    sha256_file,
    write_json,
)

logger = logging.getLogger(__name__)

DAYS_VARIABLE = "LINCHAIN_CACHE_DAYS"
_DAYS = 30.0
_DAY = 24 * 3600.0  # seconds
# Where entries lie, what they are called, and which file of one its users lock. What has another name is not
# the tool's: $LINCHAIN_CACHE may be a directory that serves for more.
_ENTRIES = {
    "encoded": (re.compile(r"[0-9a-f]{32}"), "meta.json"),
    "gguf": (re.compile(r".+-[0-9a-f]{16}"), "config.json"),
    "downloads": (re.compile(r"[0-9a-f]{24}"), "*"),
}
_HASHES = ("hashes", "encoded/hashes")
_NOTE = re.compile(r"[0-9a-f]{32}\.json")
# A file that changed this recently may change again within the clock's resolution, and look the same.
SETTLED_AFTER = 2.0  # seconds


def cache_root() -> Path:
    """Where it is: $LINCHAIN_CACHE, $XDG_CACHE_HOME/linchain or ~/.cache/linchain."""
    if root := os.environ.get("LINCHAIN_CACHE"):
        return expand(root)
    return expand(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "linchain"


def cache_days() -> float:
    """How many days an entry that nobody uses stays: $LINCHAIN_CACHE_DAYS, or 30. `inf` keeps all.

    Raises:
        InputError: the variable is no such number.
    """
    written = os.environ.get(DAYS_VARIABLE) or _DAYS
    try:
        days = float(written)
    except ValueError:
        days = math.nan
    if not days >= 0:
        raise InputError(f"{DAYS_VARIABLE}: '{written}' is no number of days; expected 30, say, or inf")
    return days


def cache_bytes(root: Path) -> int:
    """The size of all files below `root`."""
    size = 0
    for folder, _, names in os.walk(root):
        for name in names:
            with contextlib.suppress(OSError):  # it is gone by now
                size += os.lstat(os.path.join(folder, name)).st_size
    return size


def cache_size() -> int:
    """Bytes of what the tool keeps below `cache_root()`."""
    return sum(cache_bytes(cache_root() / folder) for folder in (*_ENTRIES, "hashes"))


_kept: dict[Path, int] = {}  # open files with a shared lock, by their names


def keep(marker: Path) -> bool:
    """Keeps the entry that the file `marker` is of for as long as this process lives; false where it is just
    being removed.

    Raises:
        OSError: there is no such entry, or it may not be read.
    """
    descriptor = os.open(marker, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        there = True
    except OSError as error:  # without locks nothing is removed
        there = not isinstance(error, BlockingIOError)
    if not (there and is_at(descriptor, marker)):
        os.close(descriptor)
        return False
    if (before := _kept.pop(marker, None)) is not None:
        os.close(before)
    _kept[marker] = descriptor
    if time.time() - marker.parent.stat().st_mtime > _DAY:
        with contextlib.suppress(OSError):  # of a cache that can only be read
            os.utime(marker.parent)
    return True


def remove_unused(root: Path) -> None:
    """Removes from the cache at `root` what nobody uses now nor has for `cache_days()`. What cannot be locked
    stays, and what may not be removed."""
    days = cache_days()
    before = time.time() - days * _DAY
    count = size = 0
    for folder, (names, marker) in _ENTRIES.items():
        for entry in _named(root / folder, names):
            with contextlib.suppress(OSError, InUse):
                if (freed := _remove_entry(entry, marker, before)) is not None:
                    count, size = count + 1, size + freed
    for folder in _HASHES:
        for note in _named(root / folder, _NOTE):
            with contextlib.suppress(OSError):
                if _last_use(note) < before:
                    note.unlink()
                    lock_path(note).unlink(missing_ok=True)
    if count:
        logger.info(
            "Removed from the cache %s: %s, unused for %g days (%s)",
            root,
            f"{count:,} entr{'y' if count == 1 else 'ies'} of {size / 1e9:.2f} GB",
            days,
            DAYS_VARIABLE,
        )


def _named(folder: Path, names: re.Pattern[str]) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield from (path for path in folder.iterdir() if names.fullmatch(path.name))


def _remove_entry(entry: Path, marker: str, before: float) -> int | None:
    """Removes it if nobody has used it since `before`, nor uses it now. Returns its size in bytes; None of
    one that stays."""
    markers = list(entry.glob(marker))
    # Whoever looks what is there reads the directory, but not its files.
    if max([entry.stat().st_mtime, *map(_last_use, markers)]) >= before:
        return None
    with locked(entry, needed=False), contextlib.ExitStack() as held:  # nobody makes it anew meanwhile
        for path in markers:
            handle = held.enter_context(open(path, "r+b"))  # NFS locks for one alone only what may be written
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        size = cache_bytes(entry)
        remove_directory(entry)
        lock_path(entry).unlink(missing_ok=True)
    return size


def _last_use(path: Path) -> float:
    """When a file was last written, or read, as far as its file system notes that."""
    status = path.stat()
    return max(status.st_mtime, status.st_atime)


def is_settled(status: os.stat_result) -> bool:
    """Whether a file with these times has another status whenever its content is another one."""
    return time.time() - max(status.st_mtime, status.st_ctime) > SETTLED_AFTER


def remembered_sha256(path: Path, cache: Path) -> str:
    """SHA-256 of a file, remembered below `cache` for as long as its size, times and inode stay the same."""
    status = os.stat(path)
    seen = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]
    note = cache / "hashes" / f"{sha256_bytes(os.fsencode(path.resolve()))[:32]}.json"
    try:
        known = json.loads(note.read_bytes())
        if known["status"] == seen:
            return known["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none yet, or damaged: hash the file again
    settled = is_settled(status)  # before it is read: it may change while that goes on
    digest = sha256_file(path)
    if settled:
        with contextlib.suppress(OSError):  # it only saves time
            note.parent.mkdir(parents=True, exist_ok=True)
            write_json(note, {"path": str(path.resolve()), "status": seen, "sha256": digest})
    return digest
