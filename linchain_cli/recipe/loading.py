"""From a YAML file and `key=value` overrides to a `Recipe`, or to one message that names everything wrong.

Other files of ours that people write are read the same way."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from linchain_cli.errors import InputError, did_you_mean, nearest, some
from linchain_cli.recipe import strict_yaml
from linchain_cli.recipe.conversion import converted, foreign_keys
from linchain_cli.recipe.other_tools import CALLED_HERE
from linchain_cli.recipe.schema import Recipe
from linchain_cli.recipe.validation import MOST_PROBLEMS, Key, Model, check, dotted_fields
from linchain_cli.shipped import shipped_recipes

MAX_RECIPE_BYTES = 1 << 20

# An override of one takes the other out of the file: `training.max_steps=50` is enough to shorten a recipe.
ALTERNATIVES = {
    ("training", "epochs"): ("training", "max_steps"),
    ("training", "max_steps"): ("training", "epochs"),
}


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe.

    Args:
        path: a YAML file.
        overrides: `dotted.key=value`, the value written as in YAML; later ones win.

    Raises:
        InputError: naming every problem with its place (`recipe.yaml:12` or the override), key and remedy.
    """
    path = Path(path)
    document = _parsed(path, _RECIPE)
    if foreign := foreign_keys(document.value):
        raise InputError(
            f"{path}: a configuration of another tool ({some(foreign)}), no recipe. `linchain recipes "
            f"convert {shlex.quote(str(path))}` writes it as one, and what a recipe does not say."
        )
    draft = _drafted(path, document)
    for override in overrides:
        _apply(override, draft)
    return _checked(Recipe, path, draft)


@dataclass(frozen=True)
class FileKind:
    """What a YAML file should hold, how one begins, and where to find out more. `read_once` says that it may
    be a pipe."""

    name: str
    begin: str
    hint: str
    read_once: bool = False


def load_file(model: type[Model], path: Path, kind: FileKind) -> Model:
    """Reads and checks a file of another kind; raises InputError as `load_recipe` does."""
    return _checked(model, path, _drafted(path, _parsed(path, kind)))


def _checked(model: type[Model], path: Path, draft: _Draft) -> Model:
    valid, problems = check(model, draft.value)
    for problem in problems:
        if not strict_yaml.within(problem.key, draft.broken):
            draft.add(problem.key, problem.message)
    if draft.complaints:
        raise InputError(_summary(path, draft.complaints))
    assert valid is not None
    return valid


@dataclass
class _Place:
    """Where a key was written: a line of the file, or an override (line 0)."""

    text: str
    line: int = 0


@dataclass
class _Draft:
    """A recipe on its way in. `broken` are the keys whose value is known to be unusable already."""

    value: dict[str, Any]
    source: str
    places: dict[Key, _Place] = field(default_factory=dict)
    complaints: list[tuple[int, str]] = field(default_factory=list)
    broken: list[Key] = field(default_factory=list)

    def add(self, key: Key, message: str, place: _Place | None = None) -> None:
        place = place or self.place_of(key)
        name = f"{dotted(key)}: " if key else ""
        self.complaints.append((place.line, f"{place.text}: {name}{message}"))

    def place_of(self, key: Key) -> _Place:
        """Where the key stands, or else the nearest section around it that was written."""
        for length in range(len(key), 0, -1):
            if key[:length] in self.places:
                return self.places[key[:length]]
        return _Place(self.source)


def dotted(key: Key) -> str:
    """`data.train[0].path` for ("data", "train", 0, "path")."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")
    return text if text.isprintable() and len(text) <= 120 else repr(text)[:120]


def _summary(path: Path, complaints: list[tuple[int, str]]) -> str:
    lines = [message for _, message in sorted(complaints, key=lambda item: item[0])]
    if len(lines) == 1:
        return lines[0]
    some = "" if len(lines) <= MOST_PROBLEMS else f", of which these are the first {MOST_PROBLEMS}"
    shown = "\n".join(f"  {line}" for line in lines[:MOST_PROBLEMS])
    return f"{path} has {len(lines)} problems{some}:\n{shown}"


def convert_recipe(path: Path | str) -> str:
    """A configuration of another tool as a recipe, with comments on what that does not say.

    Raises:
        InputError: the file cannot be read, or is none.
    """
    path = Path(path)
    document = _parsed(path, _CONVERTED)
    if document.problems:
        problem = document.problems[0]
        key = f"{dotted(problem.key)}: " if problem.key else ""
        raise InputError(f"{path}:{problem.line}: {key}{problem.message}")
    if not foreign_keys(document.value):
        raise InputError(
            f"{path}: no configuration of Axolotl, LLaMA-Factory or TRL: at least three of its keys would be "
            "theirs (base_model, model_name_or_path, lora_r, ...)."
        )
    return converted(document.value, path.name)


_RECIPE = FileKind("a recipe", "name: my-run", "Start from a shipped one: `linchain recipes list`.")
_CONVERTED = FileKind(
    "a configuration that can be converted",
    "base_model: owner/model",
    "docs/coming-from.md says what its settings are called here.",
    read_once=True,
)


def _parsed(path: Path, kind: FileKind) -> strict_yaml.Document:
    """A file's document, which is a mapping."""
    text = _read_text(path, kind)
    if path.suffix in (".py", ".ipynb", ".sh"):
        raise InputError(f"{path}: a script; {kind.name} is a short YAML file. {kind.hint}")
    try:
        document = strict_yaml.parse(text)
    except InputError as error:
        where, colon, reason = str(error).partition(": ")
        place = f"{path}:{where.removeprefix('line ')}" if colon and where.startswith("line ") else str(path)
        raise InputError(f"{place}: not YAML: {reason if colon else error}") from None
    if document.value is None:
        raise InputError(f"{path}: the file is empty. {kind.hint}")
    if not isinstance(document.value, dict):
        raise InputError(
            f"{path}: {kind.name} is a mapping that begins like `{kind.begin}`, this is not one. {kind.hint}"
        )
    return document


def _drafted(path: Path, document: strict_yaml.Document) -> _Draft:
    places = {key: _Place(f"{path}:{line}", line) for key, line in document.lines.items()}
    draft = _Draft(document.value, str(path), places, broken=document.broken)
    for problem in document.problems:
        draft.add(problem.key, problem.message, _Place(f"{path}:{problem.line}", problem.line))
    return draft


def _read_text(path: Path, kind: FileKind) -> str:
    try:
        if path.is_dir():
            raise InputError(_directory_message(path, kind))
        if not kind.read_once and path.exists() and not path.is_file():
            raise InputError(f"{path}: not a regular file. It is read more than once: write it to one.")
        if path.stat().st_size > MAX_RECIPE_BYTES:
            size = f"{path.stat().st_size:,} bytes"
            raise InputError(f"{path}: {size} are too many; {kind.name} is a short YAML file.")
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file.{_similar_file(path, kind)}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(f"{path}: cannot be read: {reason}.") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8 text; {kind.name} is a YAML file.") from None
    if "\0" in text:
        raise InputError(f"{path}: a binary file; {kind.name} is a YAML file.")
    return text


def _directory_message(path: Path, kind: FileKind) -> str:
    if kind is _RECIPE and (path / "recipe.yaml").is_file():
        return f"{path}: a directory. Its recipe is {path / 'recipe.yaml'}."
    return f"{path}: a directory; {kind.name} is a YAML file."


def _similar_file(path: Path, kind: FileKind) -> str:
    """The nearest YAML file beside a missing one, else the nearest shipped recipe."""
    beside = path.parent
    try:
        names = [found.name for found in beside.iterdir() if found.suffix in (".yaml", ".yml")]
    except OSError:
        names = []
    if found := nearest(path.name, names):
        return f" Did you mean '{beside / found}'?"
    if kind is _RECIPE and (
        shipped := nearest(path.name.removesuffix(".yaml").removesuffix(".yml"), shipped_recipes())
    ):
        return f" '{shipped}' is a shipped recipe: `linchain recipes copy {shipped}` puts it here."
    return f" {kind.hint}"


def _apply(override: str, draft: _Draft) -> None:
    """Puts one `dotted.key=value` into the draft, or adds what is wrong with it."""
    place = _Place(f"override '{_short(override)}'")
    name, equals, text = override.partition("=")
    if not equals or not name:
        fields = list(dotted_fields(Recipe))
        hint = "" if name in fields else did_you_mean(name, fields)
        example = f"{name}=VALUE" if name in fields else "adapter.depth=1"
        draft.add((), f"expected key=value, such as {example}.{hint}", place)
        return
    key: Key = tuple(name.strip().split("."))
    try:
        document = strict_yaml.parse(text)
    except InputError as error:
        reason = str(error).removeprefix("line 1: ")
        draft.add((), f"the value is not YAML: {reason}. Quote it if it is a text.", place)
        return
    for problem in document.problems:
        draft.add((), problem.message, place)
    if document.problems:
        return
    if not _put(draft.value, key, document.value):
        draft.add((), f"{dotted(key)} cannot be set, because a part of it is no section.", place)
        return
    draft.places = {old: where for old, where in draft.places.items() if not strict_yaml.within(old, [key])}
    draft.places[key] = place
    draft.broken = [broken for broken in draft.broken if not strict_yaml.within(broken, [key])]
    if key in ALTERNATIVES and document.value is not None:
        _remove(draft.value, ALTERNATIVES[key])


def dotted_key(name: str) -> str:
    """The dotted key that is probably meant by a name out of another tool or without its section."""
    fields = list(dotted_fields(Recipe))
    if name in fields:
        return name
    by_name = {field.rpartition(".")[2]: field for field in fields}
    return CALLED_HERE.get(name) or by_name.get(name, name)


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def _put(value: dict[str, Any], key: Key, new: Any) -> bool:
    """Sets a nested value, making the sections on the way; False where something else lies there."""
    *sections, last = key
    for section in sections:
        if value.get(section) is None:
            value[section] = {}
        value = value[section]
        if not isinstance(value, dict):
            return False
    value[last] = new
    return True


def _remove(value: Mapping[str, Any], key: Key) -> None:
    *sections, last = key
    for section in sections:
        value = value.get(section)
        if not isinstance(value, dict):
            return
    value.pop(last, None)
