"""Validation with a model that is no recipe: nothing in it may know the recipe's keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import pytest
from pydantic import Field

from linchain_cli.recipe.validation import Conflict, Expected, StrictModel, check, describe, field_at, tagged


class Inner(StrictModel):
    low: int = 0
    high: Annotated[int, Field(le=9)] = 9
    mode: Literal["fast", "slow"] = "fast"

    def conflicts(self) -> Iterator[Conflict]:
        if self.low > self.high:
            yield Conflict(("low", "high"), "low is above high.")


class Outer(StrictModel):
    title: str
    inner: Inner = Inner()
    items: list[Inner] = []


def found(value: dict) -> list[tuple[tuple, str]]:
    model, problems = check(Outer, value)
    assert (model is None) == bool(problems)
    return [(problem.key, problem.message) for problem in problems]


def test_a_valid_value_is_the_model():
    model, problems = check(Outer, {"title": "t", "inner": {"low": "3"}})
    assert problems == [] and model == Outer(title="t", inner=Inner(low=3))


def test_a_conflict_is_found_beside_an_unrelated_error_in_the_same_section():
    assert found({"title": "t", "inner": {"low": 5, "high": 3, "mode": "fsat"}}) == [
        (("inner", "mode"), "expected one of fast, slow, got 'fsat'. Did you mean 'fast'?"),
        (("inner", "low"), "low is above high."),
    ]


def test_no_conflict_is_made_up_from_the_default_of_a_wrong_value():
    assert found({"title": "t", "inner": {"low": 12, "high": 99}}) == [
        (("inner", "high"), "expected a whole number at most 9, got 99.")
    ]


def test_items_of_a_list_have_their_index():
    assert found({"title": "t", "items": [{}, {"low": "x"}]}) == [
        (("items", 1, "low"), "expected a whole number, got 'x'.")
    ]


def test_a_missing_key_is_not_reported_beside_its_misspelling():
    assert found({"titel": "t"}) == [(("titel",), "unknown key. Did you mean 'title'?")]
    assert found({}) == [(("title",), "missing. Expected text.")]


def test_an_unknown_key_is_looked_for_in_other_sections():
    assert found({"title": "t", "high": 3}) == [(("high",), "unknown key. Did you mean 'inner.high'?")]
    assert found({"title": "t", "inner": {"zzz": 3}}) == [
        (("inner", "zzz"), "unknown key. Known here: low, high, mode.")
    ]


@pytest.mark.parametrize(
    ("annotation", "metadata", "text"),
    [
        (int | None, (), "a whole number or null"),
        (float, (Field(gt=0), Field(le=1)), "a number above 0 and at most 1"),
        (Annotated[int, Field(ge=1)] | None, (), "a whole number of at least 1 or null"),
        (int, (Field(ge=1, le=10**9),), "a whole number from 1 to 1,000,000,000"),
        (list[str], (), "a list, each item text"),
        (dict[str, int], (), "a mapping of text to a whole number"),
        (Literal["one"], (), "'one'"),
        (Inner, (), "a mapping with low, high, mode"),
        (str, (Expected("first"), Expected("a colour")), "a colour"),
        (tagged(int, "n") | tagged(str, "t"), (), "a whole number or text"),
    ],
)
def test_what_a_field_takes_in_words(annotation, metadata, text):
    assert describe(annotation, metadata) == text


def test_the_field_at_a_key():
    assert field_at(Outer, ("items", 3, "mode")).default == "fast"
    assert field_at(Outer, ("nothing",)) is None
