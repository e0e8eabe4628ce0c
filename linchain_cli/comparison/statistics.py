"""How far a mean over a few seeds, or a difference paired by seed, can be trusted."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

CONFIDENCE = 0.95
LEVEL = 0.05  # how often some arm of a table without any effect may be called better or worse


def student_t(t: float, df: int) -> float:
    """P(|T| ≤ t) of Student's t with `df` degrees of freedom, t ≥ 0 (Abramowitz and Stegun 26.7.3, .4)."""
    theta = math.atan(t / math.sqrt(df))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = df % 2
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(2 + odd, df + 1, 2):
        total += term
        term *= cosine * cosine * (k - 1) / k
    return 2 / math.pi * (theta + sine * total) if odd else sine * total


@lru_cache(maxsize=256)
def t_quantile(df: int, confidence: float = CONFIDENCE) -> float:
    """The t with P(|T| ≤ t) = confidence, found by bisection."""
    low, high = 0.0, 1.0
    while student_t(high, df) < confidence:
        high *= 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if student_t(middle, df) < confidence else (low, middle)
    return (low + high) / 2


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
    return max(0.0, 1 - student_t(abs(found.mean) * math.sqrt(found.n) / found.deviation, found.n - 1))


def smallest_telling(deviation: float, n: int, comparisons: int) -> float:
    """The smallest mean of n values that would be told from 0 at this spread, as the clearest of so many
    comparisons."""
    return t_quantile(n - 1, 1 - LEVEL / comparisons) * deviation / math.sqrt(n)
