"""Where exports may be written: never over what they are made from, never onto a full disk, never half."""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from linchain_cli import storage
from linchain_cli.chain import Adapter
from linchain_cli.errors import InputError, LinchainError, Stopped

_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}
_DISK_MARGIN = 64 << 20  # for the small files, and file-system blocks


def parse_size(text: str, option: str) -> int:
    """Bytes of a size such as 5GB, 500MB or 2GiB.

    Raises:
        InputError: it is none, or nothing fits into it.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", text.upper())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise InputError(
            f"{option}: '{text}' is not a size; expected a number with a unit, such as 5GB, 500MB or 2GiB"
        )
    return size


def check_output(out: Path, *, overwrite: bool, sources: Iterable[Path]) -> Path:
    """The resolved output directory, once it is clear that writing it loses nothing that anybody wants.

    `sources` are what the export reads: none may lie in it, and it may lie in none that is a directory.

    Raises:
        InputError: it exists and `overwrite` is not given, is no directory, or meets a source, the current
        directory or home.
    """
    target = storage.expand(out).resolve()
    for source in (Path(source).resolve() for source in sources):
        if target == source or target in source.parents or source in target.parents:
            raise InputError(
                f"{out} cannot be the output: it would write into or over {source}, which is read. Choose"
                " another --out."
            )
    for name, keep in (("the current directory", Path.cwd()), ("the home directory", Path.home())):
        if target == keep or target in keep.parents:
            raise InputError(f"{out} cannot be the output: it holds {name}. Choose another --out.")
    if target.exists():
        if not target.is_dir():
            raise InputError(f"{out} exists and is a file. Choose another --out.")
        if any(target.iterdir()) and not overwrite:
            raise InputError(
                f"{out} exists and is left as it is. Use --overwrite to replace it, or choose another --out."
            )
    return target


def check_factors(adapter: Adapter) -> None:
    """Raises InputError for an adapter with a value that is no finite number; the message names the
    module."""
    for path, chain in adapter.tensors.items():
        if not all(torch.isfinite(tensor).all() for tensor in chain):
            raise InputError(f"the adapter's values for '{path}' are not finite: its training diverged")


def check_disk(target: Path, needed: int) -> None:
    """Raises LinchainError where the file system of `target` has less than `needed` bytes (and a margin)
    free."""
    place = next(folder for folder in (target, *target.parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed + _DISK_MARGIN:
        raise LinchainError(
            f"{target} needs {_gigabytes(needed + _DISK_MARGIN)}, but only {_gigabytes(free)} are free there."
            " Nothing was written. Free some space or choose another --out."
        )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


@contextlib.contextmanager
def staged_output(target: Path) -> Iterator[Path]:
    """`storage.staged_directory` over an output that `check_output` has passed, its failures told in a
    sentence.

    The directory appears under its name when the block has ended without an error, as a whole or not at all,
    also when SIGTERM ends it. What an earlier process left because it was killed is removed first.
    """
    storage.remove_staging(target.parent, target.name, spare_living=True)
    removed = "What had been written was removed again."
    try:
        with _terminable(target), storage.staged_directory(target, overwrite=True) as staging:
            yield staging
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise LinchainError(
                f"the disk of {target} is full. {removed} Free some space or choose another --out."
            ) from error
        raise LinchainError(f"{target} could not be written: {error}. {removed}") from error


@contextlib.contextmanager
def _terminable(target: Path) -> Iterator[None]:
    """Makes SIGTERM an exception for the length of the block, so that what is half written goes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, _frame: object) -> None:
        raise Stopped(f"stopped; {target} was not written", signum)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def copy_files(paths: Iterable[Path], source: Path, directory: Path) -> None:
    """Copies files below `source` (what a link points to, not the link) to the same places below
    `directory`."""
    for path in paths:
        target = Path(directory) / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
