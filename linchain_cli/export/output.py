"""Where exports may be written: never over what they are made from, never onto a full disk, never half."""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from linchain_cli import directories, storage
from linchain_cli.chain import Adapter
from linchain_cli.errors import InputError, LinchainError, Stopped
from linchain_cli.export.receipts import Receipt, check_replaceable
from linchain_cli.stopping import caught

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
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]I?)?B?\s*", text.upper())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise InputError(
            f"{option}: '{text}' is not a size; expected a number with a unit, such as 5GB, 500MB or 2GiB"
        )
    return size


def check_output(
    out: Path, kind: type[Receipt] | None = None, *, overwrite: bool = False, sources: Iterable[Path]
) -> Path:
    """The resolved output directory, once it is clear that it can be written and that nothing is lost by it.

    Args:
        kind: the receipt by which the command knows what it wrote; None where nothing is ever replaced.
        sources: what the export reads: none may lie in it, and it may lie in none that is a directory.

    Raises:
        InputError: it exists and `overwrite` is not given, or another hand wrote what it holds; it is no
        directory, cannot be written to, or meets a source, the current directory or home.
    """
    target = storage.expand(out).resolve()
    for source in (Path(source).resolve() for source in sources):
        if target == source or target in source.parents or source in target.parents:
            raise InputError(
                f"{out} cannot be the output: it would write into or over {source}, which is read. Choose"
                " another --out."
            )
    for name, place in (("the current directory", "."), ("the home directory", "~")):
        try:
            keep = storage.expand(place).resolve()
        except (OSError, InputError):  # gone, or of a container's user who has none
            continue
        if target == keep or target in keep.parents:
            raise InputError(f"{out} cannot be the output: it holds {name}. Choose another --out.")
    _check_writable(out, target)
    if target.is_dir() and not directories.is_empty(target):
        if kind is not None and overwrite:
            check_replaceable(target, kind)
        else:
            raise InputError(f"{out} exists and is left as it is. {_way_out(target, kind)}")
    return target


def _way_out(target: Path, kind: type[Receipt] | None) -> str:
    """What to do about an output that exists: `--overwrite` is named where it would be heard."""
    with contextlib.suppress(InputError):
        if kind is not None:
            check_replaceable(target, kind)
            return "Use --overwrite to replace it, or choose another --out."
    return "Choose another --out."


def _check_writable(out: Path, target: Path) -> None:
    """Raises InputError where nothing can be written there."""
    place = next(folder for folder in (target, *target.parents) if folder.exists())
    if not place.is_dir():
        what = "exists and is a file" if place == target else f"cannot be made: {place} is a file"
        raise InputError(f"{out} {what}. Choose another --out.")
    try:
        directories.check_writable(target)
    except InputError as error:
        raise InputError(f"{error}. Choose another --out.") from error


def check_factors(adapter: Adapter) -> None:
    """Raises InputError for an adapter with a value that is no finite number; the message names the
    module."""
    for path, chain in adapter.tensors.items():
        if not all(torch.isfinite(tensor).all() for tensor in chain):
            raise InputError(f"the adapter's values for '{path}' are not finite: its training diverged")


def check_disk(target: Path, needed: int) -> None:
    """Raises LinchainError where the file system of `target` has less than `needed` bytes (and a margin)
    free."""
    free = shutil.disk_usage(directories.staging_place(target)).free
    if free < needed + _DISK_MARGIN:
        raise LinchainError(
            f"{target} needs {_gigabytes(needed + _DISK_MARGIN)}, but only {_gigabytes(free)} are free there."
            " Nothing was written. Free some space or choose another --out."
        )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


@contextlib.contextmanager
def staged_output(
    target: Path, kind: type[Receipt] | None = None, *, overwrite: bool = False
) -> Iterator[Path]:
    """`directories.staged_directory` over an output that `check_output` has passed, its failures told in a
    sentence.

    The directory appears under its name when the block has ended without an error, as a whole or not at all,
    also when a signal ends it. What another process wrote there in the meantime is left as it is.
    """
    removed = "What had been written was removed again."
    taken = f"{target} was written by another process in the meantime; it is left as it is. {removed}"
    try:
        with (
            stops_with(f"stopped; {target} was not written"),
            directories.staged_directory(target, overwrite=overwrite) as staging,
        ):
            yield staging
            if target.is_dir() and not directories.is_empty(target):
                if not overwrite or kind is None:
                    raise InputError(taken)
                check_replaceable(target, kind)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise InputError(taken) from error
        if error.errno in storage.NO_ROOM:
            raise LinchainError(
                f"the disk of {target} is full. {removed} Free some space or choose another --out."
            ) from error
        raise LinchainError(f"{target} could not be written: {error}. {removed}") from error


@contextlib.contextmanager
def stops_with(message: str) -> Iterator[None]:
    """Makes a signal that asks for a stop, for the length of the block, an exception that says what was kept
    and what was not."""

    def stop(signum: int, _frame: object) -> None:
        raise Stopped(message, signum)

    with caught(stop):
        yield


def copy_files(paths: Iterable[Path], source: Path, directory: Path) -> None:
    """Copies files below `source` (what a link points to, not the link) to the same places below
    `directory`."""
    for path in paths:
        target = Path(directory) / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
