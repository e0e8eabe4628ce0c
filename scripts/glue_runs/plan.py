"""What is trained, and in which order: arms, sizes, and runs that become possible when a rate is found."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

HEAD_ONLY = {"A": 0.0, "links": 0.0, "B": 0.0}
MAIN = {"cola": "matthews", "rte": "accuracy", "boolq": "accuracy"}
CHOOSING_SEED = 100  # what rates are chosen with is counted from here, what is reported from 1


@dataclass(frozen=True)
class Arm:
    """A way to train: a recipe's values by dotted key, or `full` fine-tuning without a chain.

    `factor`: the size of a chain's factors, which are then all semi-orthogonal times this; None leaves them
    as the recipe begins them.
    """

    rates: tuple[float, ...]
    changes: Mapping[str, Any] = field(default_factory=dict)
    factor: float | None = None
    full: bool = False


CHAIN_RATES = (1e-4, 3e-4, 1e-3, 2e-3, 4e-3)
FEW_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
ALL_ROWS = {
    "LoRA": Arm(CHAIN_RATES, {"adapter.depth": 0}),
    "MoSLoRA": Arm(CHAIN_RATES, {"adapter.depth": 1, "adapter.init": "kaiming"}),
    "3 links, kaiming": Arm(CHAIN_RATES, {"adapter.depth": 3, "adapter.init": "kaiming"}),
    "3 links, orthogonal": Arm(CHAIN_RATES, {"adapter.depth": 3}),
    "head alone": Arm(CHAIN_RATES, {"adapter.depth": 0, "training.lr_multiplier": HEAD_ONLY}),
    "full fine-tuning": Arm((1e-5, 3e-5, 1e-4, 3e-4, 1e-3), full=True),
}
# Deep LoRA's three factors begin at 1e-3. Five of that size have gradients far below AdamW's epsilon; at this
# one they have gradients as large as those of three.
SMALL, SMALL_OF_FIVE = 1e-3, 1e-6 ** (1 / 4)
FEW_ROWS = {
    "depth 0": Arm(FEW_RATES, {"adapter.depth": 0}),
    "depth 1": Arm(FEW_RATES, {"adapter.depth": 1}),
    "depth 3": Arm(FEW_RATES, {"adapter.depth": 3}),
    "depth 0, small": Arm(FEW_RATES, {"adapter.depth": 0}, SMALL),
    "depth 1, small": Arm(FEW_RATES, {"adapter.depth": 1}, SMALL),
    "depth 3, small": Arm(FEW_RATES, {"adapter.depth": 3}, SMALL_OF_FIVE),
}


@dataclass(frozen=True)
class Task:
    """`rows` and `held_out` are counted, the second of the first; the epochs are of runs on all rows; `told`
    are the most rows that are reported."""

    rows: int
    held_out: int
    max_length: int
    choose_epochs: float
    epochs: float
    told: int | None = None


@dataclass(frozen=True)
class Few:
    """Steps and rows per step of a run on few rows."""

    steps: int
    batch: int


BATCH = 32
TASKS = {
    "rte": Task(2127, 500, 128, 4, 10),
    "cola": Task(7250, 1000, 64, 2, 3),
    "boolq": Task(9427, 1000, 64, 2, 3, told=1000),
}
FEW = {16: Few(30, 16), 64: Few(40, 16), 256: Few(60, 16), 1024: Few(96, 32)}
REFERENCE = {"all": "LoRA", "few": "depth 0"}
ARMS = {"all": ALL_ROWS, "few": FEW_ROWS}


@dataclass(frozen=True)
class Cell:
    """What has a best rate of its own. `rows` is 0 for all."""

    study: str
    task: str
    rows: int
    arm: str

    @property
    def settings(self) -> Arm:
        return ARMS[self.study][self.arm]


@dataclass(frozen=True)
class Run:
    """One training; `choosing` tells held-out training rows, else the development set is told."""

    cell: Cell
    choosing: bool
    rate: float
    seed: int

    @property
    def name(self) -> str:
        cell, phase = self.cell, "choose" if self.choosing else "final"
        arm = cell.arm.replace(" ", "").replace(",", "-")
        return f"{cell.study}-{cell.task}-{cell.rows}-{arm}-{phase}-{self.rate:g}-{self.seed}"

    def as_row(self) -> dict[str, Any]:
        """How it is named in results.jsonl."""
        own = {"phase": "choose" if self.choosing else "final", "rate": self.rate, "seed": self.seed}
        return {"name": self.name, **asdict(self.cell), **own}


@dataclass(frozen=True)
class Plan:
    """Which runs there are. `length` is a factor on all numbers of steps; `seeds` and `choosing` are how many
    of a study's runs are reported and how many each rate is judged by; `batch` are the most rows of a step
    and `held_out` the most that a rate is judged on. With a `rate` none is chosen: every arm has this one."""

    studies: Sequence[str]
    tasks: Sequence[str]
    few_rows: Sequence[int]
    seeds: Mapping[str, int]
    choosing: Mapping[str, int]
    arms: Sequence[str] = ()
    length: float = 1.0
    batch: int = BATCH
    held_out: int | None = None
    rate: float | None = None

    def cells(self) -> Iterator[Cell]:
        for study in self.studies:
            for rows in self.few_rows if study == "few" else [0]:
                for task in self.tasks:
                    for arm in ARMS[study]:
                        if not self.arms or arm in self.arms:
                            yield Cell(study, task, rows, arm)

    def choosing_runs(self, cell: Cell) -> list[Run]:
        if self.rate is not None:
            return []
        seeds = range(CHOOSING_SEED + 1, CHOOSING_SEED + 1 + self.choosing[cell.study])
        return [Run(cell, True, rate, seed) for rate in cell.settings.rates for seed in seeds]

    def final_runs(self, cell: Cell, rate: float) -> list[Run]:
        return [Run(cell, False, rate, seed) for seed in range(1, 1 + self.seeds[cell.study])]

    def batch_of(self, run: Run) -> int:
        """Rows of a step."""
        return min(self.batch, FEW[run.cell.rows].batch) if run.cell.rows else self.batch

    def held_out_of(self, task: str) -> int:
        """Training rows that are kept to judge rates on, of the task as it is distributed."""
        return TASKS[task].held_out if self.held_out is None else min(self.held_out, TASKS[task].held_out)

    def steps(self, run: Run) -> int:
        """Optimizer steps of a run, of the task as it is distributed."""
        if run.cell.rows:
            return max(1, round(self.length * FEW[run.cell.rows].steps))
        task = TASKS[run.cell.task]
        rows = task.rows - self.held_out_of(run.cell.task) if run.choosing else task.rows
        epochs = task.choose_epochs if run.choosing else task.epochs
        return max(1, round(self.length * epochs * math.ceil(rows / self.batch_of(run))))

    def best_rate(self, cell: Cell, done: Mapping[str, Mapping[str, Any]]) -> float | None:
        """The rate that tells held-out rows best by the task's metric, of equal ones that with the lower
        loss; None while runs are missing, or if none ended well."""
        if self.rate is not None:
            return self.rate
        runs = self.choosing_runs(cell)
        if not all(run.name in done for run in runs):
            return None
        found = {}
        for rate in cell.settings.rates:
            rows = [done[run.name] for run in runs if run.rate == rate]
            if not any("failed" in row for row in rows):
                found[rate] = tuple(
                    sum(sign * row["scores"][key] for row in rows)
                    for sign, key in ((1, MAIN[cell.task]), (-1, "loss"))
                )
        return max(found, key=found.__getitem__) if found else None

    def possible(self, done: Mapping[str, Mapping[str, Any]]) -> list[Run]:
        """The runs that can begin now, in their order: study by study and size by size, rates before what is
        reported, which goes seed by seed, so that an early end leaves a smaller table; else the longest
        first."""
        runs = []
        for cell in self.cells():
            runs += self.choosing_runs(cell)
            if (rate := self.best_rate(cell, done)) is not None:
                runs += self.final_runs(cell, rate)

        def order(run: Run) -> tuple:
            size = self.few_rows.index(run.cell.rows) if run.cell.rows else 0
            stage = 0 if run.choosing else run.seed
            return self.studies.index(run.cell.study), size, stage, -self.steps(run), run.name

        return sorted((run for run in runs if run.name not in done), key=order)

    def describe(self) -> list[str]:
        """How many runs and steps each study takes."""
        lines = []
        for study in self.studies:
            cells = [cell for cell in self.cells() if cell.study == study]
            choosing = [run for cell in cells for run in self.choosing_runs(cell)]
            final = [run for cell in cells for run in self.final_runs(cell, cell.settings.rates[0])]
            counted = [f"{len(runs)} ({sum(map(self.steps, runs)):,} steps)" for runs in (choosing, final)]
            lines.append(f"{study}: {counted[0]} runs choose rates, {counted[1]} are reported")
        return lines
