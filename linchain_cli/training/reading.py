"""What a process finds when it reads its share of validation rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Reading:
    """`loss`: summed, a float64 scalar on the model's device; `told`: of rows with a label (rows, what the
    model tells of them)."""

    loss: Tensor
    told: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)


def joined(parts: Sequence[Reading]) -> Reading:
    """What was found in several parts of the rows, as one."""
    return Reading(sum(part.loss for part in parts), [each for part in parts for each in part.told])
