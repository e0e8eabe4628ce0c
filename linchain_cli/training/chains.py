"""What a recipe trains, put into a base: chains on its layers, and a classifier's head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from linchain_cli.chain import Adapter, Chain, ChainConfig, initial_gain, inject, load_adapter, load_tensors
from linchain_cli.chain.head import initialise_head, load_head, make_trainable
from linchain_cli.errors import InputError
from linchain_cli.model.classifier import drawn_names, head_names, initial_deviation
from linchain_cli.model.config import text_decoder_prefix
from linchain_cli.model.fast import record
from linchain_cli.recipe import Recipe
from linchain_cli.run import RunDirectory, find_adapter
from linchain_cli.storage import expand
from linchain_cli.training import state as states
from linchain_cli.training.base import Base


def chain_config(recipe: Recipe) -> ChainConfig:
    """The adapter section as the chain package takes it, whose alpha is the one that is computed with."""
    adapter = recipe.adapter
    lost = initial_gain(adapter.init, adapter.depth) if adapter.scale == "match" else 1.0
    return ChainConfig(
        rank=adapter.rank,
        depth=adapter.depth,
        alpha=adapter.alpha / lost,
        dropout=adapter.dropout,
        init=adapter.init,
        target_modules=adapter.target_modules,
    )


def start_adapter(recipe: Recipe) -> Adapter | None:
    """What `adapter.init_from` names: an adapter's directory, or a run, with the adapter that RUN means.

    Raises:
        InputError: there is none, or it has another shape than the recipe's chains.
    """
    source = recipe.adapter.init_from
    if source is None:
        return None
    path = expand(source)
    try:
        adapter = load_adapter(find_adapter(path).adapter_dir if RunDirectory(path).exists() else path)
    except InputError as error:
        theirs = (path / "adapter_config.json").is_file() or not path.exists() and "/" in source
        hint = f". If it is PEFT's, `linchain import {source} --out NEW` makes one of it" if theirs else ""
        raise InputError(f"adapter.init_from: {error}{hint}") from None
    theirs, ours = ((c.rank, c.depth, c.alpha) for c in (adapter.config, chain_config(recipe)))
    if theirs != ours:
        found, wanted = ("rank {}, depth {} and alpha {:g}".format(*values) for values in (theirs, ours))
        raise InputError(f"adapter.init_from: {source} has {found}; the recipe asks for {wanted}")
    return adapter


def refuse_other_modules(recipe: Recipe, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises InputError where what init_from adapts, told of each module, is not what the recipe does."""
    different = sorted(path for path in found.keys() | wanted.keys() if found.get(path) != wanted.get(path))
    if different:
        raise InputError(
            f"adapter.init_from: {recipe.adapter.init_from} adapts other modules than the recipe does "
            f"(e.g. {different[0]})"
        )


def put_in_chains(model: nn.Module, recipe: Recipe) -> dict[str, Chain]:
    """Injects the recipe's chains, with the values of `adapter.init_from` if it names an adapter."""
    adapter = start_adapter(recipe)
    layers = inject(model, chain_config(recipe), recipe.seed, text_decoder_prefix(model))
    if adapter is None:
        return layers
    shapes = {path: [tensor.shape for tensor in chain] for path, chain in adapter.tensors.items()}
    wanted = {path: [layer.A.shape, layer.links.shape, layer.B.shape] for path, layer in layers.items()}
    refuse_other_modules(recipe, shapes, wanted)
    for path, layer in layers.items():
        load_tensors(layer, adapter.tensors[path])
    if adapter.head:
        load_head(model, adapter.head)
    return layers


def put_on_head(base: Base, recipe: Recipe) -> dict[str, nn.Parameter]:
    """A classifier's head as trained parameters; what the checkpoint has no values for begins by the recipe's
    seed. Comes before the chains, which may bring a head."""
    model = base.model
    # In float32 before any value is drawn, which a base of 16 bits would round, though in its first run only.
    head, drawn = make_trainable(model, head_names(model)), drawn_names(model)
    stored = {name: parameter for name, parameter in head.items() if name not in drawn}
    # The base may have served another run before, which trained these.
    before = record(model).setdefault("head", states.snapshot(stored))
    states.restore(stored, before)
    initialise_head(model, drawn, recipe.seed, initial_deviation(model))
    return head
