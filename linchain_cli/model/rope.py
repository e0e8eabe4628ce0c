"""Rotary embeddings whose frequencies follow the longest row of a batch.

Two of transformers' kinds do: longrope (Phi-3's long models) takes another set beyond the length it was
first trained at, dynamic NTK scaling another one for every length beyond it. What a row computes then depends
on the rows beside it, unless they are of one class: those that would choose the same frequencies alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from linchain_cli.model.fast import record


class _Rope(NamedTuple):
    """A module's frequencies. `prefix` begins its attributes' names: a kind of layer, or nothing."""

    module: nn.Module
    prefix: str
    dynamic: bool
    limit: int  # up to this length nothing changes


def length_classes(model: nn.Module, lengths: Tensor) -> Tensor:
    """(rows,) lengths → (rows,) classes: rows of one may be read side by side. Most models have only 0."""
    classes = torch.zeros_like(lengths)
    for rope in _varying(model):
        beyond = lengths > rope.limit
        classes = torch.maximum(classes, lengths * beyond if rope.dynamic else beyond.to(lengths.dtype))
    return classes


def forget_lengths(model: nn.Module) -> None:
    """Takes dynamic frequencies back to those of short rows. They would stay with the longest row so far."""
    for module, prefix, dynamic, limit in _varying(model):
        if dynamic:
            frequencies = getattr(module, f"{prefix}original_inv_freq")
            now = getattr(module, f"{prefix}inv_freq")
            setattr(module, f"{prefix}inv_freq", frequencies.to(now.device))
            setattr(module, f"{prefix}max_seq_len_cached", limit)


def _varying(model: nn.Module) -> list[_Rope]:
    known = record(model)
    if "ropes" not in known:
        known["ropes"] = [
            rope for module in model.modules() if hasattr(module, "rope_type") for rope in _ropes_of(module)
        ]
    return known["ropes"]


def _ropes_of(module: Any) -> list[_Rope]:
    of_layers = isinstance(module.rope_type, dict)
    found = []
    for layer, kind in (module.rope_type if of_layers else {"": module.rope_type}).items():
        parameters = module.config.rope_parameters[layer] if of_layers else module.config.rope_parameters
        prefix = f"{layer}_" if of_layers else ""
        if kind == "longrope":
            found.append(_Rope(module, prefix, False, parameters["original_max_position_embeddings"]))
        elif kind and "dynamic" in kind:
            found.append(_Rope(module, prefix, True, module.original_max_seq_len))
    return found
