"""Data files: which there are at a path, in a directory, behind a pattern or at an address; and their
readers."""

from __future__ import annotations

import contextlib
import glob
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from linchain_cli.cache import cache_root, keep, remove_unused
from linchain_cli.data.readers import CsvReader, JsonLinesReader, JsonReader, Reader, TsvReader, starts_list
from linchain_cli.data.streams import COMPRESSIONS, ending
from linchain_cli.data.tables import ArrowReader, ParquetReader, TableReader
from linchain_cli.errors import InputError, LinchainError, did_you_mean, first_line, some
from linchain_cli.storage import (
    NO_ROOM,
    broken_link,
    expand,
    make_directory,
    refuse_lfs_pointer,
    sha256_bytes,
    staged_file,
)

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

TEXTS: dict[str, type[Reader]] = {
    ".json": JsonReader,
    ".jsonl": JsonLinesReader,
    ".ndjson": JsonLinesReader,
    ".csv": CsvReader,
    ".tsv": TsvReader,
}
TABLES: dict[str, type[TableReader]] = {".parquet": ParquetReader, ".arrow": ArrowReader}
ENDINGS = f"{', '.join(TEXTS)} (also with {', '.join(COMPRESSIONS)} behind it), {', '.join(TABLES)}"


@dataclass(frozen=True)
class DataFile:
    """A file that is on this machine: `path` is where, `name` how messages call it (its address, if it was
    fetched). `header` are the columns of a .tsv file without a header line."""

    path: Path
    name: str
    header: tuple[str, ...] | None = None


@dataclass(frozen=True)
class FoundFiles:
    """The files of one source by split, in name order; `left_out` are names beside them that are not read.

    `named` says that the splits are told by the files' names; else all files are one, whatever it is called.
    """

    location: str
    splits: dict[str, tuple[DataFile, ...]]
    left_out: tuple[str, ...] = ()
    named: bool = False


def is_data_file(name: str) -> bool:
    """Whether a file of that name can be read as rows."""
    form, compression = ending(name)
    return form in TEXTS or form in TABLES and not compression


def open_reader(file: DataFile | Path, wanted: set[str]) -> Reader:
    """The reader for a file by its name's ending; `wanted` are the columns that will be asked for."""
    if isinstance(file, Path):
        file = DataFile(file, str(file))
    refuse_lfs_pointer(file.path, file.name)
    form, _ = ending(file.path.name)
    if form in TABLES:
        return TABLES[form](file.path, file.name, wanted)
    reader = TEXTS[form](file.path, file.name)
    if file.header is not None:
        reader.header = list(file.header)
    if isinstance(reader, JsonLinesReader) and starts_list(reader):
        return JsonReader(file.path, file.name)  # a list in a file named .jsonl is read as what it is
    return reader


def count_rows(file: DataFile) -> int:
    """The rows of a file, those that cannot be used among them."""
    reader = open_reader(file, set())
    return reader.count() if isinstance(reader, TableReader) else sum(1 for _ in reader)


def find_files(name: str) -> FoundFiles | None:
    """The files that a source's path names: an address, a file, a directory or a pattern with * or ?.

    None if it looks like none of these. Raises InputError for one that is not there, may not be read or is
    no data file.
    """
    if "://" in name:
        return _at_address(name)
    path = expand(name)
    if path.is_dir():
        return _in_directory(path)
    if glob.has_magic(name) and not path.exists():
        return _matching(str(path))
    if path.exists() or is_data_file(name) or name.startswith(("/", "./", "../", "~")):
        check_file(path)
        return FoundFiles(str(path), {"train": (DataFile(path, str(path)),)})
    return None


def check_file(path: Path) -> None:
    """Raises InputError unless there is a data file that may be read."""
    if path.exists() and not is_data_file(path.name):
        texts = ' Write each document of a text as a line {"text": ...} of a .jsonl file.'
        hint = texts if path.suffix in (".txt", ".md") else ""
        raise InputError(f"data: {path} is a file; a data file ends in {ENDINGS}.{hint}")
    if not path.is_file():
        beside = path.parent.iterdir() if path.parent.is_dir() else ()
        named = [file.name for file in beside if is_data_file(file.name) and file.name != path.name]
        hint = did_you_mean(path.name, named)
        below = "" if path.is_absolute() else f" below {Path.cwd()}"
        raise InputError(f"data: there is no file {path}{below}{broken_link(path)}.{hint}")
    if not os.access(path, os.R_OK):
        raise InputError(f"data: {path} may not be read (permission denied).")


def _matching(pattern: str) -> FoundFiles:
    matches = sorted(match for match in glob.glob(pattern, recursive=True) if not os.path.isdir(match))
    files = [match for match in matches if is_data_file(match)]
    if not files:
        what = f"no data file (it matches {some(matches)})" if matches else "nothing"
        raise InputError(f"data: the pattern {pattern} matches {what}. A data file ends in {ENDINGS}.")
    return _found(os.path.commonpath([os.path.dirname(file) for file in files]), {"train": files}, matches)


def _in_directory(path: Path) -> FoundFiles:
    """Splits are told by the names of files and directories (train-00000-of-00002.parquet, test/a.jsonl), as
    `datasets` does; where none is, all files are `train`. What lies behind links to directories is left out,
    by `datasets` too."""
    from datasets.data_files import get_data_patterns, resolve_pattern

    base = glob.escape(str(path))
    everything = sorted(
        str(file)
        for file in path.rglob("*")
        if (file.is_file() or file.is_symlink()) and not _is_hidden(file, path)
    )
    files = [file for file in everything if is_data_file(file)]
    if not files:
        beside = f" (it holds {some(list(map(short_name, everything)))})" if everything else ""
        raise InputError(f"data: the directory {path} holds no data file{beside}; one ends in {ENDINGS}.")
    splits: dict[str, list[str]] = {}
    with contextlib.suppress(FileNotFoundError, ValueError):
        for split, patterns in get_data_patterns(base).items():
            found: set[str] = set()
            for pattern in patterns:
                with contextlib.suppress(FileNotFoundError):
                    found |= set(map(os.path.realpath, resolve_pattern(pattern, base)))
            splits[str(split)] = [file for file in files if os.path.realpath(file) in found]
    named = {split: names for split, names in splits.items() if names}
    return _found(str(path), named or {"train": files}, everything, bool(named))


def short_name(file: str) -> str:
    """The last part of a path; of a link to a directory with a slash."""
    return os.path.basename(file) + ("/" if os.path.isdir(file) else "")


def _is_hidden(file: Path, base: Path) -> bool:
    return any(part.startswith((".", "__")) for part in file.relative_to(base).parts)


def _found(
    location: str, splits: dict[str, list[str]], everything: Iterable[str], named: bool = False
) -> FoundFiles:
    taken = {name for names in splits.values() for name in names}
    for name in everything:
        if name in taken or is_data_file(name) and not os.path.exists(name):  # a link that leads nowhere
            check_file(Path(name))
    return FoundFiles(
        location,
        {split: tuple(DataFile(Path(name), name) for name in names) for split, names in splits.items()},
        tuple(name for name in everything if name not in taken and Path(name).name not in _ABOUT),
        named,
    )


_ABOUT = ("README.md", "LICENSE", "dataset_infos.json", "dataset_info.json")  # nobody takes them for rows


def _at_address(address: str) -> FoundFiles:
    """Files that fsspec reaches (https://, s3://, hf://datasets/...), fetched once into the tool's cache."""
    import fsspec

    if page := _PAGE.fullmatch(address):
        raise InputError(f"data: {address} is no data file. The data set of that page is {page[1]}.")
    with _address_problems(address):
        system, path = fsspec.core.url_to_fs(address)
        protocol = address.partition("://")[0]
        if protocol in ("file", "local"):
            return find_files(path) or FoundFiles(path, {})
        if any(mark in path for mark in "*[") or "?" in path and not protocol.startswith("http"):
            paths = [match for match in sorted(system.glob(path)) if is_data_file(match)]
        else:
            paths = [path]
        if not paths:
            raise InputError(f"data: nothing at {address} is a data file; one ends in {ENDINGS}.")
        if not is_data_file(_last_part(paths[0])):
            raise InputError(f"data: {address} is no data file; one ends in {ENDINGS}.")
        files = [DataFile(_fetched(system, path), system.unstrip_protocol(path)) for path in paths]
    return FoundFiles(address, {"train": tuple(files)})


_PAGE = re.compile(r"https?://huggingface\.co/datasets/([\w.-]+/[\w.-]+)/?")


def _last_part(path: str) -> str:
    return PurePosixPath(re.split(r"[?#]", path)[0]).name


def _fetched(system: AbstractFileSystem, path: str) -> Path:
    """The file's copy in the cache; fetched again when what the server says of it has changed, or when it
    says nothing."""
    about = system.info(path)
    marks = [about.get(key) for key in ("ETag", "etag", "sha", "blob_id", "mtime", "LastModified", "size")]
    name = sha256_bytes(repr([system.unstrip_protocol(path), *map(str, marks)]).encode())[:24]
    target = cache_root() / "downloads" / name / _last_part(path)
    if target.is_file() and any(mark is not None for mark in marks[:-1]) and keep(target):
        return target
    make_directory(target.parent)
    with staged_file(target) as partial:
        system.get_file(path, str(partial))
    keep(target)
    remove_unused(cache_root())
    return target


@contextlib.contextmanager
def _address_problems(address: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except ImportError as error:
        raise InputError(
            f"data: {address} needs a package that is not installed: {error}. Install it, or give the path "
            "of a copy on this machine."
        ) from None
    except Exception as error:  # each file system has errors of its own
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise LinchainError(
                f"data: no space is left for {address} in {cache_root()}. Free some, or set LINCHAIN_CACHE to"
                " another directory."
            ) from error
        what = "is not there" if isinstance(error, FileNotFoundError) else "cannot be read"
        raise InputError(
            f"data: {address} {what}: {type(error).__name__}: {first_line(error)}. Check the address and "
            "your access to it, or give the path of a copy on this machine."
        ) from error
