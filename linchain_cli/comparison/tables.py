"""The two tables of a comparison: arms at the recipe's learning rate, and each arm at its best one."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from linchain_cli.comparison.definition import Definition
from linchain_cli.comparison.grid import DEPTH, INIT, LINKS_RATE, RATE, SCALE, Arm, labels, settings
from linchain_cli.comparison.measure import Measurement
from linchain_cli.comparison.statistics import LEVEL, estimate, interval, p_value, smallest_telling
from linchain_cli.evaluation.statistics import holm
from linchain_cli.recipe import Recipe

LOWER, HIGHER, WITHIN = "lower", "higher", "within the spread"
# The interval alone leaves 0 out, and as one of so many that is no surprise.
BY_CHANCE = "may be chance"
ONE_SEED, REFERENCE = "one seed, no spread", "reference"
# Keys that have no meaning for a depth of 0, so that they need not agree between an arm and its LoRA.
_OF_LINKS = (DEPTH, INIT, LINKS_RATE, SCALE)


@dataclass(frozen=True)
class Candidate:
    """An arm with its finished runs by seed."""

    arm: Arm
    label: str
    settings: Mapping[str, Any]
    runs: Mapping[int, Measurement]

    @property
    def recipe(self) -> Recipe:
        return self.arm.recipe

    @property
    def rate(self) -> float:
        return self.recipe.training.learning_rate

    def mean(self, read: Callable[[Measurement], float]) -> float:
        """Over its runs."""
        return statistics.fmean(map(read, self.runs.values()))

    def group(self) -> str:
        """What arms that differ in their learning rate alone have in common."""
        return json.dumps({key: value for key, value in self.settings.items() if key != RATE}, sort_keys=True)


def candidates(definition: Definition, measurements: Sequence[Measurement]) -> list[Candidate]:
    """Every arm, with those of its runs that finished."""
    named = labels([arm.recipe for arm in definition.arms], definition.base)
    found = []
    for arm, label in zip(definition.arms, named, strict=True):
        runs = {one.seed: one for one in measurements if one.arm == arm.name and one.finished}
        own = settings(arm.recipe)
        if definition.equal_parameters:
            # Ranks were chosen, not compared, and alpha with them: what an arm shares with its LoRA is alpha
            # as it was asked for.
            del own["adapter.rank"]
            own["adapter.alpha"] = arm.alpha
        found.append(Candidate(arm, label, own, runs))
    return found


def at_recipe_rate(all_arms: Sequence[Candidate], rate: float) -> list[dict[str, Any]]:
    """Rows for the arms that were trained at the recipe's learning rate."""
    chosen = [one for one in all_arms if one.rate == rate and one.runs]
    return _judged([_row(one, reference_of(one, chosen), _final_loss) for one in chosen])


def at_best_rate(all_arms: Sequence[Candidate]) -> list[dict[str, Any]]:
    """Rows for every arm at the learning rate that gave it the lowest mean validation loss.

    Rates are compared over the seeds that all of the group's finished rates have. Where every run has its
    loss on either half of the validation rows (see `has_halves`), a rate is chosen on the first half and its
    loss on the second one is reported. `edge` says that the best rate is the lowest or the highest one tried,
    so that a better one may lie beyond.
    """
    groups: dict[str, list[Candidate]] = {}
    for one in all_arms:
        groups.setdefault(one.group(), []).append(one)
    chosen_by, reported = (_first_half, _second_half) if has_halves(all_arms) else (_final_loss, _final_loss)
    best, edges, counts = [], {}, {}
    for tried in groups.values():
        whole = max((len(one.runs) for one in tried), default=0)
        usable = [one for one in tried if one.runs and len(one.runs) == whole]
        if not usable:
            continue
        winner = min(usable, key=lambda one: one.mean(chosen_by))
        rates = sorted(one.rate for one in tried)
        edges[winner.arm.name] = len(rates) > 1 and winner.rate in (rates[0], rates[-1])
        counts[winner.arm.name] = len(rates)
        best.append(winner)
    return _judged(
        [
            {
                **_row(one, reference_of(one, best), reported),
                "edge": edges[one.arm.name],
                "rates_tried": counts[one.arm.name],
            }
            for one in best
        ]
    )


def has_halves(all_arms: Sequence[Candidate]) -> bool:
    """Whether the loss on either half of the validation rows is known of every run."""
    return all(run.halves is not None for one in all_arms for run in one.runs.values())


def _final_loss(run: Measurement) -> float:
    return run.final_loss


def _first_half(run: Measurement) -> float:
    return run.halves[0]


def _second_half(run: Measurement) -> float:
    return run.halves[1]


def reference_of(one: Candidate, table: Sequence[Candidate]) -> Candidate:
    """The LoRA arm that is like `one` in all but depth (and learning rate); else the table's first LoRA arm,
    else its first arm."""

    def rest(candidate: Candidate) -> dict[str, Any]:
        return {key: value for key, value in candidate.settings.items() if key not in (*_OF_LINKS, RATE)}

    loras = [candidate for candidate in table if candidate.recipe.adapter.depth == 0]
    alike = [candidate for candidate in loras if rest(candidate) == rest(one)]
    return (alike or loras or list(table))[0]


Read = Callable[[Measurement], float | None]


def _row(one: Candidate, reference: Candidate, loss: Read) -> dict[str, Any]:
    runs, recipe = list(one.runs.values()), one.recipe
    row = {
        "arm": one.arm.name,
        "label": one.label,
        "reference": reference.label,
        "depth": recipe.adapter.depth,
        "rank": recipe.adapter.rank,
        "alpha": recipe.adapter.alpha,
        "learning_rate": one.rate,
        "seeds": sorted(one.runs),
        "trainable_parameters": runs[0].trainable_parameters,
        "validation_loss": _mean(runs, loss),
        "area": _mean(runs, lambda run: run.area),
        "tokens_to_reference": _reached(one, reference),
        "step_seconds": _mean(runs, lambda run: run.step_seconds),
        "tokens_per_second": _mean(runs, lambda run: run.tokens_per_second),
        "peak_memory_bytes": max(
            (run.peak_memory_bytes for run in runs if run.peak_memory_bytes), default=None
        ),
        "accuracy": _mean(runs, lambda run: run.accuracy),
    }
    measures = {
        "validation_loss": loss,
        "area": lambda run: run.area,
        "accuracy": lambda run: run.accuracy,
    }
    row["difference"] = {name: _difference(one, reference, read) for name, read in measures.items()}
    return row


def _mean(runs: Sequence[Measurement], read: Read) -> dict[str, Any] | None:
    found = estimate([value for run in runs if (value := read(run)) is not None])
    return found.as_json() if found else None


def _difference(one: Candidate, reference: Candidate, read: Read) -> dict[str, Any] | None:
    """`one` minus `reference`, paired by seed, with its 95 % t interval and its p, each as if alone."""
    if one is reference:
        return {"verdict": REFERENCE}
    pairs = [
        (read(run), read(reference.runs[seed])) for seed, run in one.runs.items() if seed in reference.runs
    ]
    found = estimate([own - other for own, other in pairs if own is not None and other is not None])
    if found is None:
        return None
    bounds = interval(found)
    return {**found.as_json(), "interval": bounds and list(bounds), "p": p_value(found)}


def _judged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with what may be said of their differences, each measure's as one family: of twenty tables of
    arms without any effect, however many arms they have, one calls some arm's loss lower or higher.

    A difference's `p` becomes Holm's; `smallest_telling` is the one that would have been told from none.
    """
    for measure in rows[0]["difference"] if rows else ():
        found = [row["difference"][measure] or {} for row in rows]
        tested = [one for one in found if one.get("p") is not None]
        for one, p in zip(tested, holm([one["p"] for one in tested]), strict=True):
            one["p"] = p
            one["smallest_telling"] = smallest_telling(one["sd"], one["n"], len(tested))
        for one in found:
            if "p" in one:
                one["verdict"] = _verdict(one)
    return rows


def _verdict(difference: Mapping[str, Any]) -> str:
    if difference["p"] is None:
        return ONE_SEED
    if difference["p"] <= LEVEL:
        return LOWER if difference["mean"] < 0 else HIGHER
    low, high = difference["interval"]
    return WITHIN if low <= 0 <= high else BY_CHANCE


def _reached(one: Candidate, reference: Candidate) -> dict[str, Any] | None:
    """Mean tokens until the validation loss is the reference's final one, over the seeds that get there."""
    found = [
        run.tokens_to_reach(reference.runs[seed].final_loss)
        for seed, run in one.runs.items()
        if seed in reference.runs
    ]
    if not found:
        return None
    reached = [tokens for tokens in found if tokens is not None]
    return {"mean": statistics.fmean(reached) if reached else None, "reached": len(reached), "of": len(found)}
