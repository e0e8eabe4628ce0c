"""`linchain compare` as it is typed."""

from __future__ import annotations

import json

import pytest

from linchain_cli.commands.compare import parse_seeds
from linchain_cli.errors import InputError
from linchain_cli.run import ComparisonDirectory, find_run

from ..command_line import linchain


def test_from_the_command_line_to_a_page(recipe_path, tmp_path, capsys):
    words = [
        "compare",
        str(recipe_path),
        "adapter.depth=0,3",
        "training.learning_rate=3e-3,1e-2",
        "training.max_steps=2",
    ]
    assert linchain(*words, "--seeds", "1,2") == 0
    shown = capsys.readouterr()
    directory = ComparisonDirectory(tmp_path / "tiny")
    assert "At the recipe's learning rate (0.003)" in shown.out
    assert "Each arm at its best learning rate" in shown.out
    assert "run 8 of 8: depth-3-kaiming_learning_rate-0.01_seed-2" in shown.err
    assert "only 1 validation(s) in 2 steps" in shown.err and "eval_every=1 would give 2" in shown.err
    for path in (
        directory.table_path,
        directory.runs_table_path,
        directory.results_path,
        directory.plot_path,
    ):
        assert str(path) in shown.out and path.is_file()
    results = json.loads(directory.results_path.read_text())
    assert {run["seed"] for run in results["runs"]} == {1, 2}

    assert linchain("report", str(directory.path)) == 0
    page = (directory.path / "report.html").read_text()
    assert page.count("<img") == 4 and "depth-3-kaiming_learning_rate-0.01_seed-2" in page
    assert capsys.readouterr().out.strip() == str(directory.path / "report.html")

    # A comparison is no run; the message says where its runs are.
    with pytest.raises(
        InputError, match=r"is a comparison: name one of its runs, which lie in .*/tiny/arms/"
    ):
        find_run(directory.path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["adapter.depht=0,3"], "Did you mean 'depth'?"),
        (["adapter.depth=3"], "nothing is varied"),
        (["adapter.depth=0,3", "--seeds", "1,x"], "--seeds: 'x' is no seed"),
        (["adapter.depth=0,3", "data.train=nowhere.json"], "nowhere.json"),
    ],
)
def test_wrong_words_are_told_in_one_message(recipe_path, words, message, capsys):
    assert linchain("compare", str(recipe_path), *words) == 2
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown


def test_seeds():
    assert parse_seeds("1,2,3") == [1, 2, 3]
    assert parse_seeds("7, 7,4294967295") == [7, 4294967295]
    for text in ("", "1,", "1.5", "-1", "x", "4294967296"):
        with pytest.raises(InputError, match="--seeds"):
            parse_seeds(text)
