"""What a person sees while rows are encoded and steps are taken."""

from __future__ import annotations

import io

from rich.console import Console

from linchain_cli.training import display


def test_encoding_tells_how_far_it_is_and_a_cache_says_nothing(run_tiny, capsys, monkeypatch):
    monkeypatch.setattr(display, "SECONDS_BETWEEN_LINES", 0.0)
    run_tiny({"name": "first", "data.max_length": 257})
    assert "encoding rows: 46 so far\n" in capsys.readouterr().err
    run_tiny({"name": "second", "data.max_length": 257})
    assert "encoding rows" not in capsys.readouterr().err


def test_lines_come_at_most_every_few_seconds(capsys, monkeypatch):
    times = iter([0.0, 1.0, 9.9, 10.5, 10.5, 11.0, 21.0, 21.0])
    monkeypatch.setattr(display.time, "monotonic", lambda: next(times))
    with display.counting_rows() as show:
        for rows in (10, 20, 1000, 1100, 20000):
            show(rows)
    assert capsys.readouterr().err == "encoding rows: 1,000 so far\nencoding rows: 20,000 so far\n"


def test_on_a_terminal_the_number_changes_in_place(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(
        display, "Console", lambda **options: Console(file=shown, force_terminal=True, width=60)
    )
    with display.counting_rows() as show:
        show(12345)
    assert "encoding rows: 12,345 so far" in shown.getvalue()
    with display.counting_rows():
        length = len(shown.getvalue())
    assert len(shown.getvalue()) == length, "nothing to count, nothing to see"
