"""Directories that appear, and go, as a whole; see storage.py, which does the same for files."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from linchain_cli import storage
from linchain_cli.errors import InputError

_NOT_OURS = {"lost+found"}  # what a new file system has in it


@contextlib.contextmanager
def staged_directory(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty directory that becomes `target` when the block ends without an error.

    The caller writes the files with `write_durable`, or leaves it to the sweep that fsyncs every
    file before the end. On any error the staging directory is removed and `target` is untouched.
    With `overwrite`, an existing target is moved aside first, and put back if the end fails. A link is
    followed.

    A target that is an empty directory, or a mount point, stays the directory that it is: it is staged inside
    and then filled, which readers may see. Else the staging directory lies beside it, and gets its name.

    What killed processes left of this target is removed first, or put back where one had moved it aside.

    Raises:
        FileExistsError: `target` exists without `overwrite`, or came to be or was replaced while the block
        ran.
    """
    target = Path(os.path.realpath(target))
    with contextlib.suppress(OSError):
        storage.remove_staging(target.parent, target.name, spare_living=True)
    before = _identity(target)
    if before and not overwrite and not (target.is_dir() and is_empty(target)):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    inside = _is_filled_in_place(target)
    if not inside:
        storage.make_directory(target.parent)
    staging = storage.beside(target / target.name if inside else target, storage.STAGING_PREFIX)
    storage.mkdir(staging)
    try:
        yield staging
        _sync_tree(staging)
        if inside:
            _fill(target, staging, overwrite)
        else:
            if _identity(target) != before:
                raise FileExistsError(errno.EEXIST, "another process has written it meanwhile", str(target))
            _replace_directory(staging, target, overwrite)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def staging_place(target: Path) -> Path:
    """The existing directory in which `staged_directory` will write: its disk is the one that counts."""
    target = Path(os.path.realpath(target))
    if _is_filled_in_place(target):
        return target
    return next(folder for folder in target.parents if folder.is_dir())


def check_writable(target: Path) -> None:
    """Tries whether `staged_directory` can write `target`.

    Raises:
        InputError: it cannot; the message says where and why.
    """
    place = staging_place(target)
    probe = storage.beside(place / Path(os.path.realpath(target)).name, storage.STAGING_PREFIX)
    try:
        storage.mkdir(probe)
        probe.rmdir()
    except OSError as error:
        raise InputError(f"{target} cannot be written: {place}: {error.strerror or error}") from error


def refuse_unwritable(directory: Path, remedy: str) -> None:
    """Raises InputError, whose message `remedy` ends, where it is clear without a try that nothing can be
    written into a directory. It need not be there yet."""
    existing = next(path for path in [directory, *directory.absolute().parents] if path.exists())
    if not existing.is_dir():
        raise InputError(f"{existing} is not a directory: {remedy}")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{existing} cannot be written to: {remedy}")


def is_empty(directory: Path) -> bool:
    """Whether a directory holds nothing that anybody put there."""
    return not entries(directory)


def entries(directory: Path) -> list[Path]:
    """What lies in a directory, but for what is on its way in or out, and what file systems have in them."""
    return [
        entry
        for entry in Path(directory).iterdir()
        if not entry.name.startswith(storage.PASSING) and entry.name not in _NOT_OURS
    ]


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _is_filled_in_place(target: Path) -> bool:
    return target.is_dir() and (_is_mount_point(target) or is_empty(target))


def _is_mount_point(path: Path) -> bool:
    """Also one of the same file system, such as a directory that is bound into a container."""
    if os.path.ismount(path):
        return True
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        escaped = re.sub(r"[ \t\n\\]", lambda match: f"\\{ord(match[0]):03o}", str(path))
        return any(line.split(" ", 5)[4] == escaped for line in lines)
    return False


def _sync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root):
        for name in names:
            storage.fsync_file(Path(folder, name))
        storage.fsync_directory(Path(folder))


def _replace_directory(staging: Path, target: Path, overwrite: bool) -> None:
    aside = storage.beside(target, storage.REPLACED_PREFIX)
    replaces = overwrite and target.exists()
    if replaces:
        storage.rename(target, aside)
    try:
        storage.rename(staging, target)
        storage.fsync_directory(target.parent)
    except BaseException:
        if not staging.exists():
            storage.rename(target, staging)
        if replaces:
            storage.rename(aside, target)
        raise
    if replaces:
        shutil.rmtree(aside, ignore_errors=True)


def _fill(target: Path, staging: Path, overwrite: bool) -> None:
    """Moves what is staged inside `target` up into it; what was there goes, or comes back if that fails."""
    old = entries(target)
    if old and not overwrite:
        raise FileExistsError(errno.EEXIST, "another process has written it meanwhile", str(target))
    aside = storage.beside(target / target.name, storage.REPLACED_PREFIX)
    moved: list[tuple[Path, Path]] = []
    try:
        if old:
            storage.mkdir(aside)
        # Small files come last: with them, what reads the directory takes it for complete.
        new = sorted(staging.iterdir(), key=lambda entry: (entry.is_file(), -entry.stat().st_size))
        for source, place in [*((each, aside) for each in old), *((each, target) for each in new)]:
            storage.rename(source, place / source.name)
            moved.append((source, place / source.name))
        storage.fsync_directory(target)
    except BaseException:
        for source, place in reversed(moved):
            storage.rename(place, source)
        with contextlib.suppress(OSError):
            aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)
    staging.rmdir()


def remove_directory(path: Path) -> None:
    """Removes a directory so that it is never seen half removed: it is renamed first. A mount point, and what
    is behind a link, stays as an empty directory.
    """
    if path.is_symlink() or _is_mount_point(path):
        path = Path(os.path.realpath(path))
        doomed = entries(path)
    else:
        doomed = [path]
    for entry in doomed:
        aside = storage.beside(entry, storage.REMOVED_PREFIX)
        storage.rename(entry, aside)
        if aside.is_dir() and not aside.is_symlink():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)
