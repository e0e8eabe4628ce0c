"""Tasks of GLUE with a small encoder: chains, the head alone, and full fine-tuning, each at its best of some
rates.

    python scripts/glue_runs.py MODEL --out DIR [--tasks rte,cola] [--seeds 1,2,3]

Every arm is trained at every rate on a part of the training rows, and the rate with the lowest loss on other
training rows is taken (one seed). With that rate it is trained again with every seed, to the last step, and
tells the development set, which had no say in anything. DIR/results.jsonl holds a line per run; called again,
it continues. Chains and the head alone go through linchain's training; full fine-tuning is a plain loop over
the same rows in the same order with the same schedule, and with the dropout that the model brings.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import AutoModelForSequenceClassification

from linchain_cli.chain import detach
from linchain_cli.data.batches import micro_batches, step_rows, steps_per_epoch
from linchain_cli.data.dataset import prepare_data
from linchain_cli.evaluation.labels import evaluate_labels, load_labelled
from linchain_cli.machine import limit_threads
from linchain_cli.model.classifier import Outputs, padding
from linchain_cli.recipe import Recipe
from linchain_cli.training.base import Base, load_base
from linchain_cli.training.labels import LabelObjective
from linchain_cli.training.runner import run_training
from linchain_cli.training.schedule import learning_rate, warmup_steps

CHAIN_RATES = [3e-4, 1e-3, 2e-3, 4e-3, 8e-3]
FULL_RATES = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3]
HEAD_ONLY = {"A": 0.0, "links": 0.0, "B": 0.0}
ARMS: dict[str, dict[str, Any]] = {
    "LoRA": {"adapter.depth": 0},
    "MoSLoRA": {"adapter.depth": 1, "adapter.init": "kaiming"},
    "3 links, kaiming": {"adapter.depth": 3, "adapter.init": "kaiming"},
    "3 links, orthogonal": {"adapter.depth": 3, "adapter.init": "orthogonal"},
    "head alone": {"adapter.depth": 0, "training.lr_multiplier": HEAD_ONLY},
    "full fine-tuning": {},
}
MAIN = {"cola": "matthews", "rte": "accuracy"}


@dataclass(frozen=True)
class Size:
    """How much is trained: rows and epochs when rates are chosen and at the end, and tokens of a row."""

    choose_rows: int
    choose_epochs: float
    rows: int | None
    epochs: float
    max_length: int


SIZES = {"rte": Size(800, 2, None, 3, 64), "cola": Size(2000, 1, None, 2, 64)}


def recipe_of(model: str, out: Path, task: str, size: Size, seed: int, changes: dict[str, Any]) -> Recipe:
    """A recipe of one run; `changes` by dotted key."""
    values: dict[str, Any] = {
        "task": "classification",
        "output_dir": str(out / "runs"),
        "seed": seed,
        "model.path": model,
        "model.dtype": "float32",
        "adapter.rank": 8,
        "adapter.alpha": 32,
        "adapter.target_modules": ["query", "key", "value", "intermediate.dense"],
        "data.max_length": size.max_length,
        "training.global_batch_size": 32,
        "training.micro_batch_size": 32,
        "training.warmup_steps": 0.06,
        "training.keep": "last",
        "training.log_every": 50,
        "training.eval_every": 10**6,
        "training.save_every": 10**6,
        **changes,
    }
    content: dict[str, Any] = {}
    for dotted, value in values.items():
        *sections, key = dotted.split(".")
        place = content
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    return Recipe.model_validate(content)


def phase_changes(task: str, size: Size, choosing: bool) -> dict[str, Any]:
    """The rows and length of either phase."""
    rows = size.choose_rows if choosing else size.rows
    return {
        "data.train": [{"path": f"glue/{task}", **({"max_rows": rows} if rows else {})}],
        "data.validation": "25%" if choosing else 0,
        "training.epochs": size.choose_epochs if choosing else size.epochs,
    }


class Runs:
    """All runs of one task; holds the base from one to the next."""

    def __init__(self, model: str, out: Path, task: str):
        self.model, self.out, self.task, self.size = model, out, task, SIZES[task]
        self._base: Base | None = None
        self.path = out / "results.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.done = {self._key(row): row for row in map(json.loads, lines)}

    @staticmethod
    def _key(row: dict[str, Any]) -> tuple:
        return row["task"], row["phase"], row["arm"], row["rate"], row["seed"]

    def run(self, phase: str, arm: str, rate: float, seed: int) -> dict[str, Any]:
        """One run's line, found or made."""
        row = {"task": self.task, "phase": phase, "arm": arm, "rate": rate, "seed": seed}
        if self._key(row) in self.done:
            return self.done[self._key(row)]
        name = f"{self.task}-{phase}-{arm}-{rate:g}-{seed}".replace(" ", "").replace(",", "-")
        changes = phase_changes(self.task, self.size, phase == "choose") | ARMS[arm]
        changes |= {"name": name, "training.learning_rate": rate}
        recipe = recipe_of(self.model, self.out, self.task, self.size, seed, changes)
        began = time.process_time()
        trained = full if arm == "full fine-tuning" else self._chains
        row |= trained(recipe, self._loaded(recipe), phase == "choose")
        row["cpu_seconds"] = round(time.process_time() - began, 1)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.done[self._key(row)] = row
        shown = row.get("loss") or row["metrics"]
        print(f"{name}: {shown} ({row['cpu_seconds']} s of CPU)", flush=True)
        return row

    def _loaded(self, recipe: Recipe) -> Base:
        self._base = self._base or load_base(recipe, Accelerator())
        return self._base

    def _chains(self, recipe: Recipe, base: Base, choosing: bool) -> dict[str, Any]:
        job = run_training(recipe, fresh=True, base=base, brief=True)
        try:
            trained = sum(parameter.numel() for parameter in job.parameters.values())
            told = {
                "trained": trained,
                "steps": job.total_steps,
                "train_seconds": round(job.state.seconds, 1),
            }
            if choosing:
                return {"loss": job.state.best_loss, **told}
            return {"metrics": metrics(recipe, base, job.model), **told}
        finally:
            detach(base.model)


def metrics(recipe: Recipe, base: Base, model: torch.nn.Module) -> dict[str, float]:
    """What the model is worth on the development set."""
    name = recipe.data.train[0].path
    tasks = load_labelled([name], base.outputs, base.tokenizer, like=recipe.data)
    score = evaluate_labels(model, base.tokenizer, base.outputs, tasks, name="run").summary.tasks[name]
    return {"accuracy": score.accuracy, **{key: metric.value for key, metric in score.metrics.items()}}


def full(recipe: Recipe, base: Base, choosing: bool) -> dict[str, Any]:
    """Full fine-tuning, with transformers' model and torch's AdamW."""
    torch.manual_seed(recipe.seed)
    labels = Outputs(base.outputs.classes)
    model = AutoModelForSequenceClassification.from_pretrained(
        base.directory, attn_implementation="eager", num_labels=labels.number
    )
    rows = prepare_data(recipe.data, base.tokenizer, task=recipe.task, classes=labels.classes)
    training, train = recipe.training, rows.train
    steps = int(training.epochs * steps_per_epoch(len(train), training.global_batch_size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    objective, pad_id = LabelObjective(labels.number, "accuracy"), padding(model, base.tokenizer)
    began = time.perf_counter()
    model.train()
    for step in range(steps):
        chosen = step_rows(len(train), recipe.seed, training.global_batch_size, step)
        for part in micro_batches(chosen, train.lengths, training.micro_batch_size):
            batch = objective.collate(train, part, pad_id)
            objective.add_gradients(model, batch, 1 / len(chosen), torch.device("cpu"))
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
        warmup = warmup_steps(training, steps)
        rate = learning_rate(step, steps, training.learning_rate, warmup, training.lr_scheduler)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    told = {
        "trained": sum(parameter.numel() for parameter in model.parameters()),
        "steps": steps,
        "train_seconds": round(time.perf_counter() - began, 1),
    }
    if not choosing:
        return {"metrics": metrics(recipe, base, model), **told}
    held_out = np.arange(len(rows.validation))
    parts = micro_batches(held_out, rows.validation.lengths, 32)
    read = objective.read(model, rows.validation, parts, pad_id, torch.device("cpu"))
    found = objective.judge(Accelerator(), read, rows.validation, held_out)
    return {"loss": found["loss"], **told}


def table(runs: Runs, rates: dict[str, float], seeds: list[int]) -> list[str]:
    """The arms in lines of Markdown: mean and spread over the seeds that are done."""
    main = MAIN[runs.task]
    lines = [
        f"| {runs.task}: {main} on dev | best rate | mean | per seed | trained | seconds per run |",
        "|---|---|---|---|---|---|",
    ]
    for arm, rate in rates.items():
        found = [runs.done.get((runs.task, "final", arm, rate, seed)) for seed in seeds]
        rows = [row for row in found if row is not None]
        if not rows:
            continue
        values = [100 * row["metrics"][main] for row in rows]
        mean = f"{statistics.fmean(values):.1f}"
        if len(values) > 1:
            mean += f" ± {statistics.stdev(values):.1f}"
        own = ", ".join(f"{value:.1f}" for value in values)
        seconds = statistics.fmean(row["train_seconds"] for row in rows)
        lines.append(f"| {arm} | {rate:g} | {mean} | {own} | {rows[0]['trained']:,} | {seconds:.0f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="checkpoint directory of a BERT")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", default="rte,cola")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--table", action="store_true", help="only show what is done")
    arguments = parser.parse_args()
    limit_threads()
    arguments.out.mkdir(parents=True, exist_ok=True)
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    chosen = {}
    for task in arguments.tasks.split(","):
        runs = Runs(arguments.model, arguments.out, task)
        chosen[task] = runs, {}
        for arm in ARMS:
            rates = FULL_RATES if arm == "full fine-tuning" else CHAIN_RATES
            keys = [(task, "choose", arm, rate, 0) for rate in rates]
            if arguments.table and not all(key in runs.done for key in keys):
                continue
            losses = {rate: runs.run("choose", arm, rate, 0)["loss"] for rate in rates}
            chosen[task][1][arm] = min(losses, key=losses.__getitem__)
    for seed in seeds if not arguments.table else []:
        for runs, rates in chosen.values():
            for arm, rate in rates.items():
                runs.run("final", arm, rate, seed)
    for runs, rates in chosen.values():
        print("\n".join(["", *table(runs, rates, seeds)]))


if __name__ == "__main__":
    main()
