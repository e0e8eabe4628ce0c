"""Where a page goes: beside what it is about, or where the user says, and never over anything else."""

from __future__ import annotations

from pathlib import Path

from linchain_cli.directories import refuse_unwritable
from linchain_cli.errors import InputError
from linchain_cli.report.html import GENERATOR
from linchain_cli.storage import expand

FILE = "report.html"


def page_path(directory: Path, out: Path | None = None) -> Path:
    """report.html in the directory of a run or comparison, or `out`: a file, or a directory for report.html.

    Raises:
        InputError: it cannot be written there, or `out` is a file of another hand.
    """
    target = directory / FILE
    if out is not None:
        out = expand(out)
        target = out / FILE if out.is_dir() else out
        if target.exists() and not _is_page(target):
            raise InputError(f"--out {target} exists and is no page of linchain report; it is left as it is")
    refuse_unwritable(target.parent, f"name another place, such as --out {FILE}")
    return target


def _is_page(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as handle:
        return GENERATOR.encode() in handle.read(1000)
