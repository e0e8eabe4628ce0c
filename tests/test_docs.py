"""What the documents say of the source tree."""

from __future__ import annotations

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
