"""Values of a recipe by dotted key: training.learning_rate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Sections out of values by dotted key."""
    content: dict[str, Any] = {}
    for dotted, value in values.items():
        *sections, key = dotted.split(".")
        place = content
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    return content


def flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of all that sections hold; an empty mapping is a value."""
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def within(key: str, names: Iterable[str]) -> bool:
    """Whether a dotted key is one of `names`, or lies in a section that is."""
    return any(key == name or key.startswith(name + ".") for name in names)
