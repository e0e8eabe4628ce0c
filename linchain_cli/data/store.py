"""Encoded rows on disk: flat arrays, of which a row is read when it is needed. Memory holds a few bytes per
row.

    tokens.int32       all rows' tokens, one behind the other
    supervised.bool    the same length
    segments.uint8     the same length: which text of a pair a token is of; absent where no model is told
    offsets.int64      (rows + 1,): row i is tokens[offsets[i]:offsets[i + 1]]
    lengths.int32      (rows,): how many tokens a row has
    labels.int32       (rows,): how many of a row's tokens are supervised; one where a row has a target
    targets.float32    (rows,): a class's number, or a number to predict; absent where tokens are predicted
    hashes.uint64      (rows,): a hash of a row's tokens, to find rows that occur twice
    groups.int32       (rows,): which row of the sources it was made of, counted from 0; absent where each
                       made one
    meta.json          sizes
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from linchain_cli.data.encoding import EncodedText
from linchain_cli.storage import json_bytes, naming, write_durable

FORMAT_VERSION = 1
META_FILE = "meta.json"
_FILES = {
    "tokens": np.dtype(np.int32),
    "supervised": np.dtype(np.bool_),
    "offsets": np.dtype(np.int64),
    "lengths": np.dtype(np.int32),
    "labels": np.dtype(np.int32),
    "hashes": np.dtype(np.uint64),
    "groups": np.dtype(np.int32),
    "segments": np.dtype(np.uint8),
    "targets": np.dtype(np.float32),
}
_OPTIONAL = ("groups", "segments", "targets")


def _file(directory: Path, name: str) -> Path:
    return directory / f"{name}.{_FILES[name].name}"


class StoreWriter:
    """Appends rows to a directory's files, in a with-block. It can be opened only after `finish`."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._handles = {name: open(_file(directory, name), "wb") for name in _FILES}
        self.rows = self._groups = self._tokens = 0
        self._write("offsets", [0])

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles.values():
            handle.close()

    def _write(self, name: str, values: Any) -> None:
        with naming(_file(self._directory, name)):
            self._handles[name].write(np.asarray(values, dtype=_FILES[name]).data)

    def append(self, groups: Iterable[Sequence[EncodedText]]) -> None:
        """Writes the training rows that each row of a source became."""
        groups = [group for group in groups if group]
        rows = [row for group in groups for row in group]
        if not rows:
            return
        ends = self._tokens + np.cumsum([len(row.input_ids) for row in rows])
        self._write("tokens", np.concatenate([row.input_ids for row in rows]))
        self._write("supervised", np.concatenate([row.supervised for row in rows]))
        self._write("offsets", ends)
        self._write("lengths", [len(row.input_ids) for row in rows])
        self._write("labels", [np.count_nonzero(row.supervised) for row in rows])
        self._write("hashes", [_hash(row.input_ids) for row in rows])
        if rows[0].target is not None:
            self._write("targets", [row.target for row in rows])
        if rows[0].segments is not None:
            self._write("segments", np.concatenate([row.segments for row in rows]))
        numbers = np.arange(self._groups, self._groups + len(groups))
        self._write("groups", np.repeat(numbers, [len(group) for group in groups]))
        self.rows += len(rows)
        self._groups += len(groups)
        self._tokens = int(ends[-1])

    def finish(self) -> None:
        meta = {"format": FORMAT_VERSION, "rows": self.rows, "tokens": self._tokens}
        if self._groups != self.rows:
            meta["groups"] = self._groups
        for name in ("segments", "targets"):
            if self._handles[name].tell():
                meta[name] = True
        for name in _OPTIONAL:
            if name not in meta:
                _file(self._directory, name).unlink()
        write_durable(self._directory / META_FILE, json_bytes(meta))


def _hash(input_ids: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(input_ids.data, digest_size=8).digest(), "little")


class EncodedStore:
    """A directory that StoreWriter wrote. Raises ValueError or OSError if it is not whole.

    Rows are read from their files one by one rather than through a memory map, whose pages would count as the
    process's memory until they are all of it.
    """

    def __init__(self, directory: Path):
        meta = json.loads((directory / META_FILE).read_bytes())
        if meta["format"] != FORMAT_VERSION:
            raise ValueError(f"format {meta['format']}, not {FORMAT_VERSION}")
        self.num_rows: int = meta["rows"]
        self.num_groups: int = meta.get("groups", self.num_rows)
        self._directory = directory
        self.has_segments: bool = "segments" in meta
        self.has_targets: bool = "targets" in meta
        of_tokens = dict.fromkeys(("tokens", "supervised", "segments"), meta["tokens"])
        sizes = {**of_tokens, "offsets": self.num_rows + 1}
        for name, dtype in _FILES.items():
            if name in _OPTIONAL and name not in meta:
                continue
            size, path = sizes.get(name, self.num_rows) * dtype.itemsize, _file(directory, name)
            if path.stat().st_size != size:
                raise ValueError(f"{path.name} has {path.stat().st_size} bytes, not {size}")
        self._handles = {
            name: open(_file(directory, name), "rb")
            for name in ("tokens", "supervised", "offsets", *(["segments"] if self.has_segments else []))
        }

    def _read(self, name: str, start: int, end: int) -> np.ndarray:
        """Elements start to end of a file, read at a position: threads and forks share no cursor."""
        size = _FILES[name].itemsize
        data = os.pread(self._handles[name].fileno(), int(end - start) * size, int(start) * size)
        return np.frombuffer(data, dtype=_FILES[name])

    def row(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids int32, supervised bool), both (length,)."""
        start, end = self._read("offsets", row, row + 2)
        return self._read("tokens", start, end), self._read("supervised", start, end)

    def segments(self, row: int) -> np.ndarray | None:
        """Which text each token is of, (length,) uint8; None where no model is told."""
        return self._read("segments", *self._read("offsets", row, row + 2)) if self.has_segments else None

    def groups(self) -> np.ndarray | None:
        """Which row of the sources each row was made of: (rows,) int32, ascending; None where each made
        one."""
        return self.column("groups") if self.num_groups < self.num_rows else None

    def column(self, name: str, start: int = 0, rows: int = -1) -> np.ndarray:
        """One number of each row, as a new array: `lengths`, `labels`, `hashes` or `targets`."""
        dtype = _FILES[name]
        return np.fromfile(
            _file(self._directory, name), dtype=dtype, count=rows, offset=start * dtype.itemsize
        )

    def highest_token(self) -> int:
        """The largest id of all rows, looked at in blocks."""
        total, block = int(self._read("offsets", self.num_rows, self.num_rows + 1)[0]), 1 << 22
        starts = range(0, total, block)
        return max(int(self._read("tokens", at, min(at + block, total)).max()) for at in starts)


class EncodedRows:
    """Rows of a store: all of them, `only` some (in any order, also several times), or all `without` some
    (ascending).

    `encoded[i]` is (input_ids int32, supervised bool), both (length,), read from disk as it is asked for.
    """

    def __init__(
        self, store: EncodedStore, *, only: np.ndarray | None = None, without: np.ndarray | None = None
    ):
        self.store = store
        self._only = only
        self._without = np.empty(0, np.int64) if without is None else without
        # Row i of what is left lies behind as many missing rows as have at most i rows left before them.
        self._left_before = self._without - np.arange(len(self._without))

    def __len__(self) -> int:
        return self.store.num_rows - len(self._without) if self._only is None else len(self._only)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self.store.row(self.store_row(index))

    def segments(self, index: int) -> np.ndarray | None:
        """Which of its texts each token of a row is of, (length,) uint8; None where no model is told."""
        return self.store.segments(self.store_row(index))

    def store_row(self, index: int) -> int:
        """Which row of the store this is."""
        if self._only is not None:
            return int(self._only[index])
        return index + int(np.searchsorted(self._left_before, index, side="right"))

    def store_rows(self) -> np.ndarray:
        """Which rows of the store these are: (rows,) int32."""
        if self._only is not None:
            return self._only
        return np.delete(np.arange(self.store.num_rows, dtype=np.int32), self._without)

    def _column(self, name: str) -> np.ndarray:
        values = self.store.column(name)
        if self._only is not None:
            return values[self._only]
        return np.delete(values, self._without) if len(self._without) else values

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row: (rows,) int32."""
        return self._column("lengths")

    @cached_property
    def supervised_counts(self) -> np.ndarray:
        """Supervised tokens of each row: (rows,) int32."""
        return self._column("labels")

    @cached_property
    def targets(self) -> np.ndarray:
        """Each row's class or number, (rows,) float32, where rows have one."""
        return self._column("targets")

    @cached_property
    def starts(self) -> np.ndarray | None:
        """Where the rows of each conversation begin, ascending, (conversations,) int32; None where each row
        of the sources became one row."""
        groups = self.store.groups()
        if groups is None:
            return None
        rows = self.store_rows()
        goes_on = (np.diff(rows) == 1) & (np.diff(groups[rows]) == 0)
        return np.flatnonzero(np.concatenate([[True], ~goes_on])).astype(np.int32)

    def repeated_in(self, others: EncodedRows, block: int = 1 << 16) -> int:
        """How many of these rows have the same tokens as one of `others`, looked at in blocks."""
        wanted = self._column("hashes")
        if others._only is not None:
            return int(np.isin(wanted, others._column("hashes"), kind="sort").sum())
        found = np.zeros(len(wanted), dtype=bool)
        for start in range(0, others.store.num_rows, block):
            hashes = others.store.column("hashes", start, block)
            left_out = others._without[(others._without >= start) & (others._without < start + block)] - start
            found |= np.isin(wanted, np.delete(hashes, left_out), kind="sort")
        return int(found.sum())
