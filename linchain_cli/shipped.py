"""The recipes that come with linchain: their names, purposes and places. Needs no YAML, so that listing them
is quick."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with linchain, by name.

    A wheel carries configs/ inside the package; in a source tree it lies beside the package.
    """
    package = Path(__file__).resolve().parent
    for directory in (package / "configs", package.parent / "configs"):
        if directory.is_dir():
            return {path.stem: path for path in sorted(directory.glob("*.yaml"), key=lambda path: path.stem)}
    return {}


def recipe_purposes() -> Iterator[tuple[str, str]]:
    """Name and purpose (its first comment line) of every shipped recipe."""
    for name, path in shipped_recipes().items():
        with open(path, encoding="utf-8") as lines:
            yield name, lines.readline().lstrip("# ").strip()
