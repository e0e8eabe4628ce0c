"""What a comparison evaluates on its tasks: every run's adapter, and the base without one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from linchain_cli.chain.files import adapter_hash
from linchain_cli.data.asking import straddle_mostly
from linchain_cli.data.templates import template_of
from linchain_cli.evaluation.asked import AskedTask, evaluate_asked
from linchain_cli.evaluation.labels import LabelledTask, evaluate_labels
from linchain_cli.recipe import EvaluationConfig, Recipe, load_recipe
from linchain_cli.run import RunDirectory
from linchain_cli.training.base import Base


def evaluate_run(
    asked: Recipe, run: RunDirectory, base: Base, tasks: Sequence[AskedTask | LabelledTask]
) -> None:
    """Evaluates a run, whose adapter is attached to `base`, as the comparison's recipe `asked` says."""
    if base.outputs is None:
        own, straddles = load_recipe(run.recipe_path), straddle_mostly(run.read_status().rows)
        _answers(asked.evaluation, own, base, tasks, str(run.path), run.path.name, run.eval_dir, straddles)
        return
    evaluate_labels(
        base.model,
        base.tokenizer,
        base.outputs,
        tasks,
        name=str(run.path),
        title=run.path.name,
        limit=asked.evaluation.limit,
        base_sha256=base.hash,
        adapter_sha256=adapter_hash(run.adapter_dir),
        out=run.eval_dir,
    )


def evaluate_base(
    asked: Recipe, base: Base, tasks: Sequence[AskedTask], out: Path, straddles: bool | None
) -> None:
    """Evaluates the base alone into the directory `out`, asked as the runs are: with the training rows'
    template, and prompts that end as theirs do (`straddles`)."""
    _answers(asked.evaluation, asked, base, tasks, asked.model.path, "base", out, straddles)


def _answers(
    section: EvaluationConfig,
    recipe: Recipe,
    base: Base,
    tasks: Sequence[AskedTask],
    name: str,
    title: str,
    out: Path,
    straddles: bool | None,
) -> None:
    evaluate_asked(
        base.model,
        base.tokenizer,
        template_of(recipe.data, base.tokenizer),
        tasks,
        name=name,
        title=title,
        system=recipe.data.chat.system,
        protocol=section.protocol,
        limit=section.limit,
        straddles=straddles,
        base_sha256=base.hash,
        quantization=recipe.model.quantization,
        out=out,
    )
