"""JSON-lines files: one object a line, appended to while a run goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from linchain_cli import storage


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, up to the first line that a killed process or a lost disk block left
    damaged; none where there is no such file.
    """
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return []
    rows = []
    for line in data.splitlines(keepends=True):
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            row = None
        if not isinstance(row, dict):
            break
        rows.append(row)
    return rows


def jsonl_bytes(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Rows as `append_jsonl` writes them."""
    texts = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
    return b"".join(storage.utf8(text) + b"\n" for text in texts)


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Adds one row at the end of a JSON-lines file."""
    storage.append(path, jsonl_bytes([row]))


def cut_jsonl(path: Path, last_step: int) -> None:
    """Drops the rows of steps after `last_step`, and what is damaged."""
    if path.is_file():
        storage.write_atomic(
            path, jsonl_bytes([row for row in read_jsonl(path) if row.get("step", 0) <= last_step])
        )
