"""Every byte that must survive goes through here: atomic files, staged directories, hashes.

A reader sees either what was there before or all of what replaces it. Files are written to a
sibling name that nobody can guess, fsynced, renamed over the target, and the parent directory is
fsynced. The few functions that change the disk (`_write`, `_fsync`, `_rename`, `_mkdir`) are module
attributes, so that tests can make each of them fail in turn.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from linchain_cli.errors import InputError

if TYPE_CHECKING:
    import torch

STAGING_PREFIX = ".staging-"
REPLACED_PREFIX = ".replaced-"
REMOVED_PREFIX = ".removed-"
# What the system says of a disk that takes no more: it is full, the user's share is, or a file's limit.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ABANDONED = 24 * 3600.0  # seconds without a change until another machine's staging counts as left behind
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_NOT_OURS = {"lost+found"}  # what a new file system has in it


def expand(path: Path | str) -> Path:
    """`path` with its `~` written out.

    Raises:
        InputError: nobody knows that home directory.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        whose = "your" if str(path).partition("/")[0] == "~" else "that user's"
        raise InputError(f"{path}: {whose} home directory is not known here; write the path out") from None


def broken_link(path: Path) -> str:
    """` (LINK is a link to TARGET, where nothing is)` of a path that is missing because a link on it leads
    nowhere, such as to a disk that is not mounted; nothing of others."""
    for part in (path, *path.parents):
        if part.is_symlink() and not part.exists():
            return f" ({part} is a link to {os.readlink(part)}, where nothing is)"
    return ""


def refuse_lfs_pointer(path: Path, name: str = "") -> None:
    """Raises InputError for a file in whose place a clone without Git LFS has left a few lines about it.

    `name` is what the message calls it.
    """
    with open(path, "rb") as handle:
        if handle.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise InputError(
                f"{name or path} is not the file itself but what Git LFS keeps in its place: `git lfs pull`"
                " in the clone fetches it, and so does a download from the hub."
            )


def _write(handle: IO[bytes], data: bytes) -> None:
    handle.write(data)


def _fsync(descriptor: int) -> None:
    os.fsync(descriptor)


def _rename(source: Path, target: Path) -> None:
    os.replace(source, target)


def _mkdir(path: Path) -> None:
    path.mkdir()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the file's name into an error of a write or a sync, which the system does not do."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def fsync_file(path: Path) -> None:
    """Makes what was written to a file durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            _fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_directory(path: Path) -> None:
    """Makes the directory's entries durable (a rename is not, until its parent is synced)."""
    try:
        fsync_file(path)
    except OSError as error:
        # Some network and FUSE file systems cannot sync a directory; there is nothing better to do on them.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def make_directory(path: Path) -> None:
    """Creates a directory and its missing parents, each made durable in the one above it."""
    path = Path(path)
    if path.is_dir():
        return
    make_directory(path.parent)
    try:
        _mkdir(path)
    except FileExistsError:
        if not path.is_dir():  # else another process was first
            raise
    fsync_directory(path.parent)


def append(path: Path, data: bytes) -> None:
    """Adds to the end of a file. What is added is durable only after `fsync_file`."""
    with naming(path), open(path, "ab") as handle:
        _write(handle, data)


def write_durable(path: Path, data: bytes) -> None:
    """Writes and fsyncs a file in place: for files of a directory that is itself staged."""
    with naming(path), open(path, "wb") as handle:
        _write(handle, data)
        handle.flush()
        _fsync(handle.fileno())


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replaces `path` as one step; the old content stays readable until the new one is complete."""
    with staged_file(path) as temporary, open(temporary, "xb") as handle:
        _write(handle, data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Yields the name of a file to write, beside `path`, whose place it takes when the block ends without an
    error; on any error it is removed. What killed processes left of such files goes first.
    """
    path = Path(path)
    with contextlib.suppress(OSError):
        _remove_staging(path.parent, None, re.escape(path.name), spare_living=True)
    temporary = _beside(path, STAGING_PREFIX)
    try:
        yield temporary
        fsync_file(temporary)
        _rename(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary), temporary):
            error.filename = str(path)  # what people know it by
        raise
    fsync_directory(path.parent)


def json_bytes(value: Any) -> bytes:
    """Indented JSON as the project writes it everywhere: UTF-8, a newline at the end, NaN refused."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` for a JSON value."""
    write_atomic(path, json_bytes(value))


def tensor_bytes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file as bytes. They depend on names, values and metadata alone."""
    from safetensors.torch import save

    ordered = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    return save(ordered, metadata=dict(metadata) if metadata else None)


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
        remove_staging(target.parent, target.name, spare_living=True)
    before = _identity(target)
    if before and not overwrite and not (target.is_dir() and is_empty(target)):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    inside = _is_filled_in_place(target)
    if not inside:
        make_directory(target.parent)
    staging = _beside(target / target.name if inside else target, STAGING_PREFIX)
    _mkdir(staging)
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
    probe = _beside(place / Path(os.path.realpath(target)).name, STAGING_PREFIX)
    try:
        _mkdir(probe)
        probe.rmdir()
    except OSError as error:
        raise InputError(f"{target} cannot be written: {place}: {error.strerror or error}") from error


def is_empty(directory: Path) -> bool:
    """Whether a directory holds nothing that anybody put there."""
    return not entries(directory)


def entries(directory: Path) -> list[Path]:
    """What lies in a directory, but for what is on its way in or out, and what file systems have in them."""
    passing = (STAGING_PREFIX, REPLACED_PREFIX, REMOVED_PREFIX)
    return [
        entry
        for entry in Path(directory).iterdir()
        if not entry.name.startswith(passing) and entry.name not in _NOT_OURS
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


def _beside(target: Path, prefix: str) -> Path:
    """A name beside `target` that tells whose it is, and that nobody can guess."""
    return target.with_name(f"{prefix}{target.name}-{_host()}-{os.getpid()}-{secrets.token_hex(4)}")


@functools.cache
def _host() -> str:
    """Eight digits for where a process number means something: a machine since its start, or a container."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return sha256_bytes("\n".join(parts).encode())[:8]


def _sync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root):
        for name in names:
            fsync_file(Path(folder, name))
        fsync_directory(Path(folder))


def _replace_directory(staging: Path, target: Path, overwrite: bool) -> None:
    aside = _beside(target, REPLACED_PREFIX)
    replaces = overwrite and target.exists()
    if replaces:
        _rename(target, aside)
    try:
        _rename(staging, target)
        fsync_directory(target.parent)
    except BaseException:
        if not staging.exists():
            _rename(target, staging)
        if replaces:
            _rename(aside, target)
        raise
    if replaces:
        shutil.rmtree(aside, ignore_errors=True)


def _fill(target: Path, staging: Path, overwrite: bool) -> None:
    """Moves what is staged inside `target` up into it; what was there goes, or comes back if that fails."""
    old = entries(target)
    if old and not overwrite:
        raise FileExistsError(errno.EEXIST, "another process has written it meanwhile", str(target))
    aside = _beside(target / target.name, REPLACED_PREFIX)
    moved: list[tuple[Path, Path]] = []
    try:
        if old:
            _mkdir(aside)
        # Small files come last: with them, what reads the directory takes it for complete.
        new = sorted(staging.iterdir(), key=lambda entry: (entry.is_file(), -entry.stat().st_size))
        for source, place in [*((each, aside) for each in old), *((each, target) for each in new)]:
            _rename(source, place / source.name)
            moved.append((source, place / source.name))
        fsync_directory(target)
    except BaseException:
        for source, place in reversed(moved):
            _rename(place, source)
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
        aside = _beside(entry, REMOVED_PREFIX)
        _rename(entry, aside)
        if aside.is_dir() and not aside.is_symlink():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)


def remove_staging(directory: Path, name: str | None = None, *, spare_living: bool = False) -> None:
    """Cleans up after killed processes in `directory`: what they left half-written is removed, and what one
    had moved aside and not yet replaced is put back. Of everything, or of the target `name` only.

    The caller sees to it that no other process writes there now, or asks with `spare_living` to leave alone
    what belongs to a process that runs on this machine, or may run on another one.
    """
    directory = Path(directory)
    if name is not None:
        directory, name = (real := Path(os.path.realpath(directory / name))).parent, real.name
        if real.is_dir():
            _remove_staging(real, real, re.escape(name), spare_living)
    if directory.is_dir():
        _remove_staging(directory, None, ".+" if name is None else re.escape(name), spare_living)


def _remove_staging(directory: Path, filled: Path | None, of_target: str, spare_living: bool) -> None:
    """`filled` is the target itself where it was staged inside; `of_target` a pattern of targets' names."""
    # The second form is of linchain 0.1.0. No process has a number of more than seven digits, so that the
    # eight of a token, which may be decimal ones alone, are not taken for one.
    ours = r"(?P<host>[0-9a-f]{8})-(?P<process>\d{1,7})-[0-9a-f]{8}|(?P<early>\d{1,7})"
    prefixes = rf"(?P<prefix>{'|'.join(map(re.escape, (STAGING_PREFIX, REMOVED_PREFIX, REPLACED_PREFIX)))})"
    pattern = re.compile(rf"{prefixes}(?P<target>{of_target})-(?:{ours})")
    for leftover in directory.iterdir():
        match = pattern.fullmatch(leftover.name)
        if not match or (
            spare_living and _may_live(leftover, match["host"], match["process"] or match["early"])
        ):
            continue
        if match["prefix"] == REPLACED_PREFIX:
            target = filled or leftover.with_name(match["target"])
            if filled:
                for entry in leftover.iterdir():
                    if not (target / entry.name).exists():
                        _rename(entry, target / entry.name)
            elif not target.exists():
                _rename(leftover, target)
                continue
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _may_live(leftover: Path, host: str | None, process: str) -> bool:
    if host not in (None, _host()):
        return time.time() - _last_change(leftover) < _ABANDONED
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _last_change(path: Path) -> float:
    times = [0.0]
    for entry in (path, *path.rglob("*")):
        with contextlib.suppress(OSError):
            times.append(entry.lstat().st_mtime)
    return max(times)


def sha256_bytes(data: bytes) -> str:
    """Hexadecimal SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content, read in blocks."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
