"""Every byte that must survive goes through here: atomic files, staged directories, hashes.

A reader sees either what was there before or all of what replaces it. Files are written to a
sibling name, fsynced, renamed over the target, and the parent directory is fsynced. The few
functions that change the disk (`_write`, `_fsync`, `_rename`, `_mkdir`) are module attributes, so
that tests can make each of them fail in turn.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linchain_cli.errors import InputError

if TYPE_CHECKING:
    import torch

STAGING_PREFIX = ".staging-"
REPLACED_PREFIX = ".replaced-"


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


def _write(handle, data: bytes) -> None:
    handle.write(data)


def _fsync(descriptor: int) -> None:
    os.fsync(descriptor)


def _rename(source: Path, target: Path) -> None:
    os.replace(source, target)


def _mkdir(path: Path) -> None:
    path.mkdir(exist_ok=True)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
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
        with _naming(path):
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
    _mkdir(path)
    fsync_directory(path.parent)


def append(path: Path, data: bytes) -> None:
    """Adds to the end of a file. What is added is durable only after `fsync_file`."""
    with _naming(path), open(path, "ab") as handle:
        _write(handle, data)


def write_durable(path: Path, data: bytes) -> None:
    """Writes and fsyncs a file in place: for files of a directory that is itself staged."""
    with _naming(path), open(path, "wb") as handle:
        _write(handle, data)
        handle.flush()
        _fsync(handle.fileno())


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replaces `path` as one step; the old content stays readable until the new one is complete."""
    path = Path(path)
    temporary = path.with_name(f"{STAGING_PREFIX}{path.name}-{os.getpid()}")
    try:
        write_durable(temporary, data.encode() if isinstance(data, str) else data)
        _rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
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
    """Yields an empty sibling directory that becomes `target` when the block ends without an error.

    The caller writes the files with `write_durable`, or leaves it to the sweep that fsyncs every
    file before the rename. On any error the staging directory is removed and `target` is untouched.
    With `overwrite`, an existing target is moved aside first, and put back if the rename fails.
    """
    target = Path(target)
    make_directory(target.parent)
    staging = target.with_name(f"{STAGING_PREFIX}{target.name}-{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    _mkdir(staging)
    try:
        yield staging
        _sync_tree(staging)
        _replace_directory(staging, target, overwrite)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _sync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root):
        for name in names:
            fsync_file(Path(folder, name))
        fsync_directory(Path(folder))


def _replace_directory(staging: Path, target: Path, overwrite: bool) -> None:
    aside = target.with_name(f"{REPLACED_PREFIX}{target.name}-{os.getpid()}")
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


def remove_directory(path: Path) -> None:
    """Removes a directory so that it is never seen half removed: it is renamed first."""
    aside = path.with_name(f"{STAGING_PREFIX}old-{path.name}-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    _rename(path, aside)
    shutil.rmtree(aside, ignore_errors=True)


def remove_staging(directory: Path, name: str | None = None, *, spare_living: bool = False) -> None:
    """Cleans up after killed processes in `directory`: what they left half-written is removed, and what one
    had moved aside and not yet replaced is put back. Of everything, or of the target `name` only.

    The caller sees to it that no other process writes there now, or asks with `spare_living` to leave alone
    what belongs to a process that runs on this machine.
    """
    of_target = ".+" if name is None else rf"(?:old-)?{re.escape(name)}"
    pattern = re.compile(rf"({re.escape(STAGING_PREFIX)}|{re.escape(REPLACED_PREFIX)})({of_target})-(\d+)")
    for leftover in Path(directory).iterdir() if Path(directory).is_dir() else ():
        match = pattern.fullmatch(leftover.name)
        if not match or (spare_living and _is_alive(int(match[3]))):
            continue
        target = leftover.with_name(match[2])
        if match[1] == REPLACED_PREFIX and not target.exists():
            _rename(leftover, target)
        elif leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def sha256_bytes(data: bytes) -> str:
    """Hexadecimal SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content, read in blocks."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
