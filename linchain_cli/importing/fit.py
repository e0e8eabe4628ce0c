"""Finding a foreign adapter's modules in its base model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from linchain_cli.chain import Adapter, linear_shape, match_modules
from linchain_cli.errors import InputError, did_you_mean
from linchain_cli.importing.foreign import ForeignAdapter, ForeignModule
from linchain_cli.model.names import map_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def fit_to_model(foreign: ForeignAdapter, model: PreTrainedModel) -> dict[str, str]:
    """Finds the modules of a foreign adapter in a model (on the meta device will do): path there -> path
    here.

    Paths of older layouts are translated as transformers translates the keys of old checkpoints.

    Raises:
        InputError: a module is not there, is not linear, or has another shape.
    """
    modules = dict(model.named_modules())
    names = {}
    for path, module in foreign.modules.items():
        names[path] = path if path in modules else _translated(path, module, model)
        shape, wanted = linear_shape(modules.get(names[path])), (module.A.shape[1], module.B.shape[0])
        if shape != wanted:
            found = f"has {shape[0]} → {shape[1]}" if shape else "has no such linear module"
            raise InputError(
                f"{foreign.directory} does not fit the base: it adapts '{path}' ({wanted[0]} → {wanted[1]}),"
                f" {type(model).__name__}"
                f" {found}.{did_you_mean(path, modules)} Name the right base with --base MODEL."
            )
    return names


def _translated(path: str, module: ForeignModule, model: PreTrainedModel) -> str:
    shape = torch.Size((module.B.shape[0], module.A.shape[1]))
    renamed = map_names(model, {f"{path}.weight": shape}).renamed
    return next(iter(renamed), path).removesuffix(".weight")


def short_targets(adapter: Adapter, model: PreTrainedModel, prefix: str) -> Adapter:
    """The adapter with module names as its targets, where they select exactly its modules; else with whole
    paths."""
    names = sorted({path.rpartition(".")[2] for path in adapter.tensors})
    if set(match_modules(model, names, prefix).paths) != set(adapter.tensors):
        return adapter
    return replace(adapter, config=replace(adapter.config, target_modules=names))
