"""What a person sees while a run trains: a bar on a terminal, plain lines elsewhere. All of it goes to
stderr.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from linchain_cli.console import SECONDS_BETWEEN_LINES, stderr_console


@contextlib.contextmanager
def counting_rows(quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """Yields what shows a number of encoded rows: in place on a terminal, elsewhere as a line every half
    minute. Nothing appears before the first number, so that rows found in the cache are not told about.
    """
    console = stderr_console(quiet)
    last = time.monotonic()
    with contextlib.ExitStack() as shown:
        status = None

        def show(rows: int) -> None:
            nonlocal last, status
            text = f"encoding rows: {rows:,} so far"
            if console.is_terminal:
                status = status or shown.enter_context(console.status(text))
                status.update(text)
            elif time.monotonic() - last >= SECONDS_BETWEEN_LINES:
                console.print(text)
                last = time.monotonic()

        yield show


class Display:
    """Shows steps, validation losses and notes of one run: under a bar on a terminal, elsewhere as a line for
    every logged step, and one every half minute in between.

    Args:
        total_steps: where the bar ends. done: steps that a resumed run has behind it.
        quiet: show nothing (every process but the first).
        brief: without a terminal, the line every half minute and nothing else (one of many runs).
    """

    def __init__(self, total_steps: int, done: int = 0, quiet: bool = False, brief: bool = False):
        self.console = stderr_console(quiet)
        self.total_steps = total_steps
        self.started, self.first_step = time.monotonic(), done
        self.last_line, self.last_told = self.started, done
        self.bar = None
        if self.console.is_terminal and not self.console.quiet:
            self.bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.task = self.bar.add_task("", total=total_steps, completed=done, status="")
        self.brief = brief and self.bar is None

    def __enter__(self) -> Display:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bar:
            self.bar.stop()

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        """After every optimizer step."""
        if self.bar:
            self.bar.update(
                self.task, completed=step, status=f"loss {loss:.4f} · {tokens_per_second:,.0f} tokens/s"
            )
        elif time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
            self._line(step, loss, tokens_per_second)

    def row(self, row: dict[str, Any]) -> None:
        """After a step whose metrics were logged."""
        if not self.bar and not self.brief and row["step"] != self.last_told:
            self._line(row["step"], row["loss"], row["tokens_per_second"])

    def _line(self, step: int, loss: float, tokens_per_second: float) -> None:
        self.last_line, self.last_told = time.monotonic(), step
        step_seconds = (self.last_line - self.started) / (step - self.first_step)
        left = _clock(step_seconds * (self.total_steps - step))
        speed = f"{tokens_per_second:,.0f} tokens/s"
        self.console.print(f"step {step}/{self.total_steps}  loss {loss:.4f}  {speed}  {left} left")

    def validation(self, step: int, values: dict[str, float], best: bool) -> None:
        """After a validation, of which `values` are the loss and what else was measured."""
        if not self.brief:
            whole = {name: value for name, value in values.items() if "/" not in name}
            told = ", ".join(f"{name} {value:.4f}" for name, value in whole.items())
            self.console.print(f"step {step}: validation {told}{' (best so far)' if best else ''}")
            parts = [(name.partition("/")[2], values[name]) for name in values if name not in whole]
            if parts:
                self.note("  " + ", ".join(f"{name} {value:.4f}" for name, value in parts))

    def note(self, message: str) -> None:
        """Anything the user should know."""
        self.console.print(message, markup=False)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
