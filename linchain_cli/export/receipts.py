"""merge.json, export.json and import.json: what an output was made from, what it consists of, what was shown.

They depend on what went in alone: no time, no place. `--overwrite` knows by them what a command wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from linchain_cli import __version__, storage
from linchain_cli.chain import Adapter, adapter_files
from linchain_cli.errors import InputError, some
from linchain_cli.export.logits import LogitProof
from linchain_cli.records import read_record

CARD_FILE = "README.md"
_EDITABLE = 64 << 20  # bytes of the largest file that somebody may have edited


@dataclass(frozen=True, kw_only=True)
class ReceiptBase:
    """The base model: its published name, and the hash of its weights beside that of those trained on."""

    name: str | None = None
    revision: str | None = None
    hash: str | None = None
    hash_expected: str | None = None


@dataclass(frozen=True, kw_only=True)
class ReceiptAdapter:
    """The adapter that went in; `hashes` are SHA-256 values of its files."""

    rank: int
    depth: int
    alpha: float
    modules: int
    hashes: dict[str, str]

    @classmethod
    def of(cls, adapter: Adapter) -> ReceiptAdapter:
        config = adapter.config
        hashes = {name: storage.sha256_bytes(data) for name, data in adapter_files(adapter).items()}
        return cls(
            rank=config.rank,
            depth=config.depth,
            alpha=config.alpha,
            modules=len(adapter.tensors),
            hashes=hashes,
        )


@dataclass(frozen=True, kw_only=True)
class ReceiptPart:
    """One of several adapters that were summed: its run's name, and what it was multiplied by."""

    name: str
    weight: float
    adapter: ReceiptAdapter


@dataclass(frozen=True, kw_only=True)
class MergeReceipt:
    """merge.json.

    dtype: what every floating-point tensor was recast to, None where each kept its type
    files: SHA-256 of every file but this one and the card, whose own is `card`
    tensors: counts: total, changed, untouched, renamed, converted
    changed: checkpoint key -> largest distance in ulp from W0 + ΔW in float64; largest_ulp is the largest
    changes: what of the base's configuration had to be changed, in sentences
    logits: merged against adapted model; quantized: against the adapter on the base as the run had rounded it
    generated: tokens that transformers' `generate` made with the merged checkpoint and its settings
    not_proven: what was not shown, and why
    parts: the adapters that `adapter` is a weighted sum of; empty where it is a run's own
    sum_error: largest relative error (Frobenius) of any module's sum
    """

    FORMAT: ClassVar[str] = "linchain merge"
    VERSION: ClassVar[int] = 2
    FILE: ClassVar[str] = "merge.json"

    base: ReceiptBase
    adapter: ReceiptAdapter
    dtype: str | None = None
    files: dict[str, str]
    tensors: dict[str, int]
    largest_ulp: float
    largest_ulp_tensor: str
    changed: dict[str, float]
    changes: list[str] = field(default_factory=list)
    logits: LogitProof | None = None
    quantized: LogitProof | None = None
    generated: int | None = None
    not_proven: list[str] = field(default_factory=list)
    parts: list[ReceiptPart] = field(default_factory=list)
    sum_error: float | None = None
    card: str | None = None
    linchain: str = __version__


@dataclass(frozen=True, kw_only=True)
class ExportReceipt:
    """export.json: `largest_error` is the largest relative error (Frobenius) of any module's ΔW, read back.

    kind: the format; files: SHA-256 of every file but this one and the card, whose own is `card`; not_proven:
    what was not shown; load_with: what a classifier's base is loaded with
    """

    FORMAT: ClassVar[str] = "linchain export"
    VERSION: ClassVar[int] = 2
    FILE: ClassVar[str] = "export.json"

    kind: str
    base: ReceiptBase = ReceiptBase()
    adapter: ReceiptAdapter | None = None
    files: dict[str, str]
    modules: int
    largest_error: float
    largest_error_module: str
    not_proven: list[str] = field(default_factory=list)
    load_with: dict[str, int | bool] = field(default_factory=dict)
    card: str | None = None
    linchain: str = __version__


@dataclass(frozen=True, kw_only=True)
class ImportReceipt:
    """import.json. files: SHA-256 of every file but this one, as it was written"""

    FORMAT: ClassVar[str] = "linchain import"
    VERSION: ClassVar[int] = 1
    FILE: ClassVar[str] = "import.json"

    files: dict[str, str]
    linchain: str = __version__


Receipt = MergeReceipt | ExportReceipt | ImportReceipt


def hash_files(directory: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Relative path -> SHA-256 of every file below `directory`, those that are `known` not read again."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    names = {str(path.relative_to(directory)): path for path in paths}
    return {name: (known or {}).get(name) or storage.sha256_file(path) for name, path in names.items()}


def check_replaceable(directory: Path, kind: type[Receipt]) -> None:
    """Raises InputError unless the command of `kind` wrote all that `directory` holds, as it is; the message
    names what it did not, and what was changed since."""
    refused = f"{directory} is left as it is: --overwrite replaces only what '{kind.FORMAT}' wrote"
    elsewhere = "Choose another --out, or move it away yourself."
    try:
        receipt = read_record(directory / kind.FILE, kind)
    except InputError as error:
        missing = f"there is no {kind.FILE} of it" if not (directory / kind.FILE).exists() else str(error)
        raise InputError(f"{refused}, and {missing}. {elsewhere}") from error
    known = {*receipt.files, kind.FILE, CARD_FILE}
    files = [path for path in directory.rglob("*") if not path.is_dir() or path.is_symlink()]
    found = [str(path.relative_to(directory)) for path in files]
    # What is staged inside a mount point is on its way.
    others = sorted(name for name in found if name not in known and not name.startswith(storage.PASSING))
    if others:
        verb = "is" if len(others) == 1 else "are"
        raise InputError(f"{refused}, and {some(others)} {verb} not of it. {elsewhere}")
    written = receipt.files | ({CARD_FILE: card} if (card := getattr(receipt, "card", None)) else {})
    edited = [
        name for name in sorted(found) if name in written and _was_edited(directory / name, written[name])
    ]
    if edited:
        verb = "was" if len(edited) == 1 else "were"
        raise InputError(f"{refused}, and {some(edited)} {verb} changed since. {elsewhere}")


def _was_edited(path: Path, written: str) -> bool:
    """Whether a file has another SHA-256 than `written`. Large ones, which nobody edits and which take long
    to read, count as they are."""
    if not path.is_file():
        return True
    return path.stat().st_size <= _EDITABLE and storage.sha256_file(path) != written
