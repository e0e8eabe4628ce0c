"""linchain check"""

from __future__ import annotations

from typing import TYPE_CHECKING

from linchain_cli.commands.options import Overrides, RecipePath

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from linchain_cli.recipe import Recipe


def run(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Show what a recipe would train, on what, at what cost."""
    from rich.console import Console

    from linchain_cli.commands import check_view
    from linchain_cli.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    console = Console(soft_wrap=True, highlight=False, markup=False)
    check_view.recipe(console, loaded.to_yaml())
    _check(loaded, console)


def _check(recipe: Recipe, console: Console) -> None:
    """Model, then data, tasks and cost: what is cheap to find wrong comes first."""
    from linchain_cli.commands import check_view
    from linchain_cli.data import prepare_data
    from linchain_cli.evaluation.questions import check_questions
    from linchain_cli.evaluation.tasks import recipe_tasks
    from linchain_cli.machine import limit_threads
    from linchain_cli.model.limits import limits
    from linchain_cli.model.loading import default_device, empty_model, load_tokenizer, locate
    from linchain_cli.training.display import counting_rows
    from linchain_cli.training.forecast import forecast, recipe_epoch
    from linchain_cli.training.job import chain_config
    from linchain_cli.training.schedule import total_steps, unreachable

    limit_threads()
    directory = locate(recipe.model.path, recipe.model.revision, weights=False)
    tokenizer = load_tokenizer(directory)
    model = empty_model(directory)
    _modules(recipe, model, console)

    readable = limits(model)
    with counting_rows() as progress:
        data = prepare_data(recipe.data, tokenizer, readable, progress=progress)
    epoch = recipe_epoch(recipe, data.train)
    check_view.sources(console, data)
    check_view.lengths(console, data, data.config.max_length)
    check_view.epoch(console, epoch, total_steps(recipe.training, epoch.rows), recipe)
    check_view.notes(console, unreachable(recipe.training, epoch.rows, data.validation is not None))
    check_view.rows(console, data.train, tokenizer)
    if tasks := recipe_tasks(recipe.evaluation):
        protocol = recipe.evaluation.protocol
        warnings = check_questions(tokenizer, data.template, tasks, protocol, readable)
        check_view.tasks(console, tasks, protocol)
        check_view.notes(console, warnings)

    config, device = chain_config(recipe), default_device()
    check_view.cost(console, forecast(recipe, config, directory, data.train, data.validation, device))


def _modules(recipe: Recipe, model: nn.Module, console: Console) -> None:
    """The modules that get a chain, as `train` would choose or refuse them."""
    from linchain_cli.chain import coverage, linear_shape, match_modules, refuse_shared
    from linchain_cli.commands import check_view
    from linchain_cli.model.loading import text_decoder_prefix
    from linchain_cli.training.base import refuse_unfit

    refuse_unfit(model, recipe.training)
    prefix = text_decoder_prefix(model)
    matches = match_modules(model, recipe.adapter.target_modules, prefix)
    refuse_shared(model, matches.paths)
    shapes = [linear_shape(model.get_submodule(path)) for path in matches.paths]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    covered = coverage(model, matches.paths, prefix)
    check_view.modules(console, matches, shapes, parameters, covered, recipe)
