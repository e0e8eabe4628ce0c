from __future__ import annotations

import pytest

from linchain_cli.errors import InputError
from linchain_cli.recipe.strict_yaml import parse


def test_scalars_stay_text_and_every_key_and_item_has_its_line():
    document = parse("a: 1\nb:\n  - yes\n  - {c: 0o7}\n\nd: |\n  two\n  lines\n")
    assert document.value == {"a": "1", "b": ["yes", {"c": "0o7"}], "d": "two\nlines\n"}
    assert document.lines == {
        (): 1, ("a",): 1, ("b",): 2, ("b", 0): 3, ("b", 1): 4, ("b", 1, "c"): 4, ("d",): 6,
    }  # fmt: skip
    assert document.problems == []


@pytest.mark.parametrize("text", ["null", "~", "", "NULL"])
def test_only_plain_nulls_are_none(text):
    assert parse(f"a: {text}\nb: '{text}'").value == {"a": None, "b": text}


def test_the_first_of_two_equal_keys_is_kept_and_the_second_reported():
    document = parse("a: {x: 1}\nb: 2\na: 3\nb: 4")
    assert document.value == {"a": {"x": "1"}, "b": "2"}
    assert [(problem.key, problem.line) for problem in document.problems] == [(("a",), 3), (("b",), 4)]


def test_an_alias_is_not_followed():
    document = parse("a: &x [1, 2]\nb: [*x, *x]")
    assert document.value == {"a": ["1", "2"], "b": ["*x", "*x"]}
    assert sorted((problem.line, problem.key) for problem in document.problems) == [
        (1, ()),
        (2, ("b", 0)),
        (2, ("b", 1)),
    ]


@pytest.mark.parametrize(
    ("text", "line"), [("a: [1\nb: 2", 2), ("a: 'x", 1), ("a: 1\n b: 2", 2), ("a: \x01", 1), ("%X\n%", 2)]
)
def test_syntax_errors_name_their_line(text, line):
    with pytest.raises(InputError, match=rf"^line {line}: "):
        parse(text)
