"""A source's rows as they are stored, one at a time: of files, of saved and hub data sets, of one split or a
slice of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from linchain_cli.data.files import DataFile, count_rows, open_reader
from linchain_cli.data.rows import RowError
from linchain_cli.data.sources import DATA_DIR_VARIABLE, Source, stand_in
from linchain_cli.data.tables import TableReader
from linchain_cli.errors import InputError, did_you_mean

if TYPE_CHECKING:
    import datasets

    from linchain_cli.data.readers import Reader

_ONE_SPLIT = re.compile(r"[\w.-]+")
_MANY = 1 << 62


class RawRows:
    """The rows of a source: a dict each, or a RowError for one that cannot be read but can be skipped.

    Iterate once. `columns` are the names that the format gives once for all rows (None for .json, where
    each row has its own); `class_names` what the integers in columns of classes stand for. Where the format
    allows it, only the columns in `wanted` are read (all, if none of them is there).
    """

    def __init__(self, source: Source, wanted: set[str]):
        self.source = source
        self.columns: list[str] | None = None
        self.class_names: dict[str, list[str]] = {}
        self._wanted = wanted
        self._reader: Reader | None = None
        self._number, self._split = 0, source.split or "train"

    def __iter__(self) -> Iterator[dict[str, Any] | RowError]:
        yield from islice(self._rows(), self.source.max_rows)

    def place(self) -> str:
        """Where the last row stands: its file, line and number there, or its number in the split."""
        if self._reader is None:
            return f"{self.source.name} (row {self._number}, split {self._split})"
        line = f":{self._reader.line}" if self._reader.line else ""
        return f"{self._reader.name}{line} (row {self._reader.row})"

    @property
    def is_table(self) -> bool:
        """Whether a key that a row does not have comes as null, because another row has it."""
        return self._reader is None or isinstance(self._reader, TableReader)

    def header_place(self) -> str:
        """What `columns` belong to: a file and its line, or the data set."""
        if self._reader is None:
            return self.source.name
        return f"{self._reader.name}:1" if self._reader.line else self._reader.name

    def _rows(self) -> Iterator[dict[str, Any] | RowError]:
        source = self.source
        if source.kind == "hub":
            yield from self._of_dataset(hub_dataset(source))
        elif source.kind == "saved":
            from linchain_cli.data.hub import load_saved

            stored = load_saved(source.location)
            for split, start, stop in slices(source, list(stored), lambda name: len(stored[name])):
                rows = stored[split]
                yield from self._of_dataset(rows.select(range(start, min(stop, len(rows)))), split, start)
        elif source.kind == "generated":
            from linchain_cli.data.everyday import STYLES, everyday_rows

            for split, start, stop in slices(source, list(STYLES), lambda name: len(everyday_rows(name))):
                self._split = split
                self._number = start
                for row in everyday_rows(split)[start:stop]:
                    self._number += 1
                    yield row
        else:
            files = source.files.splits
            for split, start, stop in slices(source, list(files), lambda name: _count(files[name])):
                yield from islice(self._of_files(files[split]), start, stop)

    def _of_files(self, files: Iterable[DataFile]) -> Iterator[dict[str, Any] | RowError]:
        for file in files:
            self._reader = open_reader(file, self._wanted)
            for row in self._reader:
                self.columns = self._reader.header
                yield row

    def _of_dataset(
        self, dataset: datasets.Dataset, split: str | None = None, start: int = 0
    ) -> Iterator[dict[str, Any]]:
        from linchain_cli.data.hub import hub_rows

        self.columns, self._split = dataset.column_names, split or self._split
        self.class_names = {
            name: feature.names for name, feature in dataset.features.items() if hasattr(feature, "names")
        }
        self._number = start
        for row in hub_rows(dataset, self._wanted):
            self._number += 1
            yield row


def hub_dataset(source: Source) -> datasets.Dataset:
    """The split of a source that `datasets` loads.

    Raises:
        InputError: it cannot be had; the message says which file could stand in for it.
    """
    from linchain_cli.data.hub import load_hub_dataset

    files, split = json.dumps(source.data_files, sort_keys=True) if source.data_files else None, source.split
    try:
        return load_hub_dataset(source.location, split or "train", source.revision, source.config, files)
    except InputError as error:
        if (file := stand_in(source)) is None:
            raise
        raise InputError(f"{error} Or let {DATA_DIR_VARIABLE} name a directory that holds {file}.") from error


def _count(files: Sequence[DataFile]) -> int:
    return sum(map(count_rows, files))


def slices(source: Source, splits: Sequence[str], count: Callable[[str], int]) -> list[tuple[str, int, int]]:
    """What `source.split` asks for, as (split, first row, row behind the last): `train`, `train[10:20]`,
    `train[:5%]`, `train+test`.

    A source with one split calls it as the recipe does. `count` tells a split's rows, and is only asked where
    the slice depends on it. Raises InputError for another notation and for a split that is not there.
    """
    spec = source.split
    if spec is None:
        if len(splits) == 1 or "train" in splits:
            return [(splits[0] if len(splits) == 1 else "train", 0, _MANY)]
        spec = "train"
    if _ONE_SPLIT.fullmatch(spec):
        return [(_known(spec, source, splits), 0, _MANY)]
    from datasets import ReadInstruction

    names = [part.partition("[")[0].strip() for part in spec.split("+")]
    found = {name: _known(name, source, splits) for name in names}
    relative = "%" in spec or "-" in spec.replace("(pct1_dropremainder)", "")
    lengths = {name: count(found[name]) if relative else _MANY for name in names}
    try:
        parts = ReadInstruction.from_spec(spec).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        raise InputError(
            f"data.split: '{spec}' is no split or slice, such as train, train[:100], train[10%:20%] or "
            f"train+test ({error})."
        ) from None
    return [(found[part.splitname], part.from_, max(part.from_, part.to)) for part in parts]


def _known(split: str, source: Source, splits: Sequence[str]) -> str:
    if split in splits:
        return split
    if source.files is not None and not source.files.named:
        return splits[0]  # files without splits have one, whatever it is called
    raise InputError(
        f"data: '{source.name}' has no split '{split}'. Splits: {', '.join(splits)}."
        f"{did_you_mean(split, splits)}"
    )
