from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from linchain_cli import storage
from linchain_cli.recipe import load_recipe
from linchain_cli.shipped import recipe_purposes, shipped_recipes

from ..command_line import linchain


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_list_shows_every_recipe_with_its_purpose(capsys):
    assert linchain("recipes", "list") == 0
    lines = capsys.readouterr().out.splitlines()
    purposes = dict(recipe_purposes())
    assert [line.split(maxsplit=1) for line in lines] == [
        [name, purpose] for name, purpose in purposes.items()
    ]
    assert purposes.keys() == shipped_recipes().keys() and len(set(purposes.values())) == len(purposes)


def test_purposes_are_first_lines_that_are_comments():
    for path in shipped_recipes().values():
        assert path.read_text(encoding="utf-8").startswith("# "), path


def test_convert_prints_a_recipe_that_says_the_same(elsewhere, capsys):
    (elsewhere / "theirs.yml").write_text("base_model: m\nlora_r: 8\ndatasets: [{path: x.jsonl}]\n")
    assert linchain("recipes", "convert", "theirs.yml") == 0
    (elsewhere / "ours.yaml").write_text(capsys.readouterr().out)
    recipe = load_recipe("ours.yaml")
    assert (recipe.name, recipe.model.path, recipe.adapter.rank) == ("theirs", "m", 8)
    assert linchain("recipes", "convert", "ours.yaml") == 2
    assert "ours.yaml: no configuration of Axolotl" in capsys.readouterr().err


def test_convert_reads_the_standard_input(capsys):
    reading, writing = os.pipe()
    os.write(writing, b"base_model: m\nadapter: lora\nlora_r: 8\nlora_alpha: 8\noutput_dir: out/mine\n")
    os.close(writing)
    before = os.dup(0)
    os.dup2(reading, 0)
    try:
        assert linchain("recipes", "convert", "-") == 0
    finally:
        os.dup2(before, 0)
        os.close(before)
        os.close(reading)
    assert "name: mine" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, said",
    [
        ("no.yaml", "no.yaml: no such file. docs/coming-from.md says what its settings are called here."),
        (".", ".: a directory; a configuration that can be converted is a YAML file."),
        ("train.py", "train.py: a script; a configuration that can be converted is a short YAML file. docs/"),
    ],
)
def test_convert_says_what_it_takes(elsewhere, capsys, name, said):
    (elsewhere / "train.py").write_text("import trl\n")
    assert linchain("recipes", "convert", name) == 2
    assert said in capsys.readouterr().err


def test_copy_writes_the_same_bytes_and_never_over_a_file(elsewhere, capsys):
    assert linchain("recipes", "copy", "figure2") == 0
    copied = elsewhere / "figure2.yaml"
    assert copied.read_bytes() == shipped_recipes()["figure2"].read_bytes()
    assert load_recipe(copied).name == "figure2"
    copied.write_text("mine")
    capsys.readouterr()
    assert linchain("recipes", "copy", "figure2") == 2
    assert "figure2.yaml exists and is left as it is" in capsys.readouterr().err
    assert copied.read_text() == "mine"


def test_copy_over_a_file_only_when_asked(elsewhere):
    (elsewhere / "figure2.yaml").write_text("mine")
    assert linchain("recipes", "copy", "figure2", "--overwrite") == 0
    assert (elsewhere / "figure2.yaml").read_bytes() == shipped_recipes()["figure2"].read_bytes()
    (elsewhere / "linked.yaml").symlink_to("nowhere")
    assert linchain("recipes", "copy", "figure2", "--overwrite", "--out", "linked.yaml") == 2
    (elsewhere / "folder" / "figure2.yaml").mkdir(parents=True)
    assert linchain("recipes", "copy", "figure2", "--overwrite", "--out", "folder") == 2


def test_copy_to_another_place(elsewhere, capsys):
    (elsewhere / "folder").mkdir()
    assert linchain("recipes", "copy", "figure2", "--out", "folder") == 0
    assert linchain("recipes", "copy", "figure2", "--out", "mine.yaml") == 0
    assert (elsewhere / "folder/figure2.yaml").is_file() and (elsewhere / "mine.yaml").is_file()
    assert linchain("recipes", "copy", "figure2", "--out", "no/such/place.yaml") == 2
    assert "no/such is not a directory" in capsys.readouterr().err


def test_copy_does_not_follow_a_dangling_link(elsewhere):
    (elsewhere / "figure2.yaml").symlink_to("nowhere")
    assert linchain("recipes", "copy", "figure2") == 2


def test_copy_of_an_unknown_name_lists_them(capsys):
    assert linchain("recipes", "copy", "zzz") == 2
    assert "There are: " in capsys.readouterr().err
    assert linchain("recipes", "copy", "figure2.yaml") == 2
    assert "Did you mean 'figure2'?" in capsys.readouterr().err


def test_schema_is_json(capsys):
    assert linchain("recipes", "schema") == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Recipe"


def test_a_place_that_cannot_be_written_is_named(monkeypatch, capsys):
    def read_only(path, data):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(storage, "write_atomic", read_only)
    assert linchain("recipes", "copy", "figure2") == 2
    assert "figure2.yaml cannot be written: Read-only file system" in capsys.readouterr().err
    assert linchain("recipes", "copy", "figure2", "--out", "~nobody-knows/x.yaml") == 2
    assert "home directory is not known" in capsys.readouterr().err
