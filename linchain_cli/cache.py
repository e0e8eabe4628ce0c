"""The tool's own cache: where it lies, and the hashes of large files, which need not be read twice."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

from linchain_cli.storage import expand, sha256_bytes, sha256_file, write_json

# A file that changed this recently may change again within the clock's resolution, and look the same.
SETTLED_AFTER = 2.0  # seconds


def cache_root() -> Path:
    """Where it is: $LINCHAIN_CACHE, $XDG_CACHE_HOME/linchain or ~/.cache/linchain."""
    if root := os.environ.get("LINCHAIN_CACHE"):
        return expand(root)
    return expand(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "linchain"


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
    digest = sha256_file(path)
    if is_settled(status):
        with contextlib.suppress(OSError):  # it only saves time
            note.parent.mkdir(parents=True, exist_ok=True)
            write_json(note, {"path": str(path.resolve()), "status": seen, "sha256": digest})
    return digest
