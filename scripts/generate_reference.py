"""Writes docs/recipe.md from the recipe's models. With --check it writes nothing and fails if the file is
out of date."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from linchain_cli.recipe import Recipe, SourceConfig, TemplateConfig
from linchain_cli.recipe.validation import describe

TARGET = Path(__file__).resolve().parent.parent / "docs" / "recipe.md"

INTRODUCTION = """\
# The recipe, key by key

Generated from `linchain_cli/recipe/` by `make docs`; `linchain recipes schema` prints the same as
JSON schema.

A recipe is a YAML file. Keys given twice, unknown keys, anchors, aliases and tags are errors. A value is read
by the type its key has, so `1e-5` is a number where a number is expected. On the command line `key=value`
replaces a value of the file: `linchain train recipe.yaml adapter.depth=1 training.max_steps=50`. A key
without a default must be given.
"""


def reference() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    parts += _section("Top level", "", Recipe)
    for name, declared in Recipe.model_fields.items():
        if _is_section(declared):
            parts += _section(f"`{name}`", f"{name}.", declared.annotation)
    parts += _section("An entry of `data.train`", "", SourceConfig)
    parts += _section("`data.template` as a mapping", "", TemplateConfig)
    return "\n".join(parts)


def _section(title: str, prefix: str, model: type[BaseModel]) -> Iterator[str]:
    yield f"## {title}\n"
    yield f"{model.__doc__}\n"
    yield "| key | value | default | |"
    yield "| --- | --- | --- | --- |"
    yield from _rows(prefix, model)
    yield ""


def _rows(prefix: str, model: type[BaseModel]) -> Iterator[str]:
    for name, declared in model.model_fields.items():
        if _is_section(declared) and prefix:
            yield from _rows(f"{prefix}{name}.", declared.annotation)
        elif not _is_section(declared):
            text = " ".join(declared.description.split())
            cells = (f"`{prefix}{name}`", _value(declared), _default(declared), text)
            yield "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"


def _is_section(declared: FieldInfo) -> bool:
    return isinstance(declared.annotation, type) and issubclass(declared.annotation, BaseModel)


def _value(declared: FieldInfo) -> str:
    return describe(declared.annotation, declared.metadata)


def _default(declared: FieldInfo) -> str:
    return "" if declared.is_required() else f"`{_yaml(declared.default)}`"


def _yaml(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return (
        yaml.safe_dump(value, default_flow_style=True, width=2**31).removesuffix("\n").removesuffix("\n...")
    )


def main() -> int:
    text = reference()
    if "--check" in sys.argv[1:]:
        current = TARGET.read_text(encoding="utf-8") if TARGET.exists() else ""
        if current != text:
            print(f"{TARGET} is out of date: run `make docs`", file=sys.stderr)
            return 1
        return 0
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
