"""linchain report"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linchain_cli import console
from linchain_cli.commands.options import Base, Json


def run(
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN",
            help="A run or a comparison; left out, the newest finished run under ./runs.",
            show_default=False,
        ),
    ] = None,
    base: Base = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where the page goes, such as page.html, or a directory; left out, report.html in RUN.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Write one HTML page about a run or a comparison."""
    from linchain_cli.run import ComparisonDirectory, find_run

    directory = ComparisonDirectory(path) if path is not None else None
    if directory is not None and directory.exists():
        from linchain_cli.report.comparison_page import write_comparison_report

        written = write_comparison_report(directory, out)
    else:
        found = find_run(path)
        from linchain_cli.report.run_page import write_run_report

        written = write_run_report(found, base, out)
    if json:
        console.print_json({"report": str(written)})
    else:
        print(written)
