"""Finding a foreign adapter's modules in its base model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from linchain_cli.chain import Adapter, match_modules, misfit
from linchain_cli.errors import InputError
from linchain_cli.importing.foreign import ForeignAdapter, ForeignModule
from linchain_cli.model.checkpoint import FLOAT_TYPES, Checkpoint, StoredTensor
from linchain_cli.model.names import NameMap, map_names

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
        if path not in modules and (experts := _experts_of(path, modules)):
            raise InputError(
                f"{foreign.directory} adapts single experts ('{path}'). In {type(model).__name__} of"
                f" transformers 5 all of them are one parameter ('{experts}'), which is no linear module: an"
                " adapter of it cannot be imported. Merge it with the versions of PEFT and transformers that"
                " it was trained with."
            )
        names[path] = path if path in modules else _translated(path, module, model)
        if why := misfit(modules, names[path], module.A, module.B):
            raise InputError(
                f"{foreign.directory} does not fit the base: {why} Name the right base with --base MODEL."
            )
    return names


def _experts_of(path: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The first module that holds a layer's experts together, where `path` is a part of a single one."""
    if not re.search(r"\.experts\.\d+\.", path):
        return None
    return next((name for name in modules if name.endswith(".experts")), None)


def check_base_weights(foreign: ForeignAdapter, model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Whole weights that were saved beside the adapter must be the base's own: then they add nothing to it.

    PEFT saves embeddings and head with every adapter of one of them, and where a vocabulary was resized.

    Raises:
        InputError: one of them is another than the base's; the message names it.
    """
    names = map_names(model, checkpoint.shapes)
    for path, weight in foreign.base_weights.items():
        stored = _stored(f"{path}.weight", weight, model, names, checkpoint)
        if stored is not None and stored.shape == weight.shape:
            if stored.type in FLOAT_TYPES and torch.equal(stored.tensor().to(weight.dtype), weight):
                continue
            found = "has other values than the base's: it was trained beside the adapter"
        elif stored is not None:
            found = f"is {tuple(weight.shape)} where the base has {tuple(stored.shape)}: it was resized"
        else:
            found = "is no weight of the base"
        raise InputError(
            f"{foreign.directory}: the weight of '{path}', which was saved whole with the adapter, {found}."
            " No chain can hold that. Is it the base that it was trained on (--base MODEL)?"
        )


def _stored(
    name: str, weight: Tensor, model: PreTrainedModel, names: NameMap, checkpoint: Checkpoint
) -> StoredTensor | None:
    """The tensor of the base's file that is the parameter `name`, or one that it is tied to."""
    if name not in names.renamed and name not in names.tied:
        name = next(iter(map_names(model, {name: weight.shape}).renamed), name)
    keys = [names.renamed[other] for other in (name, *names.tied.get(name, ())) if other in names.renamed]
    return checkpoint.tensors[keys[0]] if keys else None


def _translated(path: str, module: ForeignModule, model: PreTrainedModel) -> str:
    shape = torch.Size((module.B.shape[0], module.A.shape[1]))
    renamed = map_names(model, {f"{path}.weight": shape}).renamed
    return next(iter(renamed), path).removesuffix(".weight")


def short_targets(adapter: Adapter, model: PreTrainedModel, prefix: str) -> Adapter:
    """The adapter with module names as its targets, where they select exactly its modules; else with whole
    paths, as for modules outside the text decoder (at `prefix`), where names select nothing."""
    if prefix and not all(path.startswith(f"{prefix}.") for path in adapter.tensors):
        return adapter
    names = sorted({path.rpartition(".")[2] for path in adapter.tensors})
    if set(match_modules(model, names, prefix).paths) != set(adapter.tensors):
        return adapter
    return replace(adapter, config=replace(adapter.config, target_modules=names))
