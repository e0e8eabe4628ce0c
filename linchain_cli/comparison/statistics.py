"""How far a mean over a few seeds, or a difference paired by seed, can be trusted."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy import special

CONFIDENCE = 0.95
LEVEL = 0.05  # how often some arm of a table without any effect may be called better or worse


def t_quantile(df: float, confidence: float = CONFIDENCE) -> float:
    """The t with P(|T| ≤ t) = confidence of Student's t with `df` degrees of freedom."""
    return float(special.stdtrit(df, (1 + confidence) / 2))


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds. `deviation` is the standard deviation between them (n − 1), None with one seed."""

    mean: float
    deviation: float | None
    n: int

    def as_json(self) -> dict[str, Any]:
        return {"mean": self.mean, "sd": self.deviation, "n": self.n}


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and spread; None of no values."""
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Estimate(statistics.fmean(values), deviation, len(values))


def interval(found: Estimate) -> tuple[float, float] | None:
    """The 95 % t interval of a mean; None with one value, which has no spread to judge by."""
    if found.deviation is None:
        return None
    half = t_quantile(found.n - 1) * found.deviation / math.sqrt(found.n)
    return found.mean - half, found.mean + half


def p_value(found: Estimate) -> float | None:
    """The two-sided t test's p of a mean that is 0 if nothing but chance is at work; None with one value."""
    if found.deviation is None:
        return None
    if found.deviation == 0:
        return 1.0 if found.mean == 0 else 0.0
    t = abs(found.mean) * math.sqrt(found.n) / found.deviation
    return float(2 * special.stdtr(found.n - 1, -t))


def smallest_telling(deviation: float, n: int, comparisons: int) -> float:
    """The smallest mean of n values that would be told from 0 at this spread, as the clearest of so many
    comparisons."""
    return t_quantile(n - 1, 1 - LEVEL / comparisons) * deviation / math.sqrt(n)
