"""linchain report"""

from __future__ import annotations

from linchain_cli.commands.options import RunPath, not_available


def run(run_path: RunPath = None) -> None:
    """Write one HTML page about a run."""
    raise not_available("report")
