"""The command line within this process."""

from __future__ import annotations

import pytest

from linchain_cli import cli


def linchain(*words: object) -> int:
    """Runs a command; returns its exit code."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(word) for word in words])
    return end.value.code
