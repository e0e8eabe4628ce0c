"""Files that are replaced as a whole, what killed processes left on the way there, and hashes.

Every byte that must survive is written here or, of whole directories, in directories.py. A reader sees either
what was there before or all of what replaces it: it is written under a sibling name that nobody can guess,
fsynced, renamed over the target, and the parent directory is fsynced. The few functions that change the disk
(`_write`, `_fsync`, `rename`, `mkdir`) are called as attributes of this module, so that tests can make each
of them fail in turn.
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
PASSING = (STAGING_PREFIX, REPLACED_PREFIX, REMOVED_PREFIX)  # what is on its way in or out
# What the system says of a disk that takes no more: it is full, the user's share is, or a file's limit.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ABANDONED = 24 * 3600.0  # seconds without a change until another machine's staging counts as left behind
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


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


def rename(source: Path, target: Path) -> None:
    os.replace(source, target)


def mkdir(path: Path) -> None:
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
        mkdir(path)
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
    temporary = beside(path, STAGING_PREFIX)
    try:
        yield temporary
        fsync_file(temporary)
        rename(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary), temporary):
            error.filename = str(path)  # what people know it by
        raise
    fsync_directory(path.parent)


def json_bytes(value: Any) -> bytes:
    """Indented JSON as the project writes it everywhere: UTF-8, a newline at the end, NaN refused."""
    return utf8(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def utf8(json_text: str) -> bytes:
    """JSON as bytes. For half a character (a byte that is no UTF-8 in a file's name, say) a question mark
    stands: strict readers of JSON refuse its escape, too."""
    return json_text.encode(errors="replace")


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` for a JSON value."""
    write_atomic(path, json_bytes(value))


def tensor_bytes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file as bytes. They depend on names, values and metadata alone."""
    from safetensors.torch import save

    ordered = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    return save(ordered, metadata=dict(metadata) if metadata else None)


def beside(target: Path, prefix: str) -> Path:
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
    ours = r"(?P<host>[0-9a-f]{8})-(?P<process>\d+)-[0-9a-f]{8}"
    prefixes = rf"(?P<prefix>{'|'.join(map(re.escape, PASSING))})"
    pattern = re.compile(rf"{prefixes}(?P<target>{of_target})-{ours}")
    for leftover in directory.iterdir():
        match = pattern.fullmatch(leftover.name)
        if not match or (spare_living and _may_live(leftover, match["host"], match["process"])):
            continue
        if match["prefix"] == REPLACED_PREFIX:
            target = filled or leftover.with_name(match["target"])
            if filled:
                for entry in leftover.iterdir():
                    if not (target / entry.name).exists():
                        rename(entry, target / entry.name)
            elif not target.exists():
                rename(leftover, target)
                continue
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _may_live(leftover: Path, host: str, process: str) -> bool:
    if host != _host():
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
