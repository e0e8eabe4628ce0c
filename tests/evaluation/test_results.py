"""Summaries, comparisons, and how they are shown."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from linchain_cli.errors import InputError
from linchain_cli.evaluation.answers import AnswerRule
from linchain_cli.evaluation.published import COMMONSENSE, PUBLISHED, published_beside
from linchain_cli.evaluation.results import compare, summarise
from linchain_cli.evaluation.show import print_comparison, print_published, print_results, write_chart
from linchain_cli.evaluation.task import Task, TaskRow
from linchain_cli.result_files import Evaluation, Found, Metric, table

SETTING = Evaluation(
    format_version=2, model="one", protocol="likelihood", template="alpaca", dtype="float32",
    quantization="none", tasks={},
)  # fmt: skip


def make_task(name, count):
    """A task whose right answer is always `a`."""
    rows = tuple(TaskRow(index, {"instruction": f"Q{index}"}, "a", ("a", "b")) for index in range(count))
    return Task(name, rows, f"{name}.json", AnswerRule("options"), 8)


def rows_of(task, right, margin=1.0):
    """Predictions of which the given ones are right."""
    rows = []
    for row, is_right in zip(task.rows, right, strict=True):
        prediction, other = ("a", "b") if is_right else ("b", "a")
        rows.append(
            {
                "index": row.index,
                "task": task.name,
                "prediction": prediction,
                "answer": "a",
                "correct": is_right,
                "scores": {prediction: -1.0, other: -1.0 - margin},
            }
        )
    return rows


def make(correct, names=("boolq", "piqa"), margin=1.0, **settings):
    """Results in which the given rows (per task) are right."""
    tasks = [make_task(name, len(correct)) for name in names]
    predictions = [row for task in tasks for row in rows_of(task, correct, margin)]
    return summarise(tasks, list(reversed(predictions)), SETTING.model_copy(update=settings))


def shown(function, *args):
    console = Console(file=io.StringIO(), width=160)
    function(*args, console)
    return console.file.getvalue()


def test_rows_are_put_in_order_and_near_ties_counted():
    results = make([True, False, True, True])
    assert [(row["task"], row["index"]) for row in results.predictions][:5] == [
        ("boolq", 0), ("boolq", 1), ("boolq", 2), ("boolq", 3), ("piqa", 0),
    ]  # fmt: skip
    assert results.summary.tasks["boolq"].near_ties == 0
    assert make([True] * 3, margin=5e-5).summary.tasks["piqa"].near_ties == 3


def test_two_models_are_compared_row_by_row():
    first = make([True] * 30 + [False] * 10)
    second = make([True] * 20 + [False] * 18 + [True] * 2, model="two")
    comparison = compare(first, second)
    entry = comparison["tasks"]["boolq"]
    assert (entry["gained"], entry["lost"], entry["n"]) == (10, 2, 40)
    assert entry["difference"] == pytest.approx(0.2)
    assert entry["p"] == pytest.approx(0.038574, abs=1e-6)
    assert entry["interval"][0] > 0
    assert comparison["all_rows"]["n"] == 80 and comparison["average_difference"] == pytest.approx(0.2)
    assert comparison["differences_in_settings"] == []
    text = shown(print_comparison, first, comparison)
    assert "one minus two" in text and "+20.0" in text and "not evaluated alike" not in text


def test_eight_p_values_are_eight():
    """One of eight tests is below 0.05 by chance in a third of comparisons of equal models."""
    names = [f"task{number}" for number in range(8)]
    first = make([True] * 9 + [False] * 20, names=names)
    second = make([True] * 2 + [False] * 27, names=names, model="two")
    entries = compare(first, second)["tasks"].values()
    assert all(entry["p"] == pytest.approx(2 / 2**7) for entry in entries)
    assert all(entry["p_holm"] == pytest.approx(8 * 2 / 2**7) for entry in entries)
    text = shown(print_comparison, first, compare(first, second))
    assert "Holm's p" in text and "of 8" in text


def test_intervals_stay_within_what_a_share_can_be():
    certain = make([True] * 5 + [False] * 1)
    assert certain.summary.average_interval[1] == 1.0
    other = make([False] * 6, model="two")
    assert compare(certain, other)["average_interval"][1] <= 1.0


def test_different_settings_are_said():
    comparison = compare(make([True] * 4), make([True] * 4, model="two", dtype="bfloat16", template="plain"))
    assert comparison["differences_in_settings"] == [
        "template: alpaca and plain",
        "dtype: float32 and bfloat16",
    ]
    text = shown(print_comparison, make([True] * 4), comparison)
    assert text.count("not evaluated alike") == 2 and "float32 and bfloat16" in text


@pytest.mark.parametrize("other", [make([True] * 5), make([True] * 4, names=("boolq",))])
def test_other_rows_are_not_compared(other):
    with pytest.raises(InputError, match="not of the same rows"):
        compare(make([True] * 4), other)


def test_a_narrow_terminal_cuts_no_number(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "30")
    print_results(make([True, False, True, True]))
    assert "75.0 %" in capsys.readouterr().out


def test_the_table_names_the_settings_and_the_majority():
    text = shown(print_results, make([True, False, True, True]))
    assert "one · likelihood · template alpaca · float32" in text
    assert "75.0 %" in text and "100.0 %" in text and "average" in text
    assert "no answer" not in text  # no column for what did not happen
    generated = make([True, False], protocol="generate", beams=4)
    generated.summary.tasks["boolq"] = generated.summary.tasks["boolq"].model_copy(update={"unparsable": 7})
    text = shown(print_results, generated)
    assert "generate (4 beams)" in text and "no answer" in text and "7" in text


def test_tasks_that_only_have_a_loss_have_no_columns_of_accuracies():
    """They took the place of the headings that there are numbers for."""
    results = make([True, False], names=("held-out",))
    loss = Metric(value=1.2345, stderr=0.1, is_share=False)
    without = {"accuracy": None, "stderr": None, "interval": None, "majority": None, "near_ties": None}
    results.summary.tasks["held-out"] = results.summary.tasks["held-out"].model_copy(
        update={**without, "metrics": {"loss": loss, "perplexity": loss}}
    )
    text = shown(print_results, results)
    assert "perplexity" in text and "1.234" in text and "accuracy" not in text and "majority" not in text


def test_published_rows_stand_apart_with_their_source():
    assert published_beside(["boolq"]) == []
    results = make([True] * 4, names=COMMONSENSE)
    text = shown(print_published, results)
    assert "80.8 %" in text and "arXiv 2402.09353" in text and "Published by others" in text
    assert all(row.source and row.tasks == COMMONSENSE for row in PUBLISHED)
    assert "No published rows" in shown(print_published, make([True] * 4))


def test_the_chart_depends_on_the_results_alone(tmp_path):
    results = [make([True, False, True, True]), make([True] * 4, model="two")]
    for name in ("a.png", "b.png"):
        write_chart(results, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    write_chart(results[:1], tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_names_are_shown_as_they_are():
    """Square brackets are markup to the table's library, and were swallowed."""
    results = make([True, False], ("[red]dev.csv",), model="runs/[red]one")
    text = shown(print_results, results)
    assert "runs/[red]one · likelihood" in text and "[red]dev.csv" in text
    comparison = compare(results, make([True, True], ("[red]dev.csv",), model="[red]two"))
    measures = {"[red]dev.csv": {"f1": {"difference": 0.5, "interval": (0.1, 0.9)}}}
    text = shown(print_comparison, results, comparison | {"metrics": measures})
    assert "runs/[red]one minus [red]two" in text and "the same minus [red]two" in text
    assert text.count("[red]dev.csv") == 2


def test_a_classifiers_table_fits_into_80_characters():
    long = f"runs/{'a' * 70}"
    results = make([True, False], ("glue/mnli",), protocol="classification", model=long)
    (name,) = results.summary.tasks
    metrics = {
        "f1": Metric(value=0.788),
        "matthews": Metric(value=-0.01234, interval=(-0.25, -0.01), is_share=False),
    }
    results.summary.tasks[name] = results.summary.tasks[name].model_copy(
        update={"metrics": metrics, "n": 9815}
    )
    console = Console(file=io.StringIO(), width=80)
    print_results(results, console)
    text = console.file.getvalue()
    for whole in (
        f"{long} · classification",
        "accuracy",
        "interval",
        "matthews",
        "9.5 … 90.5",
        "-0.01234",
        "-0.25 … -0.01",
        "78.8 %",
        "glue/mnli",
        "9815",
    ):
        assert whole in text


def test_a_template_that_a_task_brings_is_told():
    """It is that task's, and not the one in the heading; then the heading's makes no difference either."""
    task = replace(make_task("own", 2), template={"prompt": "{instruction}", "response": "{output}"})
    for name, expected in ((None, None), ("alpaca", None), ("chat", "chat"), (task.template, "of its own")):
        results = summarise([replace(task, template=name)], rows_of(task, [True, False]), SETTING)
        assert results.summary.tasks["own"].template == expected
    other = SETTING.model_copy(update={"template": "plain"})
    again = summarise([task], rows_of(task, [True, False]), other)
    assert "(template of its own)" in shown(print_results, results)
    assert compare(results, again)["differences_in_settings"] == []
    lines = table([Found(Path("x.json"), results.summary)])
    assert lines[0].setting == "likelihood · template of its own · float32"
