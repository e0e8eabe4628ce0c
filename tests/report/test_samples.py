"""Rows as tokens, and which of them are supervised."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from linchain_cli.errors import InputError
from linchain_cli.recipe import load_recipe
from linchain_cli.report.samples import row_samples, token_pieces
from linchain_cli.run import RunDirectory, read_jsonl


def test_samples_are_the_first_steps_rows(finished_run):
    run = RunDirectory(finished_run)
    samples = row_samples(run, load_recipe(run.recipe_path), count=2)
    assert [sample.row for sample in samples] == read_jsonl(run.rows_path)[0]["rows"][:2]
    for sample in samples:
        learned = "".join(text for text, supervised in sample.pieces if supervised)
        prompt = "".join(text for text, supervised in sample.pieces if not supervised)
        number = learned.split()[1]
        assert learned.lstrip().startswith("answer ") and "<u>" in learned
        assert f"<i>{number}: </pre>" in prompt
        assert 0 < sample.supervised < sample.tokens


def test_pieces_are_tokens_and_join_to_the_text(tiny_tokenizer_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_dir)
    ids = tokenizer("the apple é 🧪 found", add_special_tokens=False).input_ids
    pieces = token_pieces(tokenizer, ids, [False] * len(ids))
    assert "".join(text for text, _ in pieces) == tokenizer.decode(ids)
    assert len(pieces) < len(ids)  # the bytes of é and 🧪 are joined
    assert all("\ufffd" not in text for text, _ in pieces)


def test_half_a_character_does_not_reach_over_the_boundary(tiny_tokenizer_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_dir)
    ids = tokenizer("🧪", add_special_tokens=False).input_ids
    pieces = token_pieces(tokenizer, ids, [False, *[True] * (len(ids) - 1)])
    assert [supervised for _, supervised in pieces] == [False, True]


def test_other_rows_are_not_shown_as_the_runs(run_path):
    run = RunDirectory(run_path)
    run.update_status(hashes={"data": "0" * 64})
    with pytest.raises(InputError, match="not the ones of the run any more"):
        row_samples(run, load_recipe(run.recipe_path))


def test_a_run_without_a_step_has_no_samples(run_path):
    run = RunDirectory(run_path)
    run.rows_path.unlink()
    assert row_samples(run, load_recipe(run.recipe_path)) == []
    assert json.loads(run.status_path.read_text())["status"] == "finished"
