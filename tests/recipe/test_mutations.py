"""Recipes and overrides that a slip of the finger has changed: a recipe still, or one message."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from linchain_cli.errors import InputError
from linchain_cli.recipe import Recipe, load_recipe

from .test_loading import VALID

# What a slip of the finger, a paste or a wrong file makes of a recipe.
SCRAPS = st.text(max_size=4) | st.sampled_from(
    [
        ":",
        "- ",
        "  ",
        "\t",
        "\n",
        "'",
        '"',
        "{",
        "}",
        "[",
        "]",
        "&a ",
        "*a",
        "!!int ",
        "|",
        ">",
        "#",
        "%",
        "@",
    ]
    + [
        "?",
        "---\n",
        "...\n",
        "null",
        "~",
        "1e999",
        "-1",
        "0x1F",
        "9" * 400,
        ".inf",
        "2024-11-01",
        "<<: ",
        "\\",
    ]
    + ["\u2028", "\x85", "\ufeff", "\xe9"]
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    text = VALID
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.sampled_from([0, 0, 1, 3, 20])))
        text = text[:start] + draw(SCRAPS) + text[end:]
    lines = text.split("\n")
    if draw(st.booleans()):
        source, target = draw(st.integers(0, len(lines) - 1)), draw(st.integers(0, len(lines) - 1))
        lines.insert(target, draw(st.sampled_from(["", "  ", "    "])) + lines[source].strip())
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    cut = draw(st.none() | st.integers(0, len(data)))
    return data[:cut]


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(content=mutated())
def test_a_mutated_recipe_is_a_recipe_or_an_input_error(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    try:
        recipe = load_recipe(path)
    except InputError as error:
        assert str(path) in str(error)
    else:
        path.write_text(recipe.to_yaml(), encoding="utf-8")
        assert load_recipe(path) == recipe


KEYS = ["name", "model", "data.train", "data.columns", "data.template.prompt", "adapter.target_modules"]


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(override=st.text(max_size=20) | st.tuples(st.sampled_from(KEYS), SCRAPS).map("=".join))
def test_any_override_is_taken_or_an_input_error(tmp_path, override):
    path = tmp_path / "recipe.yaml"
    path.write_text(VALID, encoding="utf-8")
    try:
        assert isinstance(load_recipe(path, [override]), Recipe)
    except InputError as error:
        assert "override" in str(error)
