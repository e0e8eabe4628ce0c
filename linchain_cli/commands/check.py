"""linchain check"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from linchain_cli.commands import check_view
from linchain_cli.commands.options import Json, Overrides, RecipePath
from linchain_cli.console import print_json
from linchain_cli.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from rich.console import Console
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from linchain_cli.data.dataset import PreparedData
    from linchain_cli.model.classifier import Outputs
    from linchain_cli.model.limits import Limits
    from linchain_cli.recipe import Recipe


def run(recipe: RecipePath, overrides: Overrides = None, json: Json = False) -> None:
    """Show what a recipe would train, on what, at what cost."""
    from rich.console import Console

    from linchain_cli.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    shown = Console(soft_wrap=True, highlight=False, markup=False, quiet=json)
    check_view.recipe(shown, loaded.to_yaml())
    found = _check(loaded, shown)
    if json:
        print_json(found)


def _check(recipe: Recipe, console: Console) -> dict[str, Any]:
    """Model, then data, tasks and cost: what is cheap to find wrong comes first. Shows each as soon as it is
    known, and returns all of it, as JSON holds it, but for the example rows. Memory is in bytes."""
    from linchain_cli.data.dataset import prepare_data
    from linchain_cli.machine import limit_threads
    from linchain_cli.model.config import empty_model
    from linchain_cli.model.files import locate
    from linchain_cli.model.limits import limits
    from linchain_cli.model.loading import default_device
    from linchain_cli.model.tokenizer import load_tokenizer
    from linchain_cli.training.base import recipe_outputs
    from linchain_cli.training.chains import chain_config
    from linchain_cli.training.display import counting_rows
    from linchain_cli.training.forecast import forecast
    from linchain_cli.training.launch import wanted_processes
    from linchain_cli.training.marks import untrained_marks
    from linchain_cli.training.rate import far_from_auto, with_rate
    from linchain_cli.training.trackers import check_trackers

    limit_threads()
    check_trackers(recipe)
    there = [note] if (note := _run_there(recipe)) else []
    check_view.notes(console, there)
    directory = locate(recipe.model.path, recipe.model.revision, weights=False)
    tokenizer = load_tokenizer(directory)
    outputs = recipe_outputs(recipe)
    model = empty_model(directory, outputs)
    modules, adapted = _modules(recipe, model, console)
    far = [note] if (note := far_from_auto(recipe, model)) else []
    recipe, auto = with_rate(recipe, model)
    check_view.learning_rate(console, auto)
    check_view.notes(console, far)

    readable, device = limits(model), default_device()
    classes = outputs and outputs.classes
    with counting_rows() as progress:
        data = prepare_data(
            recipe.data, tokenizer, readable, task=recipe.task, classes=classes, progress=progress
        )
    rows, short = _rows(recipe, data, tokenizer, outputs, device, console)
    marks = list(untrained_marks(model, directory, adapted, data.train, tokenizer)) if outputs is None else []
    check_view.notes(console, marks)
    tasks, warnings = _tasks(recipe, data, tokenizer, outputs, readable, console)
    processes = wanted_processes(None)
    cost = forecast(recipe, chain_config(recipe), directory, data.train, data.validation, device, processes)
    check_view.cost(console, cost)
    reports = [report for report in (data.report, data.validation_report) if report is not None]
    told = [note for report in reports for note in (*report.notes, *report.warnings)]
    return {
        "recipe": recipe.model_dump(mode="json"),
        "auto_rate": auto and auto.reason,
        "modules": modules,
        **rows,
        "tasks": tasks,
        "notes": [*there, *far, *told, *short, *marks, *warnings, *cost.notes],
        "forecast": {
            "device": cost.device,
            "memory": {**asdict(cost.memory), "total": cost.memory.total},
            "time": asdict(cost.time) if cost.time else None,
        },
    }


def _run_there(recipe: Recipe) -> str | None:
    """What `train` would say of the run's place, which may hold one that is to be replaced or continued."""
    from linchain_cli.run import RunDirectory

    try:
        RunDirectory(recipe.run_path).check_free()
    except InputError as error:
        return str(error)
    return None


def _modules(recipe: Recipe, model: nn.Module, console: Console) -> tuple[dict[str, Any], Sequence[str]]:
    """What is told of the modules that get a chain, as `train` would choose or refuse them; their paths."""
    from linchain_cli.chain import carriers, coverage, match_modules, parameter_count, refuse_shared
    from linchain_cli.model.classifier import head_names, is_classifier
    from linchain_cli.model.config import text_decoder_prefix
    from linchain_cli.training.base import refuse_unfit
    from linchain_cli.training.chains import refuse_other_modules, start_adapter

    refuse_unfit(model, recipe.training)
    prefix = text_decoder_prefix(model)
    matches = match_modules(model, recipe.adapter.target_modules, prefix)
    refuse_shared(model, matches.paths)
    if start := start_adapter(recipe):
        refuse_other_modules(recipe, dict.fromkeys(start.tensors), dict.fromkeys(matches.paths))
    shape_at = carriers(dict(model.named_modules()))
    shapes = [shape_at[path] for path in matches.paths]
    head = 0
    if is_classifier(model):
        head = sum(model.get_parameter(name).numel() for name in head_names(model))
    parameters = sum(parameter.numel() for parameter in model.parameters()) - head
    covered = coverage(model, matches.paths, prefix)
    check_view.modules(console, matches, shapes, parameters, head, covered, recipe)
    adapter = recipe.adapter
    found = {
        "per_pattern": dict(matches.per_pattern),
        "adapted": len(matches.paths),
        "trainable_parameters": head + parameter_count(shapes, adapter.rank, adapter.depth),
        "frozen_parameters": parameters,
        "coverage": {"share": covered.share, **asdict(covered)},
    }
    return found, matches.paths


def _rows(
    recipe: Recipe,
    data: PreparedData,
    tokenizer: PreTrainedTokenizerBase,
    outputs: Outputs | None,
    device: torch.device,
    console: Console,
) -> tuple[dict[str, Any], list[str]]:
    """The rows, the steps that they make, and what the run is too short for."""
    from linchain_cli.cache import cache_days, cache_root, cache_size
    from linchain_cli.training.forecast import recipe_epoch
    from linchain_cli.training.schedule import total_steps, unreachable

    classes = outputs and outputs.classes
    epoch = recipe_epoch(recipe, data.train, device)
    check_view.sources(console, data)
    cache = {"directory": str(cache_root()), "bytes": cache_size()}
    check_view.cache(console, **cache, days=cache_days())
    labels = check_view.labels(console, data, classes) if outputs else None
    check_view.lengths(console, data, data.config.max_length)
    steps = total_steps(recipe.training, epoch.rows)
    check_view.epoch(console, epoch, steps, recipe, device.type)
    short = list(unreachable(recipe.training, epoch.rows, data.validation is not None))
    check_view.notes(console, short)
    check_view.rows(console, data.train, tokenizer, classes)
    found = {
        "rows": data.report.counts(),
        "validation": data.validation_report.counts() if data.validation_report else None,
        "train_rows": len(data.train),
        "validation_rows": len(data.validation or ()),
        "max_length": data.config.max_length,
        "epoch": asdict(epoch),
        "total_steps": steps,
        "classes": outputs and list(outputs.classes),
        "labels": labels,
        "cache": cache,
    }
    return found, short


def _tasks(
    recipe: Recipe,
    data: PreparedData,
    tokenizer: PreTrainedTokenizerBase,
    outputs: Outputs | None,
    readable: Limits,
    console: Console,
) -> tuple[dict[str, int], list[str]]:
    """How many rows each task has that the run is evaluated on, and what is to be said of them."""
    from linchain_cli.evaluation.asked import harness_tasks, own_tasks, recipe_tasks
    from linchain_cli.evaluation.labels import recipe_labelled
    from linchain_cli.evaluation.questions import check_questions

    warnings: list[str] = []
    if outputs is not None:
        labelled = recipe_labelled(recipe, outputs, tokenizer, readable)
        found = {task.name: (len(task.data.train), task.source) for task in labelled}
    else:
        tasks, section = recipe_tasks(recipe), recipe.evaluation
        own, theirs = own_tasks(tasks), harness_tasks(tasks)
        warnings = check_questions(tokenizer, data.template, own, section.protocol, readable)
        found = {task.name: (len(task.rows), task.source) for task in own}
        found |= {task.name: (sum(task.counts(section.limit)), task.source) for task in theirs}
    check_view.tasks(console, found, recipe)
    check_view.notes(console, warnings)
    return {name: rows for name, (rows, _) in found.items()}, warnings
