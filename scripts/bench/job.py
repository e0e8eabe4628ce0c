"""The rows, the job and the settings that training is measured with, the same for every arm."""

from __future__ import annotations

import numpy as np
from torch import nn

from linchain_cli.data.batches import step_rows
from linchain_cli.recipe import Recipe
from linchain_cli.run import RunDirectory
from linchain_cli.training.job import Job, prepare
from linchain_cli.training.processes import connect

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
RATE = 3e-4
ALPHA_PER_RANK = 2
BATCH = 16  # rows per optimizer step


class BenchRows:
    """The rows of step after step, encoded once by linchain's own data room and shared by every arm."""

    def __init__(self, job: Job):
        self.data, self.pad_id = job.data.train, job.base.pad_id
        self.by_step = lambda step: step_rows(len(self.data), job.recipe.seed, BATCH, step)

    def examples(self, steps: int) -> list[dict[str, list[int]]]:
        """Rows in training order as the Hugging Face trainers take them."""
        examples = []
        for row in np.concatenate([self.by_step(step) for step in range(steps)]):
            ids, supervised = self.data[int(row)]
            labels = np.where(supervised, ids, -100)
            examples.append(
                {"input_ids": ids.tolist(), "attention_mask": [1] * len(ids), "labels": labels.tolist()}
            )
        return examples

    def tokens(self, step: int) -> int:
        """Unpadded tokens of a step."""
        return int(self.data.lengths[self.by_step(step)].sum())


def make_job(settings: dict, depth: int, compiled: bool = False, attention: str = "auto") -> Job:
    """A linchain job on the benchmark's rows; other arms take model, rows and initial values from it."""
    model = {"path": settings["model"], "dtype": settings["dtype"], "attention": attention}
    data = {"train": settings["data"], "validation": 0, "max_length": settings["max_length"]}
    data["template"] = settings.get("template", "alpaca")
    recipe = Recipe.model_validate(
        {
            "name": "bench",
            "output_dir": settings["scratch"],
            "model": model | {"quantization": settings["quantization"]},
            "adapter": {
                "rank": settings["rank"],
                "depth": depth,
                "alpha": ALPHA_PER_RANK * settings["rank"],
                "target_modules": TARGETS,
            },
            "data": data | {"train_on_inputs": settings["train_on_inputs"]},
            "training": {
                "max_steps": settings["rounds"] * settings["steps"],
                "global_batch_size": BATCH,
                "micro_batch_size": settings["micro"],
                "learning_rate": RATE,
                "lr_scheduler": "constant",
                "warmup_steps": 0,
                "keep": "last",
                "compile": compiled,
            },
        }
    )
    job = prepare(recipe, RunDirectory(recipe.run_path), connect())
    job.state.micro_batch_size = settings["micro"]
    return job


def restore_norms(model: nn.Module) -> None:
    """Takes linchain's norms out again: peers and the limit run transformers' own."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.__dict__.pop("forward", None)
