"""What a classifier tells, and of rows of which length: other tools' adapter formats have no place for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from linchain_cli.records import read_record

TELLING_FILE = "linchain_labels.json"


@dataclass(frozen=True, kw_only=True)
class Telling:
    """linchain_labels.json.

    classes: their names, in the order of the outputs; none for a regression
    max_length: the tokens that rows were cut to; None: not known
    """

    FORMAT: ClassVar[str] = "linchain labels"
    VERSION: ClassVar[int] = 1

    classes: list[str] = field(default_factory=list)
    max_length: int | None = None


def read_telling(directory: Path) -> Telling | None:
    """What an adapter's directory says of it; None if it says nothing.

    Raises:
        InputError: its file is damaged.
    """
    path = directory / TELLING_FILE
    return read_record(path, Telling) if path.is_file() else None
