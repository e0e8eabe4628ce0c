"""Steps that break: whatever was done up to one of them has to be safe."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest


def failing_at_each_call(monkeypatch: pytest.MonkeyPatch, module: ModuleType, function: str) -> Iterator[int]:
    """1, 2, ...: while the loop's body runs, that call of the function is an error of the device; until a
    body has fewer calls than that."""
    original = getattr(module, function)
    for failing in range(1, 30):
        calls = 0

        def step(*arguments: Any, failing: int = failing) -> Any:
            nonlocal calls
            calls += 1
            if calls == failing:
                raise OSError(errno.EIO, "it broke")
            return original(*arguments)

        monkeypatch.setattr(module, function, step)
        yield failing
        monkeypatch.setattr(module, function, original)
        if calls < failing:
            return
    pytest.fail("the steps have no end")
