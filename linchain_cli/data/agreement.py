"""How well predictions agree with labels: accuracy, F1 and Matthews' correlation of classes, Pearson's and
Spearman's correlation of numbers.

scikit-learn and SciPy say what a number is. Its interval is the bootstrap's percentiles: rows drawn again
with replacement, the same ones for two models that are compared. The draws are counted all at once, by the
same formulas.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from linchain_cli.recipe.schema import METRICS

RESAMPLES = 1000
_TAILS = (2.5, 97.5)  # percent, of a 95 % interval
_AT_ONCE = 1 << 22  # numbers of drawn rows


@dataclass(frozen=True)
class Agreement:
    """One number over all rows; stderr is the bootstrap's standard deviation, interval its middle 95 %."""

    value: float
    stderr: float
    interval: tuple[float, float]


def agreement(metric: str, targets: np.ndarray, predictions: np.ndarray, classes: int = 0) -> float:
    """One of METRICS' numbers. A correlation with what does not vary is undefined, and counts as zero.

    Args:
        targets, predictions: (rows,), classes by number, or numbers.
        classes: how many there are. F1 is the last one's of two; of more it is the unweighted mean over those
            that occur among targets or predictions, as scikit-learn's.
    """
    if metric in METRICS["regression"]:
        return _correlation(metric, targets, predictions)
    from sklearn import metrics

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of predictions that are all the same
        if metric == "f1":
            average = "binary" if classes == 2 else "macro"
            return float(metrics.f1_score(targets, predictions, zero_division=0.0, average=average))
        function = {"accuracy": metrics.accuracy_score, "matthews": metrics.matthews_corrcoef}[metric]
        return float(function(targets, predictions))


def _correlation(metric: str, targets: np.ndarray, predictions: np.ndarray) -> float:
    from scipy import stats

    if len(targets) < 2 or np.ptp(targets) == 0 or np.ptp(predictions) == 0:
        return 0.0
    function = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}[metric]
    return float(function(targets, predictions).statistic)


def with_interval(metric: str, targets: np.ndarray, predictions: np.ndarray, classes: int = 0) -> Agreement:
    """A number with its bootstrap interval; the arguments are those of `agreement`."""
    value = agreement(metric, targets, predictions, classes)
    (drawn,) = resampled(metric, [targets, predictions], classes)
    return _summary(value, drawn)


def difference(
    metric: str,
    targets: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    classes: int = 0,
) -> Agreement:
    """The first model's number less the second one's, on the same rows in every draw."""
    value = agreement(metric, targets, first, classes) - agreement(metric, targets, second, classes)
    ours, theirs = resampled(metric, [targets, first, second], classes)
    return _summary(value, ours - theirs)


def _summary(value: float, drawn: np.ndarray) -> Agreement:
    low, high = np.percentile(drawn, _TAILS)
    return Agreement(value, float(np.std(drawn, ddof=1)), (float(low), float(high)))


def resampled(metric: str, columns: Sequence[np.ndarray], classes: int) -> list[np.ndarray]:
    """The metric of each column after the first, the targets, in RESAMPLES draws of as many rows."""
    targets, *told = (np.asarray(column) for column in columns)
    # RandomState's streams are frozen: the same intervals in every NumPy version.
    random, rows = np.random.RandomState(0), len(targets)
    if classes:
        # Of classes only how often each combination occurs counts: combinations are drawn for their rows.
        cells, counts = np.unique(np.stack([targets, *told]), axis=1, return_counts=True)
        drawn = random.multinomial(rows, counts / rows, size=RESAMPLES).astype(np.float64)
        return [_of_counts(metric, cells[0], one, drawn, classes) for one in cells[1:]]
    found: list[list[np.ndarray]] = [[] for _ in told]
    at_once = max(1, _AT_ONCE // rows)
    for start in range(0, RESAMPLES, at_once):
        draw = random.randint(0, rows, (min(at_once, RESAMPLES - start), rows))
        for number, one in enumerate(told):
            found[number].append(_correlations(metric, targets[draw], one[draw]))
    return [np.concatenate(parts) for parts in found]


def _of_counts(
    metric: str, targets: np.ndarray, told: np.ndarray, counts: np.ndarray, classes: int
) -> np.ndarray:
    """The metric of each draw. `counts` (draws, cells) says how often a cell's pair was drawn."""
    names = np.arange(classes)
    is_target, is_told = targets[:, None] == names, told[:, None] == names
    of_target, of_told = counts @ is_target, counts @ is_told  # (draws, classes)
    right = counts @ (is_target & is_told)
    rows = counts.sum(-1)
    if metric == "accuracy":
        return right.sum(-1) / rows
    if metric == "f1":
        occurs = of_target + of_told
        each = _ratio(2 * right, occurs)
        return each[:, 1] if classes == 2 else each.sum(-1) / (occurs > 0).sum(-1)
    shared = right.sum(-1) * rows - (of_target * of_told).sum(-1)
    spread = (rows**2 - (of_target**2).sum(-1)) * (rows**2 - (of_told**2).sum(-1))
    return _ratio(shared, np.sqrt(spread))


def _correlations(metric: str, targets: np.ndarray, told: np.ndarray) -> np.ndarray:
    """The correlation of each row of two (draws, rows)."""
    from scipy import stats

    if metric == "spearman":
        targets, told = stats.rankdata(targets, axis=-1), stats.rankdata(told, axis=-1)
    x, y = (each - each.mean(-1, keepdims=True) for each in (targets, told))
    return _ratio((x * y).sum(-1), np.sqrt((x * x).sum(-1) * (y * y).sum(-1)))


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.zeros_like(above, dtype=np.float64), where=below > 0)
