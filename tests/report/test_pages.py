"""Whole pages: what they hold, that nothing in them acts, and that they fit a phone."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from linchain_cli.errors import InputError
from linchain_cli.report.comparison_page import write_comparison_report
from linchain_cli.report.run_page import write_run_report
from linchain_cli.run import ComparisonDirectory, RunDirectory

from ..command_line import linchain


@pytest.fixture
def shown(hostile) -> str:
    """The hostile text as a page shows it: what cannot be seen, or turns what follows around, by its code."""
    return hostile.replace("\u202e", "\\u202e").replace("\x07", "\\x07")


@pytest.fixture(scope="session")
def run_page(finished_run, tmp_path_factory) -> str:
    copy = shutil.copytree(finished_run, tmp_path_factory.mktemp("page") / "run")
    return write_run_report(RunDirectory(copy)).read_text()


def test_a_run_on_one_page(check_page, run_page, finished_run):
    page = check_page(run_page)
    status = json.loads((finished_run / "run.json").read_text())
    assert page.texts[0].strip() == "" and "tiny: a chain of 2 links of rank 4" in page.text
    for title in (
        "Loss",
        "Evaluation",
        "Speed and memory",
        "What was learned",
        "Rows",
        "How to repeat it",
        "Recipe",
    ):
        assert title in page.text
    assert f"{status['trainable_parameters']:,}" in page.text
    assert status["versions"]["torch"] in page.text and status["hashes"]["base"] in page.text
    # Intervals of a task and of the average.
    assert "41.0% to 80.0%" in page.text and "50.0% to 75.0%" in page.text
    assert "lr_scheduler: linear" in page.text  # the recipe with its defaults
    # loss, ‖ΔW‖/‖W0‖, entropy rank, first direction, spectra
    assert len(page.all("img")) == 5
    assert "‖ΔW‖ / ‖W0‖" in page.text


def test_text_of_data_and_results_stays_text(check_page, run_page, shown):
    page = check_page(run_page)
    assert shown in page.text
    assert "<b>boolq</b>" in page.text
    assert "".join(page.marked).count("answer ") == 3  # three rows, each with its supervised answer marked
    assert "<i>" not in "".join(page.marked)  # the prompt is not


def test_a_run_that_stopped_early_has_a_page(check_page, run_path, hostile, shown):
    shutil.rmtree(run_path / "adapter")
    shutil.rmtree(run_path / "eval")
    (run_path / "metrics.jsonl").unlink()
    RunDirectory(run_path).update_status(status="failed", reason=f"the loss is nan {hostile}")
    page = check_page(write_run_report(RunDirectory(run_path)).read_text())
    assert f"failed: the loss is nan {shown}" in page.text
    assert "What was learned" not in page.text and "Evaluation" not in page.text


def test_the_page_of_an_imported_adapter_tells_of_no_training(check_page, run_path):
    run = RunDirectory(run_path)
    run.metrics_path.unlink()
    run.rows_path.unlink()
    run.update_status(imported={"from": "their/adapter"}, rows={}, hashes={})
    source = write_run_report(run).read_text()
    assert "imported from" in source and "their/adapter" in check_page(source).text
    assert "<dd></dd>" not in source and "<dd>{}</dd>" not in source
    assert "seed</dt>" not in source and "linchain train" not in source


def test_what_cannot_be_read_is_said_on_the_page(check_page, run_path, tmp_path):
    run = RunDirectory(run_path)
    status = run.read_status()
    gone = replace(status.base, source=str(tmp_path / "gone"), path="gone")
    run.recipe_path.write_text(run.recipe_path.read_text().replace(status.base.path, "gone"))
    run.update_status(base=gone, hashes={"data": "0" * 64})
    page = check_page(write_run_report(run).read_text())
    assert "‖W0‖ is not shown: it was at" in page.text
    assert "Sample rows cannot be shown" in page.text
    (run_path / "adapter" / "chain.safetensors").write_bytes(b"damaged")
    assert "The adapter cannot be shown" in check_page(write_run_report(run).read_text()).text


def test_a_page_goes_where_one_says_and_over_no_file_of_another_hand(run_path, tmp_path, monkeypatch, capsys):
    place = tmp_path / "pages" / "a page.html"
    for _ in range(2):  # its own page is replaced
        assert linchain("report", run_path, "--out", place) == 0
    assert capsys.readouterr().out == f"{place}\n" * 2
    assert linchain("report", run_path, "--out", tmp_path / "pages") == 0
    assert (tmp_path / "pages" / "report.html").read_text() == place.read_text()
    (tmp_path / "mine.html").write_text("mine")
    assert linchain("report", run_path, "--out", tmp_path / "mine.html") == 2
    assert "mine.html exists and is no page of linchain report" in capsys.readouterr().err
    assert (tmp_path / "mine.html").read_text() == "mine"
    assert not (run_path / "report.html").exists()
    monkeypatch.setattr("os.access", lambda path, mode: not mode & os.W_OK)
    assert linchain("report", run_path) == 2
    assert "cannot be written to: name another place, such as --out report.html" in capsys.readouterr().err


def test_a_damaged_result_is_named(check_page, run_path):
    (run_path / "eval" / "likelihood.json").write_text("{")
    page = check_page(write_run_report(RunDirectory(run_path)).read_text())
    assert "Not shown: " in page.text and "likelihood.json: this is no result of linchain eval" in page.text


def test_a_comparison_on_one_page(check_page, comparison_path, shown):
    page = check_page(write_comparison_report(ComparisonDirectory(comparison_path)).read_text())
    assert "At the recipe's learning rate (0.0003)" in page.text
    assert "Each arm at its best learning rate" not in page.text  # one rate was tried
    assert "−0.1000 [−0.3000, +0.1000] within the spread" in page.text
    assert "150 (1 of 2 seeds)" in page.text
    assert "linchain compare recipe.yaml adapter.depth=0,3 --seeds 1,2" in page.text
    assert page.text.count(shown) >= 3  # the arm's label and the note
    assert len(page.all("img")) == 2


def test_adapters_of_a_comparison_that_are_gone_are_said(check_page, comparison_path):
    page = check_page(write_comparison_report(ComparisonDirectory(comparison_path)).read_text())
    assert "holds no chain adapter" in page.text


def test_a_comparison_without_results(tmp_path):
    (tmp_path / "comparison.json").write_text("{}")
    with pytest.raises(InputError, match="has no results yet"):
        write_comparison_report(ComparisonDirectory(tmp_path))
    for text in ("{", "[]", "{}"):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(InputError, match="is damaged"):
            write_comparison_report(ComparisonDirectory(tmp_path))


@pytest.mark.parametrize("kind", ["run_path", "comparison_path"])
def test_the_command_writes_and_names_the_page(kind, request, capsys):
    path: Path = request.getfixturevalue(kind)
    assert linchain("report", path) == 0
    assert capsys.readouterr().out.strip() == str(path / "report.html")
    assert (path / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_the_command_names_what_is_no_run(tmp_path, capsys):
    assert linchain("report", tmp_path) == 2
    assert "is not a run directory" in capsys.readouterr().err


@pytest.mark.parametrize("width", [390, 800, 1200])
def test_nothing_overflows(overflow, run_page, comparison_path, width):
    written = write_comparison_report(ComparisonDirectory(comparison_path)).read_text()
    for source in (run_page, written):
        assert overflow(source, width) == (width, [])
