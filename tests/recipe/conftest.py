"""What tests of recipes share."""

from __future__ import annotations

import pytest

from linchain_cli.recipe import Recipe, convert_recipe, load_recipe


@pytest.fixture
def convert(tmp_path):
    """`convert(text)`: the recipe's text, and the recipe as it loads."""

    def call(text: str) -> tuple[str, Recipe]:
        path = tmp_path / "theirs.yaml"
        path.write_text(text, encoding="utf-8")
        made = convert_recipe(path)
        (tmp_path / "recipe.yaml").write_text(made, encoding="utf-8")
        return made, load_recipe(tmp_path / "recipe.yaml")

    return call
