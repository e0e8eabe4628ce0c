"""What a comparison was begun with, and what it is not continued with."""

from __future__ import annotations

import json

import pytest

from linchain_cli.comparison.grid import expand
from linchain_cli.comparison.runner import run_comparison
from linchain_cli.errors import InputError
from linchain_cli.run import ComparisonDirectory

WORDS = ["adapter.depth=0,3"]


def test_other_rows_are_no_continuation(recipe_path, rows_path, tmp_path):
    own = tmp_path / "rows.json"
    own.write_bytes(rows_path.read_bytes())
    words = [*WORDS, f"data.train={own}", "training.max_steps=1"]
    run_comparison(expand(recipe_path, words), [1])
    own.write_text(json.dumps(json.loads(own.read_text())[:-1]))
    with pytest.raises(InputError, match="data changed since depth-0_seed-1 was trained"):
        run_comparison(expand(recipe_path, words), [1, 2])


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        (
            ["adapter.depth=0,3", "training.warmup_steps=2"],
            {},
            "another recipe; it differs in training.warmup_steps",
        ),
        (WORDS, {"equal_parameters": True}, "a comparison without --equal-parameters"),
        (["adapter.depth=0,3", "adapter.rank=2,4"], {"equal_parameters": True}, "do not vary adapter.rank"),
    ],
)
def test_another_comparison_is_not_mixed_in(finished, words, options, message):
    path, directory, results = finished
    with pytest.raises(InputError, match=message):
        run_comparison(expand(path, words), [1], **options)
    assert results == json.loads(directory.results_path.read_bytes())


def test_what_is_no_comparison_is_left_alone(recipe_path, tmp_path):
    grid = expand(recipe_path, WORDS)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "thesis.txt").write_text("mine")
    for fresh in (False, True):
        with pytest.raises(InputError, match="is no comparison; it is left alone"):
            run_comparison(grid, [1], fresh=fresh)
    (tmp_path / "tiny" / "run.json").write_text('{"status": "finished"}')
    with pytest.raises(InputError, match="holds a run, not a comparison"):
        run_comparison(grid, [1], fresh=True)
    assert (tmp_path / "tiny" / "thesis.txt").read_text() == "mine"


def test_a_damaged_definition_is_told(recipe_path, tmp_path):
    directory = ComparisonDirectory(tmp_path / "tiny")
    directory.path.mkdir()
    for text in ("{", "[]", '{"format": 1}', '{"format": 99}'):
        directory.definition_path.write_text(text)
        with pytest.raises(InputError, match="damaged|format 99"):
            run_comparison(expand(recipe_path, WORDS), [1])
