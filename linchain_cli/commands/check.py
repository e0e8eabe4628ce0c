"""linchain check"""

from __future__ import annotations

from linchain_cli.commands.options import Overrides, RecipePath, not_available


def run(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Show what a recipe would train, on what, at what cost."""
    raise not_available("check")
