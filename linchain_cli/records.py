"""JSON files that several parts read, as formats: each is a dataclass with a name and a version, and has one
reader.

A format is a dataclass with two class variables, `FORMAT` (its name in the file) and `VERSION`, which rises
when an older reader would misread what is written. Keys that the class does not know are left alone, so that
a file of a later version that only adds to it can be read.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from linchain_cli import storage
from linchain_cli.errors import InputError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Record = TypeVar("Record")


def read_record(path: Path, kind: type[Record]) -> Record:
    """The file's content as a `kind`.

    Raises:
        InputError: it cannot be read, is no file of this format, is damaged, or of a later version.
    """
    return _checked(_content(path, kind), kind, path)


def write_record(path: Path, record: Any) -> None:
    """Writes the record as one step, with the name and the version of its format."""
    storage.write_atomic(path, record_bytes(record))


def record_bytes(record: Any) -> bytes:
    """The file of a record."""
    return _bytes(type(record), asdict(record))


def update_record(path: Path, kind: type, changes: dict[str, Any]) -> None:
    """Writes `changes` over those fields of a file that exists, or begins it with them, as one step.

    Raises:
        TypeError: the format has no such field, or it takes no such value.
        InputError: what is there cannot be read.
    """
    known = {field.name for field in fields(kind)}
    if unknown := sorted(changes.keys() - known):
        raise TypeError(f"{kind.__name__} has no field {', '.join(unknown)}: add it there")
    before = _content(path, kind) if path.exists() else {}
    content = before | {name: _plain(value) for name, value in changes.items()}
    try:
        _checked(content, kind, path)
    except InputError as error:
        raise TypeError(f"not written: {error}") from error
    storage.write_atomic(path, _bytes(kind, content))


def _bytes(kind: type, content: dict[str, Any]) -> bytes:
    return storage.json_bytes({"format": kind.FORMAT, "format_version": kind.VERSION} | content)


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _content(path: Path, kind: type) -> dict[str, Any]:
    """A file's content, once it is clear that it is of this format."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged: it holds no JSON object")
    name, version = content.pop("format", kind.FORMAT), content.pop("format_version", kind.VERSION)
    if name != kind.FORMAT or not isinstance(version, int):
        raise InputError(f"{path} is no '{kind.FORMAT}' file: it names its format {name!r}, {version!r}")
    if version > kind.VERSION:
        raise InputError(
            f"{path} has format version {version}, this linchain reads up to {kind.VERSION}: install the"
            " version that wrote it, or a later one"
        )
    return content


def _checked(content: dict[str, Any], kind: type[Record], path: Path) -> Record:
    from pydantic import ValidationError

    try:
        text = storage.utf8(json.dumps(content, ensure_ascii=False))
        return _adapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(f"{path} is damaged: {place}: {first['msg'].lower()}") from error


@functools.cache
def _adapter(kind: type[Record]) -> TypeAdapter[Record]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)
