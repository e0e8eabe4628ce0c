"""A configuration of another tool, and which of its settings have been read.

Values are texts here, as `strict_yaml.parse` gives them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml

from linchain_cli.recipe.other_tools import TOOLS, Tool
from linchain_cli.recipe.strict_yaml import scalar

Config = Mapping[str, Any]
Fields = dict[str, Any]  # of a recipe, by dotted key

_YES, _NO = ("true", "yes", "on", "1"), ("false", "no", "off", "none", "", "0", "0.0", "[]", "{}")


class Theirs:
    """Settings by their names. What nobody asks for is left in `unread`; what a recipe does not say of the
    others is in `remarks`, and what is to be known of one of its fields in `notes`. `nulls` are keys with
    nothing behind them, which most tools take for keys that are not there. `documents`: all rows are some."""

    def __init__(self, config: Config):
        self.config = {key: value for key, value in config.items() if value is not None}
        self.nulls = config.keys() - self.config.keys()
        self.tool = tool_of(self.config)
        self.unread = dict.fromkeys(self.config)
        self.remarks: list[str] = []
        self.notes: dict[str, str] = {}
        self.documents = False

    def __call__(self, *names: str) -> Any:
        """The first of these that is set, else the first that their tool has a default for, else None."""
        for name in names:
            if name in self.config:
                self.unread.pop(name, None)
                return self.config[name]
        return next((self.tool.defaults[name] for name in names if name in self.tool.defaults), None)

    def sets(self, *names: str) -> bool:
        """Whether one of these is set."""
        return any(name in self.config for name in names)

    def yes(self, *names: str) -> bool:
        """Whether one of these says yes."""
        return any([is_yes(self(name)) for name in names])  # a list: all of them are read

    def unsaid(self, key: str, value: Any, why: str) -> None:
        """Notes that a recipe does not say this."""
        self.remarks.append(remark(key, value, why))


def tool_of(config: Config) -> Tool:
    """Whose configuration it is."""
    return next(tool for tool in TOOLS if not tool.marks or any(mark in config for mark in tool.marks))


def is_yes(value: Any) -> bool:
    return str(value).lower() in _YES


def is_no(value: Any) -> bool:
    """Whether a value says that something is off, or that there is nothing of it."""
    return value is None or str(value).lower() in _NO


def number(value: Any) -> float | None:
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None


def names(value: Any) -> list[Any]:
    """A list, what stands between commas, or the one thing that is given."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    if isinstance(value, list):
        return [item for item in value if item is not None]
    return [] if value is None else [value]


def texts(value: Any) -> Iterator[str]:
    """All that stands in a value, without keys."""
    if isinstance(value, (Mapping, list)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from texts(item)
    elif value is not None:
        yield str(value)


def are_all(value: Any, usual: Iterable[str]) -> bool:
    """Whether something stands in a value, and nothing but this."""
    found = {text.lower() for text in texts(value)}
    return bool(found) and found <= set(usual)


def remark(key: str, value: Any, why: str) -> str:
    """`key: value  (why)` in one line; a long value is cut."""
    text = yaml.safe_dump(typed(value), default_flow_style=True, width=2**31, allow_unicode=True)
    text = " ".join(text.removesuffix("\n").removesuffix("\n...").split())
    return f"{key}: {text if len(text) <= 60 else text[:57] + '...'}  ({why})"


def typed(value: Any) -> Any:
    """Texts as the scalars of YAML that they were."""
    if isinstance(value, Mapping):
        return {key: typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [typed(item) for item in value]
    return scalar(value) if isinstance(value, str) else value
