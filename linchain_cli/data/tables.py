"""Files of Arrow tables, one row at a time: .parquet and .arrow."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from linchain_cli.data.readers import Reader
from linchain_cli.errors import InputError, first_line

_BATCH = 1024  # rows that are Python objects at once


class TableReader(Reader):
    """A table whose columns are named once; only those in `wanted` are read (all, if none of them is
    there)."""

    kind = ""

    def __init__(self, path: Path, name: str, wanted: set[str]):
        super().__init__(path, name)
        self._wanted = wanted

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with self._problems():
            for batch in self._batches():
                for row in batch.to_pylist():
                    self.row += 1
                    yield row
        if not self.row:
            raise self.problem("the file has no rows.")

    def count(self) -> int:
        """How many rows the file has, without reading them."""
        raise NotImplementedError

    def _batches(self) -> Iterator[Any]:
        """Sets `header`, and gives pieces of at most _BATCH rows."""
        raise NotImplementedError

    def _columns(self, header: list[str]) -> list[str]:
        self.header = header
        return [name for name in header if name in self._wanted] or header

    @contextlib.contextmanager
    def _problems(self) -> Iterator[None]:
        import pyarrow

        try:
            yield
        except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
            raise InputError(
                f"{self.name}: not {self.kind} file that can be read: {first_line(error)}. "
                "Get or write it again."
            ) from None


class ParquetReader(TableReader):
    """A parquet file, read by row groups."""

    kind = "a parquet"

    def count(self) -> int:
        import pyarrow.parquet

        with self._problems():
            return pyarrow.parquet.read_metadata(self.path).num_rows

    def _batches(self) -> Iterator[Any]:
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(self.path) as file:
            columns = self._columns(file.schema_arrow.names)
            yield from file.iter_batches(batch_size=_BATCH, columns=columns)


class ArrowReader(TableReader):
    """An Arrow file, as a stream (what `datasets` writes) or with random access (Feather)."""

    kind = "an .arrow"

    def count(self) -> int:
        with self._problems():
            return sum(batch.num_rows for batch in self._stored())

    def _batches(self) -> Iterator[Any]:
        for batch in self._stored():
            columns = self._columns(batch.schema.names)
            for start in range(0, batch.num_rows, _BATCH):
                yield batch.select(columns).slice(start, _BATCH)

    def _stored(self) -> Iterator[Any]:
        import pyarrow

        with pyarrow.OSFile(str(self.path)) as source:
            try:
                file = pyarrow.ipc.open_file(source)
            except pyarrow.ArrowInvalid:
                source.seek(0)
                yield from pyarrow.ipc.open_stream(source)
            else:
                yield from (file.get_batch(number) for number in range(file.num_record_batches))
