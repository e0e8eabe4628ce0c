"""`linchain merge RUN RUN --weights`: several runs' adapters as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from linchain_cli import console
from linchain_cli.commands.named_run import AdaptedRun
from linchain_cli.errors import InputError

if TYPE_CHECKING:
    from linchain_cli.chain import Adapter
    from linchain_cli.data.asking import Asking
    from linchain_cli.export.receipts import ReceiptPart


def parse_weights(weights: str | None, runs: int, out: Path | None) -> list[float] | None:
    """--weights as numbers, one for each run; None where one run is merged as it is.

    Raises:
        InputError: they are missing, are no numbers, or are not one for each run; a sum has no --out.
    """
    if weights is None and runs == 1:
        return None
    if weights is None:
        even = ",".join([f"{1 / runs:.3g}"] * runs)
        raise InputError(f"{runs} runs are summed: say how with --weights, such as {even} for their mean")
    if out is None:
        raise InputError("a weighted sum belongs to no run: say where it goes with --out DIR")
    try:
        factors = [float(word) for word in weights.split(",")]
    except ValueError:
        factors = []
    if not factors or not all(map(math.isfinite, factors)) or not any(factors):
        raise InputError(f"--weights: '{weights}' is not a list of numbers such as 0.5,0.5")
    if len(factors) != runs:
        raise InputError(f"--weights: {len(factors)} numbers for {runs} runs")
    return factors


@dataclass(frozen=True)
class Sum:
    """A weighted sum of runs' adapters. It is asked as the first of them was.

    parts: each run's name, weight and adapter; error: of the sum, as `chain.sum_error` measures it
    data: names of what the runs were trained on
    quantization: how the runs had rounded their base, `none` where not all alike
    """

    adapter: Adapter
    parts: list[ReceiptPart]
    error: float
    data: tuple[str, ...]
    quantization: str
    asking: Asking | None


def describe_sum(parts: Sequence[ReceiptPart], error: float | None) -> str:
    """The sum in a line."""
    terms = " + ".join(f"{part.weight:g} × {part.name}" for part in parts)
    return f"{terms}: every ΔW within {error:.2g} of the sum"


def sum_runs(runs: Sequence[AdaptedRun], weights: Sequence[float], base: Path, allow_other_base: bool) -> Sum:
    """Sums the adapters of `runs`, which all have to be of the base at `base`.

    Raises:
        InputError: one of them is not, or holds numbers that are not finite; the message names it.
    """
    from linchain_cli.chain import sum_error, weighted_sum
    from linchain_cli.export.output import check_factors
    from linchain_cli.export.receipts import ReceiptAdapter, ReceiptPart
    from linchain_cli.model.hashing import refuse_other_base

    adapters = [run.adapter for run in runs]
    for run in runs:
        refuse_other_base(base, run.adapter.base.get("hash"), run.opened.name, allow=allow_other_base)
        check_factors(run.adapter)
    combined = weighted_sum(adapters, weights)
    asked = {str(run.asking and replace(run.asking, straddles=None)): run.opened.name for run in runs}
    if len(asked) > 1:
        console.warn(
            f"{' and '.join(asked.values())} were trained with different templates: the sum is asked as"
            f" {runs[0].opened.name} was"
        )
    roundings = {run.recipe.model.quantization for run in runs}
    return Sum(
        combined,
        [
            ReceiptPart(name=run.recipe.name, weight=weight, adapter=ReceiptAdapter.of(run.adapter))
            for run, weight in zip(runs, weights, strict=True)
        ],
        sum_error(combined, adapters, weights),
        tuple(dict.fromkeys(source.path for run in runs for source in run.recipe.data.sources)),
        roundings.pop() if len(roundings) == 1 else "none",
        runs[0].asking,
    )
