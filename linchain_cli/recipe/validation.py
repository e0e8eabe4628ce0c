"""Checks a nested mapping against pydantic models and says everything that is wrong with it, in plain words.

pydantic finds the errors; this module turns them into `Problem`s that name the key, what was expected
there (read off the declared type, so that it is written nowhere twice) and the nearest valid name.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ConfigDict, Discriminator, Tag, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from linchain_cli.errors import did_you_mean, nearest
from linchain_cli.recipe.other_tools import CALLED_HERE, instead_of
from linchain_cli.recipe.strict_yaml import Key

Model = TypeVar("Model", bound=BaseModel)

CONFLICT = "conflict"
_ALIKE_ELSEWHERE = 0.75  # of 1: a field of another section is meant less often than one beside the key
MOST_PROBLEMS = 50  # of one recipe; whoever has more has given another kind of file
# pydantic puts the tag of a union's branch among the keys of an error; nobody's key begins like this.
TAG_MARK = "\0"


@dataclass(frozen=True)
class Expected:
    """Put into `Annotated[...]` where the type alone does not say well enough what is expected."""

    text: str


@dataclass(frozen=True)
class Conflict:
    """Two or more fields of a model that do not go together: dotted keys within it, and the sentence to
    show."""

    keys: tuple[str, ...]
    message: str


@dataclass(frozen=True)
class Problem:
    """What is wrong at `key`. `involved` are all keys it depends on; `guess` is the key an unknown one seems
    to mean."""

    key: Key
    message: str
    involved: tuple[Key, ...]
    missing: bool = False
    guess: Key | None = None


class StrictModel(BaseModel):
    """Unknown keys are errors, values do not change once read, a field's docstring is its description."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    def conflicts(self) -> Iterable[Conflict]:
        """Fields that are valid one by one and do not go together. Overridden by models that have some."""
        return ()

    @model_validator(mode="after")
    def _raise_conflicts(self) -> StrictModel:
        found = list(self.conflicts())
        if found:
            message = " ".join(conflict.message for conflict in found)
            raise PydanticCustomError(CONFLICT, "{message}", {"message": message, "conflicts": found})
        return self


def check(model: type[Model], value: Mapping[str, Any]) -> tuple[Model | None, list[Problem]]:
    """The validated model, or None and every problem of `value`, up to `MOST_PROBLEMS` of them.

    pydantic runs the checks across fields only where each field alone is valid. So the wrong values are
    taken out and the rest is looked at again, until nothing new turns up; what then depends on a value
    that was taken out is not reported, because it speaks of a default.
    """
    problems: list[Problem] = []
    rest: Any = value
    while True:
        try:
            valid = model.model_validate(rest)
        except ValidationError as error:
            known = [_whole(key) for problem in problems for key in problem.involved]
            new = (p for p in _problems(error, model) if not any(_related(p.involved, key) for key in known))
            fresh = list(itertools.islice(new, MOST_PROBLEMS - len(problems)))
            problems += fresh
            if len(problems) == MOST_PROBLEMS:
                problems.append(Problem((), f"more is wrong than the first {MOST_PROBLEMS} problems.", ()))
                break
            if not fresh:
                break
            rest = _without(rest, [key for problem in fresh for key in problem.involved])
        else:
            if not problems:
                return valid, []
            break
    return None, _without_consequences(problems)


def _related(involved: Iterable[Key], key: Key) -> bool:
    return any(one[: len(key)] == key for one in involved)


def _without(value: Any, keys: Iterable[Key]) -> Any:
    for key in keys:
        value = _without_one(value, _whole(key))
    return value


def _whole(key: Key) -> Key:
    """The key of the list for the key of an item: a list with a wrong item is left out as a whole."""
    return tuple(itertools.takewhile(lambda part: not isinstance(part, int), key))


def _without_one(value: Any, names: Key) -> Any:
    if not names or not isinstance(value, Mapping) or names[0] not in value:
        return value
    head, *tail = names
    if not tail:
        return {name: item for name, item in value.items() if name != head}
    return {**value, head: _without_one(value[head], tuple(tail))}


def _problems(error: ValidationError, model: type[BaseModel]) -> Iterator[Problem]:
    for detail in error.errors(include_url=False):
        key = tuple(part for part in detail["loc"] if not str(part).startswith(TAG_MARK))
        if detail["type"] == CONFLICT:
            for conflict in detail["ctx"]["conflicts"]:
                involved = tuple((*key, *name.split(".")) for name in conflict.keys)
                yield Problem(involved[0], conflict.message, involved)
        elif detail["type"] == "extra_forbidden":
            yield _unknown_key(key, model)
        else:
            yield Problem(key, _wrong_value(detail, key, model), (key,), missing=detail["type"] == "missing")


def _wrong_value(detail: Mapping[str, Any], key: Key, model: type[BaseModel]) -> str:
    value = detail["input"]
    found = field_at(model, key)
    if found is None:
        return f"expected a mapping, got {_show(value)}."
    expected = describe(found.annotation, found.metadata)
    if detail["type"] == "missing":
        return f"missing. Expected {expected}."
    suggestion = ""
    if isinstance(value, Mapping) and "text" in expected:
        suggestion = " Quote it, if it is one text."
    elif isinstance(value, str):
        words = [word for word in choices(found.annotation) if word in expected]
        suggestion = f" Write [{value}]." if value in words else did_you_mean(value, words)
    reason = f" ({detail['ctx']['error']})" if detail["type"] == "value_error" else ""
    return f"expected {expected}, got {_show(value)}{reason}.{suggestion}"


def _unknown_key(key: Key, model: type[BaseModel]) -> Problem:
    """Suggests the nearest field beside the wrong one, else the place where a field of such a name
    belongs."""
    *parent, name = key or ("",)
    here = model_at(model, tuple(parent))
    siblings = list(here.model_fields) if here else []
    fields = list(dotted_fields(model))
    elsewhere = {path.rpartition(".")[2]: path for path in fields}
    if str(name) in fields and not parent and "." in str(name):
        section, _, field = str(name).rpartition(".")
        return Problem(key, f"unknown key. Write {field} within {section}, as a key of its own.", (key,))
    if (called := CALLED_HERE.get(str(name))) in fields:
        *section, field = called.split(".")
        shown = field if field in siblings else called
        return Problem(key, f"unknown key. Did you mean '{shown}'?", (key,), guess=(*section, field))
    if said := instead_of(str(name)):
        return Problem(key, f"unknown key; {said}.", (key,))
    initials = {"".join(word[0] for word in field.split("_")): field for field in siblings}
    if found := nearest(str(name), siblings) or initials.get(str(name)):
        return Problem(key, f"unknown key. Did you mean '{found}'?", (key,), guess=(*parent, found))
    if found := nearest(str(name), elsewhere, _ALIKE_ELSEWHERE):
        return Problem(key, f"unknown key. Did you mean '{elsewhere[found]}'?", (key,))
    known = f" Known here: {', '.join(siblings)}." if siblings else ""
    return Problem(key, f"unknown key.{known}", (key,))


def _without_consequences(problems: list[Problem]) -> list[Problem]:
    """Leaves out `missing` where an unknown key seems to be that very key misspelt."""
    guesses = [problem.guess for problem in problems if problem.guess]
    return [p for p in problems if not (p.missing and any(_one_within(p.key, guess) for guess in guesses))]


def _one_within(key: Key, other: Key) -> bool:
    length = min(len(key), len(other))
    return key[:length] == other[:length]


def field_at(model: type[BaseModel], key: Key) -> FieldInfo | None:
    """The declaration of the deepest named field on the way to `key`; list indices and mapping keys are
    passed over."""
    found = None
    here: type[BaseModel] | None = model
    for part in key:
        if here is None or part not in here.model_fields:
            continue
        found = here.model_fields[part]
        here = nested_model(found.annotation)
    return found


def model_at(model: type[BaseModel], key: Key) -> type[BaseModel] | None:
    """The model that holds the fields at `key`, or None where a plain value lies."""
    if not key:
        return model
    found = field_at(model, key)
    return nested_model(found.annotation) if found else None


def nested_model(annotation: Any) -> type[BaseModel] | None:
    """The model within an annotation such as `Model`, `Model | None` or `list[Model]`; None if there is
    none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := nested_model(part))), None)


def dotted_fields(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every field that holds a value, as the dotted key it has in a file."""
    for name, declared in model.model_fields.items():
        section = declared.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            yield from dotted_fields(section, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def choices(annotation: Any) -> list[str]:
    """All words a `Literal` within the annotation allows."""
    if get_origin(annotation) is Literal:
        return [str(word) for word in get_args(annotation)]
    return [word for part in get_args(annotation) for word in choices(part)]


SIMPLE = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    types.NoneType: "null",
}


def describe(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """What a field takes, in words: `a whole number of at least 1`, `one of none, int8, nf4`."""
    metadata = list(metadata)
    wordings = [item.text for item in metadata if isinstance(item, Expected)]
    if wordings:
        return wordings[-1]
    return _describe_type(annotation) + _describe_bounds(metadata)


def _describe_type(annotation: Any) -> str:
    if annotation in SIMPLE:
        return SIMPLE[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}" if len(arguments) > 1 else f"'{arguments[0]}'"
    if origin in (Union, types.UnionType):
        return " or ".join(_describe_type(part) for part in arguments)
    if hasattr(annotation, "__metadata__"):
        return describe(arguments[0], annotation.__metadata__)
    if origin is list:
        return f"a list, each item {_describe_type(arguments[0])}"
    if origin is dict:
        return f"a mapping of {_describe_type(arguments[0])} to {_describe_type(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a mapping with {', '.join(annotation.model_fields)}"
    return str(annotation)


def _describe_bounds(metadata: Iterable[Any]) -> str:
    words, low, high = [], None, None
    for item in _flat(metadata):
        if isinstance(item, annotated_types.Ge):
            low = item.ge
        elif isinstance(item, annotated_types.Le):
            high = item.le
        elif isinstance(item, annotated_types.Gt):
            words.append(f"above {_number(item.gt)}")
        elif isinstance(item, annotated_types.Lt):
            words.append(f"below {_number(item.lt)}")
        elif isinstance(item, annotated_types.MinLen) and item.min_length == 1:
            words.append("that is not empty")
    if low is not None and high is not None:
        words.append(f"from {_number(low)} to {_number(high)}")
    elif low is not None:
        words.insert(0, f"of at least {_number(low)}")
    elif high is not None:
        words.append(f"at most {_number(high)}")
    return f" {' and '.join(words)}" if words else ""


def _number(bound: Any) -> str:
    return f"{bound:,}" if isinstance(bound, int) else str(bound)


def _flat(metadata: Iterable[Any]) -> Iterator[Any]:
    """A `Field(ge=1)` within `Annotated` keeps its bounds in a list of its own."""
    for item in metadata:
        yield from _flat(item.metadata) if isinstance(item, FieldInfo) else (item,)


def tagged(annotation: Any, tag: str) -> Any:
    """The branch of a union that `choose` picks by this tag."""
    return Annotated[annotation, Tag(TAG_MARK + tag)]


def choose(tag_of: Callable[[Any], str]) -> Discriminator:
    """Picks the branch of a union of `tagged` types by the raw value, so that errors speak of that branch
    alone."""
    return Discriminator(lambda value: TAG_MARK + tag_of(value))


def _show(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
