"""Encoded rows on disk: flat arrays that are memory-mapped, so that opening them costs nothing per row.

    tokens.int32       all rows' tokens, one behind the other
    supervised.bool    the same length
    offsets.int64      (rows + 1,): row i is tokens[offsets[i]:offsets[i + 1]]
    labels.int32       (rows,): how many of a row's tokens are supervised
    hashes.uint64      (rows,): a hash of a row's tokens, to find rows that occur twice
    meta.json          sizes, and what the encoding reported
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from linchain_cli.data.encoding import EncodedText
from linchain_cli.storage import json_bytes, write_durable

FORMAT_VERSION = 1
_FILES = {
    "tokens": np.dtype(np.int32),
    "supervised": np.dtype(np.bool_),
    "offsets": np.dtype(np.int64),
    "labels": np.dtype(np.int32),
    "hashes": np.dtype(np.uint64),
}


def _file(directory: Path, name: str) -> Path:
    return directory / f"{name}.{_FILES[name].name}"


class StoreWriter:
    """Appends rows to the files of a directory, in a with-block; `finish` writes meta.json, without which it cannot
    be opened."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._handles = {name: open(_file(directory, name), "wb") for name in _FILES}
        self._rows = self._tokens = 0
        self._write("offsets", [0])

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles.values():
            handle.close()

    def _write(self, name: str, values: Any) -> None:
        self._handles[name].write(np.asarray(values, dtype=_FILES[name]).data)

    def append(self, rows: Iterable[EncodedText]) -> None:
        rows = list(rows)
        if not rows:
            return
        ends = self._tokens + np.cumsum([len(row.input_ids) for row in rows])
        self._write("tokens", np.concatenate([row.input_ids for row in rows]))
        self._write("supervised", np.concatenate([row.supervised for row in rows]))
        self._write("offsets", ends)
        self._write("labels", [np.count_nonzero(row.supervised) for row in rows])
        self._write("hashes", [_hash(row.input_ids) for row in rows])
        self._rows += len(rows)
        self._tokens = int(ends[-1])

    def finish(self, report: dict[str, Any]) -> None:
        meta = {"format": FORMAT_VERSION, "rows": self._rows, "tokens": self._tokens, "report": report}
        write_durable(self._directory / "meta.json", json_bytes(meta))


def _hash(input_ids: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(input_ids.data, digest_size=8).digest(), "little")


class EncodedStore:
    """A directory that StoreWriter wrote, memory-mapped. Raises ValueError or OSError if it is not whole."""

    def __init__(self, directory: Path):
        meta = json.loads((directory / "meta.json").read_bytes())
        if meta["format"] != FORMAT_VERSION:
            raise ValueError(f"format {meta['format']}, not {FORMAT_VERSION}")
        self.report: dict[str, Any] = meta["report"]
        self.num_rows: int = meta["rows"]
        sizes = {"tokens": meta["tokens"], "supervised": meta["tokens"], "offsets": self.num_rows + 1}
        for name, dtype in _FILES.items():
            size, path = sizes.get(name, self.num_rows), _file(directory, name)
            if path.stat().st_size != size * dtype.itemsize:
                raise ValueError(f"{path.name} has {path.stat().st_size} bytes, not {size * dtype.itemsize}")
            array = np.memmap(path, dtype=dtype, mode="r", shape=(size,)) if size else np.empty(0, dtype)
            setattr(self, name, array)

    tokens: np.ndarray
    supervised: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    hashes: np.ndarray


class EncodedRows:
    """Rows of a store, all of them or those that `rows` (int32, ascending) lists.

    `encoded[i]` is (input_ids int32, supervised bool), both (length,) and read from disk as they are needed.
    """

    def __init__(self, store: EncodedStore, rows: np.ndarray | None = None):
        self.store = store
        self._rows = rows

    def __len__(self) -> int:
        return self.store.num_rows if self._rows is None else len(self._rows)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row = index if self._rows is None else self._rows[index]
        part = slice(self.store.offsets[row], self.store.offsets[row + 1])
        return self.store.tokens[part], self.store.supervised[part]

    def _chosen(self, values: np.ndarray) -> np.ndarray:
        return values if self._rows is None else values[self._rows]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row: (rows,) int32."""
        return self._chosen(np.diff(self.store.offsets).astype(np.int32))

    @cached_property
    def supervised_counts(self) -> np.ndarray:
        """Supervised tokens of each row: (rows,) int32."""
        return self._chosen(self.store.labels)

    @property
    def hashes(self) -> np.ndarray:
        """A hash of each row's tokens: (rows,) uint64."""
        return self.hashes_of(slice(None))

    def hashes_of(self, part: slice) -> np.ndarray:
        """The hashes of some of the rows."""
        return self.store.hashes[part] if self._rows is None else self.store.hashes[self._rows[part]]
