"""YAML for people who make typing mistakes: nothing is guessed, and every key remembers its line.

Differences from `yaml.safe_load`:

- A scalar stays the text that was written; whoever reads the value converts it by its declared type.
  So `1e-5` is a number where a number is wanted, and the revision `0123456` or the name `no` stays text.
  Only an unquoted `null`, `~` or nothing at all becomes None.
- Keys given twice, anchors, aliases and tags are problems, each with its line, not silently resolved.
- What is not YAML at all is an `InputError` in plain words.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.events import AliasEvent, CollectionStartEvent, ScalarEvent
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from linchain_cli.errors import InputError

Key = tuple[str | int, ...]

MAX_DEPTH = 32
_ALIAS = "alias"  # the tag of a node that stands for one
NULLS = frozenset({"", "~", "null", "Null", "NULL"})


@dataclass(frozen=True)
class YamlProblem:
    """Something the file should not hold: `line` counts from 1."""

    key: Key
    line: int
    message: str


@dataclass
class Document:
    """The value (mappings, lists, text and None), the line of every key and item, and what is wrong with
    them."""

    value: Any
    lines: dict[Key, int] = field(default_factory=dict)
    problems: list[YamlProblem] = field(default_factory=list)

    @property
    def broken(self) -> list[Key]:
        """The keys whose value is unusable already: what else is wrong with it need not be told."""
        return [problem.key for problem in self.problems if problem.key]


def within(key: Key, others: Iterable[Key]) -> bool:
    """Whether a key is one of `others`, or lies below one."""
    return any(key[: len(other)] == other for other in others)


def scalar(text: str) -> bool | int | float | str:
    """What a scalar's text says where any type goes: true, false, a number, or itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if re.fullmatch(r"[+-]?\d{1,18}", text):
        return int(text)
    is_number = re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", text)
    return float(text) if is_number and math.isfinite(float(text)) else text


def parse(text: str) -> Document:
    """Reads one YAML document. An empty one has the value None.

    Raises:
        InputError: the text is not YAML; the message starts with `line N:` where a line is known.
    """
    loader = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except yaml.YAMLError as error:
        raise InputError(_syntax_message(error, text)) from None
    finally:
        if loader is not None:
            loader.dispose()
    document = Document(None)
    if root is not None:
        document.value = _build(root, (), document)
    document.problems += [YamlProblem((), line, message) for line, message in loader.refused]
    return document


class _Loader(yaml.SafeLoader):
    """Composes nodes only. Anchors and tags are noted in `refused` and then ignored; an alias becomes a
    scalar that is tagged as one."""

    def __init__(self, text: str):
        super().__init__(text)
        self.refused: list[tuple[int, str]] = []
        self.depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node:
        event = self.peek_event()
        if isinstance(event, AliasEvent):
            self.get_event()
            return ScalarNode(_ALIAS, f"*{event.anchor}", event.start_mark, event.end_mark, style="'")
        if isinstance(event, (ScalarEvent, CollectionStartEvent)):
            self._drop_properties(event)
        if self.depth >= MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=event.start_mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def _drop_properties(self, event: ScalarEvent | CollectionStartEvent) -> None:
        if event.anchor is not None:
            self._refuse(
                event, f"anchors such as &{event.anchor} are not allowed: leave it out, or quote the value"
            )
            event.anchor = None
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self._refuse(event, f"tags such as {tag} are not allowed: leave it out, or quote the value")
            event.tag = None

    def _refuse(self, event: yaml.Event, message: str) -> None:
        self.refused.append((event.start_mark.line + 1, message))


def _build(node: Node, key: Key, document: Document) -> Any:
    document.lines.setdefault(key, node.start_mark.line + 1)
    if node.tag == _ALIAS:
        document.problems.append(_alias_problem(node, key))
        return node.value
    if isinstance(node, MappingNode):
        return _build_mapping(node, key, document)
    if isinstance(node, SequenceNode):
        return [_build(item, (*key, index), document) for index, item in enumerate(node.value)]
    return None if node.style is None and node.value in NULLS else node.value


def _build_mapping(node: MappingNode, key: Key, document: Document) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, ScalarNode):
            document.problems.append(
                YamlProblem(
                    key,
                    line,
                    "a key must be a word, not a list or a mapping: quote a text that begins with { or [",
                )
            )
            continue
        if key_node.tag == _ALIAS:
            document.problems.append(_alias_problem(key_node, key))
            continue
        name = key_node.value
        path = (*key, name)
        if name in value:
            first = document.lines[path]
            document.problems.append(YamlProblem(path, line, f"given twice; first in line {first}"))
            continue
        document.lines[path] = line
        value[name] = _build(value_node, path, document)
    return value


def _alias_problem(node: Node, key: Key) -> YamlProblem:
    message = f"aliases such as {node.value} are not allowed: write the value out, or quote it"
    return YamlProblem(key, node.start_mark.line + 1, message)


def _syntax_message(error: yaml.YAMLError, text: str) -> str:
    """PyYAML's reason in one line, with the line in the file where it has one."""
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return f"line {line}: holds a character that YAML does not allow (code {error.character:#x})"
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    context, reason = getattr(error, "context", None), getattr(error, "problem", None) or "not YAML"
    if reason.startswith("but found another document"):
        reason = "a second document starts here; only one is read"
    elif context and "block mapping" in context:
        reason += " (is the indentation right?)"
    elif reason.startswith("mapping values are not allowed here"):
        reason = "a ':' where no key can stand (indentation, or a text that needs quotes)"
    elif "cannot start any token" in reason:
        reason = reason.replace("found character", "the character").replace("that cannot", "cannot")
        reason += " (no tabs for indentation; quote a text that begins with it)"
    return f"line {mark.line + 1}: {reason}" if mark is not None else reason
