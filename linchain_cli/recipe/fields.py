"""Kinds of values that several sections of a recipe hold."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, StringConstraints

from linchain_cli.recipe.validation import Expected

Text = Annotated[str, StringConstraints(min_length=1, pattern=r"^[^\x00]*$"), Expected("non-empty text")]
# No array has more than 10**9 places, and no sum of a few of them overflows.
Count = Annotated[int, Field(ge=1, le=10**9)]
CountFromZero = Annotated[int, Field(ge=0, le=10**9)]
FileName = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$"),
    Expected("a directory name of letters, digits, '.', '_' and '-'"),
]


def number_or_auto(value: Any) -> str:
    """For `choose`: which of the two a value is meant as."""
    return "auto" if value == "auto" else "number"
