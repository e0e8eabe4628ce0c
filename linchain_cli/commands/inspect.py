"""linchain inspect"""

from __future__ import annotations

from linchain_cli.commands.options import RunPath, not_available


def run(run_path: RunPath = None) -> None:
    """Show spectra and sizes of what was learned."""
    raise not_available("inspect")
