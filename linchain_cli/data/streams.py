"""The bytes of a data file, compressed or not, as one stream."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from linchain_cli.errors import InputError, first_line


def _open_zstd(path: Path) -> BinaryIO:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


COMPRESSIONS: dict[str, Callable[[Path], BinaryIO]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}


def ending(name: str) -> tuple[str, str]:
    """(format, compression) of a file's name, as its endings in lower case: `rows.jsonl.gz` is (.jsonl, .gz).

    Either is "" where the name has none.
    """
    path = Path(name)
    last = path.suffix.lower()
    if last in COMPRESSIONS:
        return Path(path.stem).suffix.lower(), last
    return last, ""


@contextlib.contextmanager
def open_bytes(path: Path, name: str) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed as they are read; `name` is what messages call it.

    Raises:
        InputError: within the block, when the compressed stream is damaged or ends too early.
    """
    _, compression = ending(path.name)
    if not compression:
        with open(path, "rb") as handle:
            yield handle
        return
    try:
        with COMPRESSIONS[compression](path) as handle:
            yield handle
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # it is about the file, not about what is in it
        raise InputError(
            f"{name}: not a {compression} file that can be decompressed: {first_line(error)}. "
            "Get or write it again."
        ) from None
