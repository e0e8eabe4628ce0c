"""What the documents say of the source tree."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("document", ["docs/contributing.md"])
def test_files_that_are_named_are_there(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:linchain_cli|tests|docs|scripts)/[\w./-]*)`", text))
    assert len(named) > 10
    assert not {name for name in named if not (ROOT / name).exists()}


def test_the_memory_table_is_what_check_predicts():
    """Its smallest model, whose cells take a few seconds; `make docs` writes all of it."""
    spec = importlib.util.spec_from_file_location("memory_table", ROOT / "scripts" / "memory_table.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    for quantization, name in (("none", "bfloat16"), ("nf4", "nf4")):
        cells = [script.cell(script.predicted("1 B", quantization, 8, *script.COLUMNS["2,048"]))]
        (row,) = (line for line in page.splitlines() if line.startswith(f"| 1 B | {name} | 8 |"))
        assert row.split(" | ")[3 + list(script.COLUMNS).index("2,048")] == cells[0]
