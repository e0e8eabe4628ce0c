"""What tells one base model from another: one hash of its tensors, however they are spread over files.

A hash reads `tensors:<64 digits>`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from linchain_cli import console
from linchain_cli.cache import cache_root, is_settled
from linchain_cli.errors import InputError
from linchain_cli.locks import locked
from linchain_cli.machine import cpu_limit
from linchain_cli.model.files import weight_files
from linchain_cli.records import read_record, write_record
from linchain_cli.storage import make_directory, sha256_bytes

if TYPE_CHECKING:
    from linchain_cli.model.checkpoint import StoredTensor

PREFIX = "tensors:"
_BLOCK = 4 << 20  # bytes that are read at a time
_BLOB = re.compile(r"[0-9a-f]{64}")


def base_hash(directory: Path) -> str:
    """One hash of a checkpoint's weights: of every tensor's name, type, shape and bytes, in order of names.

    What a file's tensors hash to is kept in the cache directory; the file is read again only once it has
    changed.

    Raises:
        InputError: there are no weights, or a file is damaged.
    """
    tensors: dict[str, str] = {}
    for path in weight_files(directory):
        tensors.update(_file_hashes(path))
    lines = [f"{name}\t{described}" for name, described in sorted(tensors.items())]
    return PREFIX + sha256_bytes("\n".join(lines).encode())


def refuse_other_base(directory: Path, wanted: str | None, name: str, *, allow: bool = False) -> str:
    """The hash of the base at `directory`, once it is clear that it is the one that `name` was trained on.

    Args:
        wanted: the hash of that one; None if it was not recorded.
        allow: take another one all the same.

    Raises:
        InputError: it is another one.
    """
    found = base_hash(directory)
    if wanted in (None, found) or allow:
        return found
    raise InputError(
        f"{name} was trained on other weights than {directory} holds ({short(wanted)}, not {short(found)})."
        " Name the right base with --base MODEL, or take this one all the same with --allow-other-base."
    )


def short(base: str) -> str:
    """A hash for a message."""
    return base.removeprefix(PREFIX)[:12] + "…"


@dataclass(frozen=True)
class _Kept:
    """A cache file: what the tensors of one weight file hash to, by name."""

    FORMAT: ClassVar[str] = "linchain tensor hashes"
    VERSION: ClassVar[int] = 1

    tensors: dict[str, str]


def _file_hashes(path: Path) -> dict[str, str]:
    """Name -> `type shape sha256` of a weight file's tensors, from the cache where they are there."""
    identity = _identity(path)
    if identity is None:
        return _read_and_hash(path)
    entry = _cache_entry(identity)
    if found := _kept(entry):
        return found
    with _alone(entry):
        found = _kept(entry)  # unless another process was first
        if not found:
            found = _read_and_hash(path)
            if _identity(path) == identity:
                with contextlib.suppress(OSError):  # a cache that cannot be written is none
                    write_record(entry, _Kept(found))
    return found


def _identity(path: Path) -> str | None:
    """As long as it is the same, so is the file's content: its name in the hub's cache, which is its SHA-256,
    or its place and times. None for one that has just been written."""
    status = path.stat()
    if blob := _blob(path):
        return f"{blob} {status.st_size}"
    if not is_settled(status):
        return None
    times = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    return " ".join(map(str, (path.resolve(), *times)))


def _blob(path: Path) -> str | None:
    """The SHA-256 by which the hub's cache names a file, if it lies there."""
    real = path.resolve()
    return real.name if real.parent.name == "blobs" and _BLOB.fullmatch(real.name) else None


def _cache_entry(identity: str) -> Path:
    return cache_root() / "hashes" / f"{sha256_bytes(identity.encode())[:32]}.json"


def _kept(entry: Path) -> dict[str, str] | None:
    try:
        return read_record(entry, _Kept).tensors
    except InputError:
        return None


@contextlib.contextmanager
def _alone(entry: Path) -> Iterator[None]:
    """One process at a time, where the cache can be written; the others wait and find what it kept."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            make_directory(entry.parent)
            stack.enter_context(locked(entry, wait=None, needed=False))
        yield


def _read_and_hash(path: Path) -> dict[str, str]:
    from linchain_cli.model.checkpoint import read_tensors

    tensors = read_tensors(path)
    total, done = sum(tensor.nbytes for tensor in tensors.values()), 0
    digests = []
    with concurrent.futures.ThreadPoolExecutor(min(8, cpu_limit())) as pool:
        progress = console.Progress("bytes", bars=False)
        for tensor, digest in zip(tensors.values(), pool.map(_digest, tensors.values()), strict=True):
            digests.append(digest)
            done += tensor.nbytes
            progress.show("reading the base's weights", done, total, path.name)
    return {
        name: f"{tensor.type} {list(tensor.shape)} {digest}"
        for (name, tensor), digest in zip(tensors.items(), digests, strict=True)
    }


def _digest(tensor: StoredTensor) -> str:
    """SHA-256 of the tensor's bytes, read in blocks."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(min(_BLOCK, tensor.nbytes)))
    for first in range(0, tensor.nbytes, _BLOCK):
        part = block[: min(_BLOCK, tensor.nbytes - first)]
        tensor.read_into(part, first)
        digest.update(part)
    return digest.hexdigest()
