"""The head of a classifier that PEFT saved whole beside its LoRA (`modules_to_save`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from linchain_cli.chain.head import Head
from linchain_cli.errors import InputError, some
from linchain_cli.importing.foreign import ForeignAdapter
from linchain_cli.model.checkpoint import open_checkpoint
from linchain_cli.model.classifier import Outputs, head_names, names_classifier
from linchain_cli.model.config import empty_model, stored_outputs
from linchain_cli.model.files import read_config
from linchain_cli.model.names import map_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def outputs_of(foreign: ForeignAdapter, directory: Path, labels: Sequence[str] = ()) -> Outputs:
    """What the classifier of a checkpoint on the base in `directory` tells: as many classes as its head has
    outputs, called by `labels`, or as the base calls them, or by their numbers. One output is a regression's.

    Raises:
        InputError: it has no head, `labels` are not as many, or the base tells several at once.
    """
    config = read_config(directory)
    if config.get("problem_type") == "multi_label_classification":
        raise InputError(
            f"{foreign.directory}: its base {directory} predicts several labels at once (config.json:"
            " problem_type), which cannot be learned or measured here. Merge it with PEFT (merge_and_unload)."
        )
    number = _number(foreign, directory)
    if labels and len(labels) != (number if number > 1 else 0):
        told = f"predicts {number} classes" if number > 1 else "predicts one number, a regression's"
        raise InputError(f"{foreign.directory} {told}, and {len(labels)} are named: {', '.join(labels)}")
    if number == 1:
        return Outputs()
    if not labels and names_classifier(config.get("architectures")):
        labels = stored_outputs(directory).classes
    if len(labels) != number:
        labels = [f"LABEL_{place}" for place in range(number)]
    return Outputs(tuple(labels))


def _number(foreign: ForeignAdapter, directory: Path) -> int:
    """How many outputs the saved head has: the size by which heads of two and of three classes differ."""
    small, large = (empty_model(directory, Outputs(tuple("abc"[:count]))) for count in (2, 3))
    sizes = dict(large.named_parameters())
    for name, parameter in small.named_parameters():
        other = sizes[name].shape
        if parameter.shape == other:
            continue
        saved = foreign.saved.get(name)
        if saved is None or saved.dim() != parameter.dim():
            raise InputError(
                f"{foreign.directory} is a classifier's (task_type SEQ_CLS), and the head of"
                f" {type(small).__name__} is not in it: '{name}' is missing. Save it with the modules of the"
                " head in modules_to_save."
            )
        place = next(place for place, size in enumerate(parameter.shape) if size != other[place])
        return saved.shape[place]
    raise InputError(f"{foreign.directory}: {type(small).__name__} has no head whose classes can be counted")


def read_head(foreign: ForeignAdapter, model: PreTrainedModel, outputs: Outputs, directory: Path) -> Head:
    """The saved tensors of the head of `model`, the classifier on the base in `directory`, on the meta
    device.

    Raises:
        InputError: one does not fit; something else than the head was trained whole; or a part of the head is
        neither saved nor the base's, so that nobody has its values.
    """
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    head = head_names(model)
    kind = type(model).__name__
    for name, tensor in foreign.saved.items():
        if name not in shapes or shapes[name] != tensor.shape:
            there = f"is {tuple(shapes[name])}" if name in shapes else "is not there"
            raise InputError(
                f"{foreign.directory} does not fit the base: it holds '{name}' {tuple(tensor.shape)}, which"
                f" {there} in {kind}. Name the right base with --base MODEL."
            )
        if not torch.isfinite(tensor).all():
            raise InputError(
                f"{foreign.directory}: '{name}' holds values that are no finite numbers: its training"
                " diverged, or the file is damaged"
            )
    if others := [name for name in foreign.saved if name not in head]:
        raise InputError(
            f"{foreign.directory}: {some(others)} was trained whole beside the adapter (modules_to_save), and"
            f" is no part of the head of {kind}: no chain can hold that. Merge it with PEFT"
            " (merge_and_unload), and use the result as a model."
        )
    stored = map_names(model, open_checkpoint(directory).shapes)
    lost = [name for name in head if name not in foreign.saved and name in stored.missing]
    if lost:
        raise InputError(
            f"{foreign.directory} lacks {some(lost)} of the head of {kind}, and so does the base: it was"
            " drawn at random when the adapter was trained, and not saved with it. PEFT cannot load it again"
            " either. Train again with that module in modules_to_save."
        )
    return Head({name: foreign.saved[name] for name in head if name in foreign.saved}, outputs.classes)
