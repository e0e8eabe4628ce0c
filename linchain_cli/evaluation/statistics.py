"""How far an accuracy, or the difference of two models on the same rows, can be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z = 1.959963984540054  # the standard normal's 97.5 % quantile: two-sided 95 % intervals


def standard_error(correct: int, n: int) -> float | None:
    """Standard error of the mean of n zeros and ones, from the sample variance; None below two rows."""
    if n < 2:
        return None
    p = correct / n
    return math.sqrt(p * (1 - p) / (n - 1))


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927): inside [0, 1], and not empty at 0 or 100 %."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = correct / n, Z * Z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # At 0 and 100 % the formula's bound is p itself, but for its rounding.
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


def macro_average(accuracies: Sequence[float], errors: Sequence[float | None]) -> tuple[float, float | None]:
    """The unweighted mean over tasks and its standard error, tasks being independent."""
    mean = sum(accuracies) / len(accuracies)
    if any(error is None for error in errors):
        return mean, None
    return mean, math.sqrt(sum(error * error for error in errors)) / len(errors)


def normal_interval(
    value: float, error: float | None, lowest: float, highest: float
) -> tuple[float, float] | None:
    """`value` ± 1.96 standard errors, cut to what the value can be."""
    return None if error is None else (max(lowest, value - Z * error), min(highest, value + Z * error))


@dataclass(frozen=True)
class Crossed:
    """A mean over seeds and rows, its standard error, and the degrees of freedom that a t interval takes it
    with; both None where a task has one row."""

    mean: float
    error: float | None
    df: float | None


def crossed(tables: Sequence[np.ndarray]) -> Crossed:
    """The unweighted mean over tasks of what every seed's run scored on every row, as an estimate of what
    other seeds would score on other rows.

    Seeds and rows are crossed random effects: the mean's variance is that of the seeds' means plus that of
    the rows' means, less their interaction, which both hold (Brennan, Generalizability Theory, 2001), and
    never less than the rows' part. Degrees of freedom are Satterthwaite's, as Hillis uses them (Statistics in
    Medicine 26, 2007). One seed says nothing of others: its error is the rows' alone.

    Args:
        tables: one per task, (seeds, rows) each with the same seeds: 0 and 1, or differences of them.
    """
    share, seeds = 1 / len(tables), tables[0].shape[0]
    mean = share * sum(float(table.mean()) for table in tables)
    if any(table.shape[1] < 2 for table in tables):
        return Crossed(mean, None, None)
    of_rows = [share**2 * table.mean(axis=0).var(ddof=1) / table.shape[1] for table in tables]
    freedoms = [table.shape[1] - 1 for table in tables]
    of_seeds = common = 0.0
    if seeds > 1:
        of_seeds = float(np.mean([table.mean(axis=1) for table in tables], axis=0).var(ddof=1)) / seeds
        common = sum(share**2 * _interaction(table) / table.size for table in tables)
    variance = sum(of_rows) + max(of_seeds - common, 0.0)
    squares = sum(part**2 / df for part, df in zip(of_rows, freedoms, strict=True))
    squares += of_seeds**2 / (seeds - 1) if seeds > 1 else 0.0
    return Crossed(mean, math.sqrt(variance), variance**2 / squares if squares else float(min(freedoms)))


def _interaction(table: np.ndarray) -> float:
    """The mean square of what is left of (seeds, rows) beside the means of both."""
    seeds, rows = table.shape
    rest = table - table.mean(axis=0) - table.mean(axis=1, keepdims=True) + table.mean()
    return float((rest**2).sum()) / ((seeds - 1) * (rows - 1))


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p: how likely so uneven a split is, were gains and losses equally likely."""
    n, k = gained + lost, min(gained, lost)
    if n == 0:
        return 1.0
    tail = term = 1
    # Binomial coefficients, each from the one before; whole numbers, so that nothing is rounded.
    for i in range(k):
        term = term * (n - i) // (i + 1)
        tail += term
    return min(1.0, 2 * tail / (1 << n))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values of several tests, adjusted so that a true null among them is rejected as rarely as in a
    single test (Holm 1979): below 0.05 in at most 5 % of families without any difference.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, floor = [0.0] * len(order), 0.0
    for rank, index in enumerate(order):
        floor = max(floor, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = floor
    return adjusted


@dataclass(frozen=True)
class Paired:
    """Two models on the same rows: `gained` rows only the first one has right, `lost` only the second one."""

    n: int
    gained: int
    lost: int

    @property
    def difference(self) -> float:
        """First accuracy minus second."""
        return (self.gained - self.lost) / self.n

    @property
    def error(self) -> float:
        """Standard error of the difference, with half a row added to each cell of the two-by-two table."""
        n, gained, lost = self.n + 2, self.gained + 0.5, self.lost + 0.5
        return math.sqrt(gained + lost - (gained - lost) ** 2 / n) / n

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the difference (Agresti and Min 2005): Wald's, with half a row added to each cell.

        Unlike Wald's it does not collapse when the two models disagree on no row or only one way.
        """
        centre = (self.gained - self.lost) / (self.n + 2)
        return max(-1.0, centre - Z * self.error), min(1.0, centre + Z * self.error)

    @property
    def p_value(self) -> float:
        """McNemar's exact p."""
        return mcnemar(self.gained, self.lost)


def pair(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    """Counts the rows on which two models differ."""
    gained = sum(one and not other for one, other in zip(first, second, strict=True))
    lost = sum(other and not one for one, other in zip(first, second, strict=True))
    return Paired(len(first), gained, lost)
